"""`prism-finetune`: train the router of a refactored checkpoint, nothing else."""

from pathlib import Path
from typing import Any

import click

from prism_refactor.calibration.settings import DTYPES, Calibration
from prism_refactor.cli.app import Reporter, command, exit_of
from prism_refactor.cli.options import INPUT_FOLDER, OUTPUT_FOLDER, TEXT_OPTIONS, Finite, add
from prism_refactor.cli.resuming import RESUME
from prism_refactor.distillation import Distillation
from prism_refactor.errors import UsageError
from prism_refactor.formats import MANIFEST


@command()
@click.argument("refactored_dir", type=INPUT_FOLDER)
@click.argument("out_dir", type=OUTPUT_FOLDER)
@click.option(
    "--router",
    type=click.Choice(["two-level", "stock"]),
    default="two-level",
    help="What is trained: what stands in for dropped sub-experts, or the stock router's rows.",
)
@click.option("--steps", type=click.IntRange(1), default=40, help="Optimiser steps.")
@click.option("--learning-rate", type=Finite(0, min_open=True), default=0.01, help="Of Adam, relative to the size of what is trained.")
@click.option("--least-k", type=click.IntRange(1), help="Active sub-experts of a step, at least.  [default: an eighth of all]")
@click.option(
    "--most-k", type=click.IntRange(1), help="Active sub-experts of a step at most.  [default: three quarters; of the stock router all]"
)
@click.option("--evaluate-every", type=click.IntRange(1), default=20, help="Steps between measurements of the held-out perplexity.")
@add(TEXT_OPTIONS)
@click.option("--num-samples", type=click.IntRange(2), default=512, help="Samples of text; one in 16 is held out, at most 8.")
@click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", help="Compute type; auto is float32 on a CPU.")
@RESUME
@click.option("--overwrite", is_flag=True, help="Replace an existing OUT_DIR that was written by prism-refactor or this command.")
def main(
    reporter: Reporter,
    refactored_dir: Path,
    out_dir: Path,
    router: str,
    steps: int,
    learning_rate: float,
    least_k: int | None,
    most_k: int | None,
    evaluate_every: int,
    resume: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Train only the router of the checkpoint in REFACTORED_DIR; OUT_DIR is a checkpoint of the same kind.

    It learns to give with few sub-experts what the model gives with all of them. The whole model is in memory. What is written is the
    state with the best held-out perplexity, which may be the one it started with. An interrupted run keeps its state in
    OUT_DIR.partial; --resume goes on with it.
    """
    from prism_refactor.files import can_resume, check_target
    from prism_refactor.models.refactored import RefactoredCheckpoint
    from prism_refactor.refactoring.finetune import FineTuning
    from prism_refactor.resources import check_disk

    check_target(out_dir, refactored_dir, overwrite, MANIFEST)
    checkpoint = RefactoredCheckpoint(refactored_dir)
    if router == "stock" and not checkpoint.prism.stock:
        raise UsageError(f"--router stock: {refactored_dir} as a stock model is the original; use --router two-level")
    if router == "two-level" and checkpoint.prism.router != "linear":
        otherwise = "use --router stock" if checkpoint.prism.stock else "refactor with --router linear"
        raise UsageError(f"--router two-level: {refactored_dir} has no linear sub-router to train; {otherwise}")
    full = checkpoint.prism.max_active
    # At full k a two-level router stands in for nothing; a stock router that is trained must be held to what it was.
    largest, usual = (full - 1, full * 3 // 4) if router == "two-level" else (full, full)
    most = most_k or max(1, usual, least_k or 0)
    least = least_k or max(1, min(full // 8, most))
    if not least <= most <= largest:
        raise UsageError(f"--least-k {least}, --most-k {most}: need 1 <= least <= most <= {largest} for the {router} router")
    check_disk(out_dir, sum(checkpoint.sizes.values()))
    calibration = Calibration(**options)
    settings = Distillation(steps, least, most, learning_rate, calibration.batch_size, evaluate_every, calibration.seed)
    tuning = FineTuning(checkpoint, router, settings, calibration, reporter)
    try:
        tuning.run(out_dir, resume)
    except BaseException as error:
        stopped = exit_of(error)
        if stopped is None or not can_resume(out_dir):
            raise
        reporter.close()
        reporter.notice(f"stopped after step {tuning.training.step} of {steps}; --resume goes on", steps_done=tuning.training.step)
        raise stopped from None
    step, perplexity = tuning.training.best
    reporter.close()
    click.echo(f"best held-out perplexity {perplexity:.4f} after {step} of {steps} steps\nwritten to {out_dir}")
