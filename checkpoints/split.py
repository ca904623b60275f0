"""Split the experts of one layer into sub-experts."""

import torch

from prism_errors import InputError


def split_experts(gate_up: torch.Tensor, down: torch.Tensor, order: torch.Tensor, sub_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reorder each expert's neurons and cut it into equal sub-experts; `down` is scaled by N, which is exact in binary floating point.

    Sub-expert n of expert e becomes expert e * N + n. With every router row repeated N times the routing weights come out divided by
    N, so all N sub-experts of an expert together give its output.

    Args:
        gate_up: [E, 2C, H], the C gate rows before the C up rows.
        down: [E, H, C].
        order: int64 [E, C], each expert's neurons sorted by sub-expert.
        sub_experts: N, a power of two.

    Returns:
        ([E * N, 2C / N, H], [E * N, H, C / N]) in the input's dtype.

    Raises:
        InputError: scaling overflows the dtype (only fp16 can).
    """
    experts, hidden, neurons = down.shape
    width = neurons // sub_experts
    new_gate_up = gate_up.new_empty(experts, sub_experts, 2 * width, hidden)
    new_down = down.new_empty(experts, sub_experts, hidden, width)
    for expert in range(experts):
        both = gate_up[expert].view(2, neurons, hidden)[:, order[expert]].view(2, sub_experts, width, hidden)
        new_gate_up[expert] = both.transpose(0, 1).reshape(sub_experts, 2 * width, hidden)
        scaled = down[expert][:, order[expert]] * sub_experts
        if not torch.isfinite(scaled).all():
            raise InputError(f"expert {expert}: down_proj times {sub_experts} overflows {down.dtype}; convert the checkpoint to bf16 first")
        new_down[expert] = scaled.view(hidden, sub_experts, width).transpose(0, 1)
    return new_gate_up.flatten(0, 1), new_down.flatten(0, 1)
