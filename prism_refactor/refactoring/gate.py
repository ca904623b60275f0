"""Demands on a refactoring that a batch job can fail on, from the figures in its manifest."""

import operator
import re
from dataclasses import dataclass
from statistics import mean
from typing import Any

from prism_refactor.errors import UsageError

_GATE = re.compile(r"\s*(dropped|unrouted|full-k-error|error@(\d+)(%?))\s*(<=|<)\s*(\d*\.?\d+(?:e-?\d+)?)\s*")
_COMPARE = {"<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class QualityGate:
    """A demand such as 'error@50%<0.05': met when it is true.

    Figures: 'dropped', the mean share of an expert's activation outside each token's best sub-experts; 'unrouted', experts that saw no
    token; 'full-k-error', the largest that the stock gate's tilt causes in a layer; 'error@K', the mean over layers of the squared relative
    error of the layer's output at K sub-experts (or a share of them, 'error@50%') with the router that the run wrote.

    Attributes:
        text: as written.
        figure: what is judged.
        position: of 'error@': a number of sub-experts or a share in per cent.
        is_share: which of the two.
        comparison, limit: '<' or '<=', and what the figure is compared with.
    """

    text: str
    figure: str
    position: float
    is_share: bool
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "QualityGate":
        """Raises UsageError when the text is no such demand."""
        match = _GATE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"--quality-gate '{text}': write for example 'error@50%<0.05', 'dropped<0.5', 'unrouted<=0' or 'full-k-error<1e-3'"
            )
        figure = match[1].partition("@")[0]
        return cls(text.strip(), figure, float(match[2] or 0), bool(match[3]), match[4], float(match[5]))

    def value(self, manifest: dict[str, Any]) -> float:
        """The figure in a manifest. Raises UsageError when 'error@' asks for a number of sub-experts that is not in it."""
        layers = manifest["layers"]
        if self.figure == "dropped":
            return mean(expert["loss_after"] for layer in layers for expert in layer["experts"])
        if self.figure == "unrouted":
            return sum(len(layer["unrouted"]) for layer in layers)
        if self.figure == "full-k-error":
            return max(layer["full_k_error"] for layer in layers)
        numbers = layers[0]["output_error"]["k"]
        self.check(numbers)
        column = numbers.index(self._number(numbers))
        router = "two-level" if "two-level" in layers[0]["output_error"] else "stock"
        return mean(layer["output_error"][router][column] for layer in layers)

    def check(self, numbers: list[int]) -> None:
        """Raises UsageError when the errors are known at these `numbers` of sub-experts only and the gate asks for another."""
        if self.figure == "error" and self._number(numbers) not in numbers:
            raise UsageError(
                f"--quality-gate '{self.text}': errors are measured at {', '.join(map(str, numbers))} of {numbers[-1]} sub-experts"
            )

    def _number(self, numbers: list[int]) -> float:
        return self.position * numbers[-1] / 100 if self.is_share else self.position

    def met(self, value: float) -> bool:
        """Whether the demand holds; of a figure that is not a number it does not."""
        return _COMPARE[self.comparison](value, self.limit)
