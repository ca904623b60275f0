"""How a router is distilled."""

import math
from dataclasses import dataclass

import numpy as np

# Steps at the start over which the learning rate rises.
WARM_UP = 5


@dataclass(frozen=True)
class Distillation:
    """How to train a router to give what the model gives at full k.

    Attributes:
        steps: optimiser steps.
        least_k, most_k: active sub-experts of a step are drawn between them, small numbers more often: their logarithms are uniform.
        learning_rate: how far a step of Adam moves a tensor at most, relative to the root mean square of the tensor's values.
        batch_size: sequences per step.
        evaluate_every: steps between two measurements of the held-out perplexity.
        seed: of the draws and the order of the sequences.
    """

    steps: int
    least_k: int
    most_k: int
    learning_rate: float
    batch_size: int
    evaluate_every: int
    seed: int

    def k_at(self, step: int) -> int:
        """Active sub-experts at a step counted from 0."""
        drawn = np.random.default_rng([self.seed, step]).uniform(math.log(self.least_k), math.log(self.most_k))
        return round(math.exp(drawn))

    def rate_at(self, step: int) -> float:
        """The learning rate at a step counted from 0: it rises over the first ones, then falls to nothing as a cosine does."""
        return self.learning_rate * min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / self.steps)) / 2
