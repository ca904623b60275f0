"""The partitioning problem and its answer, on plain arrays."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from prism_refactor.errors import UsageError
from prism_refactor.solvers import kernels


@dataclass(frozen=True)
class Problem:
    """Split C neurons into `num_groups` equal groups so that little is lost when each token keeps its `kept` largest groups.

    With L[b, n] the sum of `saliency[b, c]` over the neurons c of group n, the loss is the share of the total saliency that lies
    in the N - kept smallest groups of each token (MoE-Prism, arXiv 2510.19366, Partitioning Optimization Solver).

    Args:
        saliency: float32 [B tokens, C neurons], finite and non-negative.
        num_groups: N >= 2, divides C.
        kept: groups a token keeps, 1 <= kept < N.
        weights: float32 [C], finite and non-negative, multiplied into the saliency (the norms of down_proj's columns, say).

    Attributes:
        by_neuron: float32 [C, B], the weighted saliency as the kernels read it.

    Raises:
        UsageError: the array or a number does not describe such a problem.
    """

    saliency: np.ndarray
    num_groups: int
    kept: int
    weights: np.ndarray | None = None
    by_neuron: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        saliency = np.asarray(self.saliency, dtype=np.float32)
        if saliency.ndim != 2 or 0 in saliency.shape:
            raise UsageError(f"saliency must be a non-empty [tokens, neurons] array, not shape {saliency.shape}")
        if not np.isfinite(saliency).all() or saliency.min() < 0:
            raise UsageError("saliency must be finite and non-negative")
        if self.num_groups < 2 or saliency.shape[1] % self.num_groups:
            raise UsageError(f"{saliency.shape[1]} neurons cannot be split into {self.num_groups} equal groups")
        if not 1 <= self.kept < self.num_groups:
            raise UsageError(f"kept must be between 1 and {self.num_groups - 1}, not {self.kept}")
        if self.weights is not None:
            weights = np.asarray(self.weights, dtype=np.float32)
            if weights.shape != saliency.shape[1:] or not np.isfinite(weights).all() or weights.min() < 0:
                raise UsageError(f"weights must be {saliency.shape[1]} finite and non-negative numbers, one per neuron")
            saliency = saliency * weights
            if not np.isfinite(saliency).all():
                raise UsageError("saliency times weights is beyond float32")
        object.__setattr__(self, "saliency", saliency)
        object.__setattr__(self, "by_neuron", np.ascontiguousarray(saliency.T))

    @property
    def neurons(self) -> int:
        """C."""
        return self.saliency.shape[1]

    @cached_property
    def swap_scale(self) -> float:
        """What a swap of two neurons changes by chance: their mean difference in saliency x sqrt(B); temperatures are in it."""
        others = self.by_neuron[np.random.default_rng(0).permutation(self.neurons)]
        return float(np.abs(self.by_neuron - others).mean(dtype=np.float64)) * len(self.saliency) ** 0.5

    def contiguous(self) -> np.ndarray:
        """The partition a checkpoint starts with: neurons in their stored order, int32 [C]."""
        return np.repeat(np.arange(self.num_groups, dtype=np.int32), self.neurons // self.num_groups)

    def random(self, rng: np.random.Generator) -> np.ndarray:
        """A uniformly random balanced partition, int32 [C]."""
        return rng.permutation(self.contiguous())

    def loss(self, labels: np.ndarray) -> float:
        """Dropped share of a partition, in [0, 1]; 0 where there is no saliency at all."""
        total = self.saliency.sum(dtype=np.float64)
        kept = kernels.kept_sum(self.by_neuron, labels, self.num_groups, self.kept)
        return max(0.0, float(1 - kept / total)) if total > 0 else 0.0


@dataclass(frozen=True)
class Partition:
    """A balanced partition.

    Attributes:
        labels: int32 [C], each neuron's group; group 0 carries the most saliency.
        loss: its dropped share.
        stored_loss: the dropped share of the contiguous split it replaces.
    """

    labels: np.ndarray
    loss: float
    stored_loss: float

    @classmethod
    def of(cls, problem: Problem, labels: np.ndarray) -> "Partition":
        """Number the groups by falling total saliency, so that equal partitions have equal labels (ties aside), and attach the loss."""
        weight = np.bincount(labels, problem.saliency.sum(0, dtype=np.float64), problem.num_groups)
        rank = np.empty(problem.num_groups, dtype=np.int32)
        rank[np.argsort(-weight, kind="stable")] = np.arange(problem.num_groups, dtype=np.int32)
        return cls(rank[labels], problem.loss(labels), problem.loss(problem.contiguous()))

    def order(self) -> np.ndarray:
        """Neuron indices sorted by group, stable: int64 [C]; row n of its [N, C / N] reshape is group n."""
        return np.argsort(self.labels, kind="stable")
