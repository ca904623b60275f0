import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys

import numpy as np
import numpy_kernels
import pytest
from deap import tools
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import config
from scipy.optimize import linear_sum_assignment

from prism_refactor import solvers
from prism_refactor.errors import UsageError
from prism_refactor.solvers import kernels

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


@PROPERTIES
@given(problems(), st.integers(0, 2**32 - 1))
def test_a_short_search_is_never_worse_than_its_starts(problem, seed):
    saliency, num_groups, kept = problem
    found = solvers.solve(saliency, num_groups, kept, "genetic", seed, short=True)
    assert (np.bincount(found.labels) == saliency.shape[1] // num_groups).all()
    assert found.loss <= min(solvers.solve(saliency, num_groups, kept, method, seed).loss for method in ("greedy", "annealing")) + 1e-7


def test_wide_problems_get_a_short_search(monkeypatch):
    saliency = np.random.default_rng(0).exponential(size=(200, 64)).astype(np.float32)
    short, long = (solvers.solve(saliency, 4, 1, "genetic", 0, short=short).labels for short in (True, False))
    module = importlib.import_module("prism_refactor.solvers.genetic")
    assert (solvers.solve(saliency, 4, 1, "genetic", 0).labels == long).all()
    monkeypatch.setattr(module, "LARGE", saliency.size - 1)
    assert (solvers.solve(saliency, 4, 1, "genetic", 0).labels == short).all()
    assert (short != long).any()


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


@pytest.mark.skipif(config.DISABLE_JIT, reason="nothing is compiled")
def test_inner_loops_are_the_same_in_numpy():
    rng = np.random.default_rng(0)
    tokens, neurons, num_groups = 33, 12, 4

    def row(dtype=np.float32):
        # Whole numbers: many ties, and sums without rounding.
        return rng.integers(0, 6, tokens).astype(dtype)

    labels = rng.permutation(np.repeat(np.arange(num_groups, dtype=np.int32), neurons // num_groups))
    ordered = -np.sort(-np.stack([row(), row(), row()]), axis=0)
    pair = np.stack([ordered[1], ordered[rng.integers(3)]]).astype(np.float64)
    flags, room = np.zeros(tokens, np.float32), rng.integers(0, 2, tokens).astype(np.float64)
    square = np.zeros((num_groups, num_groups))
    arguments = {
        "group_sums": [np.stack([row() for _ in range(neurons)]), labels, num_groups],
        "copy": [row(np.float64), row()],
        "exchange": [row(), row()],
        "mark_above": [row(np.float64), row(np.float64), flags, room],
        "mark_equal": [row(np.float64), row(np.float64), flags, room],
        "dot": [row(), row()],
        "best_moves": [rng.random((num_groups, neurons)), labels, 2, square, square.astype(np.int64)],
        "halve": [row(np.float64), row(np.float64), row()],
        "raise_floor": [*pair, ordered, np.float32(-1), row()],
        "swapped": [row(), row(), row(), row()],
        "swap_gain": [row(), row(), row(), row()],
        "swap": [row(np.float64), row(np.float64), row(), row(), row()],
    }
    assert set(arguments) == {name for name, value in vars(numpy_kernels).items() if callable(value)}
    for name, given_arguments in arguments.items():
        outcomes = []
        for module in (kernels, numpy_kernels):
            copies = [argument.copy() if isinstance(argument, np.ndarray) else argument for argument in given_arguments]
            outcomes.append([getattr(module, name)(*copies), *copies])
        for compiled, numpy in zip(*outcomes, strict=True):
            assert (compiled is None) == (numpy is None), name
            assert compiled is None or np.array_equal(compiled, numpy), name
        assert outcomes[0][0] is not None or any(
            not np.array_equal(before, after) for before, after in zip(given_arguments, outcomes[0][1:], strict=True)
        ), f"{name} did nothing"


@pytest.mark.long
def test_without_a_compiler_every_method_ends_where_it_does_with_one():
    script = """
import json, numpy
from prism_refactor import solvers
saliency = numpy.abs(numpy.random.default_rng(0).standard_t(2, (60, 16))).astype(numpy.float32)
options = {name: {} for name in solvers.SOLVERS if name != "metis"} | {"genetic": {"generations": 1}}
print(json.dumps({name: solvers.solve(saliency, 4, 2, name, 5, **given).loss for name, given in options.items()}))
"""
    losses = []
    for disabled in ("0", "1"):
        environment = {**os.environ, "NUMBA_DISABLE_JIT": disabled}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        losses.append(json.loads(done.stdout))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_genetic_takes_a_budget_and_reports_its_generations():
    saliency = clustered(200, 64, 8)
    log = tools.Logbook()
    solvers.solve(saliency, 8, 2, "genetic", 0, generations=3, patience=5, population=4, statistics=log)
    best = log.select("best")
    assert len(best) == 1 + 3
    assert best == sorted(best)
    short = tools.Logbook()
    solvers.solve(saliency, 8, 2, "genetic", 0, patience=50, generations=50, seconds=0.0, statistics=short)
    assert len(short) == 1


def test_genetic_takes_the_callers_operators():
    calls = []

    def mutate(individual):
        calls.append(individual.copy())
        individual[:] = individual[::-1].copy()
        return (individual,)

    def unbalance(individual):
        individual[:] = 0
        return (individual,)

    saliency = clustered(100, 16, 4)
    partition = solvers.solve(saliency, 4, 1, "genetic", 0, crossover=0.0, generations=2, operators={"mutate": mutate})
    assert len(calls) == 2 * 8
    assert (np.bincount(partition.labels) == 4).all()
    for bad, message in (({"mutat": mutate}, "no operator 'mutat'"), ({"mutate": unbalance}, "unbalanced")):
        with pytest.raises(UsageError, match=message):
            solvers.solve(saliency, 4, 1, "genetic", 0, crossover=0.0, operators=bad)


@pytest.mark.parametrize(
    "option", [{"population": 1}, {"offspring": 0}, {"generations": 0}, {"patience": 0}, {"swaps": 0}, {"crossover": 2}]
)
def test_genetic_refuses_options_out_of_range(option):
    with pytest.raises(UsageError, match=next(iter(option))):
        solvers.solve(clustered(20, 16, 4), 4, 1, "genetic", 0, **option)


def test_metis_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(UsageError, match=r"prism-refactor\[metis\]"):
        solvers.solve(clustered(50, 16, 4), 4, 1, "metis")


@PROPERTIES
@given(problems(), st.integers(0, 2**32 - 1))
def test_loss_does_not_depend_on_the_order_of_tokens_and_neurons(problem, seed):
    saliency, num_groups, kept = problem
    rng = np.random.default_rng(seed)
    labels = solvers.solve(saliency, num_groups, kept, "random", seed).labels
    tokens, neurons = rng.permutation(saliency.shape[0]), rng.permutation(saliency.shape[1])
    shuffled = solvers.Problem(saliency[tokens][:, neurons], num_groups, kept)
    assert shuffled.loss(labels[neurons]) == pytest.approx(solvers.Problem(saliency, num_groups, kept).loss(labels), abs=1e-9)


@PROPERTIES
@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_exchange_graph_finds_the_optimal_assignment(num_groups, size, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(num_groups, num_groups * size))
    labels = rng.permutation(np.repeat(np.arange(num_groups, dtype=np.int32), size))
    kernels.improve_assignment(values, labels)
    rows, columns = linear_sum_assignment(np.repeat(values, size, axis=0), maximize=True)
    best = np.repeat(values, size, axis=0)[rows, columns].sum()
    assert values[labels, np.arange(len(labels))].sum() == pytest.approx(best)
    assert (np.bincount(labels, minlength=num_groups) == size).all()


@pytest.mark.parametrize("kept", [1, 2])
def test_genetic_finds_the_optimum_of_small_problems(kept):
    num_groups, neurons = kept + 1, 6
    for seed in range(5):
        saliency = np.abs(np.random.default_rng(seed).standard_t(2, (30, neurons))).astype(np.float32)
        balanced = (
            np.array(labels, dtype=np.int32)
            for labels in itertools.product(range(num_groups), repeat=neurons)
            if (np.bincount(labels, minlength=num_groups) == neurons // num_groups).all()
        )
        optimum = min(naive_loss(saliency, labels, num_groups, kept) for labels in balanced)
        assert solvers.solve(saliency, num_groups, kept, "genetic", seed).loss == pytest.approx(optimum, abs=1e-6)


def test_planted_clusters_are_found_and_the_methods_are_ranked():
    saliency = clustered(400, 64, 4)
    loss = {method: solvers.solve(saliency, 4, 1, method, 0).loss for method in METHODS}
    assert loss["genetic"] <= min(loss.values()) + 1e-9
    planted = [method for method in METHODS if method not in ("random", "contiguous", "greedy")]
    assert max(loss[method] for method in planted) < 0.1 < min(loss["random"], loss["contiguous"])


def test_solvers_leave_the_callers_random_state_alone():
    random.seed(3)
    np.random.seed(3)
    state, legacy = random.getstate(), np.random.get_state()[1].copy()
    solvers.solve(clustered(50, 16, 4), 4, 2, "genetic", 7)
    assert random.getstate() == state
    assert (np.random.get_state()[1] == legacy).all()


@pytest.mark.parametrize(
    ("saliency", "num_groups", "kept", "method", "message"),
    [
        (np.ones((3, 8)), 3, 1, "random", "8 neurons cannot be split into 3"),
        (np.ones((3, 8)), 4, 4, "random", "kept must be between 1 and 3"),
        (np.ones((3, 8)), 4, 0, "random", "kept must be"),
        (np.ones((0, 8)), 4, 1, "random", "non-empty"),
        (-np.ones((3, 8)), 4, 1, "random", "non-negative"),
        (np.full((3, 8), np.nan), 4, 1, "random", "finite"),
        (np.ones((3, 8)), 4, 1, "nonsense", "unknown solver 'nonsense'"),
    ],
)
def test_bad_problems_are_refused(saliency, num_groups, kept, method, message):
    with pytest.raises(UsageError, match=message):
        solvers.solve(saliency, num_groups, kept, method)


def test_dead_experts_have_a_partition():
    partition = solvers.solve(np.zeros((10, 8), np.float32), 4, 1)
    assert partition.loss == 0
    assert (np.bincount(partition.labels) == 2).all()
