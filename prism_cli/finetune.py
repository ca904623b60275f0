"""`prism-finetune`: train the router rows of a refactored checkpoint, nothing else."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from prism_refactor import signals as prism_signals
from prism_refactor.calibration.profile import DTYPES, Calibration
from prism_refactor.cli.app import Reporter, command, exit_of
from prism_refactor.cli.options import FOLDER, TEXT_OPTIONS, Finite, add
from prism_refactor.cli.report import PAGE
from prism_refactor.errors import InputError, UsageError
from prism_refactor.files import check_target, output_file, output_folder, save_tensors, write_json
from prism_refactor.formats import EVALUATION, MANIFEST
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.layered import names_on_disk
from prism_refactor.models.modeling_prism import ROUTER_FILE, attach, full_k, moe_gates
from prism_refactor.models.refactored import open_refactored
from prism_refactor.refactoring.finetune import LOSSES, Curriculum, Training, recorded
from prism_refactor.resources import check_disk

# The last part of the rows chooses the best state.
HELD_OUT = 16
STATE, STATE_INDEX = "state.safetensors", "state.json"
# Of what is in them.
STATE_FORMAT = 2


@command
@click.argument("refactored_dir", type=FOLDER)
@click.argument("out_dir", type=FOLDER)
@click.option("--router", type=click.Choice(["two-level", "stock"]), default="two-level", help="Which router's rows are trained.")
@click.option("--loss", type=click.Choice(LOSSES), default=LOSSES[0], help="distill: KL divergence to the model at full k.")
@click.option("--steps", type=click.IntRange(1), default=200, help="Optimiser steps.")
@click.option("--learning-rate", type=Finite(0, min_open=True), default=1e-4, help="Of AdamW.")
@click.option("--first-k", type=click.IntRange(1), help="Active sub-experts at the first step.  [default: a quarter of all]")
@click.option("--last-k", type=click.IntRange(1), help="Active sub-experts at the last step.  [default: three quarters]")
@click.option("--evaluate-every", type=click.IntRange(1), default=20, help="Steps between measurements of the held-out perplexity.")
@add(TEXT_OPTIONS)
@click.option("--num-samples", type=click.IntRange(2), default=512, help="Samples of text; one in 16 is held out.")
@click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", help="Compute type; auto is float32 on a CPU.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--overwrite", is_flag=True, help="Replace an existing OUT_DIR that was written by prism-refactor or this command.")
def main(
    reporter: Reporter,
    refactored_dir: Path,
    out_dir: Path,
    router: str,
    loss: str,
    steps: int,
    learning_rate: float,
    first_k: int | None,
    last_k: int | None,
    evaluate_every: int,
    resume: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Fine-tune only the router of the checkpoint in REFACTORED_DIR while k rises; OUT_DIR is a checkpoint of the same kind.

    The whole model is in memory. What is written is the state with the best held-out perplexity, which may be the one it started with.
    An interrupted run keeps its state in OUT_DIR.finetune; --resume goes on with it.
    """
    check_target(out_dir, refactored_dir, overwrite, MANIFEST)
    checkpoint, manifest = open_refactored(refactored_dir)
    recipe = checkpoint.config.prism
    if router == "two-level" and recipe["router"] != "linear":
        raise UsageError(f"--router two-level: {refactored_dir} has no linear sub-router to train; use --router stock")
    full = full_k(checkpoint.config)
    most = full - 1 if router == "two-level" else full
    first, last = first_k or max(1, full // 4), last_k or max(1, full * 3 // 4)
    if not first <= last <= most:
        raise UsageError(f"--first-k {first}, --last-k {last}: need 1 <= first <= last <= {most} for the {router} router")
    check_disk(out_dir, sum(checkpoint.sizes.values()))
    calibration = Calibration(**options)
    rows = calibration.rows(checkpoint)
    if len(rows) < 2:
        raise InputError("--dataset: too little text; needs at least two samples")
    held_out = max(1, len(rows) // HELD_OUT)
    curriculum = Curriculum(steps, first, last, learning_rate, loss, calibration.batch_size, evaluate_every, calibration.seed)
    model = _load(checkpoint, router, calibration)
    training = Training(model, rows[:-held_out], rows[-held_out:], curriculum)
    identity = {"format": STATE_FORMAT, "source": checkpoint.fingerprint(), "router": router}
    identity |= {"curriculum": asdict(curriculum), "text": calibration.recorded(rows)}
    store = _Store(out_dir, json.loads(json.dumps(identity)))
    if resume:
        training.restore(store.read())
    elif store.folder.exists():
        raise UsageError(f"{store.folder}: holds an interrupted run; add --resume to go on or remove it")
    _train(training, store, reporter)
    _write(checkpoint, manifest, out_dir, training, router, curriculum)
    store.remove()
    step, perplexity = training.best
    click.echo(f"best held-out perplexity {perplexity:.4f} after {step} of {steps} steps\nwritten to {out_dir}")


def _load(checkpoint: Checkpoint, router: str, calibration: Calibration) -> Any:
    dtype = calibration.resolved_dtype(checkpoint)
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, trust_remote_code=False, experts_implementation=EXPERTS)
    model.to(calibration.resolved_device())
    if router == "two-level":
        attach(model, checkpoint.path)
    model.activation_checkpointing_enable()
    return model


class _Store:
    """The durable state of an unfinished run: OUT_DIR.finetune."""

    def __init__(self, out_dir: Path, identity: dict[str, Any]):
        self.folder = out_dir.resolve().with_name(out_dir.resolve().name + ".finetune")
        self.identity = identity

    def read(self) -> dict[str, torch.Tensor]:
        """Raises InputError when there is no state, UsageError when it belongs to a run with other options."""
        try:
            identity = json.loads((self.folder / STATE_INDEX).read_text())
            state = load_file(self.folder / STATE)
        except (OSError, ValueError) as error:
            raise InputError(f"--resume: no usable state in {self.folder} ({error}); start without --resume") from None
        changed = [key for key in self.identity if identity.get(key) != self.identity[key]]
        if changed:
            raise UsageError(f"--resume: {self.folder} belongs to a run with another {changed[0]}; use the same options or remove it")
        return state

    def write(self, state: dict[str, torch.Tensor]) -> None:
        """Replace the state; whatever interrupts this, the old or the new one is there."""
        self.folder.mkdir(exist_ok=True)
        with output_file(self.folder / STATE) as partial:
            save_tensors(state, partial)
            write_json(self.folder / STATE_INDEX, self.identity)

    def remove(self) -> None:
        """Delete the state of a finished run."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _train(training: Training, store: _Store, reporter: Reporter) -> None:
    steps = training.curriculum.steps
    reporter.line(f"held-out perplexity {training.best[1]:.4f} before", event="start", perplexity=training.best[1], step=training.step)
    bar = tqdm(total=steps, initial=training.step, disable=not reporter.has_bar, leave=False)

    def on_step(step: int, loss: float | None, value: float) -> None:
        prism_signals.raise_again()
        if loss is not None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", k=int(value))
            return
        store.write(training.state())
        text = f"step {step} of {steps}: held-out perplexity {value:.4f}"
        reporter.line(text, event="evaluated", step=step, steps=steps, perplexity=value)

    try:
        training.run(on_step)
    except BaseException as error:
        stopped = exit_of(error)
        if stopped is None:
            raise
        store.write(training.state())
        click.echo(f"stopped after step {training.step} of {steps}; --resume goes on", err=True)
        raise stopped from None
    finally:
        bar.close()


def _write(
    checkpoint: Checkpoint, manifest: dict[str, Any], out_dir: Path, training: Training, router: str, curriculum: Curriculum
) -> None:
    """The source folder with the trained rows in the place of the old ones; measurements of the old router are left out."""
    changed = _trained_tensors(training, router)
    with output_folder(out_dir) as folder:
        shards = {checkpoint.weight_map[name] for name in changed if name in checkpoint.weight_map}
        if router == "two-level":
            shards = {ROUTER_FILE}
        for path in sorted(checkpoint.path.rglob("*")):
            relative = path.relative_to(checkpoint.path)
            if path.is_dir() or relative.parts[0] in (MANIFEST, EVALUATION, PAGE) or relative.parts[0].startswith("."):
                continue
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            if str(relative) in shards:
                tensors = load_file(path)
                save_tensors({name: changed.get(name, value).to(value.dtype) for name, value in tensors.items()}, folder / relative)
            else:
                shutil.copyfile(path, folder / relative)
        kept = {key: value for key, value in manifest.items() if key != "operating_points"}
        write_json(folder / MANIFEST, kept | {"finetuning": recorded(curriculum, training, router)})


def _trained_tensors(training: Training, router: str) -> dict[str, torch.Tensor]:
    """The best values by their names on disk."""
    names = {id(module): name for name, module in training.model.named_modules()}
    found = {}
    for key, value in training.best_values.items():
        layer, _, leaf = key.partition(".")
        gate = names[id(moe_gates(training.model)[int(layer)])]
        found[f"{gate}.{leaf}"] = value.cpu()
    return found if router == "two-level" else names_on_disk(training.model, found)
