"""The other partitioners, each `(problem, seed) -> int32 [C] labels`."""

import warnings

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from solvers import kernels
from solvers.problem import Problem

ASCENT_STARTS = 8
ANNEALING_ITERATIONS = 100_000
ANNEALING_TEMPERATURE = 100.0
ANNEALING_COOLING = 0.995


def contiguous(problem: Problem, seed: int) -> np.ndarray:
    """Neurons as they are stored: what splitting without partitioning gives. `seed` is not used."""
    return problem.contiguous()


def random(problem: Problem, seed: int) -> np.ndarray:
    """A random balanced partition: the floor every other method has to beat."""
    return problem.random(np.random.default_rng(seed))


def greedy(problem: Problem, seed: int) -> np.ndarray:
    """The paper's start: heaviest neuron first, each to the lightest group that has room. Deterministic; `seed` is not used."""
    weight = problem.saliency.sum(0, dtype=np.float64)
    labels = np.empty(problem.neurons, dtype=np.int32)
    load = np.zeros(problem.num_groups)
    room = np.full(problem.num_groups, problem.neurons // problem.num_groups)
    for neuron in np.argsort(-weight, kind="stable"):
        group = np.argmin(np.where(room > 0, load, np.inf))
        labels[neuron] = group
        load[group] += weight[neuron]
        room[group] -= 1
    return labels


def ascent(problem: Problem, seed: int) -> np.ndarray:
    """The best of several random partitions, each improved by alternating top-m selection and optimal balanced assignment."""
    rng = np.random.default_rng(seed)
    best, best_labels = -np.inf, problem.contiguous()
    for _ in range(ASCENT_STARTS):
        labels = problem.random(rng)
        kept = kernels.ascend(problem.saliency, labels, problem.num_groups, problem.kept)
        if kept > best:
            best, best_labels = kept, labels
    return best_labels


def annealing(problem: Problem, seed: int) -> np.ndarray:
    """The paper's solver: greedy start, 100,000 neuron swaps, T0 = 100, cooling 0.995 a swap. Compiled."""
    labels = greedy(problem, seed)
    kernels.anneal(
        np.ascontiguousarray(problem.saliency.T),
        labels,
        problem.num_groups,
        problem.kept,
        ANNEALING_ITERATIONS,
        ANNEALING_TEMPERATURE,
        ANNEALING_COOLING,
        seed % 2**32,
    )
    return labels


def kmeans(problem: Problem, seed: int) -> np.ndarray:
    """scikit-learn KMeans on the neurons' activation profiles (unit length), re-balanced by optimal assignment to the centres."""
    profiles = problem.saliency.T / np.maximum(np.linalg.norm(problem.saliency, axis=0), 1e-12)[:, None]
    with warnings.catch_warnings():
        # Fewer distinct profiles than groups is no concern here: the groups are re-balanced anyway.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(problem.num_groups, n_init=2, random_state=seed % 2**32).fit(profiles)
    labels = problem.random(np.random.default_rng(seed))
    kernels.improve_assignment(-(model.transform(profiles).T.astype(np.float64) ** 2), labels)
    return labels
