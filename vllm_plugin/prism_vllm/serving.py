"""How a checkpoint is served: how many sub-experts the tokens of a request run, and what is refused."""

from dataclasses import dataclass
from typing import Any

from prism_vllm.checkpoint import CheckpointError, RefactoredCheckpoint

# Keys of a request's vllm_xargs; the first two are those of --additional-config.
K, BUDGET, QUALITY = "prism_k", "prism_budget", "prism_quality"
# Budgets are told apart by so many steps from 0 to 1, as in prism-serve.
BUDGET_STEPS = 1000


@dataclass(frozen=True)
class Serving:
    """A refactored checkpoint as this server runs it.

    Attributes:
        checkpoint: the checkpoint.
        default: of a request that asks for nothing, see `active_of`.
    """

    checkpoint: RefactoredCheckpoint
    default: float

    @classmethod
    def of(cls, checkpoint: RefactoredCheckpoint, additional: dict[str, Any]) -> "Serving":
        """Return how to serve a checkpoint.

        Args:
            checkpoint: the checkpoint.
            additional: vLLM's `additional_config`: `prism_k` or `prism_budget`, of requests that ask for nothing.

        Raises:
            CheckpointError: a value is out of range.
        """
        if not 1 <= checkpoint.most <= checkpoint.full:
            raise CheckpointError(f"{checkpoint.config['top_k']} {checkpoint.most}: choose 1 to {checkpoint.full}")
        unknown = sorted(key for key in additional if key.startswith("prism_") and key not in (K, BUDGET))
        if unknown:
            raise CheckpointError(f"additional_config {unknown[0]}: unknown; write {K} or {BUDGET}")
        every = cls(checkpoint, checkpoint.most)
        return cls(checkpoint, every.active_of(additional))

    def active_of(self, asked: dict[str, Any] | None) -> float:
        """Return how many sub-experts the tokens of a request run: a whole number, or, below 1, the share of all that they run on average.

        Args:
            asked: its `extra_args`: `prism_k`; or `prism_budget`, a share; or `prism_quality`: the least k at which the full model's
                perplexity divided by that at k is at least this.

        Raises:
            CheckpointError: a value cannot be served; the message says what can.
        """
        ours = {key: value for key, value in (asked or {}).items() if key.startswith("prism_")}
        if not ours:
            return self.default
        unknown = sorted(ours.keys() - {K, BUDGET, QUALITY})
        if unknown:
            raise CheckpointError(f"{unknown[0]}: unknown; write {K}, {BUDGET} or {QUALITY}")
        if len(ours) > 1:
            raise CheckpointError(f"{' and '.join(sorted(ours))}: write one of them")
        if QUALITY in ours:
            return self._k_for(_share(QUALITY, ours[QUALITY]))
        return self._k(ours[K]) if K in ours else self._within(_share(BUDGET, ours[BUDGET]))

    def _k(self, value: Any) -> int:
        most = self.checkpoint.most
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise CheckpointError(f"{K}: {value!r} is not a whole number from 1 to {most}")
        return value

    def _within(self, budget: float) -> float:
        if not self.checkpoint.has_thresholds:
            raise CheckpointError(f"{BUDGET}: this checkpoint has no thresholds; refactor it again, or write {K}")
        most, full = self.checkpoint.most, self.checkpoint.full
        if most < full:
            # Tokens that need more than the most could not have it, and the mean would be less.
            raise CheckpointError(
                f"{BUDGET}: this server runs at most {most} of {full}; write {K}, or leave out the override of the config"
            )
        steps = max(round(budget * BUDGET_STEPS), 1)
        return steps / BUDGET_STEPS if steps < BUDGET_STEPS else full

    def _k_for(self, quality: float) -> int:
        curve = self.checkpoint.quality
        if curve is None:
            raise CheckpointError(f"{QUALITY}: this checkpoint was not measured; run prism-eval --save, or write {K}")
        k = next(k for k, reached in curve.items() if reached >= quality - 1e-9)
        if k > self.checkpoint.most:
            raise CheckpointError(f"{QUALITY}: {quality} needs k = {k}, and this server runs at most {self.checkpoint.most}")
        return k


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise CheckpointError(f"{name}: {value!r} is not a number above 0 and at most 1")
    return value
