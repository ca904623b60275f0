"""The performance model of MoE-Prism (arXiv 2510.19366): how long a step takes, measured before deployment."""

import os
import platform
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import RegularGridInterpolator

from prism_refactor.events import Events
from prism_refactor.files import write_json
from prism_refactor.formats import PERFORMANCE, PERFORMANCE_FORMAT, HeldOut, LatencyGrid, Performance, check_format, read

# Share of held-out points whose error the error bars cover.
_COVERED = 0.9

# Seconds of one step: (requests, tokens of each, tokens of each in the KV cache, k) -> seconds.
Measure = Callable[[int, int, int, int], float]


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step.

    Attributes:
        seconds: expected.
        low: that it is expected to take at least: the measured quartile, widened by what 90 % of held-out points stay below.
        high: at most, likewise.
        held_out_error: median relative error on points that the model was not fitted on.
    """

    seconds: float
    low: float
    high: float
    held_out_error: float


class _Interpolated:
    """The seconds of a grid between its points."""

    def __init__(self, grid: LatencyGrid):
        # Where an axis has one value, a second one of the same seconds stands beside it.
        axes = [axis if len(axis) > 1 else [axis[0], axis[0] + 1] for axis in (grid.tokens, grid.k, grid.context)]
        self._least = float(np.min(grid.seconds)) / 2
        self._grids: list[Any] = []
        for values in (grid.seconds, grid.low, grid.high):
            array = np.array(values)
            for dimension, size in enumerate(array.shape):
                array = np.repeat(array, 2, dimension) if size == 1 else array
            self._grids.append(RegularGridInterpolator(axes, array, bounds_error=False, fill_value=None))

    def at(self, tokens: float, k: float, context: float) -> tuple[float, float, float]:
        """(median, lower quartile, upper quartile), linear between grid points and beyond them."""
        seconds, low, high = (max(float(grid((tokens, k, context))), self._least) for grid in self._grids)
        return seconds, low, high


def filled(grid: LatencyGrid, runs: dict[tuple[int, int, int], list[float]]) -> LatencyGrid:
    """A grid with the medians and quartiles of some seconds for each of its points."""
    shape = len(grid.tokens), len(grid.k), len(grid.context)
    low, middle, high = (
        np.array([np.quantile(runs[point], share) for point in grid.points()]).reshape(shape).tolist() for share in (0.25, 0.5, 0.75)
    )
    return LatencyGrid(grid.tokens, grid.k, grid.context, middle, low, high)


@dataclass
class PerformanceModel(Performance):
    """Predicts the seconds of the engine's steps from those that were measured."""

    def __post_init__(self) -> None:
        self._decode, self._prefill = _Interpolated(self.decode), _Interpolated(self.prefill)
        # Schedulers and simulations ask for the same few thousand steps again and again.
        self._known = lru_cache(2**16)(self._predict_step)

    def predict(self, tokens: int, k: float, context: float = 0.0, prefill: bool = False) -> Prediction:
        """Seconds of a step of decoding requests, or of a prompt.

        Args:
            tokens: of the step.
            k: sub-experts per token, the mean where they differ.
            context: mean tokens of a request in the KV cache.
            prefill: the tokens are of one prompt, else each is of a request of its own.
        """
        seconds, low, high = (self._prefill if prefill else self._decode).at(tokens, k, context)
        spread = self.error(_COVERED)
        return Prediction(seconds, low * (1 - spread), high * (1 + spread), self.error())

    def predict_step(self, prefill: int, decode: int, k: float, context: float) -> float:
        """Seconds of a step with `prefill` prompt tokens and `decode` decoding requests.

        A mixed one is taken as a prompt of all its tokens, and what the context of the decoding requests adds.
        """
        return self._known(prefill, decode, round(k, 1), int(context) // 32 * 32.0)

    def _predict_step(self, prefill: int, decode: int, k: float, context: float) -> float:
        if not prefill:
            return self.predict(decode, k, context).seconds
        seconds = self.predict(prefill + decode, k, self.prefill.context[0] if decode else context, prefill=True).seconds
        if decode:
            near = self.decode.context[0]
            seconds += max(self.predict(decode, k, context).seconds - self.predict(decode, k, near).seconds, 0.0)
        return seconds

    def cost(self, tokens: int, k: float) -> float:
        """Seconds of a step of so many tokens, for schedulers: as decoding while decoding batches of that size were measured."""
        decoding = tokens <= self.decode.tokens[-1]
        return self.predict_step(
            0 if decoding else tokens, tokens if decoding else 0, k, self.decode.context[len(self.decode.context) // 2]
        )

    def error(self, share: float = 0.5) -> float:
        """The relative error that a share of the held-out points stay below; 0 where none were measured."""
        return float(np.quantile([point.error for point in self.held_out], share)) if self.held_out else 0.0

    def save(self, folder: Path) -> Path:
        """Write it beside the model; returns the file."""
        path = folder / PERFORMANCE
        write_json(path, {**asdict(self), "median_error": self.error(), "p90_error": self.error(_COVERED)})
        return path

    @classmethod
    def load(cls, folder: Path) -> "PerformanceModel | None":
        """The performance model of a checkpoint; None if it has none.

        Raises:
            InputError: the file is no performance model of this version.
        """
        path = folder / PERFORMANCE
        if not path.exists():
            return None
        check_format(path, PERFORMANCE_FORMAT, "run prism-bench again")
        return read(cls, path, "run prism-bench again")


def powers(most: int, first: int = 1, factor: int = 2) -> list[int]:
    """first, first * factor, ... up to `most`, and `most` itself."""
    values = []
    while first < most:
        values.append(first)
        first *= factor
    return [*values, most]


@dataclass(frozen=True)
class Sampling:
    """How a performance model is measured.

    Attributes:
        held_out: points between those of the grids to compare predictions with, of each kind.
        repeats: rounds after the first.
        seed: of the held-out points and the orders.
    """

    held_out: int = 12
    repeats: int = 5
    seed: int = 0


def fit(
    measure: Measure,
    full_k: int,
    grids: dict[str, LatencyGrid],
    sampling: Sampling,
    about: dict[str, Any],
    events: Events | None = None,
) -> PerformanceModel:
    """Measure a performance model.

    Every round measures every point once, in another order, so that a slow spell of the machine is spread over all of them; the first
    round warms up and is thrown away.

    Args:
        measure: seconds of one step.
        full_k: sub-experts per token at which the model is the original.
        grids: of decoding steps, "decode", and of prompt steps, "prefill"; their seconds are not read.
        sampling: how to measure.
        about: device, dtype and threads of the measurement.
        events: told of the steps that are measured.
    """
    rng, events, repeats = random.Random(sampling.seed), events or Events(), sampling.repeats
    tests = [(kind, *_between(rng, grid)) for kind, grid in grids.items() for _ in range(sampling.held_out)]
    points = [(kind, *point) for kind, grid in grids.items() for point in grid.points()] + tests
    points = list(dict.fromkeys(points))
    runs: dict[tuple[str, int, int, int], list[float]] = {point: [] for point in points}
    for repeat in range(repeats + 1):
        rng.shuffle(points)
        for number, (kind, tokens, k, context) in enumerate(points):
            seconds = measure(tokens, 1, context, k) if kind == "decode" else measure(1, tokens, context, k)
            if repeat:
                runs[kind, tokens, k, context].append(seconds)
            events.progress("steps measured", repeat * len(points) + number + 1, (repeats + 1) * len(points))
    measured: dict[str, Any] = {kind: filled(grid, {point: runs[kind, *point] for point in grid.points()}) for kind, grid in grids.items()}
    model = PerformanceModel(full_k, **about, **measured, machine=f"{platform.machine()}, {os.cpu_count()} cores")
    for kind, tokens, k, context in tests:
        predicted = model.predict(tokens, k, context, kind == "prefill").seconds
        model.held_out.append(HeldOut(kind, tokens, k, context, statistics.median(runs[kind, tokens, k, context]), predicted))
    return model


def _between(rng: random.Random, grid: LatencyGrid) -> tuple[int, int, int]:
    """A point inside the hull of a grid."""

    def value(axis: Sequence[int]) -> int:
        low = rng.randrange(max(len(axis) - 1, 1))
        return rng.randint(axis[low], axis[min(low + 1, len(axis) - 1)])

    return value(grid.tokens), value(grid.k), value(grid.context)
