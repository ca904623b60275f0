"""Non-uniform k: how many sub-experts each layer should get of a budget."""

import torch


def allocate(errors: torch.Tensor, budgets: list[int]) -> dict[int, tuple[int, ...]]:
    """For each mean k, the sub-experts per layer that lose least in sum, by greedy marginal gain on each layer's convex hull.

    The hull makes the greedy choice optimal at its corners: a layer whose error falls late is given several at once.

    Args:
        errors: float64 [L, K * N], error of each layer at k = 1, 2, ...
        budgets: mean numbers of sub-experts per layer.

    Returns:
        {budget: (k of each layer, at least 1)}; each sums to at most budget x L.
    """
    layers, full = errors.shape
    found = {}
    for budget in budgets:
        k = [1] * layers
        left = budget * layers - sum(k)
        while left > 0:
            steps = []
            for layer in range(layers):
                now = k[layer]
                reach = range(now + 1, min(full, now + left) + 1)
                gains = [((errors[layer, now - 1] - errors[layer, to - 1]).item() / (to - now), to) for to in reach]
                if gains:
                    rate, to = max(gains, key=lambda gain: (gain[0], -gain[1]))
                    steps.append((rate, -layer, to))
            if not steps:
                break
            _, negative, to = max(steps)
            left -= to - k[-negative]
            k[-negative] = to
        found[budget] = tuple(k)
    return found
