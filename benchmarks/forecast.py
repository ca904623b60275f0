"""How much of the distance to Belady's hit rate a better forecast of the routing could win.

    python benchmarks/forecast.py REFACTORED_DIR [--share 25]

REFACTORED_DIR is examples/olmoe-tiny refactored (`make demo` writes demo-output). Its routing of held-out texts, 256 tokens each, is
replayed a token a pass under policies that know more than they can: what every sub-expert's next turn is like, for sure or by a linear
model that was fitted to the routing of calibration texts. Each is `activation` otherwise: the expected number of layers until the next use
is (layers until its turn) + (1 - probability of a use then) x layers / (`activation`'s own probability).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import TEXT, markdown, print_provenance
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging

from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.loading import load
from prism_refactor.models.modeling_prism import full_k, moe_blocks, set_active
from prism_refactor.offload.policies import ActivationAware, _Activations
from prism_refactor.offload.replay import Pass, Trace, belady, hit_rate

TOKENS, TRAINING, HELD_OUT = 256, 150, 12
EPOCHS, BATCH, RATE, SPARSITY = 6, 256, 1e-3, 1e-5
# (Pass, layer that has just been told what it uses, own probabilities [L, E]) -> probability that each is used at its next turn.
Told = Callable[[int, int, np.ndarray], np.ndarray]


class Informed(ActivationAware):
    """`activation`, told the probability of a use at the next turn."""

    def __init__(self, layers: int, experts: int, told: Told):
        super().__init__(layers, experts)
        self.told, self.number = told, -1

    def use(self, layer: int, uses: Any) -> None:
        self.number += layer == 0
        super().use(layer, uses)

    def keep(self) -> np.ndarray:
        ahead = (np.arange(self.layers)[:, None] - self._layer - 1) % self.layers
        own = np.maximum(self.predict(), 1e-4)
        return -(ahead + (1 - self.told(self.number, self._layer, own)) * self.layers / own)


def texts(tokenizer: Any, file: str, count: int) -> list[list[int]]:
    rows = [tokenizer(json.loads(line)["text"][:4000]).input_ids[:TOKENS] for line in (TEXT / file).read_text().splitlines()]
    whole = [row for row in rows if len(row) == TOKENS]
    return whole[:: max(len(whole) // count, 1)][:count]


@torch.inference_mode()
def routing(model: Any, rows: list[list[int]], experts: int) -> np.ndarray:
    """What every token of every text uses, bool [texts * TOKENS, L, E]."""
    routers = [block.experts.two_level for block in moe_blocks(model)]
    found: list[torch.Tensor] = []
    hooks = [router.register_forward_hook(lambda router, given, output: found.append(output[1])) for router in routers]
    used = np.zeros((len(rows) * TOKENS, len(routers), experts), bool)
    for number, row in enumerate(rows):
        found.clear()
        model(input_ids=torch.tensor([row]))
        for layer, index in enumerate(found):
            np.put_along_axis(used[number * TOKENS : (number + 1) * TOKENS, layer], index.numpy(), True, 1)
    for hook in hooks:
        hook.remove()
    return used


def next_turns(used: np.ndarray) -> np.ndarray:
    """What is used at the next turn of each layer once layer l of a token has been told: bool [T, l, L, E]."""
    following = np.concatenate([used[1:], used[-1:]])
    turns = np.stack([used] * used.shape[1], 1)
    for layer in range(used.shape[1]):
        turns[:, layer, : layer + 1] = following[:, : layer + 1]
    return turns


def histories(used: np.ndarray) -> np.ndarray:
    """What `activation` has seen then: last uses, then its windows; float32 [T, l, 1 + windows, L, E]."""
    tokens, layers, experts = used.shape
    rows = []
    last, past_requests = np.zeros((1, layers, experts)), np.zeros((0, layers, experts))
    for token in range(tokens):
        if token % TOKENS == 0:
            seen, last = _Activations(layers, experts, past_requests), np.zeros((1, layers, experts))
        for layer in range(layers):
            seen.add(layer, used[token, layer].astype(float), past_requests)
            last[0, layer] = used[token, layer]
            rows.append(np.concatenate([last, seen.windows()]).astype(np.float32))
    return np.stack(rows).reshape(tokens, layers, *rows[0].shape)


class Linear(nn.Module):
    """Logits of the next turn: of the windows' mean, all last uses and windows, and the token's own, if it has a say."""

    def __init__(self, inputs: int, outputs: int, vocabulary: int):
        super().__init__()
        self.lines, self.scale = nn.Linear(inputs, outputs), nn.Parameter(torch.ones(outputs))
        self.token = nn.Embedding(vocabulary, outputs) if vocabulary else None
        for weight in (self.lines.weight, *([self.token.weight] if self.token else [])):
            nn.init.zeros_(weight)

    def forward(self, history: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        mean = history[:, 1:].mean(1).flatten(1).clamp(0.01, 0.99)
        logits = self.lines(history.flatten(1)) + self.scale * mean.logit()
        return logits + self.token(ids) if self.token else logits


def fitted(history: np.ndarray, turns: np.ndarray, ids: torch.Tensor, vocabulary: int) -> Linear:
    """A model of one layer's moment."""
    inputs, wanted = torch.from_numpy(history), torch.from_numpy(turns).flatten(1).float()
    model = Linear(inputs[0].numel(), wanted.shape[1], vocabulary)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            loss = nn.functional.binary_cross_entropy_with_logits(model(inputs[rows], ids[rows]), wanted[rows])
            optimizer.zero_grad()
            (loss + SPARSITY * model.lines.weight.abs().sum()).backward()
            optimizer.step()
    return model


@torch.no_grad()
def forecast(turns: np.ndarray, seen: np.ndarray, new: np.ndarray, ids: list[torch.Tensor], vocabulary: int) -> np.ndarray:
    """Probability of the next turn for held-out texts of which `new` is seen, [T, l, L, E]; fitted to turns that followed `seen`."""
    found = []
    for layer in range(turns.shape[1]):
        with torch.enable_grad():
            model = fitted(seen[:, layer], turns[:, layer], ids[0], vocabulary)
        found.append(model(torch.from_numpy(new[:, layer]), ids[1]).sigmoid().view(-1, *turns.shape[2:]).numpy())
    return np.stack(found, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=int, default=25)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print_provenance()
    torch.manual_seed(0)
    model = load(arguments.folder)
    model.set_experts_implementation(EXPERTS)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    rows = [texts(tokenizer, "calibration.jsonl", TRAINING), texts(tokenizer, "evaluation.jsonl", HELD_OUT)]
    ids = [torch.tensor(part).flatten() for part in rows]
    experts = len(model.get_submodule("model.layers.0.mlp.experts").gate_up_proj)
    columns = []
    for k in (full_k(model.config) // 2, full_k(model.config)):
        set_active(model, k)
        training, held_out = (routing(model, part, experts) for part in rows)
        layers = held_out.shape[1]
        used = [[(np.flatnonzero(row), np.ones(row.sum())) for row in token] for token in held_out]
        trace = Trace(layers, experts, 1, [Pass(str(number // TOKENS), token) for number, token in enumerate(used)])
        turns = next_turns(held_out)
        known = next_turns(training), histories(training), histories(held_out)

        def coming(number: int, layer: int, own: np.ndarray, turns: np.ndarray = turns) -> np.ndarray:
            return np.where(np.arange(len(own))[:, None] > layer, turns[number, layer], own)

        told: dict[str, Told] = {"itself, as it is": lambda number, layer, own: own, "what the coming layers use for this token": coming}
        for name, vocabulary in (("a linear model of last uses and windows", 0), ("the same, with the token", model.config.vocab_size)):
            guess = forecast(*known, ids, vocabulary)
            told[name] = lambda number, layer, own, guess=guess: guess[number, layer]
        told["what every layer uses at its next turn"] = lambda number, layer, own, turns=turns: turns[number, layer]
        slots = layers * experts * arguments.share // 100
        rates = {name: hit_rate(trace, Informed(layers, experts, tells), slots) for name, tells in told.items()}
        columns.append(rates | {"everything (Belady)": hit_rate(trace, belady(trace), slots)})
    table = [[name, *(f"{column[name]:.3f}" for column in columns)] for name in columns[0]]
    print(f"hit rates, fast memory for {arguments.share} %\n")
    print(markdown(["`activation` is told", f"k = {full_k(model.config) // 2}", f"k = {full_k(model.config)}"], table))


if __name__ == "__main__":
    main()
