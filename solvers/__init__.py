"""Balanced neuron partitioners (saliency [tokens, neurons] in, partition out) and ridge regression. Knows nothing of models."""

from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from prism_refactor.errors import UsageError
from prism_refactor.solvers import methods
from prism_refactor.solvers.genetic import genetic
from prism_refactor.solvers.problem import Partition, Problem
from prism_refactor.solvers.regression import ridge

SOLVERS: dict[str, Callable[..., np.ndarray]] = {
    "genetic": genetic,
    "annealing": methods.annealing,
    "ascent": methods.ascent,
    "greedy": methods.greedy,
    "kmeans": methods.kmeans,
    "spectral": methods.spectral,
    "metis": methods.metis,
    "random": methods.random,
    "contiguous": methods.contiguous,
}


def solve(
    saliency: np.ndarray,
    num_groups: int,
    kept: int,
    method: str = "genetic",
    seed: int = 0,
    weights: np.ndarray | None = None,
    **options: Any,
) -> Partition:
    """Partition neurons into equal groups that fire together.

    Args:
        saliency: float32 [B tokens, C neurons], non-negative: how much each neuron matters to each token.
        num_groups: N, divides C.
        kept: groups a token keeps in the objective, 1 <= kept < N.
        method: a name in `SOLVERS`.
        seed: equal seeds give equal bytes, in any process.
        weights: float32 [C], multiplied into the saliency.
        options: of the method; see `solvers.genetic.genetic`, the only one that has any.

    Returns:
        The partition and its dropped share (see `Problem`).

    Raises:
        UsageError: unknown method, or the numbers do not describe a problem.
    """
    if method not in SOLVERS:
        raise UsageError(f"unknown solver '{method}'; choose one of {', '.join(SOLVERS)}")
    problem = Problem(saliency, num_groups, kept, weights)
    with threadpool_limits(1):
        return Partition.of(problem, SOLVERS[method](problem, seed, **options))


__all__ = ["SOLVERS", "Partition", "Problem", "ridge", "solve"]
