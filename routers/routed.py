"""Sampled MoE inputs with their routing: what the routers of one layer are fitted on."""

from dataclasses import dataclass
from typing import Any

import torch

# An expert with fewer sampled tokens is fitted on the layer's inputs instead, whatever their expert, at most this many of them.
FEWEST_TOKENS, STAND_IN_TOKENS = 16, 1024
# The last eighth of the sample, other text than the rest, judges what was fitted on the rest.
HELD_OUT = 8
CHUNK = 2048


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
    def by(cls, gate: Any, inputs: torch.Tensor) -> "Routed":
        """Route inputs [T, H] with the original gate, which computes in float32 here."""
        inputs = inputs.float()
        rows = gate.weight
        try:
            gate.weight = torch.nn.Parameter(rows.float(), requires_grad=False)
            _, weights, experts = gate(inputs)
        finally:
            gate.weight = rows
        return cls(inputs, weights, experts)

    def split(self) -> tuple["Routed", "Routed"]:
        """(for fitting, held out)."""
        cut = len(self.inputs) - len(self.inputs) // HELD_OUT
        parts = (slice(None, cut), slice(cut, None)) if cut < len(self.inputs) else (slice(None), slice(None))
        fitting, held_out = (Routed(self.inputs[part], self.weights[part], self.experts[part]) for part in parts)
        return fitting, held_out

    def inputs_of(self, expert: int) -> list[torch.Tensor]:
        """The inputs routed to one expert, in chunks of at most `CHUNK`; where there are next to none, inputs of the layer."""
        tokens = torch.nonzero((self.experts == expert).any(1)).flatten()
        chosen = self.inputs[:STAND_IN_TOKENS] if len(tokens) < FEWEST_TOKENS else self.inputs[tokens]
        return list(chosen.split(CHUNK))
