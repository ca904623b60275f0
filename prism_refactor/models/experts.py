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
from prism_refactor.models.modeling_prism import places, product
from prism_refactor.models.transformers_models import ExpertsModule, FusedExperts, register_experts

EXPERTS = "prism"
# Told (expert, token positions [n], inputs [n, H], activations [n, C]) for every expert that has tokens.
OnExpert = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


def expert_activations(
    experts: ExpertsModule, expert: int, inputs: torch.Tensor, activate: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the activations of one expert's neurons, [n, C], for MoE inputs [n, H]; `activate`: another than the module's own."""
    fused = FusedExperts(experts)
    return (activate or fused.activate)(product(inputs, *fused.projection(fused.inner, expert, inputs.dtype)))


def weighted_output(experts: ExpertsModule, expert: int, activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return one expert's output times the routing weights [n], [n, H], from its activations [n, C]."""
    down, bias = FusedExperts(experts).projection("down_proj", expert, activations.dtype)
    # Of activations there are fewer than of outputs.
    output = product((activations * weights[:, None]).to(activations.dtype), down)
    return output if bias is None else output + (bias * weights[:, None]).to(output.dtype)


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, on_expert: OnExpert | None = None
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
    sums = RowSums(torch.zeros_like(hidden_states))
    for expert, tokens, weights in by_expert(top_k_index, top_k_weights, self.num_experts):
        same = sums.last_were(tokens)
        if not same:
            inputs = hidden_states[tokens]
        activations = expert_activations(self, expert, inputs)
        if on_expert is not None:
            on_expert(expert, tokens, inputs, activations)
        sums.add(tokens, weighted_output(self, expert, activations, weights), same)
    return sums.finish()


class RowSums:
    """Adds parts, each of some rows, to an output.

    Consecutive parts of the same rows are summed first: those of an expert's sub-experts, where its tokens keep all of them.

    Args:
        output: [T, H], changed in place.
    """

    def __init__(self, output: torch.Tensor):
        self._output = output
        self._tokens: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None

    def last_were(self, tokens: torch.Tensor) -> bool:
        """Whether the last part had the same rows, int64 [n]; on a GPU, which would have to be waited for, only where there is one."""
        last = self._tokens
        if last is None or last.shape != tokens.shape:
            return False
        return self._output.shape[0] == 1 or (tokens.device.type == "cpu" and torch.equal(last, tokens))

    def add(self, tokens: torch.Tensor, rows: torch.Tensor, same: bool) -> None:
        """Add rows [n, H] to n different rows of the output, int64 [n]; `same`: `last_were(tokens)`."""
        if same and self._sum is not None:
            self._sum = self._sum + rows
            return
        self._put()
        self._tokens, self._sum = tokens, rows

    def finish(self) -> torch.Tensor:
        """The output, after the last part."""
        self._put()
        return self._output

    def _put(self) -> None:
        if self._sum is None or self._tokens is None:
            return
        rows = self._sum.to(self._output.dtype)
        if len(self._output) == 1:
            # As in decoding; index_add_ takes ten times as long for it.
            self._output += rows
        else:
            self._output.index_add_(0, self._tokens, rows)


def by_expert(top_k_index: torch.Tensor, values: torch.Tensor, num_experts: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """The tokens of each expert that has any.

    Args:
        top_k_index: int64 [T, k], the experts of each token; those from `num_experts` on are left out.
        values: [T, k, ...], what each token has for them.
        num_experts: E.

    Returns:
        [(expert, token positions int64 [n], their values [n, ...])] in the order of experts.
    """
    if len(top_k_index) == 1:
        # One token, as in decoding: the sort below would take as long as an expert.
        token, each = top_k_index.new_zeros(1), values[0].split(1)
        return [(expert, token, each[slot]) for slot, expert in _rising(top_k_index[0].tolist()) if expert < num_experts]
    ordered, positions = top_k_index.flatten().sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=ordered.device)).tolist()
    tokens, values = positions // top_k_index.shape[1], values.flatten(0, 1)[positions]
    parts = [(expert, slice(*bounds[expert : expert + 2])) for expert in range(num_experts)]
    return [(expert, tokens[part], values[part]) for expert, part in parts if part.start < part.stop]


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
