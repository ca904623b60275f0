"""The other partitioners, each `(problem, seed) -> int32 [C] labels`."""

import warnings

import numpy as np
from threadpoolctl import threadpool_limits

from prism_refactor.errors import UsageError
from prism_refactor.solvers import kernels
from prism_refactor.solvers.problem import Problem

# Random partitions that `ascent` starts from, and the annealing of each: swaps per neuron and group.
ASCENT_STARTS, ASCENT_SWAPS = 2, 40
# Temperatures, in units of `Problem.swap_scale`, and how many swaps in a row between the same two groups.
ASCENT_WARM, ASCENT_COLD, RUN = 1.0, 0.03, 50
ANNEALING_ITERATIONS = 100_000
ANNEALING_TEMPERATURE = 100.0
ANNEALING_COOLING = 0.995
METIS_NEIGHBOURS = 32
# METIS takes whole numbers as edge weights.
METIS_WEIGHT = 1000


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
    """The best of several short annealings, each then improved by alternating top-m selection and optimal balanced assignment.

    From random partitions themselves the alternation ends far above the paper's annealing where neurons are independent, or N is large.
    """
    rng = np.random.default_rng(seed)
    starts = [problem.random(rng) for _ in range(ASCENT_STARTS)]
    for labels in starts:
        cool(problem, labels, ASCENT_SWAPS, ASCENT_WARM, ASCENT_COLD, rng)
    kept = [kernels.ascend(problem.by_neuron, labels, problem.num_groups, problem.kept) for labels in starts]
    return starts[int(np.argmax(kept))]


def cool(problem: Problem, labels: np.ndarray, swaps: int, start: float, end: float, rng: np.random.Generator) -> None:
    """Anneal in place with `swaps` per neuron and group, from temperature `start` down to `end`, in units of `problem.swap_scale`."""
    total = swaps * problem.neurons * problem.num_groups
    cooling = (end / start) ** (1 / total)
    temperature = start * problem.swap_scale
    kernels.anneal(problem.by_neuron, labels, problem.num_groups, problem.kept, total, temperature, cooling, RUN, rng)


def annealing(problem: Problem, seed: int) -> np.ndarray:
    """The paper's solver: greedy start, 100,000 neuron swaps, T0 = 100, cooling 0.995 a swap. Compiled; draws of its own."""
    labels = greedy(problem, seed)
    kernels.anneal(
        problem.by_neuron,
        labels,
        problem.num_groups,
        problem.kept,
        ANNEALING_ITERATIONS,
        ANNEALING_TEMPERATURE,
        ANNEALING_COOLING,
        1,
        np.random.default_rng(seed),
    )
    return labels


def kmeans(problem: Problem, seed: int) -> np.ndarray:
    """scikit-learn KMeans on the neurons' activation profiles (unit length), re-balanced by optimal assignment to the centres."""
    from sklearn.cluster import KMeans  # noqa: PLC0415  (slow to import, and worker processes hardly ever need it)
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415

    profiles = _profiles(problem)
    # Its import loads the threads it brings, which the limit in `solve` came too early for.
    with threadpool_limits(1), warnings.catch_warnings():
        # Fewer distinct profiles than groups is no concern here: the groups are re-balanced anyway.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(problem.num_groups, n_init=2, random_state=seed % 2**32).fit(profiles)
    labels = problem.random(np.random.default_rng(seed))
    kernels.improve_assignment(-(model.transform(profiles).T.astype(np.float64) ** 2), labels)
    return labels


def spectral(problem: Problem, seed: int) -> np.ndarray:
    """scikit-learn SpectralClustering of the co-activation graph (cosine of the neurons' profiles), re-balanced exactly."""
    from sklearn.cluster import SpectralClustering  # noqa: PLC0415  (as above)

    if problem.neurons <= problem.num_groups + 1:
        # Too small for the eigenvectors that scikit-learn asks for.
        return problem.random(np.random.default_rng(seed))
    graph = _coactivation(problem)
    with threadpool_limits(1), warnings.catch_warnings():
        # A graph that falls apart is what clustering hopes for.
        warnings.simplefilter("ignore")
        model = SpectralClustering(problem.num_groups, affinity="precomputed", assign_labels="cluster_qr", random_state=seed % 2**32)
        found = model.fit_predict(graph)
    return _balanced(graph, found, problem, seed)


def metis(problem: Problem, seed: int) -> np.ndarray:
    """METIS (pymetis, optional extra `metis`) on the co-activation graph's strongest edges, re-balanced exactly.

    Raises:
        UsageError: pymetis is not installed.
    """
    try:
        import pymetis  # noqa: PLC0415  (optional)
    except ImportError:
        raise UsageError("solver 'metis' needs pymetis; install prism-refactor[metis]") from None
    graph = _coactivation(problem)
    strongest = np.argsort(-graph, axis=1, kind="stable")[:, : min(METIS_NEIGHBOURS, problem.neurons - 1)]
    edges = np.zeros_like(graph, dtype=bool)
    np.put_along_axis(edges, strongest, True, axis=1)
    np.fill_diagonal(edges, False)
    edges |= edges.T
    weights = np.maximum(1, np.rint(graph / max(graph.max(), 1e-30) * METIS_WEIGHT)).astype(np.int64)
    adjacency = pymetis.CSRAdjacency(np.concatenate([[0], np.cumsum(edges.sum(1))]), np.nonzero(edges)[1])
    options = pymetis.Options(seed=seed % 2**31)
    _, found = pymetis.part_graph(problem.num_groups, adjacency, eweights=weights[edges].tolist(), options=options)
    return _balanced(graph, np.array(found), problem, seed)


def _profiles(problem: Problem) -> np.ndarray:
    """Unit-length rows [C, B]."""
    return problem.by_neuron / np.maximum(np.linalg.norm(problem.by_neuron, axis=1), 1e-12)[:, None]


def _coactivation(problem: Problem) -> np.ndarray:
    """Cosines of the neurons' profiles, [C, C], without the neurons themselves."""
    profiles = _profiles(problem)
    graph = profiles @ profiles.T
    np.fill_diagonal(graph, 0)
    return graph


def _balanced(graph: np.ndarray, found: np.ndarray, problem: Problem, seed: int) -> np.ndarray:
    """Equal groups nearest to the clusters `found`: every neuron to the group with whose cluster it is most connected, optimally."""
    members = np.eye(problem.num_groups)[found]
    values = (graph @ members / np.maximum(members.sum(0), 1)).T.astype(np.float64)
    labels = problem.random(np.random.default_rng(seed))
    kernels.improve_assignment(np.ascontiguousarray(values), labels)
    return labels
