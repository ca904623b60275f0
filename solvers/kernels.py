"""Compiled inner loops of the partitioners: group sums, top-m selection, exchange-graph assignment, annealing.

Everything is single-threaded and sums in float64 in a fixed order, so results do not depend on BLAS or on the number of workers.
Shapes: B tokens, C neurons, N groups; `labels` is int32 [C] with C / N neurons of each value.
"""

import numpy as np
from numba import njit


@njit(cache=True)
def group_sums(saliency, labels, num_groups):
    """Sum of each token's saliency inside each group: float64 [B, N]."""
    tokens, neurons = saliency.shape
    sums = np.zeros((tokens, num_groups))
    for b in range(tokens):
        for c in range(neurons):
            sums[b, labels[c]] += saliency[b, c]
    return sums


@njit(cache=True)
def keep_largest(values, kept, mask):
    """Mark the `kept` largest entries of `values` [N] in `mask` [N] (ties: the lower index) and return their sum."""
    mask[:] = False
    total = 0.0
    for _ in range(kept):
        best = -1
        for n in range(values.shape[0]):
            if not mask[n] and (best < 0 or values[n] > values[best]):
                best = n
        mask[best] = True
        total += values[best]
    return total


@njit(cache=True)
def kept_sum(saliency, labels, num_groups, kept):
    """What survives when every token keeps its `kept` largest groups: the value the solvers maximise."""
    sums = group_sums(saliency, labels, num_groups)
    mask = np.zeros(num_groups, dtype=np.bool_)
    total = 0.0
    for b in range(sums.shape[0]):
        total += keep_largest(sums[b], kept, mask)
    return total


@njit(cache=True)
def group_values(saliency, labels, num_groups, kept):
    """Return (kept sum of `labels`, V), where V[n, c] is the saliency of neuron c over the tokens that keep group n (float64 [N, C])."""
    sums = group_sums(saliency, labels, num_groups)
    values = np.zeros((num_groups, saliency.shape[1]))
    mask = np.zeros(num_groups, dtype=np.bool_)
    total = 0.0
    for b in range(sums.shape[0]):
        total += keep_largest(sums[b], kept, mask)
        for n in range(num_groups):
            if mask[n]:
                for c in range(saliency.shape[1]):
                    values[n, c] += saliency[b, c]
    return total, values


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
def ascend(saliency, labels, num_groups, kept):
    """Alternate top-m selection and optimal balanced assignment, in place, until the kept sum stops growing; returns it."""
    best, values = group_values(saliency, labels, num_groups, kept)
    while True:
        candidate = labels.copy()
        improve_assignment(values, candidate)
        total, values = group_values(saliency, candidate, num_groups, kept)
        if total <= best * (1 + 1e-9):
            return best
        labels[:] = candidate
        best = total


@njit(cache=True)
def anneal(saliency_by_neuron, labels, num_groups, kept, iterations, temperature, cooling, seed):
    """Simulated annealing with swaps of two neurons of different groups, in place (MoE-Prism, offline solver).

    `saliency_by_neuron` is [C, B]. A swap is accepted when it lowers the dropped sum or with probability exp(-increase / T);
    T is multiplied by `cooling` each iteration. Keeps the best partition seen and returns its kept sum.
    """
    np.random.seed(seed)
    neurons, tokens = saliency_by_neuron.shape
    sums = np.zeros((tokens, num_groups))
    for c in range(neurons):
        for b in range(tokens):
            sums[b, labels[c]] += saliency_by_neuron[c, b]
    mask = np.zeros(num_groups, dtype=np.bool_)
    token_kept = np.empty(tokens)
    new_kept = np.empty(tokens)
    trial = np.empty(num_groups)
    for b in range(tokens):
        token_kept[b] = keep_largest(sums[b], kept, mask)
    current = token_kept.sum()
    best, best_labels = current, labels.copy()
    for _ in range(iterations):
        first = np.random.randint(neurons)
        second = np.random.randint(neurons)
        p, q = labels[first], labels[second]
        if p != q:
            total = 0.0
            for b in range(tokens):
                trial[:] = sums[b]
                shift = saliency_by_neuron[second, b] - saliency_by_neuron[first, b]
                trial[p] += shift
                trial[q] -= shift
                new_kept[b] = keep_largest(trial, kept, mask)
                total += new_kept[b]
            if total > current or np.random.random() < np.exp((total - current) / temperature):
                for b in range(tokens):
                    shift = saliency_by_neuron[second, b] - saliency_by_neuron[first, b]
                    sums[b, p] += shift
                    sums[b, q] -= shift
                token_kept[:] = new_kept
                labels[first], labels[second] = q, p
                current = total
                if current > best:
                    best = current
                    best_labels[:] = labels
        temperature = max(temperature * cooling, 1e-12)
    labels[:] = best_labels
    return best
