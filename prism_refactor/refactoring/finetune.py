"""Router-only fine-tuning (MoE-Prism, linear gate): everything is frozen but router rows, and k rises while training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from prism_refactor.models.modeling_prism import full_k, moe_gates, set_active
from prism_refactor.signals import uninterrupted

LOSSES = ("cross-entropy", "distill")
# Told (step, loss, k) after every step and (step, None, perplexity) after every evaluation.
OnStep = Callable[[int, float | None, float], None]


@dataclass(frozen=True)
class Curriculum:
    """How to train.

    Attributes:
        steps: optimiser steps.
        first_k, last_k: active sub-experts at the first and the last step; linear between.
        learning_rate: of AdamW; the paper's 1e-5 suits 200,000 sequences.
        loss: 'cross-entropy', or 'distill': KL divergence to the model at full k.
        batch_size: sequences per step.
        evaluate_every: steps between two measurements of the held-out perplexity.
        seed: of the order of the sequences.
    """

    steps: int
    first_k: int
    last_k: int
    learning_rate: float
    loss: str
    batch_size: int
    evaluate_every: int
    seed: int

    def k_at(self, step: int) -> int:
        """Active sub-experts at a step counted from 0."""
        return round(self.first_k + (self.last_k - self.first_k) * step / max(1, self.steps - 1))


class Training:
    """The fine-tuning of one model's routers, one step at a time; its state is plain tensors, so that it can be stored and resumed.

    Args:
        model: refactored; with two-level routing attached its linear sub-routers train, otherwise its stock gates.
        rows: int64 [S, T] token ids to train on.
        held_out: int64 [S', T] token ids that choose the best state.
        curriculum: how to train.

    Attributes:
        step: steps done.
        evaluated: the step at which the held-out perplexity was measured last.
        best: (step, held-out perplexity) of the best state so far; step 0 is the model as it came.
    """

    def __init__(self, model: Any, rows: torch.Tensor, held_out: torch.Tensor, curriculum: Curriculum):
        self.model, self.rows, self.held_out, self.curriculum = model, rows, held_out, curriculum
        model.requires_grad_(False)
        self.parameters = _make_trainable(model)
        self.original = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=curriculum.learning_rate, weight_decay=0.0)
        self.step = self.evaluated = 0
        self.best = (0, self.perplexity())
        self.best_values = dict(self.original)

    def run(self, on_step: OnStep | None = None) -> None:
        """Train to the end from where the state is."""
        steps, every = self.curriculum.steps, self.curriculum.evaluate_every
        while self.evaluated < steps:
            if self.step > self.evaluated and (self.step % every == 0 or self.step == steps):
                perplexity = self._evaluate()
                if on_step:
                    on_step(self.step, None, perplexity)
            else:
                k = self.curriculum.k_at(self.step)
                loss = self._train_on(self._batch(), k)
                if on_step:
                    on_step(self.step, loss, k)

    def _evaluate(self) -> float:
        """Measure, and keep the values when they are the best so far."""
        perplexity = self.perplexity()
        with uninterrupted():
            if perplexity < self.best[1]:
                self.best = (self.step, perplexity)
                self.best_values = {name: value.detach().clone() for name, value in self.parameters.items()}
            self.evaluated = self.step
        return perplexity

    def _batch(self) -> torch.Tensor:
        """The sequences of the current step: a shuffled pass over all rows after the other, whatever step training resumes at."""
        size = min(self.curriculum.batch_size, len(self.rows))
        per_pass = len(self.rows) // size
        order = np.random.default_rng([self.curriculum.seed, self.step // per_pass]).permutation(len(self.rows))
        start = self.step % per_pass * size
        return self.rows[np.sort(order[start : start + size])]

    def _train_on(self, batch: torch.Tensor, k: int) -> float:
        batch = batch.to(self.model.device)
        teacher = self._teacher(batch) if self.curriculum.loss == "distill" else None
        set_active(self.model, k)
        self.model.train()
        logits = self.model(input_ids=batch, use_cache=False).logits.float()
        if teacher is None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        else:
            loss = F.kl_div(logits.log_softmax(-1).flatten(0, 1), teacher.flatten(0, 1), log_target=True, reduction="batchmean")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        with uninterrupted():
            self.optimizer.step()
            self.step += 1
        return loss.item()

    @torch.no_grad()
    def _teacher(self, batch: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the untrained model at full k, which is the original."""
        set_active(self.model, full_k(self.model.config))
        # Whoever stores the state must find the parameters' own values.
        with uninterrupted(), self._values(self.original):
            return self.model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)

    @torch.no_grad()
    def perplexity(self) -> float:
        """Held-out perplexity, the geometric mean over the first, middle and last k of the curriculum."""
        curriculum = self.curriculum
        choices = sorted({curriculum.first_k, (curriculum.first_k + curriculum.last_k) // 2, curriculum.last_k})
        self.model.eval()
        total = 0.0
        for k in choices:
            set_active(self.model, k)
            for row in self.held_out:
                tokens = row[None].to(self.model.device)
                logits = self.model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
                total += F.cross_entropy(logits, tokens[0, 1:]).item()
        return float(np.exp(total / len(choices) / len(self.held_out)))

    @contextmanager
    def _values(self, values: dict[str, torch.Tensor]) -> Iterator[None]:
        """Let the parameters have other values for a while."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = values[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that `restore` needs, as tensors."""
        found = {
            "step": torch.tensor([self.step]),
            "evaluated": torch.tensor([self.evaluated]),
            "best": torch.tensor(self.best, dtype=torch.float64),
        }
        for name, parameter in self.parameters.items():
            found |= {f"value.{name}": parameter.detach().cpu(), f"best.{name}": self.best_values[name].cpu()}
            found |= {f"optimizer.{name}.{key}": value.detach().cpu() for key, value in self.optimizer.state[parameter].items()}
        return {name: value.clone().contiguous() for name, value in found.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a `state` of a training with the same curriculum, text and model."""
        self.step, self.evaluated = int(state["step"]), int(state["evaluated"])
        best_step, perplexity = state["best"].tolist()
        self.best = (int(best_step), perplexity)
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"value.{name}"])
            self.best_values[name] = state[f"best.{name}"].to(parameter.device)
            prefix = f"optimizer.{name}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if own:
                self.optimizer.state[parameter] = {key: value.to(parameter.device) if value.dim() else value for key, value in own.items()}


def _make_trainable(model: Any) -> dict[str, nn.Parameter]:
    """Turn the router rows into parameters in float32: {'<MoE layer>.<tensor>': parameter}."""
    trainable = {}
    for layer, gate in enumerate(moe_gates(model)):
        owner, names = (gate.two_level, ("weight", "bias")) if hasattr(gate, "two_level") else (gate, ("weight",))
        for name in names:
            value = getattr(owner, name).detach().clone()
            delattr(owner, name)
            parameter = nn.Parameter(value.float() if hasattr(gate, "two_level") else value)
            owner.register_parameter(name, parameter)
            trainable[f"{layer}.{name}"] = parameter
    return trainable


def recorded(curriculum: Curriculum, training: Training, router: str) -> dict[str, Any]:
    """What the manifest says about a finished training."""
    step, perplexity = training.best
    return asdict(curriculum) | {"router": router, "best_step": step, "held_out_perplexity": perplexity}
