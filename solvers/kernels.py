"""Inner loops of the partitioners: group sums, top-m selection, exchange-graph assignment, swaps of two neurons.

Single-threaded, in a fixed order, so results depend neither on BLAS nor on the number of workers. Sums that decide what is kept are
float64; the float32 sums that screen swaps and value assignments only propose, and what they propose is measured in float64.
Shapes: B tokens, C neurons, N groups; `by_neuron` is the saliency, float32 [C, B]; `labels` is int32 [C] with C / N neurons of each
value; `kept` is m.

Compiled by numba. tests/numpy_kernels.py has the inner loops in NumPy, which they are tested against.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from numba import config, njit

from prism_refactor.signals import uninterrupted

# A change must gain more than this share of the whole saliency to count. Every token's terms are rounded to float32, at most 6e-8 of its
# saliency each, and a gain is made of four of them: what passes is a gain in truth, so descents end.
TOLERANCE = 2.5e-7


def _inner_loop(fastmath: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An inner loop, compiled. `fastmath` lets sums be vectorised, in an order of their own."""
    return njit(cache=True, fastmath=fastmath)


def _whole(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that Python calls; an interrupt takes effect when it has ended, which compiled code makes no later.

    Python code runs in numba when a kernel is loaded, where destructors lose an exception, and when a random generator is handed over,
    where an exception ends the process with a fault of memory.
    """
    if config.DISABLE_JIT:  # type: ignore[attr-defined]
        return kernel

    @wraps(kernel)
    def call(*arguments: Any) -> Any:
        with uninterrupted():
            return kernel(*arguments)

    return call


@_inner_loop(fastmath=False)
def group_sums(by_neuron: np.ndarray, labels: np.ndarray, num_groups: int) -> np.ndarray:
    """Sum of each token's saliency inside each group: float64 [N, B]."""
    sums = np.zeros((num_groups, by_neuron.shape[1]))
    for c in range(by_neuron.shape[0]):
        row, values = sums[labels[c]], by_neuron[c]
        for b in range(values.shape[0]):
            row[b] += values[b]
    return sums


@_inner_loop(fastmath=True)
def copy(source: np.ndarray, target: np.ndarray) -> None:
    """target[:] = source, whatever their types."""
    for b in range(source.shape[0]):
        target[b] = source[b]


@_inner_loop(fastmath=True)
def exchange(upper: np.ndarray, lower: np.ndarray) -> None:
    """The larger of each two values to `upper`, the smaller to `lower`, in place."""
    for b in range(upper.shape[0]):
        first, second = upper[b], lower[b]
        upper[b] = max(first, second)
        lower[b] = min(first, second)


@njit(cache=True)
def order_groups(sums: np.ndarray, ordered: np.ndarray) -> None:
    """Sort every token's group sums, falling, into `ordered` ([N, B]): Batcher's merge exchange, whole rows at a time."""
    num_groups = sums.shape[0]
    for n in range(num_groups):
        copy(sums[n], ordered[n])
    top = 1
    while 2 * top < num_groups:
        top *= 2
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            for n in range(num_groups - d):
                if n & p == r:
                    exchange(ordered[n], ordered[n + d])
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2


@_inner_loop(fastmath=True)
def mark_above(row: np.ndarray, threshold: np.ndarray, mask: np.ndarray, room: np.ndarray) -> None:
    """mask[:] = row > threshold; takes what is marked out of `room` (float64 [B])."""
    for b in range(row.shape[0]):
        above = np.float32(row[b] > threshold[b])
        mask[b] = above
        room[b] -= above


@_inner_loop(fastmath=True)
def mark_equal(row: np.ndarray, threshold: np.ndarray, mask: np.ndarray, room: np.ndarray) -> None:
    """Mark also what equals the threshold, where there is room."""
    for b in range(row.shape[0]):
        equal = np.float32((row[b] == threshold[b]) & (room[b] > 0))
        mask[b] += equal
        room[b] -= equal


@_inner_loop(fastmath=True)
def dot(first: np.ndarray, second: np.ndarray) -> float:
    """Inner product, in the type of the products."""
    total = first[0] * second[0]
    for b in range(1, first.shape[0]):
        total += first[b] * second[b]
    return total


@njit(cache=True)
def keep_largest(sums: np.ndarray, kept: int, mask: np.ndarray) -> float:
    """Mark in `mask` (float32 [N, B]) the `kept` largest groups of every token (ties: the lower index); returns their sum."""
    ordered = np.empty_like(sums)
    order_groups(sums, ordered)
    threshold, room = ordered[kept - 1], np.full(sums.shape[1], float(kept))
    for n in range(sums.shape[0]):
        mark_above(sums[n], threshold, mask[n], room)
    total = 0.0
    for n in range(sums.shape[0]):
        mark_equal(sums[n], threshold, mask[n], room)
        total += dot(sums[n], mask[n])
    return total


@_whole
@njit(cache=True)
def kept_sum(by_neuron: np.ndarray, labels: np.ndarray, num_groups: int, kept: int) -> float:
    """What survives when every token keeps its `kept` largest groups: the value the solvers maximise."""
    mask = np.empty((num_groups, by_neuron.shape[1]), dtype=np.float32)
    return keep_largest(group_sums(by_neuron, labels, num_groups), kept, mask)


@njit(cache=True)
def group_values(by_neuron: np.ndarray, mask: np.ndarray, values: np.ndarray) -> None:
    """values[n, c] (float64 [N, C]): saliency of neuron c over the tokens that keep group n, from a `keep_largest` mask."""
    for c in range(by_neuron.shape[0]):
        for n in range(mask.shape[0]):
            values[n, c] = dot(mask[n], by_neuron[c])


@_inner_loop(fastmath=False)
def best_moves(values: np.ndarray, labels: np.ndarray, group: int, gain: np.ndarray, mover: np.ndarray) -> None:
    """Of the neurons in `group`, the one whose move to each other group gains most, into `gain` and `mover` ([N, N], from x to)."""
    num_groups, neurons = values.shape
    for target in range(num_groups):
        gain[group, target] = -np.inf
    for c in range(neurons):
        if labels[c] == group:
            for target in range(num_groups):
                difference = values[target, c] - values[group, c]
                if target != group and difference > gain[group, target]:
                    gain[group, target] = difference
                    mover[group, target] = c


@njit(cache=True)
def _positive_cycle(gain: np.ndarray, tolerance: float, cycle: np.ndarray) -> int:
    """Find a cycle of groups whose moves gain more than `tolerance` together (Bellman-Ford); returns its length, 0 if none."""
    num_groups = gain.shape[0]
    distance = np.zeros(num_groups)
    previous = np.full(num_groups, -1)
    last = -1
    for _ in range(num_groups):
        last = -1
        for p in range(num_groups):
            for q in range(num_groups):
                if p != q and distance[p] + gain[p, q] > distance[q] + tolerance:
                    distance[q] = distance[p] + gain[p, q]
                    previous[q] = p
                    last = q
        if last < 0:
            return 0
    for _ in range(num_groups):
        last = previous[last]
    length = 0
    node = last
    while True:
        cycle[length] = node
        length += 1
        node = previous[node]
        if node == last:
            break
    return length


@njit(cache=True)
def _improve_assignment(values: np.ndarray, labels: np.ndarray) -> None:
    """Move neurons along positive cycles of the N-node exchange graph until none is left, in place.

    That is the optimum of the balanced assignment problem max sum_c values[labels[c], c] (a transportation problem with N equal
    bins is optimal when its residual graph has no improving cycle), without a C x C cost matrix. Group sizes are preserved.
    """
    num_groups = values.shape[0]
    gain = np.empty((num_groups, num_groups))
    mover = np.zeros((num_groups, num_groups), dtype=np.int64)
    cycle = np.empty(num_groups, dtype=np.int64)
    tolerance = 1e-12 * max(1e-300, np.abs(values).max())
    for group in range(num_groups):
        best_moves(values, labels, group, gain, mover)
    while True:
        length = _positive_cycle(gain, tolerance, cycle)
        if length == 0:
            return
        # The cycle was traced backwards: cycle[i + 1] -> cycle[i] is an edge.
        for i in range(length):
            target = cycle[i]
            source = cycle[(i + 1) % length]
            labels[mover[source, target]] = target
        for i in range(length):
            best_moves(values, labels, cycle[i], gain, mover)


improve_assignment = _whole(_improve_assignment)


@_whole
@njit(cache=True)
def ascend(by_neuron: np.ndarray, labels: np.ndarray, num_groups: int, kept: int) -> float:
    """Alternate top-m selection and optimal balanced assignment, in place, until the kept sum stops growing; returns it."""
    neurons, tokens = by_neuron.shape
    mask = np.empty((num_groups, tokens), dtype=np.float32)
    values = np.empty((num_groups, neurons))
    best = keep_largest(group_sums(by_neuron, labels, num_groups), kept, mask)
    while True:
        group_values(by_neuron, mask, values)
        candidate = labels.copy()
        _improve_assignment(values, candidate)
        total = keep_largest(group_sums(by_neuron, candidate, num_groups), kept, mask)
        if not total > best * (1 + 1e-9):
            return best
        labels[:] = candidate
        best = total


@njit(cache=True)
def pair_terms(sums: np.ndarray, ordered: np.ndarray, p: int, q: int, kept: int, half: np.ndarray, floor: np.ndarray) -> None:
    """What decides the value of swaps between groups p and q, written to `half` and `floor` (float32 [B]).

    Moving delta of a token's saliency from q to p leaves the sum of both as it is, so the token's kept sum, as a function of delta, is
    a constant plus max(floor, |half + delta|): it keeps both groups, neither, or the larger one beside the best m - 1 others.

    Args:
        ordered: see `order_groups`, up to date.
    """
    halve(sums[p], sums[q], half)
    floor[:] = 0
    # The floor is set by the m-th and the (m - 1)-th largest of the other groups, if there are as many.
    if kept <= sums.shape[0] - 2:
        raise_floor(sums[p], sums[q], ordered[kept - 1 : kept + 2], np.float32(1), floor)
    if kept >= 2:
        raise_floor(sums[p], sums[q], ordered[kept - 2 : kept + 1], np.float32(-1), floor)


@_inner_loop(fastmath=True)
def halve(first: np.ndarray, second: np.ndarray, half: np.ndarray) -> None:
    """half[:] = (first - second) / 2, in float32."""
    for b in range(half.shape[0]):
        half[b] = (np.float32(first[b]) - np.float32(second[b])) / 2


@_inner_loop(fastmath=True)
def raise_floor(first: np.ndarray, second: np.ndarray, ordered: np.ndarray, sign: float, floor: np.ndarray) -> None:
    """Raise `floor` to sign * (the group that comes first in `ordered` without the groups p and q, minus the mean of p and q).

    Args:
        first, second: float64 [B], the sums of p and q.
        ordered: float32 [3, B], three neighbours of every token's sorted sums.
    """
    v0, v1, v2 = ordered[0], ordered[1], ordered[2]
    for b in range(floor.shape[0]):
        a, c = np.float32(first[b]), np.float32(second[b])
        larger, smaller = max(a, c), min(a, c)
        # Take the larger out of the row, then the smaller.
        w0 = v1[b] if larger >= v0[b] else v0[b]
        w1 = v2[b] if larger >= v1[b] else v1[b]
        other = w1 if smaller >= w0 else w0
        floor[b] = max(floor[b], sign * (other - (a + c) / 2))


@_inner_loop(fastmath=True)
def swapped(half: np.ndarray, floor: np.ndarray, gone: np.ndarray, came: np.ndarray) -> np.floating:
    """Sum over tokens of max(floor, |half + came - gone|), in float32: the value of one swap up to a constant."""
    total = np.float32(0)
    for b in range(half.shape[0]):
        total += max(floor[b], abs(half[b] + came[b] - gone[b]))
    return total


@_inner_loop(fastmath=True)
def swap_gain(half: np.ndarray, floor: np.ndarray, gone: np.ndarray, came: np.ndarray) -> float:
    """Growth of the kept sum when neuron `gone` of p and neuron `came` of q (their rows of `by_neuron`) change places; float64."""
    total = 0.0
    for b in range(half.shape[0]):
        total += max(floor[b], abs(half[b] + came[b] - gone[b])) - max(floor[b], abs(half[b]))
    return total


@_inner_loop(fastmath=True)
def swap(first: np.ndarray, second: np.ndarray, half: np.ndarray, gone: np.ndarray, came: np.ndarray) -> None:
    """Carry a swap out on the sums of p and q (float64 [B]) and on `half`."""
    for b in range(half.shape[0]):
        shift = np.float64(came[b]) - gone[b]
        first[b] += shift
        second[b] -= shift
        half[b] = (np.float32(first[b]) - np.float32(second[b])) / 2


@njit(cache=True)
def _members(labels: np.ndarray, num_groups: int) -> np.ndarray:
    """Neurons of each group, rising: int64 [N, C / N]."""
    found = np.empty((num_groups, labels.shape[0] // num_groups), dtype=np.int64)
    filled = np.zeros(num_groups, dtype=np.int64)
    for c in range(labels.shape[0]):
        found[labels[c], filled[labels[c]]] = c
        filled[labels[c]] += 1
    return found


@njit(cache=True)
def _label(labels: np.ndarray, members: np.ndarray) -> None:
    """Write `labels` from the neurons of each group: undoes `_members`."""
    for n in range(members.shape[0]):
        for i in range(members.shape[1]):
            labels[members[n, i]] = n


@_whole
@njit(cache=True)
def swap_descent(by_neuron: np.ndarray, labels: np.ndarray, num_groups: int, kept: int) -> None:
    """Carry out improving swaps of two neurons, in place, until there is none: every pair of every two groups has been tried since."""
    tokens = by_neuron.shape[1]
    sums = group_sums(by_neuron, labels, num_groups)
    members = _members(labels, num_groups)
    ordered = np.empty((num_groups, tokens), dtype=np.float32)
    half, floor = np.empty(tokens, dtype=np.float32), np.empty(tokens, dtype=np.float32)
    threshold = TOLERANCE * max(sums.sum(), 1e-300)
    nothing = np.zeros(tokens, dtype=np.float32)
    # Swaps so far, and how many there had been when a pass over two groups found none. One pass at a time: to repeat it until there is
    # none takes longer, and the other groups change what it found.
    swaps, settled = 1, np.zeros((num_groups, num_groups), dtype=np.int64)
    while True:
        before = swaps
        for p in range(num_groups):
            for q in range(p + 1, num_groups):
                if settled[p, q] == swaps:
                    continue
                order_groups(sums, ordered)
                pair_terms(sums, ordered, p, q, kept, half, floor)
                found = swaps
                for i in range(members.shape[1]):
                    gone = by_neuron[members[p, i]]
                    best, place = swapped(half, floor, nothing, nothing), -1
                    for j in range(members.shape[1]):
                        value = swapped(half, floor, gone, by_neuron[members[q, j]])
                        if value > best:
                            best, place = value, j
                    if place < 0 or swap_gain(half, floor, gone, by_neuron[members[q, place]]) <= threshold:
                        continue
                    swap(sums[p], sums[q], half, gone, by_neuron[members[q, place]])
                    members[p, i], members[q, place] = members[q, place], members[p, i]
                    swaps += 1
                if swaps == found:
                    settled[p, q] = swaps
        if swaps == before:
            break
    _label(labels, members)


@_whole
@njit(cache=True)
def anneal(
    by_neuron: np.ndarray,
    labels: np.ndarray,
    num_groups: int,
    kept: int,
    iterations: int,
    temperature: float,
    cooling: float,
    stay: int,
    rng: np.random.Generator,
) -> None:
    """Simulated annealing with swaps of two neurons of different groups, in place (MoE-Prism, offline solver).

    A swap is accepted when the kept sum grows by `gain` > 0 or with probability exp(gain / T), but not when it changes no more than
    rounding could; T is multiplied by `cooling` each iteration. Ends with the best partition seen.

    Args:
        iterations: swaps drawn; one whose two neurons share their group counts, as in the paper.
        stay: draws in a row from the same two groups: 1 is the paper's uniform draw; more saves the pair's terms.
        rng: np.random.Generator of the draws.
    """
    tokens = by_neuron.shape[1]
    sums = group_sums(by_neuron, labels, num_groups)
    members = _members(labels, num_groups)
    size = members.shape[1]
    ordered = np.empty((num_groups, tokens), dtype=np.float32)
    halves = np.empty((num_groups, num_groups, tokens), dtype=np.float32)
    floors = np.empty((num_groups, num_groups, tokens), dtype=np.float32)
    values = np.zeros((num_groups, num_groups), dtype=np.float32)
    # Swaps so far, and how many there had been when the terms of two groups were last written.
    swaps, written, sorted_at = 1, np.zeros((num_groups, num_groups), dtype=np.int64), 0
    threshold = TOLERANCE * max(sums.sum(), 1e-300)
    nothing = np.zeros(tokens, dtype=np.float32)
    gained, best, best_members = 0.0, 0.0, members.copy()
    p = q = 0
    for iteration in range(iterations):
        if iteration % stay == 0:
            p, q = rng.integers(0, num_groups), rng.integers(0, num_groups)  # type: ignore[assignment]  # numba has one kind of integer
            if p > q:
                p, q = q, p
        temperature = max(temperature * cooling, 1e-300)
        if p == q:
            continue
        half, floor = halves[p, q], floors[p, q]
        if written[p, q] != swaps:
            if sorted_at != swaps:
                order_groups(sums, ordered)
                sorted_at = swaps
            pair_terms(sums, ordered, p, q, kept, half, floor)
            values[p, q] = swapped(half, floor, nothing, nothing)
            written[p, q] = swaps
        i, j = rng.integers(0, size), rng.integers(0, size)
        first, second = by_neuron[members[p, i]], by_neuron[members[q, j]]
        demanded = temperature * np.log(max(rng.random(), 1e-300))
        # Rounding of a float32 sum over the tokens.
        doubt = 1e-6 * values[p, q]
        value = swapped(half, floor, first, second)
        if value - values[p, q] < demanded - doubt:
            continue
        gain = swap_gain(half, floor, first, second)
        if gain <= demanded or abs(gain) <= threshold:
            continue
        swap(sums[p], sums[q], half, first, second)
        members[p, i], members[q, j] = members[q, j], members[p, i]
        swaps += 1
        values[p, q] = value
        written[p, q] = swaps
        gained += gain
        if gained > best + threshold:
            best = gained
            best_members[:] = members
    _label(labels, best_members)
