"""Requirements on a result, written like 'error@50%<0.05': a batch job fails unless they hold."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from prism_refactor.errors import UsageError

_COMPARE: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_NUMBER = r"-?\d*\.?\d+(?:[eE][-+]?\d+)?"
_REQUIREMENT = re.compile(rf"\s*([a-z][a-z-]*)(?:@(\d+(?:\.\d+)?)(%?))?\s*(<=|>=|<|>)\s*({_NUMBER})\s*")


@dataclass(frozen=True)
class Requirement:
    """A comparison that must hold.

    Attributes:
        text: as written.
        figure: name of the figure that is compared.
        position: sub-experts per token at which the figure is taken, or their share in per cent; None: the figure has no position.
        is_share: whether `position` is a share.
        comparison: '<', '<=', '>' or '>='.
        limit: what the figure is compared with.
    """

    text: str
    figure: str
    position: float | None
    is_share: bool
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str, figures: dict[str, bool]) -> "Requirement":
        """Read a requirement.

        Args:
            text: such as 'recovered@50%>=0.3' or 'unrouted<=0'.
            figures: names of the figures, and whether each has a position.

        Raises:
            UsageError: the text is no requirement on one of these figures.
        """
        match = _REQUIREMENT.fullmatch(text)
        if match is None or figures.get(match[1]) is not (match[2] is not None):
            known = ", ".join(name + ("@K or " + name + "@SHARE%" if has_position else "") for name, has_position in figures.items())
            raise UsageError(f"`require` '{text}': write FIGURE<NUMBER, with <, <=, > or >= and one of the figures {known}")
        return cls(text.strip(), match[1], float(match[2]) if match[2] else None, match[3] == "%", match[4], float(match[5]))

    def k(self, full: int) -> float:
        """Return the position in sub-experts of a model with `full` of them per token."""
        assert self.position is not None
        return self.position * full / 100 if self.is_share else self.position

    def holds(self, value: float) -> bool:
        """Return whether the figure's value meets the requirement; a value that is not finite does not."""
        return math.isfinite(value) and _COMPARE[self.comparison](value, self.limit)
