"""What a refactored model is worth: perplexity at every number of active sub-experts, its cost, non-uniform k."""

from evaluation.allocation import allocate
from evaluation.compare import Curve, Evaluation, Runtime
from evaluation.cost import Cost, CostModel
from evaluation.curve import Gate, Measured, Sampled
from evaluation.losses import Losses, Point, stream_losses
from evaluation.plot import plot_curves, save_figure
from evaluation.windows import Windows, read_windows

__all__ = [
    "Cost",
    "CostModel",
    "Curve",
    "Evaluation",
    "Gate",
    "Losses",
    "Measured",
    "Point",
    "Runtime",
    "Sampled",
    "Windows",
    "allocate",
    "plot_curves",
    "read_windows",
    "save_figure",
    "stream_losses",
]
