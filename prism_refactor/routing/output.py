"""The output of one layer's experts under each way to route, and how far it is from the exact one."""

import torch

from prism_refactor.models.experts import experts_forward
from prism_refactor.models.modeling_prism import TwoLevelRouter, router_of
from prism_refactor.models.transformers_models import ExpertsModule, MoeBlock
from prism_refactor.routing.sample import Routed, in_float32, route


@torch.inference_mode()
def stock_output(block: MoeBlock, inputs: torch.Tensor, k: int) -> torch.Tensor:
    """Return the output [T, H] of a block's experts at top-k with its own router, which computes in float32; its k is left as it was."""
    router = router_of(block)
    own, router.top_k = router.top_k, k
    try:
        with in_float32(block):
            weights, indices = route(block, inputs)
    finally:
        router.top_k = own
    return experts_forward(block.experts, inputs, indices, weights)


@torch.inference_mode()
def two_level_output(router: TwoLevelRouter, experts: ExpertsModule, routed: Routed, k: int) -> torch.Tensor:
    """Return the output [T, H] of the experts at k sub-experts, with what the router adds for the dropped ones."""
    weights, indices, missing = router(routed.inputs, routed.weights, routed.experts, k)
    output = experts_forward(experts, routed.inputs, indices, weights)
    return output if missing is None else output + missing


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the squared error of a layer's output relative to its squared norm, over all tokens."""
    return ((output - exact).square().sum() / exact.square().sum().clamp_min(1e-30)).item()
