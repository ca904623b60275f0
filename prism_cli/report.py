"""`prism-report`: a refactored checkpoint as one HTML page."""

from pathlib import Path
from typing import Any

import click

from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import INPUT_FOLDER, OutputFile
from prism_refactor.errors import InputError, one_line
from prism_refactor.formats import EVALUATION, PAGE, PICTURE_FILE, Evaluation


@command()
@click.argument("out_dir", type=INPUT_FOLDER)
@click.option("--output", type=OutputFile(), help=f"Write the page here.  [default: OUT_DIR/{PAGE}]")
def main(reporter: Reporter, out_dir: Path, output: Path | None) -> None:
    """Show the refactored checkpoint in OUT_DIR as one HTML page: quality curve, active sub-experts, errors, partition, load, recipe.

    The page refers to nothing outside itself. The quality curve is there once prism-eval --save has measured it.
    """
    from prism_refactor.evaluation.page import report_page
    from prism_refactor.files import output_file
    from prism_refactor.models.refactored import RefactoredCheckpoint

    manifest = RefactoredCheckpoint(out_dir).manifest
    target, evaluation = output or out_dir / PAGE, Evaluation.read(out_dir)
    page = report_page(manifest, evaluation, _pictures(out_dir / PICTURE_FILE))
    with output_file(target) as partial:
        partial.write_text(page, encoding="utf-8")
    if evaluation is None:
        reporter.line(f"no {EVALUATION} in {out_dir}: prism-eval MODEL_DIR {out_dir} --save measures the quality curve", missing=EVALUATION)
    click.echo(str(target))


def _pictures(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        pictures = load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is broken ({one_line(error)}); refactor again") from None
    layers = {name.rpartition(".")[0] for name in pictures}
    if pictures.keys() != {f"{layer}.{part}" for layer in layers for part in ("before", "after", "expert")}:
        raise InputError(f"{path}: does not hold the pictures of every layer; refactor again")
    return pictures
