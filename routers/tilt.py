"""The stock router: original rows repeated, tilted a little so that ties inside an expert break the useful way."""

from typing import Any

import torch
from torch import nn

from calibration.statistics import observed_experts_forward

# Tilts tried, as shares of the predicted relative contribution.
TILTS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05)
# Squared relative errors of the experts' output that the tilts may cause with every sub-expert active, summed over the layers. The KL
# divergence of the model's full-k output was a quarter to a half of that sum on olmoe-tiny; the promise is 1e-3.
FULL_K_BUDGET = 2e-3


def tilted_rows(gate: torch.Tensor, weight: torch.Tensor, contribution: torch.Tensor, tilt: float) -> torch.Tensor:
    """Stock router rows w_e + tilt * (direction in which sub-expert j contributes more than its siblings).

    Args:
        gate: [E, H], the original rows.
        weight: [E, N, H], the linear sub-router.
        contribution: [E, N], mean contribution of each sub-expert.
        tilt: 0 repeats the rows.

    Returns:
        [E * N, H] in the type of `gate`: what the checkpoint will hold, rounding included.
    """
    direction = (weight - weight.mean(1, keepdim=True)) / contribution.mean(1)[:, None, None].clamp_min(1e-12)
    return (gate.float()[:, None] + tilt * direction).flatten(0, 1).to(gate.dtype)


@torch.inference_mode()
def choose_tilt(
    block: Any, gate: torch.Tensor, weight: torch.Tensor, contribution: torch.Tensor, inputs: torch.Tensor, bound: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Choose the tilt that loses least of the experts' output at a quarter, half and three quarters of the sub-experts.

    Only tilts that keep the full-k error within `bound` are considered; 0 always does.

    Args:
        block: the refactored MoE block with its experts materialised; its gate is changed.
        gate, weight, contribution: see `tilted_rows`.
        inputs: [T, H] MoE inputs.
        bound: this layer's share of `FULL_K_BUDGET`.

    Returns:
        The chosen rows, [E * N, H] in the type of `gate`, and {'tilt': ..., 'full_k_error': ...}.
    """
    full = block.gate.top_k
    inputs = inputs.float()

    def output(rows: torch.Tensor, k: int) -> torch.Tensor:
        block.gate.weight, block.gate.top_k = nn.Parameter(rows.float(), requires_grad=False), k
        _, weights, indices = block.gate(inputs)
        return observed_experts_forward(block.experts, inputs, indices, weights)

    exact = output(tilted_rows(gate, weight, contribution, 0.0), full)
    best = None
    for tilt in TILTS:
        rows = tilted_rows(gate, weight, contribution, tilt)
        full_k_error = relative_error(output(rows, full), exact)
        if not full_k_error <= bound:
            break
        error = sum(relative_error(output(rows, max(1, full * part // 4)), exact) for part in (1, 2, 3))
        if best is None or error < best[0]:
            best = (error, rows, {"tilt": tilt, "full_k_error": full_k_error})
    block.gate.top_k = full
    assert best is not None
    return best[1], best[2]


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Squared error of a layer's output relative to its squared norm, over all tokens."""
    return ((output - exact).square().sum() / exact.square().sum().clamp_min(1e-30)).item()
