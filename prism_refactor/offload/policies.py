"""Which sub-expert leaves fast memory when another one must come in.

A policy sees what every layer of every forward pass used, and says how much each sub-expert is worth keeping; the cache evicts the least.
The same classes run in the cache and in `offload.replay`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

# Requests whose activations are remembered, MoE-Infinity's expert activation matrix collection.
COLLECTION = 64
# Windows over a request's last tokens: after so many a use counts half.
HALF_LIVES = (2.0, 16.0, 128.0)
# A request's own history weighs as much as the past request most like it after so many tokens.
TRUST = 8.0

# Of each request in a forward pass, how many of its tokens each sub-expert of a layer was used for: float [E].
Uses = Mapping[str, np.ndarray]


class Policy:
    """What a replacement policy is told, and asked.

    Args:
        layers, experts: MoE layers, and sub-experts of each.
    """

    def __init__(self, layers: int, experts: int):
        self.layers, self.experts = layers, experts
        self.worth = np.zeros((layers, experts))

    def use(self, layer: int, uses: Uses) -> None:
        """A layer's sub-experts are about to be used."""

    def load(self, layer: int, expert: int) -> None:
        """A sub-expert comes in ahead of its use."""

    def end(self, request: str) -> None:
        """A request is over."""

    def keep(self) -> np.ndarray:
        """What each sub-expert is worth keeping, float [L, E]; only the order matters."""
        return self.worth


def _used(uses: Uses) -> np.ndarray:
    return np.flatnonzero(sum(uses.values()))


class LeastRecentlyUsed(Policy):
    """LRU, MoE-Prism's: the one whose last use is longest ago."""

    def __init__(self, layers: int, experts: int):
        super().__init__(layers, experts)
        self._now = 0

    def use(self, layer: int, uses: Uses) -> None:
        self._now += 1
        self.worth[layer, _used(uses)] = self._now

    def load(self, layer: int, expert: int) -> None:
        self.worth[layer, expert] = self._now


class LeastFrequentlyUsed(Policy):
    """LFU: the one that fewest forward passes have used so far; of equals the one used longest ago."""

    def __init__(self, layers: int, experts: int):
        super().__init__(layers, experts)
        self._now = 0

    def use(self, layer: int, uses: Uses) -> None:
        self._now += 1
        used = _used(uses)
        # The whole part counts, the fraction is the time of the last use.
        self.worth[layer, used] = np.floor(self.worth[layer, used]) + 1 + self._now / (self._now + 1e6)


class ActivationAware(Policy):
    """MoE-Infinity's: every request has a matrix of how often it used each sub-expert; what is predicted to be used last goes.

    A new request has used little, so the past request whose matrix is most like its own so far, by cosine over the layers, speaks for it
    until it has a history. Two things differ from MoE-Infinity. Its matrix counts all of a request's tokens alike; here the probability
    that the next token uses a sub-expert is the mean of averages over the last few, some and many tokens, because text moves on. And it
    weighs a layer by its depth; here a probability becomes the expected number of layers until the next use, because layers come round
    in order.
    """

    def __init__(self, layers: int, experts: int):
        super().__init__(layers, experts)
        self._collection = np.zeros((0, layers, experts))
        self._collected = _directions(self._collection)
        self._requests: dict[str, _Activations] = {}
        # Of the last pass; what it used is the best guess also when its requests are over.
        self._active: list[_Activations] = []
        self._layer = 0
        # What is worth keeping until something else is used: asked for at every eviction.
        self._kept: np.ndarray | None = None

    def use(self, layer: int, uses: Uses) -> None:
        self._layer, self._kept = layer, None
        for request, counts in uses.items():
            if request not in self._requests:
                self._requests[request] = _Activations(self.layers, self.experts, self._collected)
            self._requests[request].add(layer, counts, self._collected)
        self._active = [self._requests[request] for request in uses]

    def end(self, request: str) -> None:
        activations = self._requests.pop(request, None)
        if activations is None:
            return
        self._kept = None
        matrix = activations.counts.copy()
        if len(self._collection) < COLLECTION:
            self._collection = np.concatenate([self._collection, matrix[None]])
        else:
            # The one most like it makes room: the collection stays as different as can be.
            self._collection[int((self._collected * _directions(matrix)).sum((1, 2)).argmax())] = matrix
        self._collected = _directions(self._collection)
        for other in {*self._requests.values(), *self._active}:
            other.compare(self._collected)

    def predict(self) -> np.ndarray:
        """Probability that a sub-expert is used when its layer comes round next, [L, E]."""
        unused = np.ones((self.layers, self.experts))
        for activations in self._active:
            own, tokens = activations.probability, activations.tokens[:, None]
            if len(self._collection) and tokens.min() < TRUST * 8:
                past = self._collection[int(activations.alike.sum(1).argmax())]
                own = (own * tokens + past * TRUST) / (tokens + TRUST)
            unused *= 1 - own
        return 1 - unused

    def keep(self) -> np.ndarray:
        if self._kept is None:
            ahead = (np.arange(self.layers)[:, None] - self._layer - 1) % self.layers
            self._kept = -(ahead + self.layers / np.maximum(self.predict(), 1e-4))
        return self._kept


class _Activations:
    """What one request used: probabilities per token, over windows of several lengths.

    A layer is updated when it is used, so that asking costs nothing.

    Attributes:
        tokens: seen by each layer, [L].
        probability: mean over the windows of the average uses per token, [L, E].
        counts: average over the longest window, [L, E].
        alike: cosine with each past request, layer by layer, [past requests, L].
    """

    def __init__(self, layers: int, experts: int, collected: np.ndarray):
        self.tokens = np.zeros(layers)
        self.probability, self.counts = np.zeros((layers, experts)), np.zeros((layers, experts))
        self._means = np.zeros((len(HALF_LIVES), layers, experts))
        self._weights = np.zeros((len(HALF_LIVES), layers, 1))
        self.compare(collected)

    def add(self, layer: int, counts: np.ndarray, collected: np.ndarray) -> None:
        """A layer was used by some tokens: [E], for how many of them each sub-expert; `collected` as for `compare`."""
        # The busiest one was used by at most all of them.
        tokens = max(float(counts.max()), 1.0)
        for number, half_life in enumerate(HALF_LIVES):
            fade = 0.5 ** (tokens / half_life)
            self._means[number, layer] = self._means[number, layer] * fade + counts / tokens * (1 - fade)
            self._weights[number, layer] = self._weights[number, layer] * fade + (1 - fade)
        self.tokens[layer] += tokens
        windows = self.windows(layer)
        self.probability[layer], self.counts[layer] = windows.mean(0), windows[-1]
        self.alike[:, layer] = collected[:, layer] @ _directions(self.counts[layer])

    def compare(self, collected: np.ndarray) -> None:
        """Compare with other past requests: their matrices, every row at length one, [past requests, L, E]."""
        self.alike = np.einsum("ple,le->pl", collected, _directions(self.counts))

    def windows(self, layer: int | slice = slice(None)) -> np.ndarray:
        """Average uses per token over each window, [windows, L, E], or of one layer [windows, E]."""
        return self._means[:, layer] / np.maximum(self._weights[:, layer], 1e-12)


def _directions(matrices: np.ndarray) -> np.ndarray:
    """Every layer's row at length one; matrices [..., E]."""
    return matrices / np.maximum(np.linalg.norm(matrices, axis=-1, keepdims=True), 1e-12)


class Belady(Policy):
    """The bound: evicts the one whose next use is furthest away, which only a recorded trace knows.

    Args:
        layers, experts: as for all.
        future: for each layer of each forward pass in order, the sub-experts used.
    """

    def __init__(self, layers: int, experts: int, future: list[np.ndarray]):
        super().__init__(layers, experts)
        self._next = np.full((layers, experts), np.inf)
        self._after: list[np.ndarray] = [np.empty(0)] * len(future)
        coming = np.full((layers, experts), np.inf)
        for number in range(len(future) - 1, -1, -1):
            layer, used = number % layers, future[number]
            self._after[number] = coming[layer, used].copy()
            coming[layer, used] = number
        self._next = coming
        self._future, self._number = future, 0

    def use(self, layer: int, uses: Uses) -> None:
        self._next[layer, self._future[self._number]] = self._after[self._number]
        self._number += 1

    def keep(self) -> np.ndarray:
        return -self._next


POLICIES: dict[str, Any] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "activation": ActivationAware,
}
