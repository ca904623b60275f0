"""`prism-verify`: is the refactored checkpoint the same model at full k?"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_refactor.calibration.settings import Calibration
from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import INPUT_FOLDER, TEXT_OPTIONS, Finite, add
from prism_refactor.errors import RequirementError
from prism_refactor.recipe import LOGIT_TOLERANCE
from prism_refactor.tables import table

if TYPE_CHECKING:
    from prism_refactor.refactoring.verify import LogitComparison

NUM_SAMPLES = 8


@command()
@click.argument("model_dir", type=INPUT_FOLDER)
@click.argument("out_dir", type=INPUT_FOLDER)
@add(TEXT_OPTIONS)
@click.option("--num-samples", type=click.IntRange(1), default=NUM_SAMPLES, help="Samples of text.")
@click.option("--tolerance", type=Finite(0), default=LOGIT_TOLERANCE, help="Largest |logit difference|.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(reporter: Reporter, model_dir: Path, out_dir: Path, tolerance: float, as_json: bool, **options: Any) -> None:
    """Compare the checkpoint in OUT_DIR with the one in MODEL_DIR that it was made from.

    First every file and tensor, then the logits of both at full k in float32 on text, one layer of one model in memory. Exit code 4
    when a tensor is wrong, or when logits differ by more than floating-point reordering (--tolerance).
    """
    import torch

    from prism_refactor.calibration.text import EVALUATION_TEXT
    from prism_refactor.models.checkpoint import Checkpoint
    from prism_refactor.models.refactored import RefactoredCheckpoint
    from prism_refactor.refactoring.verify import compare_files, compare_logits, compare_tensors

    source = Checkpoint(model_dir)
    result = RefactoredCheckpoint(out_dir)
    calibration = Calibration(**options)
    if not calibration.datasets:
        calibration = replace(calibration, datasets=(EVALUATION_TEXT,))
    if result.manifest.source.fingerprint != source.fingerprint():
        raise RequirementError(f"{out_dir}: was made from another checkpoint than {model_dir}")
    problems = compare_files(source, result) or compare_tensors(source, result, reporter)
    if problems:
        raise RequirementError(f"{out_dir}: {problems[0]}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    rows = calibration.rows(source)
    compute = replace(calibration.compute(source), dtype=torch.float32)
    comparisons = compare_logits(source, result, rows, compute, tolerance, reporter)
    reporter.close()
    if as_json:
        click.echo(json.dumps({"tensors": len(result.weight_map), "logits": [asdict(comparison) for comparison in comparisons]}, indent=2))
    else:
        click.echo(_table(len(result.weight_map), comparisons, tolerance))
    failed = [f"{item.mode} max |logit difference| exceeds {tolerance:g}" for item in comparisons if not item.passed]
    if failed:
        raise RequirementError(f"{out_dir}: not the same model at full k: {', '.join(failed)}")


def _table(tensors: int, comparisons: list["LogitComparison"], tolerance: float) -> str:
    rows = [
        [
            item.mode,
            item.tokens,
            f"{item.max_difference:.2e}",
            f"{max(item.mean_kl, 0.0):.2e}",
            f"{item.same_top1:.2%}",
            f"{'ok' if item.passed else 'FAILED'}: max |logit difference| at most {tolerance:g}",
        ]
        for item in comparisons
    ]
    header = ["full k", "tokens", "max |logit difference|", "mean KL (nats)", "same top token", ""]
    return f"{tensors} tensors: none missing, none extra, all as split from the source\n{table(header, rows)}"
