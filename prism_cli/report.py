"""`prism-report`: a refactored checkpoint as one HTML page."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import INPUT_FOLDER, OutputFile
from prism_refactor.errors import InputError, one_line
from prism_refactor.formats import EVALUATION, MANIFEST, PAGE, PICTURE_FILE


@command()
@click.argument("out_dir", type=INPUT_FOLDER)
@click.option("--output", type=OutputFile(), help=f"Write the page here.  [default: OUT_DIR/{PAGE}]")
def main(reporter: Reporter, out_dir: Path, output: Path | None) -> None:
    """Show the refactored checkpoint in OUT_DIR as one HTML page: quality curve, operating points, errors, partition, load, recipe.

    The page refers to nothing outside itself. The quality curve is there once prism-eval --save has measured it.
    """
    from prism_refactor.evaluation.page import report_page
    from prism_refactor.files import output_file
    from prism_refactor.models.refactored import RefactoredCheckpoint

    manifest = RefactoredCheckpoint(out_dir).manifest
    target = output or out_dir / PAGE
    evaluation, pictures = _evaluation(out_dir / EVALUATION), _pictures(out_dir / PICTURE_FILE)
    with _broken(f"{out_dir}: {MANIFEST}, {EVALUATION} or {PICTURE_FILE}", "refactor and evaluate again"):
        page = report_page(manifest, evaluation, pictures)
    with output_file(target) as partial:
        partial.write_text(page, encoding="utf-8")
    if evaluation is None:
        reporter.line(f"no {EVALUATION} in {out_dir}: prism-eval MODEL_DIR {out_dir} --save measures the quality curve", missing=EVALUATION)
    click.echo(str(target))


@contextmanager
def _broken(what: str, remedy: str) -> Iterator[None]:
    from jinja2 import UndefinedError
    from safetensors import SafetensorError

    # What reading a file raises that lacks a field or has one of another type.
    mistakes = LookupError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration, SafetensorError, UndefinedError
    try:
        yield
    except mistakes as error:
        raise InputError(f"{what} is not as this version writes it ({type(error).__name__}: {one_line(error)}); {remedy}") from error


def _evaluation(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    with _broken(str(path), "run prism-eval --save again"):
        return dict(json.loads(path.read_text()))


def _pictures(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    if not path.exists():
        return {}
    with _broken(str(path), "refactor again"):
        return load_file(path)
