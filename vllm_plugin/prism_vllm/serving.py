"""How a checkpoint is served: which k a request runs at, and what is refused."""

from dataclasses import dataclass
from typing import Any

from prism_vllm.checkpoint import CheckpointError, RefactoredCheckpoint

# Keys of --additional-config, and of a request's vllm_xargs.
K, QUALITY, OPERATING_POINT = "prism_k", "prism_quality", "prism_operating_point"


@dataclass(frozen=True)
class Serving:
    """A refactored checkpoint as this server runs it.

    Attributes:
        checkpoint: the checkpoint.
        default: sub-experts per token of a request that asks for nothing.
        per_layer: k of each MoE layer where an operating point is served; None: each request has its own k.
    """

    checkpoint: RefactoredCheckpoint
    default: int
    per_layer: tuple[int, ...] | None = None

    @classmethod
    def of(cls, checkpoint: RefactoredCheckpoint, additional: dict[str, Any]) -> "Serving":
        """Return how to serve a checkpoint.

        Args:
            checkpoint: the checkpoint.
            additional: vLLM's `additional_config`: `prism_k`, the default k, or `prism_operating_point`, the mean k of a stored one.

        Raises:
            CheckpointError: a value is out of range, or the checkpoint has no such operating point.
        """
        most, full = checkpoint.most, checkpoint.full
        if not 1 <= most <= full:
            raise CheckpointError(f"{checkpoint.config['top_k']} {most}: choose 1 to {full}")
        unknown = sorted(key for key in additional if key.startswith("prism_") and key not in (K, OPERATING_POINT))
        if unknown:
            raise CheckpointError(f"additional_config {unknown[0]}: unknown; write {K} or {OPERATING_POINT}")
        if OPERATING_POINT not in additional:
            return cls(checkpoint, most if K not in additional else _whole(K, additional[K], most))
        if K in additional:
            raise CheckpointError(f"additional_config has {K} and {OPERATING_POINT}; drop one of them")
        point = checkpoint.operating_point(_whole(OPERATING_POINT, additional[OPERATING_POINT], full))
        if len(point) != len(checkpoint.blocks):
            raise CheckpointError(f"its operating point has {len(point)} layers, the model {len(checkpoint.blocks)}")
        if max(point) > most:
            raise CheckpointError(f"its operating point needs {max(point)} sub-experts in a layer, config.json allows {most}")
        return cls(checkpoint, max(point), tuple(point))

    def k_of(self, asked: dict[str, Any] | None) -> int:
        """Return k of a request.

        Args:
            asked: its `extra_args`: `prism_k`, or `prism_quality`: the least k at which the full model's perplexity divided by that at k
                is at least this.

        Raises:
            ValueError: a value cannot be served; the message says what can.
        """
        ours = {key: value for key, value in (asked or {}).items() if key.startswith("prism_")}
        if not ours:
            return self.default
        unknown = sorted(ours.keys() - {K, QUALITY})
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown; write {K} or {QUALITY}")
        if self.per_layer is not None:
            raise ValueError(f"{next(iter(ours))}: this server runs an operating point, the same for every request; leave it out")
        if len(ours) > 1:
            raise ValueError(f"{K} and {QUALITY}: write one of them")
        if K in ours:
            return _whole(K, ours[K], self.checkpoint.most)
        return self._k_for(ours[QUALITY])

    def _k_for(self, quality: Any) -> int:
        curve = self.checkpoint.quality
        if curve is None:
            raise ValueError(f"{QUALITY}: this checkpoint was not measured; run prism-eval --save, or write {K}")
        if isinstance(quality, bool) or not isinstance(quality, (int, float)) or not 0 < quality <= 1:
            raise ValueError(f"{QUALITY}: {quality!r} is not a number above 0 and at most 1")
        k = next(k for k, reached in curve.items() if reached >= quality - 1e-9)
        if k > self.checkpoint.most:
            raise ValueError(f"{QUALITY}: {quality} needs k = {k}, and this server runs at most {self.checkpoint.most}")
        return k


def _whole(name: str, value: Any, most: int) -> int:
    """The value of an option. Raises CheckpointError, which is a ValueError, too."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise CheckpointError(f"{name}: {value!r} is not a whole number from 1 to {most}")
    return value
