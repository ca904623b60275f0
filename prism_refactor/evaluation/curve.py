"""The quality curve: perplexity with intervals, the original beside each refactored model, and the figures that a requirement may be on."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from prism_refactor.errors import UsageError
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
    sums: torch.Tensor,
    k: tuple[int, ...],
    full: int,
    cost: Cost,
    original: dict[float, Any],
    budget: float | None = None,
    active: float = math.nan,
) -> OperatingPoint:
    """Figures of one operating point.

    Args:
        sampled: the text's bootstrap.
        sums: float64 [S], its losses.
        k: per layer.
        full: k at which everything runs.
        cost: per token.
        original: the original's losses [S] by active share; holds 1.0.
        budget: the share that was asked for, if it was; what is recovered is measured there.
        active: then the share that ran.
    """
    value, resampled = sampled.perplexity(sums)
    share = sum(k) / len(k) / full if budget is None else active
    asked = share if budget is None else budget
    comparison: dict[str, Any] = {}
    if asked in original:
        theirs, theirs_resampled = sampled.perplexity(original[asked])
        whole, whole_resampled = sampled.perplexity(original[1.0])
        comparison = {"ratio": value / theirs, "ratio_interval": _interval(resampled / theirs_resampled)}
        if asked < 1 and theirs > whole:
            with np.errstate(divide="ignore", invalid="ignore"):
                shares = (theirs_resampled - resampled) / (theirs_resampled - whole_resampled)
            comparison |= {"recovered": (theirs - value) / (theirs - whole), "recovered_interval": _interval(shares)}
    number: int | list[int] = k[0] if len(set(k)) == 1 else list(k)
    return OperatingPoint(number, share, cost, value, _interval(resampled), sampled.by_domain(sums), budget, **comparison)


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
    uniform = {point.k: point for point in points if isinstance(point.k, int)}
    check_position(requirement, list(uniform), full)
    point = uniform[int(requirement.k(full))]
    value = getattr(point, requirement.figure)
    if value is None:
        raise UsageError(f"`require` '{requirement.text}': there is no '{requirement.figure}' at k = {point.k}")
    return value
