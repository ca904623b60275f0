"""From a quality that a request asks for to a k, through what `prism-eval --save` measured."""

import math
from pathlib import Path

import numpy as np

from prism_refactor.formats import Evaluation


class QualityCurve:
    """The quality of every k: the full model's perplexity divided by that at k, so 1 is as good as the original.

    Args:
        perplexities: {k: perplexity}, with that of full k.
    """

    def __init__(self, perplexities: dict[int, float]):
        self.measured = dict(sorted(perplexities.items()))
        ks = np.array(list(self.measured))
        # What fewer sub-experts reach, more do too: noise must not make a larger k the worse one.
        logs = np.minimum.accumulate(np.log(list(self.measured.values())))
        self._ks = np.arange(ks[0], ks[-1] + 1)
        self._quality = np.exp(logs[-1] - np.interp(self._ks, ks, logs))

    def k_for(self, quality: float) -> int:
        """The least k of at least this quality; between measured k by interpolation, never below the least measured one.

        Raises:
            ValueError: the quality is not above 0 and at most 1.
        """
        if not 0 < quality <= 1:
            raise ValueError("quality must be above 0 and at most 1")
        return int(self._ks[np.argmax(self._quality >= quality - 1e-9)])

    def quality_of(self, k: int) -> float | None:
        """The quality of k; None below the least measured one."""
        return float(self._quality[k - self._ks[0]]) if self._ks[0] <= k <= self._ks[-1] else None

    @classmethod
    def load(cls, folder: Path, router: str, full_k: int) -> "QualityCurve | None":
        """The curve of a refactored checkpoint; None where `prism-eval --save` has not measured full k and one more.

        Args:
            folder: the checkpoint.
            router: "two-level" or "stock", as it is run.
            full_k: sub-experts per token at which it is the original.

        Raises:
            InputError: the file cannot be read.
        """
        evaluation = Evaluation.read(folder)
        if evaluation is None:
            return None
        points = next((curve.points for curve in evaluation.refactored if curve.router == router), [])
        perplexities = {point.k: point.perplexity for point in points if isinstance(point.k, int)}
        usable = len(perplexities) > 1 and full_k in perplexities and all(map(math.isfinite, perplexities.values()))
        return cls(perplexities) if usable else None
