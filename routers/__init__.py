"""Sub-expert routing: fit it, tilt the stock gate, run a refactored model at any k."""

from routers.compensation import fit_compensation
from routers.finetune import LOSSES, Curriculum, Training, recorded
from routers.linear import fit_linear
from routers.modeling_prism import (
    ROUTER_FILE,
    TwoLevelRouter,
    attach,
    attach_block,
    full_k,
    install,
    moe_gates,
    operating_points,
    router_of,
    router_tensors,
    set_active,
    set_token_active,
    two_level_router,
)
from routers.output import relative_error, stock_output, two_level_output
from routers.proxy import COACTIVE_SHARE, GATE_NEURONS, coactive_marks, fit_proxy, gate_neurons
from routers.routed import Routed, Run, in_float32, route
from routers.runtime import EXPERTS, add_rows, by_expert, expert_activations, experts_forward, router_file, weighted_output
from routers.tilt import FULL_K_BUDGET, choose_tilt, tilted_rows

__all__ = [
    "COACTIVE_SHARE",
    "EXPERTS",
    "FULL_K_BUDGET",
    "GATE_NEURONS",
    "LOSSES",
    "ROUTER_FILE",
    "Curriculum",
    "Routed",
    "Run",
    "Training",
    "TwoLevelRouter",
    "add_rows",
    "attach",
    "attach_block",
    "by_expert",
    "choose_tilt",
    "coactive_marks",
    "expert_activations",
    "experts_forward",
    "fit_compensation",
    "fit_linear",
    "fit_proxy",
    "full_k",
    "gate_neurons",
    "in_float32",
    "install",
    "moe_gates",
    "operating_points",
    "recorded",
    "relative_error",
    "route",
    "router_file",
    "router_of",
    "router_tensors",
    "set_active",
    "set_token_active",
    "stock_output",
    "tilted_rows",
    "two_level_output",
    "two_level_router",
    "weighted_output",
]
