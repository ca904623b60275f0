"""`prism-verify`: is the refactored checkpoint the same model at full k?"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from prism_refactor.calibration.profile import Calibration
from prism_refactor.calibration.text import EVALUATION_TEXT
from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import FOLDER, TEXT_OPTIONS, Finite, add, table
from prism_refactor.errors import GateError
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.refactored import open_refactored
from prism_refactor.refactoring.verify import LOGIT_TOLERANCE, Comparison, compare_files, compare_logits, compare_tensors

NUM_SAMPLES = 8


@command
@click.argument("model_dir", type=FOLDER)
@click.argument("out_dir", type=FOLDER)
@add(TEXT_OPTIONS)
@click.option("--num-samples", type=click.IntRange(1), default=NUM_SAMPLES, help="Samples of text.")
@click.option("--tolerance", type=Finite(0), default=LOGIT_TOLERANCE, help="Largest |logit difference| of an exact mode.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(reporter: Reporter, model_dir: Path, out_dir: Path, tolerance: float, as_json: bool, **options: Any) -> None:
    """Compare the checkpoint in OUT_DIR with the one in MODEL_DIR that it was made from.

    First every file and tensor, then the logits of both at full k in float32 on text, one layer of one model in memory. Exit code 4
    when a tensor is wrong, when the two-level logits differ by more than floating-point reordering (--tolerance), or when the tilt of
    the stock gate costs more than 1e-3 nats per token.
    """
    source = Checkpoint(model_dir)
    result, manifest = open_refactored(out_dir)
    calibration = Calibration(**options)
    if not calibration.datasets:
        calibration = replace(calibration, datasets=(EVALUATION_TEXT,))
    if manifest["source"]["fingerprint"] != source.fingerprint():
        raise GateError(f"{out_dir}: was made from another checkpoint than {model_dir}")

    def on_layer(mode: str, layer: int, layers: int) -> None:
        reporter.step(f"{mode} checked", layer, layers)

    problems = compare_files(source, result) or compare_tensors(source, result, on_layer)
    if problems:
        raise GateError(f"{out_dir}: {problems[0]}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    rows = calibration.rows(source)
    comparisons = compare_logits(source, result, rows, calibration.resolved_device(), calibration.batch_size, tolerance, on_layer)
    reporter.close()
    if as_json:
        click.echo(json.dumps({"tensors": len(result.weight_map), "logits": [asdict(comparison) for comparison in comparisons]}, indent=2))
    else:
        click.echo(_table(len(result.weight_map), comparisons))
    failed = [f"{item.mode} {item.judged_by} exceeds {item.limit:g}" for item in comparisons if not item.passed]
    if failed:
        raise GateError(f"{out_dir}: not the same model at full k: {', '.join(failed)}")


def _table(tensors: int, comparisons: list[Comparison]) -> str:
    rows = [
        [
            item.mode,
            item.tokens,
            f"{item.max_difference:.2e}",
            f"{max(item.mean_kl, 0.0):.2e}",
            f"{item.same_top1:.2%}",
            f"{'ok' if item.passed else 'FAILED'}: {item.judged_by} at most {item.limit:g}",
        ]
        for item in comparisons
    ]
    header = ["full k", "tokens", "max |logit difference|", "mean KL (nats)", "same top token", ""]
    return f"{tensors} tensors: none missing, none extra, all as split from the source\n{table(header, rows)}"
