"""Fine-tuning of a refactored checkpoint's router alone: it is distilled from the model at full k."""

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from prism_refactor.calibration.settings import Calibration
from prism_refactor.distillation import Distillation
from prism_refactor.errors import InputError
from prism_refactor.events import Events
from prism_refactor.files import STATE, output_file, output_folder, write_json
from prism_refactor.formats import CARD, EVALUATION, MANIFEST, PAGE, FineTuned
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.layered import LayeredModel
from prism_refactor.models.modeling_prism import ROUTER_FILE, attach, auto_class, full_k, moe_blocks, moe_gates, router_of, set_active
from prism_refactor.models.refactored import RefactoredCheckpoint
from prism_refactor.models.transformers_models import adopt_experts, run_experts_with
from prism_refactor.progress import versions
from prism_refactor.refactoring.card import model_card
from prism_refactor.routing.budget import thresholds
from prism_refactor.signals import exit_code, uninterrupted
from prism_refactor.tensors import save_tensors

# Written anew, or not true of the trained router.
NOT_COPIED = (CARD, MANIFEST, EVALUATION, PAGE)
# The last part of the text chooses the best state: one sequence in so many, at most so many.
HELD_OUT_ONE_IN, MOST_HELD_OUT = 16, 8
# What of a two-level router is trained: all that stands in for what is dropped. Training what ranks sub-experts gains nothing.
STAND_INS = ("compensation", "map_in", "map_out", "scale")
# Thresholds of budgets are taken anew at these shares, from so many sequences beside the held-out ones.
THRESHOLD_SHARES, THRESHOLD_ROWS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0), 8
# Of Adam. The second for hundreds of steps, not for thousands.
BETAS = (0.9, 0.95)
_STATE_FILE, _STATE_RECORD = "training.safetensors", "training.json"


class Training:
    """The fine-tuning of one model's routers, one step at a time; its state is plain tensors, so that it can be stored and resumed.

    Args:
        model: refactored; with two-level routing attached what stands in for dropped sub-experts trains, otherwise the stock gates' rows.
        rows: int64 [S, T] token ids to train on.
        held_out: int64 [S', T] token ids that choose the best state.
        settings: how to train.

    Attributes:
        step: steps done.
        evaluated: the step at which the held-out perplexity was measured last.
        best: (step, held-out perplexity) of the best state so far; step 0 is the model as it came.
    """

    def __init__(self, model: Any, rows: torch.Tensor, held_out: torch.Tensor, settings: Distillation):
        self.model, self.rows, self.held_out, self.settings = model, rows, held_out, settings
        model.requires_grad_(False)
        self.parameters = _make_trainable(model)
        self.original = {name: value.detach().clone() for name, value in self.parameters.items()}
        # A group each: their rates differ.
        groups = [{"params": [parameter]} for parameter in self.parameters.values()]
        self.optimizer = torch.optim.Adam(groups, betas=BETAS)
        self.sizes = [value.square().mean().sqrt().item() for value in self.original.values()]
        self.step = self.evaluated = 0
        self.best = (0, self.perplexity())
        self.best_values = dict(self.original)

    def run(self, save: Callable[[], None], events: Events) -> None:
        """Train to the end from where the state is; `save` is called after every measurement of the held-out perplexity."""
        steps, every = self.settings.steps, self.settings.evaluate_every
        while self.evaluated < steps:
            if self.step > self.evaluated and (self.step % every == 0 or self.step == steps):
                perplexity = self._evaluate()
                save()
                text = f"step {self.step} of {steps}: held-out perplexity {perplexity:.4f}"
                events.line(text, event="evaluated", step=self.step, steps=steps, perplexity=perplexity)
            else:
                self._train_on(self._batch(), self.settings.k_at(self.step))
                events.progress("steps trained", self.step, steps)

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
        size = min(self.settings.batch_size, len(self.rows))
        per_pass = len(self.rows) // size
        order = np.random.default_rng([self.settings.seed, self.step // per_pass]).permutation(len(self.rows))
        start = self.step % per_pass * size
        return self.rows[np.sort(order[start : start + size])]

    def _train_on(self, batch: torch.Tensor, k: int) -> float:
        batch = batch.to(self.model.device)
        teacher = self._teacher(batch)
        set_active(self.model, k)
        self.model.train()
        for gate in moe_gates(self.model):
            # Some draw their choice at random in training (PhiMoE).
            gate.eval()
        logits = self.model(input_ids=batch, use_cache=False).logits.float()
        loss = F.kl_div(logits.log_softmax(-1).flatten(0, 1), teacher.flatten(0, 1), log_target=True, reduction="batchmean")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group, size in zip(self.optimizer.param_groups, self.sizes, strict=True):
            group["lr"] = self.settings.rate_at(self.step) * size
        with uninterrupted():
            self.optimizer.step()
            self.step += 1
        return loss.item()

    @torch.no_grad()
    def _teacher(self, batch: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the untrained model at full k, which is the original."""
        set_active(self.model, full_k(self.model.config))
        self.model.eval()
        # Whoever stores the state must find the parameters' own values.
        with uninterrupted(), self._values(self.original):
            return self.model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)

    @torch.no_grad()
    def perplexity(self) -> float:
        """Held-out perplexity, the geometric mean over the least k, the most, and one between."""
        least, most = self.settings.least_k, self.settings.most_k
        choices = sorted({least, round((least * most) ** 0.5), most})
        self.model.eval()
        total = 0.0
        for k in choices:
            set_active(self.model, k)
            for row in self.held_out:
                tokens = row[None].to(self.model.device)
                logits = self.model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
                total += F.cross_entropy(logits, tokens[0, 1:]).item()
        return float(np.exp(total / len(choices) / len(self.held_out)))

    @torch.no_grad()
    def thresholds(self) -> list[torch.Tensor]:
        """Thresholds of budgets (see `budget.thresholds`) of each layer's two-level router with the best values.

        They are taken from what the model computes within these budgets: there a trained model's needs are not those at full k.
        """
        blocks, found = moe_blocks(self.model), []
        self.model.eval()
        with self._values(self.best_values):
            for share in THRESHOLD_SHARES:
                set_active(self.model, budget=share)
                found.append([thresholds(needs).numpy() for needs in self._needs(blocks)])
        width = full_k(self.model.config)
        budgets = np.arange(1, width + 1) / width
        tables = np.array(found).transpose(1, 2, 0)
        own = [[np.interp(budget, THRESHOLD_SHARES, values) for budget, values in zip(budgets, table, strict=True)] for table in tables]
        # Budgets of which one is larger never run less.
        return [torch.from_numpy(np.minimum.accumulate(table)).float() for table in own]

    def _needs(self, blocks: list[Any]) -> list[torch.Tensor]:
        """What the tokens of some rows need of their sub-experts in each layer, [tokens, K * N]; see `TwoLevelRouter.need`."""
        needs: list[list[torch.Tensor]] = [[] for _ in blocks]

        def note(layer: int, router: Any, arguments: tuple[Any, ...]) -> None:
            needs[layer].append(router.need(router.rank(*arguments[:3])).cpu())

        hooks = [block.experts.two_level.register_forward_pre_hook(functools.partial(note, layer)) for layer, block in enumerate(blocks)]
        try:
            for row in [*self.held_out, *self.rows[:THRESHOLD_ROWS]]:
                self.model(input_ids=row[None].to(self.model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return [torch.cat(each) for each in needs]

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
        """Go on from a `state` of a training with the same settings, text and model."""
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
    """Turn what is trained into parameters: {'<MoE layer>.<tensor>': parameter}. Raises InputError where there is nothing."""
    trainable = {}
    for layer, block in enumerate(moe_blocks(model)):
        two_level = getattr(block.experts, "two_level", None)
        if two_level is None:
            router: Any = router_of(block)
            # Its matrix, which may be in a part of it.
            owner, names = router, [next(name for name, value in router.named_parameters() if value.ndim == 2)]
        else:
            owner, names = two_level, [name for name in STAND_INS if hasattr(two_level, name)]
            if not names:
                raise InputError("the two-level router has nothing that stands in for dropped sub-experts; refactor again")
        for name in names:
            part, _, leaf = name.rpartition(".")
            held: Any = owner.get_submodule(part)
            value = getattr(held, leaf).detach().clone()
            delattr(held, leaf)
            parameter = nn.Parameter(value)
            held.register_parameter(leaf, parameter)
            trainable[f"{layer}.{name}"] = parameter
    return trainable


class FineTuning:
    """One run of `prism-finetune`: tensors of a refactored checkpoint's router are trained, and written in the place of the old ones.

    Args:
        source: the refactored checkpoint. The whole model is in memory.
        router: 'two-level' trains what stands in for dropped sub-experts, 'stock' the rows of the stock gates.
        settings: how to train.
        calibration: which text, and how the model runs.
        events: told of progress.

    Raises:
        InputError: there is too little text, or nothing to train.

    Attributes:
        training: its state.
    """

    def __init__(
        self, source: RefactoredCheckpoint, router: str, settings: Distillation, calibration: Calibration, events: Events | None = None
    ):
        self.source, self.router, self.settings, self.events = source, router, settings, events or Events()
        rows = calibration.rows(source)
        if len(rows) < 2:
            raise InputError("`datasets`: too little text; needs at least two samples")
        held_out = min(max(1, len(rows) // HELD_OUT_ONE_IN), MOST_HELD_OUT)
        self.identity = {
            "source": source.fingerprint(),
            "router": router,
            "distillation": asdict(settings),
            "text": calibration.recorded(rows),
            "versions": versions(),
        }
        self.training = Training(self._model(calibration), rows[:-held_out], rows[-held_out:], settings)

    def _model(self, calibration: Calibration) -> Any:
        path, dtype = self.source.path, calibration.resolved_dtype(self.source)
        model: Any = auto_class(self.source.config).from_pretrained(path, dtype=dtype, trust_remote_code=False)
        adopt_experts(model.to(calibration.resolved_device()))
        run_experts_with(model, EXPERTS)
        if self.router == "two-level":
            attach(model, path)
        model.activation_checkpointing_enable()
        return model

    def run(self, target: Path, resume: bool = False) -> None:
        """Train and write the folder `target`, which appears only when it is complete.

        An interrupted run keeps its state in TARGET.partial.

        Args:
            target: output folder.
            resume: go on with what an interrupted run of the same checkpoint, options and text left, if it left something.
        """
        with output_folder(target, self.identity, resume) as folder:
            state = folder / STATE
            if (state / _STATE_RECORD).exists():
                self.training.restore(load_file(state / _STATE_FILE))
            step, perplexity = self.training.step, self.training.best[1]
            self.events.line(f"held-out perplexity {perplexity:.4f} before", event="start", perplexity=perplexity, step=step)
            try:
                self.training.run(lambda: self._save(state), self.events)
            except BaseException as error:
                if exit_code(error) is not None:
                    self._save(state)
                raise
            self._write(folder)

    def _save(self, state: Path) -> None:
        """Replace the state; whatever interrupts this, the old or the new one is there."""
        state.mkdir(exist_ok=True)
        with output_file(state / _STATE_FILE) as partial:
            save_tensors(self.training.state(), partial)
        if not (state / _STATE_RECORD).exists():
            write_json(state / _STATE_RECORD, {})

    def _write(self, folder: Path) -> None:
        """Write the source's files with the trained tensors in the place of the old ones; measurements of the old router are left out."""
        changed, source = self._trained_tensors(), self.source
        shards = {ROUTER_FILE} if self.router == "two-level" else {source.weight_map[name] for name in changed}
        step, perplexity = self.training.best
        tuned = FineTuned(**asdict(self.settings), router=self.router, best_step=step, held_out_perplexity=perplexity)
        manifest = replace(source.manifest, finetuning=tuned)
        for relative in sorted(path.relative_to(source.path) for path in source.path.rglob("*") if path.is_file()):
            if str(relative) in NOT_COPIED or relative.parts[0].startswith("."):
                continue
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            if str(relative) in shards:
                tensors = load_file(source.path / relative)
                own = {name: value for name, value in changed.items() if name in tensors or relative == Path(ROUTER_FILE)}
                save_tensors(tensors | {name: value.to(tensors.get(name, value).dtype) for name, value in own.items()}, folder / relative)
            else:
                shutil.copyfile(source.path / relative, folder / relative)
        manifest.write(folder)
        (folder / CARD).write_text(model_card(manifest, self.source.config))

    def _trained_tensors(self) -> dict[str, torch.Tensor]:
        """Return the best values by their names on disk."""
        model = self.training.model
        names, gates = {id(module): name for name, module in model.named_modules()}, moe_gates(model)
        found = {}
        for key, value in self.training.best_values.items():
            layer, _, leaf = key.partition(".")
            found[f"{names[id(gates[int(layer)])]}.{leaf}"] = value.cpu()
        if self.router == "stock":
            return LayeredModel(self.source, None).names_on_disk(model, found)
        if self.training.best[0] == 0 or not model.prism_active.has_thresholds:
            # Nothing was better than what was there, whose thresholds are true; or there are none.
            return found
        self.events.line("taking the thresholds of budgets", event="thresholds")
        limits = zip(gates, self.training.thresholds(), strict=True)
        return found | {f"{names[id(gate)]}.threshold": each for gate, each in limits}
