"""The default partitioner: a memetic genetic algorithm on DEAP."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from deap import algorithms, base, creator, tools
from scipy.optimize import linear_sum_assignment

from solvers import kernels
from solvers.problem import Problem

POPULATION = 12
OFFSPRING = 8
MAX_GENERATIONS = 40
PATIENCE = 4
CROSSOVER_PROBABILITY = 0.8
MUTATION_PROBABILITY = 0.2
MUTATED_SHARE = 0.1
SWAP_TRIALS = 2000
COLD = 1e-12

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


def _mate(first, second, num_groups: int, rng: np.random.Generator):
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


def _mutate(individual, num_groups: int, rng: np.random.Generator):
    """Take a tenth of the neurons, at least two, out of their groups and deal them out again."""
    individual[rng.permutation(len(individual))[: max(2, round(MUTATED_SHARE * len(individual)))]] = -1
    _fill(individual, num_groups, rng)
    return (individual,)


def _select_distinct(individuals, count: int):
    """The best `count` individuals, no two of equal fitness while others remain: equal loss means the same partition."""
    distinct = {individual.fitness.values: individual for individual in reversed(individuals)}
    chosen = tools.selBest(list(distinct.values()), count)
    return chosen + tools.selBest(individuals, count - len(chosen))


def _toolbox(problem: Problem, rng: np.random.Generator) -> base.Toolbox:
    toolbox = base.Toolbox()
    toolbox.register("individual", lambda: creator.PrismIndividual(problem.random(rng)))
    toolbox.register("population", tools.initRepeat, list, toolbox.individual)
    toolbox.register("mate", _mate, num_groups=problem.num_groups, rng=rng)
    toolbox.register("mutate", _mutate, num_groups=problem.num_groups, rng=rng)
    toolbox.register("select", _select_distinct)
    toolbox.register(
        "evaluate", lambda individual: (kernels.ascend(problem.saliency, individual.view(np.ndarray), problem.num_groups, problem.kept),)
    )
    return toolbox


def genetic(problem: Problem, seed: int) -> np.ndarray:
    """Evolve partitions that are each a local optimum of the alternating ascent; stops after `PATIENCE` generations without gain.

    The best of them ends with `SWAP_TRIALS` tries of swap descent.

    A (mu + lambda) scheme built from DEAP's own parts. Evaluation is Lamarckian: it ascends the individual in place and returns
    the kept saliency as fitness. Restores the caller's `random` state.

    Returns:
        int32 [C] labels.
    """
    rng = np.random.default_rng(seed)
    toolbox = _toolbox(problem, rng)
    hall_of_fame = tools.HallOfFame(1, similar=np.array_equal)
    with _seeded_random(seed):
        population = toolbox.population(n=POPULATION)
        _evaluate(population, toolbox, hall_of_fame)
        stalled = 0
        for _ in range(MAX_GENERATIONS):
            before = hall_of_fame[0].fitness
            offspring = algorithms.varOr(population, toolbox, OFFSPRING, CROSSOVER_PROBABILITY, MUTATION_PROBABILITY)
            _evaluate(offspring, toolbox, hall_of_fame)
            population = toolbox.select(population + offspring, POPULATION)
            stalled = 0 if hall_of_fame[0].fitness > before else stalled + 1
            if stalled == PATIENCE:
                break
    best = np.array(hall_of_fame[0])
    # Annealing at no temperature is swap descent: it polishes what neither operator reaches, mostly in small problems.
    by_neuron = np.ascontiguousarray(problem.saliency.T)
    kernels.anneal(by_neuron, best, problem.num_groups, problem.kept, SWAP_TRIALS, COLD, 1.0, seed % 2**32)
    return best


def _evaluate(individuals, toolbox: base.Toolbox, hall_of_fame: tools.HallOfFame) -> None:
    for individual in individuals:
        if not individual.fitness.valid:
            individual.fitness.values = toolbox.evaluate(individual)
    hall_of_fame.update(individuals)
