import importlib.util
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import kernels

PROPERTIES = settings(max_examples=25, deadline=None)
METHODS = [name for name in solvers.SOLVERS if name != "metis" or importlib.util.find_spec("pymetis")]


def naive_loss(saliency, labels, num_groups, kept):
    sums = np.stack([saliency[:, labels == group].astype(np.float64).sum(1) for group in range(num_groups)], axis=1)
    dropped = np.sort(sums, axis=1)[:, : num_groups - kept].sum()
    return dropped / max(saliency.astype(np.float64).sum(), 1e-30)


@st.composite
def problems(draw):
    num_groups = draw(st.sampled_from([2, 3, 4, 8]))
    neurons = num_groups * draw(st.integers(1, 6))
    kept = draw(st.integers(1, num_groups - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 40)), neurons)
    # Heavy tails, or small whole numbers with their ties and zeros.
    saliency = np.abs(rng.standard_t(2, shape)) if draw(st.booleans()) else rng.integers(0, 3, shape)
    return saliency.astype(np.float32), num_groups, kept


def clustered(tokens, neurons, clusters, seed=0):
    """Activations with a planted structure: each token fires one cluster of neurons, hidden by a random permutation."""
    rng = np.random.default_rng(seed)
    fires = rng.integers(clusters, size=tokens)[:, None] == rng.permutation(np.arange(neurons) % clusters)[None]
    return (fires * rng.random((tokens, neurons)) + 0.01 * rng.random((tokens, neurons))).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@PROPERTIES
@given(problems(), st.integers(0, 2**32 - 1))
def test_partition_is_balanced_and_its_loss_is_the_naive_one(method, problem, seed):
    saliency, num_groups, kept = problem
    partition = solvers.solve(saliency, num_groups, kept, method, seed)
    assert (np.bincount(partition.labels, minlength=num_groups) == saliency.shape[1] // num_groups).all()
    assert partition.loss == pytest.approx(naive_loss(saliency, partition.labels, num_groups, kept), abs=1e-6)
    again = solvers.solve(saliency, num_groups, kept, method, seed)
    assert again.labels.tobytes() == partition.labels.tobytes()


@PROPERTIES
@given(problems(), st.integers(0, 2**32 - 1))
def test_ascent_never_loses(problem, seed):
    instance = solvers.Problem(*problem)
    labels = instance.random(np.random.default_rng(seed))
    before = instance.loss(labels)
    kept = kernels.ascend(instance.by_neuron, labels, instance.num_groups, instance.kept)
    assert instance.loss(labels) <= before + 1e-9
    assert kept == pytest.approx((1 - instance.loss(labels)) * saliency_sum(instance), rel=1e-6)


def saliency_sum(problem):
    return problem.saliency.sum(dtype=np.float64)


@PROPERTIES
@given(problems(), st.integers(0, 2**32 - 1))
def test_gain_of_a_swap_is_the_naive_difference(problem, seed):
    saliency, num_groups, kept = problem
    instance = solvers.Problem(*problem)
    rng = np.random.default_rng(seed)
    labels = instance.random(rng)
    gone, came = rng.integers(len(labels), size=2)
    p, q = labels[gone], labels[came]
    if p == q:
        return
    sums = kernels.group_sums(instance.by_neuron, labels, num_groups)
    assert sums == pytest.approx(np.stack([saliency[:, labels == n].sum(1) for n in range(num_groups)]), rel=1e-5)
    tokens = len(saliency)
    ordered = np.empty(sums.shape, np.float32)
    kernels.order_groups(sums, ordered)
    assert (ordered == -np.sort(-sums.astype(np.float32), axis=0)).all()
    half, floor = np.empty(tokens, np.float32), np.empty(tokens, np.float32)
    kernels.pair_terms(sums, ordered, p, q, kept, half, floor)
    gain = kernels.swap_gain(half, floor, instance.by_neuron[gone], instance.by_neuron[came])
    swapped = labels.copy()
    swapped[[gone, came]] = q, p
    total = saliency_sum(instance)
    expected = (naive_loss(saliency, labels, num_groups, kept) - naive_loss(saliency, swapped, num_groups, kept)) * total
    assert gain == pytest.approx(expected, abs=1e-5 * total)


@PROPERTIES
@given(problems(), st.integers(0, 2**32 - 1))
def test_swap_descent_ends_where_no_swap_gains(problem, seed):
    saliency, num_groups, kept = problem
    instance = solvers.Problem(*problem)
    labels = instance.random(np.random.default_rng(seed))
    before = instance.loss(labels)
    kernels.swap_descent(instance.by_neuron, labels, num_groups, kept)
    loss = instance.loss(labels)
    assert loss <= before + 1e-9
    for first, second in itertools.combinations(range(len(labels)), 2):
        if labels[first] != labels[second]:
            swapped = labels.copy()
            swapped[[first, second]] = labels[[second, first]]
            assert naive_loss(saliency, swapped, num_groups, kept) >= loss - 1e-6


@PROPERTIES
@given(problems(), st.integers(0, 2**32 - 1))
def test_genetic_is_never_worse_than_what_it_starts_from(problem, seed):
    saliency, num_groups, kept = problem
    loss = {method: solvers.solve(saliency, num_groups, kept, method, seed).loss for method in ("genetic", "ascent", "greedy", "annealing")}
    assert loss["genetic"] <= min(loss.values()) + 1e-7


@pytest.mark.parametrize(("num_groups", "kept"), [(4, 1), (16, 8)])
def test_ascent_ends_below_the_papers_annealing_on_independent_neurons(num_groups, kept):
    saliency = np.abs(np.random.default_rng(0).standard_t(2, (1024, 256))).astype(np.float32)
    loss = {method: solvers.solve(saliency, num_groups, kept, method).loss for method in ("ascent", "annealing")}
    assert loss["ascent"] < loss["annealing"]


@PROPERTIES
@given(problems(), st.integers(0, 2**32 - 1))
def test_weights_multiply_the_saliency(problem, seed):
    saliency, num_groups, kept = problem
    weights = np.random.default_rng(seed).random(saliency.shape[1], dtype=np.float32)
    weighted = solvers.solve(saliency, num_groups, kept, "ascent", seed, weights)
    assert (weighted.labels == solvers.solve(saliency * weights, num_groups, kept, "ascent", seed).labels).all()
