"""Sub-expert routing: fit it, tilt the stock gate, run a refactored model at any k."""

from routers.linear import fit_linear
from routers.modeling_prism import ROUTER_FILE, attach, attach_block, router_tensors, set_active
from routers.proxy import GATE_NEURONS, gate_neurons
from routers.tilt import FULL_K_BUDGET, choose_tilt, relative_error, tilted_rows

__all__ = [
    "FULL_K_BUDGET",
    "GATE_NEURONS",
    "ROUTER_FILE",
    "attach",
    "attach_block",
    "choose_tilt",
    "fit_linear",
    "gate_neurons",
    "relative_error",
    "router_tensors",
    "set_active",
    "tilted_rows",
]
