"""The stock router: original rows repeated, tilted a little so that ties inside an expert break the useful way."""

from typing import Any

import torch

from prism_refactor.models.modeling_prism import router_of
from prism_refactor.routing.output import relative_error, stock_output

# Tilts tried, as shares of the predicted difference of log sizes.
TILTS = (0.0, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05)
# Squared relative errors of the experts' output that the tilts may cause with every sub-expert active, summed over the layers. The KL
# divergence of the model's full-k output was a quarter to a half of that sum on olmoe-tiny; the promise is 1e-3.
FULL_K_BUDGET = 2e-3
# Inputs a tilt is judged on.
JUDGED = 1024


def tilted_rows(gate: torch.Tensor, weight: torch.Tensor, tilt: float) -> torch.Tensor:
    """Stock router rows w_e + tilt * (direction in which sub-expert j grows more than its siblings).

    Args:
        gate: [E, H], the original rows.
        weight: [E, N, H], the linear sub-router.
        tilt: 0 repeats the rows.

    Returns:
        [E * N, H] in the type of `gate`: what the checkpoint will hold, rounding included.
    """
    direction = weight - weight.mean(1, keepdim=True)
    return (gate.float()[:, None] + tilt * direction).flatten(0, 1).to(gate.dtype)


@torch.inference_mode()
def choose_tilt(
    block: Any, gate: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor, bound: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Choose the tilt that loses least of the experts' output at a quarter, half and three quarters of the sub-experts.

    Only tilts that keep the full-k error within `bound` are considered; 0 always does.

    Args:
        block: the refactored MoE block with its experts materialised; its router is changed.
        gate, weight: see `tilted_rows`.
        inputs: [T, H] MoE inputs that nothing was fitted on; the first `JUDGED` are used.
        bound: this layer's share of `FULL_K_BUDGET`.

    Returns:
        The chosen rows, [E * N, H] in the type of `gate`, and {'tilt': ..., 'full_k_error': ...}.
    """
    router = router_of(block)
    full = router.top_k
    inputs = inputs[:JUDGED].float()
    exact = stock_output(block, tilted_rows(gate, weight, 0.0), inputs, full)
    best = None
    for tilt in TILTS:
        rows = tilted_rows(gate, weight, tilt)
        full_k_error = relative_error(stock_output(block, rows, inputs, full), exact)
        if not full_k_error <= bound:
            break
        error = sum(relative_error(stock_output(block, rows, inputs, max(1, full * part // 4)), exact) for part in (1, 2, 3))
        if best is None or error < best[0]:
            best = (error, rows, {"tilt": tilt, "full_k_error": full_k_error})
    router.top_k = full
    assert best is not None
    return best[1], best[2]
