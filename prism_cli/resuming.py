"""What commands that can be resumed tell about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from prism_refactor.cli.app import Reporter, exit_of
from prism_refactor.files import finished_layers

RESUME = click.option("--resume", is_flag=True, help="Go on after the last finished layer of an interrupted run, if there is one.")


class Resumption:
    """Tells what an earlier run has done when this one begins, and what this one leaves when it ends too early.

    Args:
        reporter: of the command.
        target: its output folder.
        layers: how many it will finish.
    """

    def __init__(self, reporter: Reporter, target: Path, layers: int):
        self.reporter, self.target, self.layers, self._begun = reporter, target, layers, False

    def on_start(self, done: int, last: int) -> None:
        """The run has begun, after `done` layers of an earlier one, of which layer `last` was the last."""
        self._begun = True
        if done:
            self.reporter.line(f"going on after layer {last} ({done}/{self.layers})", event="resumed", layer=last, layers=self.layers)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Say that finished layers are kept when the block ends with an error."""
        try:
            yield
        except BaseException as error:
            done = finished_layers(self.target) if self._begun else 0
            if done:
                self.reporter.close()
                self.reporter.notice(f"stopped with {done} of {self.layers} layers done; --resume goes on after them", layers_done=done)
                stopped = exit_of(error)
                if stopped is not None:
                    raise stopped from None
            raise
