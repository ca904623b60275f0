"""Running sub-experts: an experts implementation registered with transformers, and what each sub-expert gives on its own.

`model.set_experts_implementation("prism")` runs any Mixture-of-Experts of transformers with it. Next to transformers' eager experts it
sorts the tokens once instead of searching them per expert, skips dropped slots (index == number of experts), so that tokens of one
batch may run different numbers of sub-experts, and lets a caller observe the activations.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from prism_refactor.formats import PrismConfig
from prism_refactor.models.modeling_prism import places
from prism_refactor.models.transformers_models import ExpertsModule, FusedExperts, register_experts

EXPERTS = "prism"
# Told (expert, token positions [n], inputs [n, H], activations [n, C]) for every expert that has tokens.
OnExpert = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


def expert_activations(
    experts: ExpertsModule, expert: int, inputs: torch.Tensor, activate: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the activations of one expert's neurons, [n, C], for MoE inputs [n, H]; `activate`: another than the module's own."""
    fused = FusedExperts(experts)
    return (activate or fused.activate)(F.linear(inputs, *fused.projection(fused.inner, expert, inputs.dtype)))


def weighted_output(experts: ExpertsModule, expert: int, activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return one expert's output times the routing weights [n], [n, H], from its activations [n, C]."""
    return F.linear(activations, *FusedExperts(experts).projection("down_proj", expert, activations.dtype)) * weights[:, None]


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    on_expert: OnExpert | None = None,
) -> torch.Tensor:
    """Sum over each token's experts of weight x output, [T, H].

    Computes in the type of `hidden_states`; weights of another type are converted one expert at a time.

    Args:
        self: a fused experts module of transformers (see `FusedExperts`).
        hidden_states: [T, H].
        top_k_index: int64 [T, k]; slots whose index is E are skipped.
        top_k_weights: [T, k].
        on_expert: observer, see `OnExpert`.
    """
    output = torch.zeros_like(hidden_states)
    for expert, tokens, slots in by_expert(top_k_index, self.num_experts):
        inputs = hidden_states[tokens]
        activations = expert_activations(self, expert, inputs)
        if on_expert is not None:
            on_expert(expert, tokens, inputs, activations)
        add_rows(output, tokens, weighted_output(self, expert, activations, top_k_weights[tokens, slots]))
    return output


def add_rows(output: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows [n, H] to some rows of [T, H], each to another one."""
    if len(output) == 1:
        # As in decoding; index_add_ takes ten times as long for it.
        output += rows.to(output.dtype)
    else:
        output.index_add_(0, tokens, rows.to(output.dtype))


def by_expert(top_k_index: torch.Tensor, num_experts: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """The tokens of each expert that has any: [(expert, token positions [n], slots [n])] for an index [T, k]."""
    if len(top_k_index) == 1:
        # One token, as in decoding: the sort below would take as long as an expert.
        token, slots = top_k_index.new_zeros(1), torch.arange(top_k_index.shape[1], device=top_k_index.device).split(1)
        return [(expert, token, slots[slot]) for slot, expert in _rising(top_k_index[0].tolist()) if expert < num_experts]
    ordered, positions = top_k_index.flatten().sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=ordered.device)).tolist()
    width = top_k_index.shape[1]
    groups = []
    for expert in range(num_experts):
        chosen = positions[bounds[expert] : bounds[expert + 1]]
        if len(chosen):
            groups.append((expert, chosen // width, chosen % width))
    return groups


def _rising(experts: list[int]) -> list[tuple[int, int]]:
    """(slot, expert) by expert."""
    return sorted(enumerate(experts), key=lambda pair: pair[1])


def _held(experts: ExpertsModule, expert: int) -> Any:
    """Index of one original expert's sub-experts in the refactored experts module."""
    prism = PrismConfig.required(experts.config, "the refactored model")
    if prism.groups == 1:
        # A slice: no copy.
        return slice(expert * prism.sub_experts, (expert + 1) * prism.sub_experts)
    return places(experts.num_experts // prism.sub_experts, prism.sub_experts, prism.groups)[expert]


def sub_expert_activations(experts: ExpertsModule, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    """Activations [n, N, C / N] of one original expert's sub-experts, from the refactored experts module, for MoE inputs [n, H]."""
    own, fused = _held(experts, expert), FusedExperts(experts)
    rows, bias = fused.projection(fused.inner, own, inputs.dtype)
    both = F.linear(inputs, rows.flatten(0, 1), None if bias is None else bias.flatten())
    return fused.activate(both.unflatten(-1, rows.shape[:2]))


def sub_expert_outputs(experts: ExpertsModule, expert: int, activations: torch.Tensor) -> torch.Tensor:
    """Outputs [n, N, H] of one original expert's sub-experts, before the routing weight, from their activations [n, N, C / N]."""
    down, bias = FusedExperts(experts).projection("down_proj", _held(experts, expert), activations.dtype)
    factor = PrismConfig.required(experts.config, "the refactored model").factor
    # A power of two: dividing the weights, of which there are fewer, gives the same bits.
    outputs = torch.einsum("tnc,nhc->tnh", activations, down / factor)
    return outputs if bias is None else outputs + bias / factor


register_experts(EXPERTS, experts_forward)
