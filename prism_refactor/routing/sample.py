"""Sampled MoE inputs with their routing: what the routers of one layer are fitted on."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from prism_refactor.models.architectures import own_routing, routing
from prism_refactor.models.modeling_prism import router_of
from prism_refactor.models.transformers_models import MoeBlock

# An expert with fewer sampled tokens is fitted on the layer's inputs instead, whatever their expert, at most this many of them.
FEWEST_TOKENS, STAND_IN_TOKENS = 16, 1024
# The last eighth of the sample, other text than the rest, judges what was fitted on the rest.
HELD_OUT = 8
CHUNK = 2048
# Runs tasks (function, arguments), perhaps in other processes, and gives their results in order.
Run = Callable[[Iterable[tuple[Callable[..., Any], tuple[Any, ...]]]], Iterator[Any]]


def run_here(tasks: Iterable[tuple[Callable[..., Any], tuple[Any, ...]]]) -> Iterator[Any]:
    """A `Run` in this process."""
    for function, arguments in tasks:
        yield function(*arguments)


@contextmanager
def in_float32(block: MoeBlock) -> Iterator[None]:
    """Let the routing of a MoE block compute in float32 for a while; the experts follow their input's type."""
    router = router_of(block)
    tensors = [*router.parameters(), *router.buffers(), *own_routing(block).values()]
    stored = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, value in zip(tensors, stored, strict=True):
            tensor.data = value


def route(block: MoeBlock, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain router's weights [T, k] and experts int64 [T, k] for inputs [T, H]."""
    _, weights, experts = routing(block, inputs)
    return weights, experts


@dataclass(frozen=True)
class Routed:
    """MoE inputs and where the original gate sends them.

    Attributes:
        inputs: [T, H], float32.
        weights: [T, K], the original routing weights.
        experts: int64 [T, K].
    """

    inputs: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor

    @classmethod
    @torch.inference_mode()
    def by(cls, block: MoeBlock, inputs: torch.Tensor) -> "Routed":
        """Route inputs [T, H] with the original block's plain router, which computes in float32 here."""
        inputs = inputs.float()
        with in_float32(block):
            return cls(inputs, *route(block, inputs))

    def split(self) -> tuple["Routed", "Routed"]:
        """(for fitting, held out)."""
        cut = len(self.inputs) - len(self.inputs) // HELD_OUT
        parts = (slice(None, cut), slice(cut, None)) if cut < len(self.inputs) else (slice(None), slice(None))
        fitting, held_out = map(self.part, parts)
        return fitting, held_out

    def part(self, rows: slice) -> "Routed":
        """Some of the rows."""
        return Routed(self.inputs[rows], self.weights[rows], self.experts[rows])

    def chunks(self) -> Iterator["Routed"]:
        """All rows, `CHUNK` at a time."""
        for start in range(0, len(self.inputs), CHUNK):
            yield self.part(slice(start, start + CHUNK))

    def tokens_of(self, expert: int) -> torch.Tensor:
        """Positions of the inputs routed to one expert, int64 [n]; where there are next to none, the first of the layer's."""
        tokens = torch.nonzero((self.experts == expert).any(1)).flatten()
        return torch.arange(min(STAND_IN_TOKENS, len(self.inputs))) if len(tokens) < FEWEST_TOKENS else tokens
