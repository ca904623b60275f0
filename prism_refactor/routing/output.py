"""The output of one layer's experts under each way to route, and how far it is from the exact one."""

from typing import Any

import torch
from torch import nn

from prism_refactor.models.experts import experts_forward
from prism_refactor.models.modeling_prism import TwoLevelRouter, router_of
from prism_refactor.routing.sample import in_float32, route


@torch.inference_mode()
def stock_output(block: Any, rows: torch.Tensor, inputs: torch.Tensor, k: int) -> torch.Tensor:
    """Output [T, H] of a block's experts at top-k with router rows [E, H]; leaves them and k in the block's router."""
    router = router_of(block)
    router.weight, router.top_k = nn.Parameter(rows, requires_grad=False), k
    with in_float32(block):
        weights, indices = route(block, inputs)
    return experts_forward(block.experts, inputs, indices, weights)


@torch.inference_mode()
def two_level_output(router: TwoLevelRouter, experts: Any, inputs: torch.Tensor, k: int) -> torch.Tensor:
    """Output [T, H] of the experts at k sub-experts, with what the router adds for the dropped ones."""
    weights, indices = router(inputs, k)
    output = experts_forward(experts, inputs, indices, weights)
    return output if router.missing is None else output + router.missing


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Squared error of a layer's output relative to its squared norm, over all tokens."""
    return ((output - exact).square().sum() / exact.square().sum().clamp_min(1e-30)).item()
