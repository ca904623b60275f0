"""The console scripts. Importing torch and transformers takes seconds, in which Ctrl-C should be no traceback either."""

import importlib
import sys
from typing import NoReturn


def _open(door: str) -> NoReturn:
    try:
        main = importlib.import_module(f"prism_cli.{door}").main
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was written\n")
        sys.exit(130)
    except MemoryError:
        sys.stderr.write("error: not enough memory to load torch and transformers; free some\n")
        sys.exit(5)
    sys.exit(main())


def bench() -> NoReturn:
    """prism-bench."""
    _open("bench")


def evaluate() -> NoReturn:
    """prism-eval."""
    _open("evaluate")


def finetune() -> NoReturn:
    """prism-finetune."""
    _open("finetune")


def loadtest() -> NoReturn:
    """prism-loadtest."""
    _open("loadtest")


def profile() -> NoReturn:
    """prism-profile, and prism-profile merge."""
    if sys.argv[1:2] == ["merge"]:
        sys.argv[:2] = [f"{sys.argv[0]} merge"]
        _open("merge")
    _open("profile")


def refactor() -> NoReturn:
    """prism-refactor."""
    _open("refactor")


def replay() -> NoReturn:
    """prism-replay."""
    _open("replay")


def report() -> NoReturn:
    """prism-report."""
    _open("report")


def run() -> NoReturn:
    """prism-run."""
    _open("run")


def serve() -> NoReturn:
    """prism-serve."""
    _open("serve")


def verify() -> NoReturn:
    """prism-verify."""
    _open("verify")
