"""What commands that can be resumed tell about it."""

from pathlib import Path
from types import TracebackType

import click

from prism_refactor.cli.app import Reporter, exit_of

RESUME = click.option("--resume", is_flag=True, help="Go on with an interrupted run, if there is one.")


class Resumption:
    """Says that finished layers are kept when its `with` block ends with an error.

    Args:
        reporter: of the command; it tells what an earlier run has done.
        target: the output folder.
        layers: how many the run will finish.
    """

    def __init__(self, reporter: Reporter, target: Path, layers: int):
        self.reporter, self.target, self.layers = reporter, target, layers
        reporter.layers_to_finish = layers

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        from prism_refactor.files import finished_layers

        done = finished_layers(self.target) if error is not None and self.reporter.begun else 0
        if error is not None and done:
            self.reporter.close()
            self.reporter.notice(f"stopped with {done} of {self.layers} layers done; --resume goes on after them", layers_done=done)
            stopped = exit_of(error)
            if stopped is not None:
                raise stopped from None
