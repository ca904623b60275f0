"""How a model is offloaded: what may be asked for."""

import re
from dataclasses import dataclass
from fractions import Fraction

from prism_refactor.errors import UsageError
from prism_refactor.resources import parse_size

# By what sub-experts are fetched ahead: the next layer's router on this layer's input, activation matrices, or both.
PREFETCHES = ("none", "router", "activation", "both")
# How sub-experts are read: past the page cache (O_DIRECT), through it, or once into page-locked host memory.
READS = DIRECT, BUFFERED, PINNED = "direct", "buffered", "pinned"


@dataclass(frozen=True)
class CacheBudget:
    """A budget for the cached sub-experts.

    Attributes:
        text: as the user gave it: bytes with a unit, 2GiB, or a share of all sub-experts, 25%.
    """

    text: str

    def __post_init__(self) -> None:
        self.bytes(1)

    def bytes(self, total: int) -> int:
        """The budget where all sub-experts together take `total` bytes. Raises UsageError when the text is neither."""
        share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", self.text)
        if share is not None and 0 < float(share[1]) <= 100:
            return int(total * Fraction(share[1]) / 100)
        size = parse_size(self.text)
        if size is not None:
            return size
        raise UsageError(f"`fast_memory` {self.text}: give bytes with a unit, like 2GiB or 512MiB, or a share of the experts, like 25%")


@dataclass(frozen=True)
class LatencyTarget:
    """A latency target, and how far quality may go for it.

    Attributes:
        seconds: that a token should take; while the misses of a layer would take longer than what is left for it, the sub-experts of
            smallest predicted contribution among them are skipped.
        k_min: the first so many of each token by rank are computed whatever it takes, so that it is at least as good as at that k.
    """

    seconds: float
    k_min: int
