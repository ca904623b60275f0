"""What every command shares: how it reports, how it fails, how it stops."""

import errno
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import click
import datasets
import torch
import transformers
from tqdm import tqdm

from prism_refactor import signals as prism_signals
from prism_refactor.errors import PrismError, ResourceError
from prism_refactor.signals import INTERRUPTED

BROKEN_PIPE = 141


class Reporter:
    """Progress on stderr: a tqdm bar on a terminal, plain lines in a pipe, JSON lines with --log-json, nothing with --quiet.

    Results go to stdout through `click.echo`; this is only about work in progress.
    """

    def __init__(self, quiet: bool, log_json: bool):
        self._json = log_json
        self._bar = not quiet and not log_json and sys.stderr.isatty()
        self._lines = not quiet and not self._bar
        self._tqdm: tqdm | None = None
        self._start = time.monotonic()

    @property
    def has_bar(self) -> bool:
        """Whether progress is a bar on a terminal."""
        return self._bar

    def step(self, what: str, layer: int, layers: int, done: int = 0, total: int = 0, part: float = 0.0, parts: float = 1.0) -> None:
        """Note that `done` of `total` units (0: the whole) of `what` are finished in a layer; `parts` of its work, after `part`."""
        prism_signals.raise_again()
        share = done / total if total else 1.0
        name = f"layer {layer} ({layer + 1}/{layers})"
        if self._bar:
            if self._tqdm is None:
                self._tqdm = tqdm(total=layers, file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed}<{remaining}", leave=False)
            self._tqdm.set_description(f"{name} {what}" + (f" {done}/{total}" if total else ""), refresh=False)
            self._tqdm.n = layer + part + parts * share
            self._tqdm.refresh()
        elif self._lines and share == 1:
            self.line(f"{name}: {what}" + (f" {total}" if total else ""), event=what, layer=layer, layers=layers, total=total)

    def count(self, what: str, done: int, total: int) -> None:
        """Note that `done` of `total` things that belong to no layer are finished."""
        prism_signals.raise_again()
        if self._bar:
            if self._tqdm is None:
                self._tqdm = tqdm(total=total, file=sys.stderr, desc=what, leave=False)
            self._tqdm.update(done - self._tqdm.n)
        elif done == total:
            self.line(f"{total} {what}", event=what, total=total)

    def line(self, text: str, **fields: Any) -> None:
        """One line of progress; with --log-json the fields instead of the text."""
        prism_signals.raise_again()
        seconds = time.monotonic() - self._start
        if self._json and self._lines:
            click.echo(json.dumps({"seconds": round(seconds, 2), "message": text, **fields}), err=True)
        elif self._lines:
            click.echo(f"{seconds:7.1f}s  {text}", err=True)
        elif self._bar:
            tqdm.write(text, file=sys.stderr)

    def warning(self, text: str, **fields: Any) -> None:
        """A line that even --quiet shows."""
        self.notice(text, "warning", **fields)

    def notice(self, text: str, kind: str = "", **fields: Any) -> None:
        """A line that even --quiet shows, of some kind."""
        if self._json:
            click.echo(json.dumps({kind or "message": text, **fields}), err=True)
        else:
            tqdm.write(f"{kind}: {text}" if kind else text, file=sys.stderr)

    def warn_of(self, text: str | None) -> None:
        """A warning, if there is something to warn of."""
        if text is not None:
            self.warning(text)

    def close(self) -> None:
        """Remove the bar."""
        if self._tqdm is not None:
            self._tqdm.close()
            self._tqdm = None


def command(function: Callable[..., None]) -> Callable[[], NoReturn]:
    """Turn `function(reporter, **options)` with click options into a console entry point with honest exit codes.

    Errors are one line on stderr: exit code 2 usage, 3 input, 4 gate, 5 resources, 130 interrupted, 143 terminated, 1 a bug of ours.
    """

    @wraps(function)
    def with_reporter(quiet: bool, log_json: bool, debug: bool, **options: Any) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        # It logs the errors that it also raises.
        datasets.logging.set_verbosity(logging.CRITICAL)
        reporter = Reporter(quiet, log_json)
        try:
            function(reporter, **options)
        finally:
            reporter.close()

    wrapped: Any = with_reporter
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--log-json", is_flag=True, help="Progress as JSON lines on stderr."),
        click.option("-q", "--quiet", is_flag=True, help="No progress."),
    ):
        wrapped = option(wrapped)
    built = click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})(wrapped)
    built = click.version_option(package_name="prism-refactor")(built)

    def main() -> NoReturn:
        prism_signals.listen()
        sys.exit(run(built, sys.argv[1:]))

    main.command = built  # type: ignore[attr-defined]
    main.__doc__ = function.__doc__
    return main


def exit_of(error: BaseException) -> click.exceptions.Exit | None:
    """The exit of a command that a signal stopped with this error and that has said itself what is left; None: no signal did."""
    code = prism_signals.exit_code(error)
    return None if code is None else click.exceptions.Exit(code)


def run(built: click.Command, arguments: list[str]) -> int:
    """Run a command on some arguments; prints an error as one line and returns the exit code."""
    try:
        return built.main(arguments, standalone_mode=False) or 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _interrupted(arguments)
    except BrokenPipeError:
        # The reader of our output has gone; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except click.ClickException as error:
        tell(arguments, f"error: {error.format_message()}", error.exit_code)
        return error.exit_code
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        stopped = prism_signals.exit_code(error)
        if stopped is not None:
            return _interrupted(arguments) if stopped == INTERRUPTED else stopped
        known = _as_prism_error(error)
        if known is not None:
            tell(arguments, f"error: {known}", known.exit_code)
            return known.exit_code
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        tell(arguments, f"error: unexpected {summary}; please report it with the output of --debug", 1)
        return 1


def _interrupted(arguments: list[str]) -> int:
    tell(arguments, "interrupted; nothing was written", INTERRUPTED)
    return INTERRUPTED


def tell(arguments: list[str], text: str, code: int) -> None:
    """Say how a command ended that did not end well: as a line, or as an object when its arguments ask for --log-json."""
    if "--log-json" in arguments:
        text = json.dumps({"error": text.removeprefix("error: "), "exit_code": code})
    click.echo(text, err=True)


def _as_prism_error(error: Exception) -> PrismError | None:
    if isinstance(error, PrismError):
        return error
    # torch reports an exhausted CPU as a RuntimeError that names its allocator.
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if no_memory or "DefaultCPUAllocator" in str(error) or os.strerror(errno.ENOMEM) in str(error):
        return ResourceError("out of memory; lower --num-samples, --batch-size or --workers, or use --dtype bfloat16 where there is one")
    # safetensors reports a full disk in an exception of its own, as text.
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
        return ResourceError("the disk is full; free some space or choose a folder on another disk")
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        where = getattr(error, "filename", None)
        return ResourceError(f"{where}: permission denied; get the right to it or choose another folder")
    return None
