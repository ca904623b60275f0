"""The original and its refactored models on the same text."""

from collections.abc import Sequence
from typing import Any

from prism_refactor.evaluation.cost import CostModel
from prism_refactor.evaluation.curve import Bootstrap, measured
from prism_refactor.evaluation.losses import Losses, Point, stream_losses
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
        points = [Point("original", k) for k in choices]
        cost = CostModel(original, "original", windows.rows.shape[1])
        losses = stream_losses(original, windows, points, compute, self.events)
        self._originals: dict[float, Any] = {k / top_k: sums for k, sums in zip(choices, losses.sums, strict=True)}
        self.original = Curve(original.path.resolve().name, "original", top_k, self._measured(points, losses, top_k, cost))

    def _measured(self, points: list[Point], losses: Losses, full: int, cost: CostModel) -> list[OperatingPoint]:
        each = zip(points, losses.sums, losses.active.tolist(), losses.sample.tolist(), strict=True)
        return [
            measured(self.sampled, self._originals, point, full, cost.at(active), sums, active, sample)
            for point, sums, active, sample in each
        ]

    def curves(self, checkpoint: Checkpoint, routers: list[str], choices: list[int], budgets: Sequence[float] = ()) -> list[Curve]:
        """The refactored model under each router at each k, in one pass over its layers.

        Args:
            checkpoint: refactored.
            routers: out of 'stock' and 'two-level'.
            choices: values of k, rising.
            budgets: of the two-level router, rising.
        """
        full = PrismConfig.required(checkpoint.config, checkpoint.path).max_active
        points = {router: [Point(router, k) for k in choices] for router in routers}
        if budgets:
            points["two-level"] += [Point("two-level", full, budget) for budget in budgets]
        losses = stream_losses(checkpoint, self.windows, [point for own in points.values() for point in own], self.compute, self.events)
        curves, start = [], 0
        for router, own in points.items():
            cost = CostModel(checkpoint, router, self.windows.rows.shape[1])
            found = self._measured(own, losses.part(slice(start, start + len(own))), full, cost)
            start += len(own)
            curves.append(Curve(checkpoint.path.resolve().name, router, full, found[: len(choices)], found[len(choices) :]))
        return curves
