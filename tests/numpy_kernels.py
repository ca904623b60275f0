"""The inner loops of `solvers.kernels` in plain NumPy, by the same names: what the compiled ones are tested against.

Shapes as there: B tokens, C neurons, N groups.
"""

import numpy as np


def group_sums(by_neuron, labels, num_groups):
    """Sum of each token's saliency inside each group: float64 [N, B]."""
    sums = np.zeros((num_groups, by_neuron.shape[1]))
    np.add.at(sums, labels, by_neuron)
    return sums


def mark_above(row, threshold, mask, room):
    """mask[:] = row > threshold; takes what is marked out of `room` (float64 [B])."""
    mask[:] = row > threshold
    room -= mask


def mark_equal(row, threshold, mask, room):
    """Mark also what equals the threshold, where there is room."""
    equal = (row == threshold) & (room > 0)
    mask += equal
    room -= equal


def best_moves(values, labels, group, gain, mover):
    """Of the neurons in `group`, the one whose move to each other group gains most, into `gain` and `mover` ([N, N], from x to)."""
    neurons = np.flatnonzero(labels == group)
    difference = values[:, neurons] - values[group, neurons]
    difference[group] = -np.inf
    others = np.arange(len(values)) != group
    gain[group] = difference.max(1)
    mover[group, others] = neurons[difference.argmax(1)[others]]


def dot(first, second):
    """Inner product, in the type of the products."""
    return (first * second).sum()


def copy(source, target):
    """target[:] = source, whatever their types."""
    target[:] = source


def exchange(upper, lower):
    """The larger of each two values to `upper`, the smaller to `lower`, in place."""
    larger = np.maximum(upper, lower)
    np.minimum(upper, lower, out=lower)
    upper[:] = larger


def halve(first, second, half):
    """half[:] = (first - second) / 2, in float32."""
    half[:] = (first.astype(np.float32) - second.astype(np.float32)) / 2


def raise_floor(first, second, ordered, sign, floor):
    """Raise `floor` to sign * (the group that comes first in `ordered` without the groups p and q, minus the mean of p and q)."""
    first, second = first.astype(np.float32), second.astype(np.float32)
    larger, smaller = np.maximum(first, second), np.minimum(first, second)
    without = np.where(larger >= ordered[:2], ordered[1:], ordered[:2])
    other = np.where(smaller >= without[0], without[1], without[0])
    np.maximum(floor, sign * (other - (first + second) / 2), out=floor)


def swapped(half, floor, gone, came):
    """Sum over tokens of max(floor, |half + came - gone|), in float32: the value of one swap up to a constant."""
    return np.maximum(floor, np.abs(half + came - gone)).sum()


def swap_gain(half, floor, gone, came):
    """Growth of the kept sum when neuron `gone` of p and neuron `came` of q (their rows of `by_neuron`) change places; float64."""
    return float((np.maximum(floor, np.abs(half + came - gone)) - np.maximum(floor, np.abs(half))).sum(dtype=np.float64))


def swap(first, second, half, gone, came):
    """Carry a swap out on the sums of p and q (float64 [B]) and on `half`."""
    shift = came.astype(np.float64) - gone
    first += shift
    second -= shift
    halve(first, second, half)
