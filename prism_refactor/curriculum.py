"""How a router is fine-tuned."""

from dataclasses import dataclass

LOSSES = ("cross-entropy", "distill")


@dataclass(frozen=True)
class Curriculum:
    """How to train.

    Attributes:
        steps: optimiser steps.
        first_k, last_k: active sub-experts at the first and the last step; linear between.
        learning_rate: of AdamW; the paper's 1e-5 suits 200,000 sequences.
        loss: 'cross-entropy', or 'distill': KL divergence to the model at full k.
        batch_size: sequences per step.
        evaluate_every: steps between two measurements of the held-out perplexity.
        seed: of the order of the sequences.
    """

    steps: int
    first_k: int
    last_k: int
    learning_rate: float
    loss: str
    batch_size: int
    evaluate_every: int
    seed: int

    def k_at(self, step: int) -> int:
        """Active sub-experts at a step counted from 0."""
        return round(self.first_k + (self.last_k - self.first_k) * step / max(1, self.steps - 1))
