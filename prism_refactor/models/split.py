"""Split the experts of one layer into sub-experts."""

from typing import Any

import torch

from prism_refactor.errors import InputError
from prism_refactor.models.architectures import Architecture, expert_shape, routing_state


def split_experts(experts: Any, order: torch.Tensor, sub_experts: int, factor: int) -> dict[str, torch.Tensor]:
    """Reorder each expert's neurons and cut it into equal sub-experts; sub-expert n of expert e becomes expert e * N + n.

    Args:
        experts: a fused experts module of transformers with its weights: `gate_up_proj` and `down_proj`, perhaps with biases, gate and up
            rows one after the other or in turns, matrices perhaps transposed.
        order: int64 [E, C], each expert's neurons sorted by sub-expert.
        sub_experts: N, a power of two.
        factor: what `down_proj` is multiplied with, N or 1, see `Architecture.factor`; exact in binary floating point.

    Returns:
        The tensors of the refactored experts module by their names, E * N sub-experts, in the source's types.

    Raises:
        InputError: scaling overflows the dtype (only fp16 can).
    """
    result: dict[str, torch.Tensor] = {}
    total = expert_shape(experts)[0]
    for expert in range(total):
        parts = {"gate_up_proj": _cut_rows(experts, experts.gate_up_proj[expert], order[expert], sub_experts)}
        columns = experts.down_proj[expert].T if experts.is_transposed else experts.down_proj[expert]
        scaled = columns[:, order[expert]] * factor
        if not torch.isfinite(scaled).all():
            raise InputError(f"expert {expert}: down_proj times {factor} overflows {scaled.dtype}; convert the checkpoint to bf16 first")
        cut = scaled.unflatten(1, (sub_experts, -1)).transpose(0, 1)
        parts["down_proj"] = cut.transpose(1, 2) if experts.is_transposed else cut
        if experts.has_bias:
            bias = experts.gate_up_proj_bias[expert][:, None]
            parts["gate_up_proj_bias"] = _cut_rows(experts, bias, order[expert], sub_experts, transposed=False)[..., 0]
            # All N sub-experts together add the expert's bias once.
            parts["down_proj_bias"] = (experts.down_proj_bias[expert] * (factor / sub_experts)).expand(sub_experts, -1)
        for name, value in parts.items():
            if name not in result:
                result[name] = value.new_empty(total, *value.shape)
            result[name][expert] = value
    return {name: value.flatten(0, 1) for name, value in result.items()}


def _cut_rows(experts: Any, matrix: torch.Tensor, order: torch.Tensor, sub_experts: int, transposed: bool | None = None) -> torch.Tensor:
    """[N, 2C / N, H] (transposed like the source) of one expert's gate and up rows [2C, H]."""
    transposed = experts.is_transposed if transposed is None else transposed
    rows = matrix.T if transposed else matrix
    # The two rows of a neuron are C apart, or neighbours.
    pairs = rows.unflatten(0, (2, -1)) if experts.is_concatenated else rows.unflatten(0, (-1, 2)).transpose(0, 1)
    cut = pairs[:, order].unflatten(1, (sub_experts, -1)).transpose(0, 1)
    cut = (cut if experts.is_concatenated else cut.transpose(1, 2)).flatten(1, 2)
    return cut.transpose(1, 2) if transposed else cut


def repeat_routing(block: Any, architecture: Architecture, sub_experts: int) -> dict[str, torch.Tensor]:
    """The router's tensors for the sub-experts, by their names in the block: everything there is per expert, N times in a row.

    With every row repeated the N copies of a chosen expert are all chosen, and share its weight where `Architecture.factor` says so.
    """
    total = expert_shape(block.experts)[0]
    repeated = {}
    for name, value in routing_state(block).items():
        repeated[name] = value.detach().repeat_interleave(sub_experts, list(value.shape).index(total))
    if architecture.correction in repeated:
        repeated[architecture.correction] = repeated[architecture.correction] / architecture.correction_divisor(sub_experts)
    return repeated
