"""The original and its refactored models on the same text."""

from collections.abc import Sequence
from typing import Any

import torch

from prism_refactor.evaluation.allocation import allocate
from prism_refactor.evaluation.cost import CostModel
from prism_refactor.evaluation.curve import Bootstrap, measured
from prism_refactor.evaluation.losses import Point, stream_losses
from prism_refactor.evaluation.windows import Windows
from prism_refactor.events import Events
from prism_refactor.formats import Curve, OperatingPoint, PrismConfig
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.stream import ComputeOptions


class Comparison:
    """The original at its own top-1 ... top-K on a text; refactored models are measured against it.

    Args:
        original: the source checkpoint.
        windows: the text.
        compute: how to run.
        seed: of the bootstrap.
        events: told of the operating points that have passed a layer.
    """

    def __init__(self, original: Checkpoint, windows: Windows, compute: ComputeOptions, seed: int, events: Events | None = None):
        self.windows, self.compute, self.events = windows, compute, events
        self.sampled = Bootstrap(windows, seed)
        top_k = original.architecture.sizes(original.config)[original.architecture.top_k]
        choices = list(range(1, top_k + 1))
        cost = CostModel(original, "original", windows.rows.shape[1])
        losses = self._losses(original, [Point("original", (k,) * len(cost.blocks)) for k in choices])
        self._originals: dict[float, Any] = {k / top_k: sums for k, sums in zip(choices, losses.sums, strict=True)}
        points = [(k,) * len(cost.blocks) for k in choices]
        self.original = Curve(original.path.resolve().name, "original", top_k, self._measured(points, losses.sums, top_k, cost), [])

    def _losses(self, checkpoint: Checkpoint, points: list[Point], measure_layers: bool = False) -> Any:
        return stream_losses(checkpoint, self.windows, points, self.compute, measure_layers, self.events)

    def _measured(self, points: list[tuple[int, ...]], sums: torch.Tensor, full: int, cost: CostModel) -> list[OperatingPoint]:
        return [
            measured(self.sampled, losses, point, full, cost.at(list(point)), self._originals)
            for point, losses in zip(points, sums, strict=True)
        ]

    def curves(
        self, checkpoint: Checkpoint, routers: list[str], choices: list[int], allocated: bool = False, budgets: Sequence[float] = ()
    ) -> list[Curve]:
        """The refactored model under each router at each k, in one pass over its layers.

        With `allocated`, the output error of each layer is measured in that pass too, and a second pass measures the non-uniform
        operating points it suggests for the two-level router.

        Args:
            checkpoint: refactored.
            routers: out of 'stock' and 'two-level'.
            choices: values of k, rising.
            allocated: see above.
            budgets: of the two-level router, rising.
        """
        full = PrismConfig.required(checkpoint.config, checkpoint.path).max_active
        length = self.windows.rows.shape[1]
        costs = {router: CostModel(checkpoint, router, length) for router in routers}
        layers = len(costs[routers[0]].blocks)
        points = [Point(router, (k,) * layers) for router in routers for k in choices]
        # Layer errors are measured on the inputs of the full two-level model.
        reference = [Point("two-level", (full,) * layers)] if allocated else []
        within = [Point("two-level", (full,) * layers, budget) for budget in budgets]
        losses = self._losses(checkpoint, reference + points + within, allocated)
        curves = []
        for number, router in enumerate(routers):
            start = len(reference) + number * len(choices)
            sums = losses.sums[start : start + len(choices)]
            found = self._measured([(k,) * layers for k in choices], sums, full, costs[router])
            curves.append(Curve(checkpoint.path.resolve().name, router, full, found, []))
        last = len(losses.sums) - len(budgets)
        for budget, sums, active in zip(budgets, losses.sums[last:], losses.active[last:].tolist(), strict=True):
            cost, share = costs["two-level"].at(active), sum(active) / layers / full
            point = measured(self.sampled, sums, (full,) * layers, full, cost, self._originals, budget, share)
            curves[routers.index("two-level")].budgets.append(point)
        if allocated:
            suggested = list(allocate(losses.layer_errors, [k for k in choices if k < full]).values())
            sums = self._losses(checkpoint, [Point("two-level", k) for k in suggested]).sums
            curves[routers.index("two-level")].allocated.extend(self._measured(suggested, sums, full, costs["two-level"]))
        return curves
