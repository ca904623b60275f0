"""What every command shares: how it reports, how it fails, how it stops. Imports no library that takes long."""

import errno
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NoReturn

import click
from tqdm import tqdm

from prism_refactor import signals
from prism_refactor.errors import PrismError, ResourceError
from prism_refactor.events import Events

BROKEN_PIPE = 141
# The libraries' own bars and warnings; datasets logs the errors that it also raises.
_QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "critical",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


class Reporter(Events):
    """Progress on stderr: a tqdm bar on a terminal, plain lines in a pipe, JSON lines with --log-json, nothing with --quiet.

    Results go to stdout through `click.echo`; this is only about work in progress.

    Attributes:
        layers_to_finish: of a job that can be resumed.
        begun: whether it has begun.
        stages: of a layer's part of the bar, where each stage begins and how much it takes; the whole where nothing is said.
    """

    def __init__(self, quiet: bool, log_json: bool):
        self._json = log_json
        self._bar = not quiet and not log_json and sys.stderr.isatty()
        self._lines = not quiet and not self._bar
        self._tqdm: tqdm | None = None
        self._start = time.monotonic()
        self.stages: dict[str, tuple[float, float]] = {}
        self.layers_to_finish = 0
        self.begun = False

    def resumed(self, layer: int, done: int) -> None:
        """The job has begun, after `done` layers of an earlier one, of which `layer` was the last."""
        self.begun = True
        if done:
            layers = self.layers_to_finish
            self.line(f"going on after layer {layer} ({done}/{layers})", event="resumed", layer=layer, layers=layers)

    def progress(self, stage: str, done: int, total: int, layer: tuple[int, int] | None = None) -> None:
        """Note that `done` of `total` units of a stage are finished: of a layer (index, layers), or of the job."""
        signals.raise_again()
        if layer is None:
            self._count(stage, done, total)
            return
        index, layers = layer
        name = f"layer {index} ({index + 1}/{layers})"
        if self._bar:
            start, part = self.stages.get(stage, (0.0, 1.0))
            if self._tqdm is None:
                self._tqdm = tqdm(total=layers, file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed}<{remaining}", leave=False)
            self._tqdm.set_description(f"{name} {stage}" + (f" {done}/{total}" if total > 1 else ""), refresh=False)
            # Layers that share the workers come by twice; the bar does not go back.
            self._tqdm.n = max(self._tqdm.n, index + start + part * done / total)
            self._tqdm.refresh()
        elif self._lines and done == total:
            count = f" {total}" if total > 1 else ""
            self.line(f"{name}: {stage}{count}", event=stage, layer=index, layers=layers, total=total if total > 1 else 0)

    def _count(self, stage: str, done: int, total: int) -> None:
        if self._bar:
            if self._tqdm is None:
                self._tqdm = tqdm(total=total, file=sys.stderr, leave=False)
            self._tqdm.set_description(stage, refresh=False)
            self._tqdm.update(done - self._tqdm.n)
        elif done == total:
            self.line(f"{total} {stage}", event=stage, total=total)

    def line(self, text: str, **fields: Any) -> None:
        """One line of progress; with --log-json the fields instead of the text."""
        signals.raise_again()
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


class LogLines(logging.Handler):
    """Shows what the library logs: as lines of progress, from warnings on also with --quiet."""

    def __init__(self, reporter: Reporter):
        super().__init__()
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record, with its traceback if it has one."""
        fields = getattr(record, "fields", {})
        try:
            if record.levelno < logging.WARNING:
                self.reporter.line(record.getMessage(), **fields)
            else:
                self.reporter.notice(self.format(record), record.levelname.lower(), **fields)
        except Exception:
            # The reader of stderr may be gone; whoever logs must not fail for it.
            self.handleError(record)


class Command(click.Command):
    """A command that may have subcommands beside its own arguments.

    Attributes:
        subcommands: by name.
    """

    def __init__(self, *arguments: Any, subcommands: Mapping[str, click.Command] | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self.subcommands = dict(subcommands or {})

    def main(self, args: Any = None, prog_name: str | None = None, **options: Any) -> Any:  # type: ignore[override]
        """Run the subcommand that the first argument names, or the command itself."""
        given = list(sys.argv[1:] if args is None else args)
        if given and given[0] in self.subcommands:
            subcommand = self.subcommands[given[0]]
            return subcommand.main(given[1:], f"{prog_name or os.path.basename(sys.argv[0])} {given[0]}", **options)
        return super().main(given, prog_name, **options)


def command(**subcommands: Any) -> Callable[[Callable[..., None]], Callable[[], NoReturn]]:
    """Turn `function(reporter, **options)` with click options into a console entry point with honest exit codes.

    Errors are one line on stderr: exit code 2 usage, 3 input, 4 requirement, 5 resources, 130 interrupted, 143 terminated, 1 a bug of
    ours.

    Args:
        subcommands: other such entry points, by name.
    """

    def decorate(function: Callable[..., None]) -> Callable[[], NoReturn]:
        @wraps(function)
        def with_reporter(quiet: bool, log_json: bool, debug: bool, **options: Any) -> None:
            reporter = Reporter(quiet, log_json)
            log, lines = logging.getLogger("prism_refactor"), LogLines(reporter)
            log.setLevel(logging.INFO)
            log.addHandler(lines)
            try:
                function(reporter, **options)
            finally:
                log.removeHandler(lines)
                reporter.close()

        wrapped: Any = with_reporter
        for option in (
            click.option("--debug", is_flag=True, help="Show the traceback of an error."),
            click.option("--log-json", is_flag=True, help="Progress as JSON lines on stderr."),
            click.option("-q", "--quiet", is_flag=True, help="No progress."),
        ):
            wrapped = option(wrapped)
        built = click.command(
            cls=Command,
            subcommands={name: main.command for name, main in subcommands.items()},
            context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
        )(wrapped)
        built = click.version_option(package_name="prism-refactor")(built)

        def main() -> NoReturn:
            signals.listen()
            os.environ.update(_QUIET_LIBRARIES)
            sys.exit(run(built, sys.argv[1:]))

        main.command = built  # type: ignore[attr-defined]
        main.__doc__ = function.__doc__
        return main

    return decorate


def exit_of(error: BaseException) -> click.exceptions.Exit | None:
    """The exit of a command that a signal stopped with this error and that has said itself what is left; None: no signal did."""
    code = signals.exit_code(error)
    return None if code is None else click.exceptions.Exit(code)


def run(built: click.Command, arguments: list[str]) -> int:
    """Run a command on some arguments; prints an error as one line and returns the exit code."""
    try:
        return built.main(arguments, standalone_mode=False) or 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _interrupted(built, arguments)
    except BrokenPipeError:
        # The reader of our output has gone; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except click.ClickException as error:
        tell(built, arguments, f"error: {error.format_message()}", error.exit_code)
        return error.exit_code
    except Exception as error:
        if asks_for("--debug", built, arguments):
            traceback.print_exc()
        stopped = signals.exit_code(error)
        if stopped is not None:
            return _interrupted(built, arguments) if stopped == signals.INTERRUPTED else stopped
        known = _as_prism_error(error)
        if known is not None:
            tell(built, arguments, f"error: {with_flags(str(known), built)}", known.exit_code)
            return known.exit_code
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        tell(built, arguments, f"error: unexpected {summary}; please report it with the output of --debug", 1)
        return 1


def with_flags(message: str, built: click.Command) -> str:
    """An error's message with the flag of each option that it names in backticks."""
    subcommands = built.subcommands.values() if isinstance(built, Command) else ()
    flags = {parameter.name: parameter.opts[0] for known in (*subcommands, built) for parameter in known.params}
    return re.sub(r"`([a-z_]+)`", lambda match: flags.get(match[1], f"--{match[1].replace('_', '-')}"), message)


def _interrupted(built: click.Command, arguments: list[str]) -> int:
    tell(built, arguments, "interrupted; nothing was written", signals.INTERRUPTED)
    return signals.INTERRUPTED


def asks_for(flag: str, built: click.Command, arguments: list[str]) -> bool:
    """Whether the arguments of a command hold a flag. They need not parse; the value of an option does not count as a flag."""
    takes_value = {
        name for parameter in built.params if isinstance(parameter, click.Option) and not parameter.is_flag for name in parameter.opts
    }
    previous = ""
    for argument in arguments:
        if argument == "--":
            break
        if argument == flag and previous not in takes_value:
            return True
        previous = "" if previous in takes_value else argument
    return False


def tell(built: click.Command, arguments: list[str], text: str, code: int) -> None:
    """Say how a command ended that did not end well: as a line, or as an object when its arguments ask for --log-json."""
    if asks_for("--log-json", built, arguments):
        text = json.dumps({"error": text.removeprefix("error: "), "exit_code": code})
    click.echo(text, err=True)


def _as_prism_error(error: Exception) -> PrismError | None:
    if isinstance(error, PrismError):
        return error
    # torch reports an exhausted GPU as an OutOfMemoryError, an exhausted CPU as a RuntimeError that names its allocator.
    no_memory = (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or getattr(error, "errno", None) == errno.ENOMEM
    )
    if no_memory or "DefaultCPUAllocator" in str(error) or os.strerror(errno.ENOMEM) in str(error):
        return ResourceError("out of memory; lower --num-samples, --batch-size or --workers, or use --dtype bfloat16 where there is one")
    # safetensors reports a full disk in an exception of its own, as text.
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
        return ResourceError("the disk is full; free some space or choose a folder on another disk")
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        where = getattr(error, "filename", None)
        return ResourceError(f"{where}: permission denied; get the right to it or choose another folder")
    return None
