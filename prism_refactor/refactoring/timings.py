"""Where the time of a run goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timings:
    """Seconds by stage, summed over the layers.

    Attributes:
        seconds: of each stage so far, in the order in which they first ran.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block as part of a stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
