"""The quality curve: perplexity with intervals, the original beside each refactored model, and the figures that a requirement may be on."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from prism_refactor.errors import UsageError
from prism_refactor.evaluation.losses import Point
from prism_refactor.evaluation.windows import Windows
from prism_refactor.formats import Cost, OperatingPoint
from prism_refactor.requirements import Requirement

RESAMPLES = 1000
CONFIDENCE = (2.5, 97.5)


class Bootstrap:
    """Perplexities of one text with their bootstrap: the same resampled windows for every model, so that differences are paired.

    Args:
        windows: the text.
        seed: of the resampling.
    """

    def __init__(self, windows: Windows, seed: int):
        self.counts = windows.scored.sum(1).double().numpy()
        self.domains = windows.domains
        rows = len(self.counts)
        draws = np.random.default_rng(seed).integers(rows, size=(RESAMPLES, rows))
        self._weights = np.stack([np.bincount(draw, minlength=rows) for draw in draws]).astype(np.float64)

    def perplexity(self, sums: torch.Tensor) -> tuple[float, np.ndarray]:
        """(token-weighted perplexity, its value in each resample) from the summed loss of each window, float64 [S]."""
        losses = sums.numpy()
        resampled = np.exp(self._weights @ losses / (self._weights @ self.counts))
        return float(np.exp(losses.sum() / self.counts.sum())), resampled

    def by_domain(self, sums: torch.Tensor) -> dict[str, float]:
        """Perplexity of each domain."""
        found = {}
        for domain in sorted(set(self.domains)):
            own = np.array([name == domain for name in self.domains])
            found[domain] = float(np.exp(sums.numpy()[own].sum() / self.counts[own].sum()))
        return found


def measured(
    sampled: Bootstrap,
    original: dict[float, Any],
    point: Point,
    full: int,
    cost: Cost,
    sums: torch.Tensor,
    active: list[float],
    sample: list[float],
) -> OperatingPoint:
    """Figures of one operating point.

    Args:
        sampled: the text's bootstrap.
        original: the original's losses [S] by active share; holds 1.0.
        point: the operating point; what is recovered is measured at the share that it asks for.
        full: k at which everything runs.
        cost: per token.
        sums: float64 [S], its losses.
        active, sample: see `Losses`, of this point.
    """
    value, resampled = sampled.perplexity(sums)
    asked = point.k / full if point.budget is None else point.budget
    figures: dict[str, Any] = {}
    if point.budget is not None:
        figures = {"by_layer": active, "by_token": sample}
    if asked in original:
        theirs, theirs_resampled = sampled.perplexity(original[asked])
        whole, whole_resampled = sampled.perplexity(original[1.0])
        figures |= {"ratio": value / theirs, "ratio_interval": _interval(resampled / theirs_resampled)}
        if asked < 1 and theirs > whole:
            with np.errstate(divide="ignore", invalid="ignore"):
                shares = (theirs_resampled - resampled) / (theirs_resampled - whole_resampled)
            figures |= {"recovered": (theirs - value) / (theirs - whole), "recovered_interval": _interval(shares)}
    share = asked if point.budget is None else sum(active) / len(active) / full
    return OperatingPoint(point.k, share, cost, value, _interval(resampled), sampled.by_domain(sums), point.budget, **figures)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(values, CONFIDENCE)
    return float(low), float(high)


def checked_budgets(budgets: Iterable[float]) -> list[float]:
    """Some budgets, rising. Raises UsageError when one is no share above 0 and at most 1."""
    found = sorted(set(budgets))
    for budget in found:
        if not 0 < budget <= 1:
            raise UsageError(f"`budget` {budget:g}: choose a share above 0 and at most 1")
    return found


# The figures that a requirement may be on, and that each has a position.
FIGURES = {"recovered": True, "ratio": True, "perplexity": True}


def check_position(requirement: Requirement, choices: list[int], full: int) -> None:
    """Raise UsageError when a requirement is at a k that is not among `choices`, or on a figure that does not exist there."""
    k = requirement.k(full)
    if k not in choices:
        raise UsageError(
            f"`require` '{requirement.text}': not among the evaluated k ({', '.join(map(str, choices))}); add it with `choices`"
        )
    if requirement.figure == "recovered" and k == full:
        raise UsageError(f"`require` '{requirement.text}': there is no 'recovered' at k = {full}, where nothing is lost")


def figure(requirement: Requirement, points: list[OperatingPoint], full: int) -> float:
    """Return the figure of a requirement on one curve, at its position.

    Args:
        requirement: on one of `FIGURES`.
        points: of the curve.
        full: k at which everything runs.

    Raises:
        UsageError: as `check_position`, or the original has no such setting to compare with.
    """
    by_k = {point.k: point for point in points}
    check_position(requirement, list(by_k), full)
    point = by_k[int(requirement.k(full))]
    value = getattr(point, requirement.figure)
    if value is None:
        raise UsageError(f"`require` '{requirement.text}': there is no '{requirement.figure}' at k = {point.k}")
    return value
