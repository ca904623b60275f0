"""Compiled inner loops of the partitioners: group sums, top-m selection, exchange-graph assignment, swaps of two neurons.

Single-threaded, in a fixed order, so results depend neither on BLAS nor on the number of workers. Sums that decide what is kept are
float64; the float32 sums that screen swaps and value assignments only propose, and what they propose is measured in float64.
Shapes: B tokens, C neurons, N groups; `by_neuron` is the saliency, float32 [C, B]; `labels` is int32 [C] with C / N neurons of each
value; `kept` is m.
"""

import numpy as np
from numba import njit

# A change must gain more than this share of the whole saliency to count. Every token's terms are rounded to float32, at most 6e-8 of its
# saliency each, and a gain is made of four of them: what passes is a gain in truth, so descents end.
TOLERANCE = 2.5e-7


@njit(cache=True)
def group_sums(by_neuron, labels, num_groups):
    """Sum of each token's saliency inside each group: float64 [N, B]."""
    sums = np.zeros((num_groups, by_neuron.shape[1]))
    for c in range(by_neuron.shape[0]):
        row, values = sums[labels[c]], by_neuron[c]
        for b in range(values.shape[0]):
            row[b] += values[b]
    return sums


@njit(cache=True)
def keep_largest(sums, kept, mask):
    """Mark in `mask` (float32 [N, B]) the `kept` largest groups of every token (ties: the lower index); returns their sum."""
    num_groups, tokens = sums.shape
    mask[:] = 0
    total = 0.0
    for b in range(tokens):
        for _ in range(kept):
            best = -1
            for n in range(num_groups):
                if mask[n, b] == 0 and (best < 0 or sums[n, b] > sums[best, b]):
                    best = n
            mask[best, b] = 1
            total += sums[best, b]
    return total


@njit(cache=True)
def kept_sum(by_neuron, labels, num_groups, kept):
    """What survives when every token keeps its `kept` largest groups: the value the solvers maximise."""
    mask = np.empty((num_groups, by_neuron.shape[1]), dtype=np.float32)
    return keep_largest(group_sums(by_neuron, labels, num_groups), kept, mask)


@njit(cache=True, fastmath=True)
def _dot(first, second):
    total = np.float32(0)
    for b in range(first.shape[0]):
        total += first[b] * second[b]
    return total


@njit(cache=True)
def group_values(by_neuron, mask, values):
    """values[n, c] (float64 [N, C]): saliency of neuron c over the tokens that keep group n, from a `keep_largest` mask."""
    for c in range(by_neuron.shape[0]):
        for n in range(mask.shape[0]):
            values[n, c] = _dot(mask[n], by_neuron[c])


@njit(cache=True)
def _refresh_best_moves(values, labels, group, gain, mover):
    """Recompute, for one source group, the neuron whose move to each other group gains most."""
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
def _positive_cycle(gain, tolerance, cycle):
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
def improve_assignment(values, labels):
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
        _refresh_best_moves(values, labels, group, gain, mover)
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
            _refresh_best_moves(values, labels, cycle[i], gain, mover)


@njit(cache=True)
def ascend(by_neuron, labels, num_groups, kept):
    """Alternate top-m selection and optimal balanced assignment, in place, until the kept sum stops growing; returns it."""
    neurons, tokens = by_neuron.shape
    mask = np.empty((num_groups, tokens), dtype=np.float32)
    values = np.empty((num_groups, neurons))
    best = keep_largest(group_sums(by_neuron, labels, num_groups), kept, mask)
    while True:
        group_values(by_neuron, mask, values)
        candidate = labels.copy()
        improve_assignment(values, candidate)
        total = keep_largest(group_sums(by_neuron, candidate, num_groups), kept, mask)
        if total <= best * (1 + 1e-9):
            return best
        labels[:] = candidate
        best = total


@njit(cache=True)
def rank_groups(sums, order, rank):
    """Bring `order` (int64 [B, N]: each token's groups by falling sum; any permutation before) and its inverse `rank` up to date."""
    num_groups, tokens = sums.shape
    for b in range(tokens):
        own = order[b]
        # Insertion sort: next to nothing to do after a swap.
        for i in range(1, num_groups):
            group = own[i]
            value = sums[group, b]
            place = i
            while place > 0 and sums[own[place - 1], b] < value:
                own[place] = own[place - 1]
                place -= 1
            own[place] = group
        for i in range(num_groups):
            rank[b, own[i]] = i


@njit(cache=True)
def pair_terms(sums, order, rank, p, q, kept, half, floor):
    """What decides the value of swaps between groups p and q, written to `half` and `floor` (float32 [B]).

    Moving delta of a token's saliency from q to p leaves the sum of both as it is, so the token's kept sum, as a function of delta, is
    a constant plus max(floor, |half + delta|): it keeps both groups, neither, or the larger one beside the best m - 1 others.

    Args:
        order, rank: see `rank_groups`, up to date.
    """
    num_groups, tokens = sums.shape
    for b in range(tokens):
        first, second = min(rank[b, p], rank[b, q]), max(rank[b, p], rank[b, q])
        middle = (sums[p, b] + sums[q, b]) / 2
        least = 0.0
        # The m-th and the (m - 1)-th largest of the other groups, if there are as many.
        if kept <= num_groups - 2:
            place = kept - 1
            place += first <= place
            place += second <= place
            least = max(least, sums[order[b, place], b] - middle)
        if kept >= 2:
            place = kept - 2
            place += first <= place
            place += second <= place
            least = max(least, middle - sums[order[b, place], b])
        half[b] = (sums[p, b] - sums[q, b]) / 2
        floor[b] = least


@njit(cache=True, fastmath=True)
def _swapped(half, floor, gone, came):
    """Sum over tokens of max(floor, |half + came - gone|), in float32: the value of one swap up to a constant."""
    total = np.float32(0)
    for b in range(half.shape[0]):
        total += max(floor[b], abs(half[b] + came[b] - gone[b]))
    return total


@njit(cache=True)
def swap_gain(half, floor, gone, came):
    """Growth of the kept sum when neuron `gone` of p and neuron `came` of q (their rows of `by_neuron`) change places; float64."""
    total = 0.0
    for b in range(half.shape[0]):
        total += max(floor[b], abs(half[b] + came[b] - gone[b])) - max(floor[b], abs(half[b]))
    return total


@njit(cache=True)
def _swap(sums, p, q, half, gone, came):
    """Carry a swap out on the sums and on `half`."""
    for b in range(half.shape[0]):
        shift = np.float64(came[b]) - gone[b]
        sums[p, b] += shift
        sums[q, b] -= shift
        half[b] = (sums[p, b] - sums[q, b]) / 2


@njit(cache=True)
def _unranked(tokens, num_groups):
    """Room for `rank_groups`."""
    order = np.empty((tokens, num_groups), dtype=np.int64)
    order[:] = np.arange(num_groups)
    return order, np.empty((tokens, num_groups), dtype=np.int64)


@njit(cache=True)
def _members(labels, num_groups):
    """Neurons of each group, rising: int64 [N, C / N]."""
    found = np.empty((num_groups, labels.shape[0] // num_groups), dtype=np.int64)
    filled = np.zeros(num_groups, dtype=np.int64)
    for c in range(labels.shape[0]):
        found[labels[c], filled[labels[c]]] = c
        filled[labels[c]] += 1
    return found


@njit(cache=True)
def _label(labels, members):
    """Write `labels` from the neurons of each group: undoes `_members`."""
    for n in range(members.shape[0]):
        for i in range(members.shape[1]):
            labels[members[n, i]] = n


@njit(cache=True)
def swap_descent(by_neuron, labels, num_groups, kept):
    """Carry out improving swaps of two neurons, in place, until there is none: every pair of every two groups has been tried since."""
    tokens = by_neuron.shape[1]
    sums = group_sums(by_neuron, labels, num_groups)
    members = _members(labels, num_groups)
    order, rank = _unranked(tokens, num_groups)
    half, floor = np.empty(tokens, dtype=np.float32), np.empty(tokens, dtype=np.float32)
    threshold = TOLERANCE * max(sums.sum(), 1e-300)
    nothing = np.zeros(tokens, dtype=np.float32)
    # Swaps so far, and how many there had been when two groups were last found without one.
    swaps, settled = 1, np.zeros((num_groups, num_groups), dtype=np.int64)
    while True:
        before = swaps
        for p in range(num_groups):
            for q in range(p + 1, num_groups):
                if settled[p, q] == swaps:
                    continue
                rank_groups(sums, order, rank)
                pair_terms(sums, order, rank, p, q, kept, half, floor)
                improving = True
                while improving:
                    improving = False
                    for i in range(members.shape[1]):
                        gone = by_neuron[members[p, i]]
                        best, place = _swapped(half, floor, nothing, nothing), -1
                        for j in range(members.shape[1]):
                            value = _swapped(half, floor, gone, by_neuron[members[q, j]])
                            if value > best:
                                best, place = value, j
                        if place < 0 or swap_gain(half, floor, gone, by_neuron[members[q, place]]) <= threshold:
                            continue
                        _swap(sums, p, q, half, gone, by_neuron[members[q, place]])
                        members[p, i], members[q, place] = members[q, place], members[p, i]
                        swaps += 1
                        improving = True
                settled[p, q] = swaps
        if swaps == before:
            break
    _label(labels, members)


@njit(cache=True)
def anneal(by_neuron, labels, num_groups, kept, iterations, temperature, cooling, stay, seed):
    """Simulated annealing with swaps of two neurons of different groups, in place (MoE-Prism, offline solver).

    A swap is accepted when the kept sum grows by `gain` > 0 or with probability exp(gain / T); T is multiplied by `cooling` each
    iteration. Ends with the best partition seen.

    Args:
        iterations: swaps drawn; one whose two neurons share their group counts, as in the paper.
        stay: draws in a row from the same two groups: 1 is the paper's uniform draw; more saves the pair's terms.
        seed: of the draws.
    """
    np.random.seed(seed)
    tokens = by_neuron.shape[1]
    sums = group_sums(by_neuron, labels, num_groups)
    members = _members(labels, num_groups)
    size = members.shape[1]
    order, rank = _unranked(tokens, num_groups)
    halves = np.empty((num_groups, num_groups, tokens), dtype=np.float32)
    floors = np.empty((num_groups, num_groups, tokens), dtype=np.float32)
    values = np.zeros((num_groups, num_groups), dtype=np.float32)
    # Swaps so far, and how many there had been when the terms of two groups were last written.
    swaps, written, ranked = 1, np.zeros((num_groups, num_groups), dtype=np.int64), 0
    threshold = TOLERANCE * max(sums.sum(), 1e-300)
    nothing = np.zeros(tokens, dtype=np.float32)
    gained, best, best_members = 0.0, 0.0, members.copy()
    p = q = 0
    for iteration in range(iterations):
        if iteration % stay == 0:
            p, q = np.random.randint(num_groups), np.random.randint(num_groups)
            if p > q:
                p, q = q, p
        temperature = max(temperature * cooling, 1e-12)
        if p == q:
            continue
        half, floor = halves[p, q], floors[p, q]
        if written[p, q] != swaps:
            if ranked != swaps:
                rank_groups(sums, order, rank)
                ranked = swaps
            pair_terms(sums, order, rank, p, q, kept, half, floor)
            values[p, q] = _swapped(half, floor, nothing, nothing)
            written[p, q] = swaps
        i, j = np.random.randint(size), np.random.randint(size)
        first, second = by_neuron[members[p, i]], by_neuron[members[q, j]]
        demanded = temperature * np.log(max(np.random.random(), 1e-300))
        # Rounding of a float32 sum over the tokens.
        doubt = 1e-6 * values[p, q]
        if _swapped(half, floor, first, second) - values[p, q] < demanded - doubt:
            continue
        gain = swap_gain(half, floor, first, second)
        if gain <= demanded or abs(gain) <= threshold:
            continue
        _swap(sums, p, q, half, first, second)
        members[p, i], members[q, j] = members[q, j], members[p, i]
        swaps += 1
        values[p, q] = _swapped(half, floor, nothing, nothing)
        written[p, q] = swaps
        gained += gain
        if gained > best + threshold:
            best = gained
            best_members[:] = members
    _label(labels, best_members)
