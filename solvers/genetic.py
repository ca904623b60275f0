"""The default partitioner: a memetic genetic algorithm on DEAP."""

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from deap import algorithms, base, creator, tools
from scipy.optimize import linear_sum_assignment

from prism_refactor.errors import UsageError
from prism_refactor.solvers import kernels, methods
from prism_refactor.solvers.problem import Problem

# Partitions kept, and made per generation.
POPULATION = 8
# Generations without gain that end the search: so many at least, N / 4 with many groups, and 256 / C in problems so small that a
# generation costs next to nothing.
PATIENCE, SMALL = 3, 256
GENERATIONS_PER_PATIENCE = 3
# Neurons x tokens above which the search is short: what a longer one gains does not show on other tokens (docs/solvers.md).
LARGE, SHORT_POPULATION, SHORT_GENERATIONS = 2**21, 4, 1
# Each generation without gain doubles the annealing of the next, up to this many times.
DOUBLINGS = 2
CROSSOVER = 0.8
MUTATED_SHARE = 0.03
# Swaps tried per neuron and group: in the annealing of offspring, in that of the final partition, and in that of a short search.
SWAPS, FINAL_SWAPS, SHORT_FINAL_SWAPS = 5, 150, 50
# Temperatures (`methods.cool`). Offspring: from a random one between the first two down to the third; the final partition: from the
# second to the fourth.
WARMEST, WARM, COLD, COLDEST = 0.6, 0.3, 0.03, 0.001
# A smaller relative gain is none.
GAIN = 1e-7

creator.create("PrismFitness", base.Fitness, weights=(1.0,))
creator.create("PrismIndividual", np.ndarray, fitness=creator.PrismFitness)


@contextmanager
def _seeded_random(seed: int) -> Iterator[None]:
    """DEAP draws from the global `random`: seed it for one task and give the caller's state back."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _fill(labels: np.ndarray, num_groups: int, rng: np.random.Generator) -> None:
    """Give the unassigned neurons (-1) to groups with room, at random, in place."""
    free = np.flatnonzero(labels < 0)
    room = len(labels) // num_groups - np.bincount(labels[labels >= 0], minlength=num_groups)
    labels[free] = rng.permutation(np.repeat(np.arange(num_groups), room))


def _mate(first: Any, second: Any, num_groups: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Match the parents' groups by overlap, keep the neurons both place alike, deal out the rest."""
    overlap = np.zeros((num_groups, num_groups))
    np.add.at(overlap, (first, second), 1)
    matched = np.empty(num_groups, dtype=np.int32)
    rows, columns = linear_sum_assignment(-overlap)
    matched[columns] = rows
    child = np.where(first == matched[second], first, -1)
    _fill(child, num_groups, rng)
    # varOr keeps the first of the two.
    first[:] = child
    return first, second


def _mutate(individual: Any, num_groups: int, rng: np.random.Generator) -> tuple[Any]:
    """Take a few of the neurons, at least two, out of their groups and deal them out again."""
    individual[rng.permutation(len(individual))[: max(2, round(MUTATED_SHARE * len(individual)))]] = -1
    _fill(individual, num_groups, rng)
    return (individual,)


def _select_distinct(individuals: list[Any], count: int) -> list[Any]:
    """The best `count` individuals, no two of equal fitness while others remain: ties aside, equal loss means the same partition."""
    distinct = {individual.fitness.values: individual for individual in reversed(individuals)}
    chosen = tools.selBest(list(distinct.values()), count)
    return chosen + tools.selBest(individuals, count - len(chosen))


class _Evaluation:
    """Lamarckian fitness: improves a partition in place and returns what it keeps, as DEAP wants it."""

    def __init__(self, problem: Problem, swaps: int, rng: np.random.Generator):
        # Swaps per neuron and group in the annealing of the next child.
        self.problem, self.swaps, self.rng = problem, swaps, rng

    def ascended(self, individual: np.ndarray) -> tuple[float]:
        """After alternating ascent."""
        problem = self.problem
        return (kernels.ascend(problem.by_neuron, individual.view(np.ndarray), problem.num_groups, problem.kept),)

    def annealed(self, individual: np.ndarray) -> tuple[float]:
        """After an annealing of `self.swaps` swaps per neuron and group from a random temperature, then ascent."""
        warm = WARM * (WARMEST / WARM) ** self.rng.random()
        methods.cool(self.problem, individual.view(np.ndarray), self.swaps, warm, COLD, self.rng)
        return self.ascended(individual)

    def cooled(self, labels: np.ndarray, swaps: int) -> np.ndarray:
        """A partition near `labels`, after a cool annealing of so many swaps per neuron and group, then ascent."""
        problem = self.problem
        labels = labels.copy()
        methods.cool(problem, labels, swaps, WARM, COLDEST, self.rng)
        kernels.ascend(problem.by_neuron, labels, problem.num_groups, problem.kept)
        return labels

    def polished(self, labels: np.ndarray) -> np.ndarray:
        """A swap-optimal partition near `labels`: a long, cool annealing leaves little to the exhaustive descent."""
        problem = self.problem
        labels = self.cooled(labels, FINAL_SWAPS)
        kernels.swap_descent(problem.by_neuron, labels, problem.num_groups, problem.kept)
        return labels


def _toolbox(problem: Problem, evaluation: _Evaluation, rng: np.random.Generator) -> base.Toolbox:
    toolbox = base.Toolbox()
    toolbox.register("individual", creator.PrismIndividual)
    toolbox.register("mate", _mate, num_groups=problem.num_groups, rng=rng)
    toolbox.register("mutate", _mutate, num_groups=problem.num_groups, rng=rng)
    toolbox.register("select", _select_distinct)
    toolbox.register("start", evaluation.ascended)
    toolbox.register("evaluate", evaluation.annealed)
    return toolbox


def genetic(
    problem: Problem,
    seed: int,
    population: int | None = None,
    offspring: int | None = None,
    generations: int | None = None,
    patience: int | None = None,
    seconds: float | None = None,
    crossover: float = CROSSOVER,
    swaps: int = SWAPS,
    short: bool | None = None,
    operators: Mapping[str, Callable[..., Any]] | None = None,
    statistics: tools.Logbook | None = None,
) -> np.ndarray:
    """Evolve partitions that are each a local optimum of the alternating ascent, and make the best of them swap-optimal.

    A (mu + lambda) scheme built from DEAP's own parts: mates match their groups by overlap and keep what both place alike; mutants
    have a few of their neurons dealt out again; every child is annealed from a random temperature and ascended. It starts from random
    partitions and from what the cheap methods find (`ascent`, `greedy`, the paper's `annealing`), so it is never worse than they are
    from the same seed. Restores the caller's `random` state.

    A short search has one generation of four, no start from `ascent`, which takes as long as all the rest, and no last descent. So it may
    end above `ascent`, and swaps may still gain. Where neurons x tokens are many, what a longer search gains does not show on other tokens.

    Args:
        problem: what to partition.
        seed: equal seeds give equal bytes, unless `seconds` cuts in.
        population: partitions kept; None is 8, in a short search 4.
        offspring: partitions made per generation; None is 8, in a short search 4.
        generations: at most so many; None is three times the patience, in a short search 1.
        patience: stop after so many without gain; None is 3, or N / 4, or 256 / C, whichever is most.
        seconds: stop after the generation that passes this time.
        crossover: share of the children that have two parents; the others are mutants.
        swaps: tried in the annealing of a child, per neuron and group.
        short: whether the search is short; None: where C x B is more than 2^21.
        operators: DEAP operators to register in place of ours, by their names in the toolbox: `mate` (two individuals to two, the
            first is the child), `mutate` (one to a tuple of one), `select` (individuals and a number to as many), all on int32 [C]
            arrays that stay balanced.
        statistics: filled with the best and mean kept sums of the start (generation 0) and of every generation, and the seconds so far.

    Returns:
        int32 [C] labels.

    Raises:
        UsageError: an option out of range, an unknown operator, or one that returned an unbalanced partition.
    """
    begin = time.perf_counter()
    if patience is None:
        patience = max(PATIENCE, problem.num_groups // 4, SMALL // problem.neurons)
    if short is None:
        short = problem.saliency.size > LARGE
    if generations is None:
        generations = SHORT_GENERATIONS if short else GENERATIONS_PER_PATIENCE * patience
    usual = SHORT_POPULATION if short else POPULATION
    population = usual if population is None else population
    offspring = usual if offspring is None else offspring
    if population < 2 or min(offspring, generations, patience, swaps) < 1 or not 0 <= crossover <= 1:
        raise UsageError("genetic: population must be at least 2, offspring, generations, patience and swaps 1, crossover within 0 and 1")
    operators = operators or {}
    if unknown := set(operators) - {"mate", "mutate", "select"}:
        raise UsageError(f"genetic: no operator '{min(unknown)}'; there are mate, mutate and select")
    rng = np.random.default_rng(seed)
    starts = [problem.random(rng) for _ in range(population)]
    cheap = (methods.greedy, methods.annealing) if short else (methods.ascent, methods.greedy, methods.annealing)
    starts += [solver(problem, seed) for solver in cheap]
    evaluation = _Evaluation(problem, swaps, rng)
    toolbox = _toolbox(problem, evaluation, rng)
    for name, operator in operators.items():
        toolbox.register(name, operator)
    hall_of_fame = tools.HallOfFame(1, similar=np.array_equal)
    figures = tools.Statistics(lambda individual: individual.fitness.values[0])
    figures.register("best", np.max)
    figures.register("mean", np.mean)
    with _seeded_random(seed):
        individuals = [toolbox.individual(labels) for labels in starts]
        _evaluate(individuals, toolbox.start, hall_of_fame)
        individuals = toolbox.select(individuals, population)
        stalled = 0
        for generation in itertools.count():
            if statistics is not None:
                statistics.record(generation=generation, seconds=time.perf_counter() - begin, **figures.compile(individuals))
            if generation == generations or stalled == patience or (seconds is not None and time.perf_counter() - begin > seconds):
                break
            before = hall_of_fame[0].fitness.values[0]
            children = algorithms.varOr(individuals, toolbox, offspring, crossover, 1 - crossover)
            if operators:
                _check_balance(children, problem)
            _evaluate(children, toolbox.evaluate, hall_of_fame)
            individuals = toolbox.select(individuals + children, population)
            stalled = 0 if hall_of_fame[0].fitness.values[0] > before * (1 + GAIN) else stalled + 1
            # What short annealings no longer better may need a longer one.
            evaluation.swaps = 2 ** min(stalled, DOUBLINGS) * swaps
    best = np.array(hall_of_fame[0])
    return evaluation.cooled(best, SHORT_FINAL_SWAPS) if short else evaluation.polished(best)


def _check_balance(individuals: Iterable[Any], problem: Problem) -> None:
    """The kernels trust every group to be full."""
    for individual in individuals:
        if not np.array_equal(np.sort(individual), problem.contiguous()):
            raise UsageError("genetic: an operator returned an unbalanced partition")


def _evaluate(individuals: list[Any], evaluate: Callable[[Any], tuple[float]], hall_of_fame: tools.HallOfFame) -> None:
    for individual in individuals:
        if not individual.fitness.valid:
            individual.fitness.values = evaluate(individual)
    hall_of_fame.update(individuals)
