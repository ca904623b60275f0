"""The public functions, handed out by `prism_refactor` itself. The commands do the same and more."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from prism_refactor.calibration.profile import Profile
from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.store import estimated_bytes, write_statistics
from prism_refactor.errors import UsageError
from prism_refactor.evaluation.compare import Comparison
from prism_refactor.evaluation.curve import checked_budgets
from prism_refactor.evaluation.windows import read_windows
from prism_refactor.files import check_target
from prism_refactor.formats import INDEX, MANIFEST, Curve, Manifest
from prism_refactor.models import modeling_prism
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.layered import LayeredModel
from prism_refactor.models.loading import load as load_model
from prism_refactor.models.refactored import RefactoredCheckpoint
from prism_refactor.recipe import Recipe
from prism_refactor.refactoring.pipeline import Refactoring
from prism_refactor.refactoring.plan import make_plan, memory_needed
from prism_refactor.refactoring.workers import Workers
from prism_refactor.resources import check_disk, check_memory

Folder = str | Path


def load(folder: Folder, k: int | Sequence[int] | None = None, device: str = "cpu", budget: float | None = None) -> Any:
    """Return the model of a refactored checkpoint, with two-level routing where it has a sub-expert router.

    Args:
        folder: what `refactor` or `prism-refactor` wrote.
        k: active sub-experts per token, as for `set_active`; None: as config.json says, which is all of them.
        device: 'cpu' or 'cuda'.
        budget: in the place of k, see `set_active`.

    Raises:
        InputError: the folder is no refactored checkpoint.
        ValueError: k or the budget is out of range.

    Example:
        >>> model = prism_refactor.load("demo-output", k=8)
        >>> model.generate(**tokenizer("The Python standard library", return_tensors="pt"))
    """
    model = load_model(Path(folder), device)
    if k is not None or budget is not None:
        set_active(model, k, budget)
    return model


def attach(model: Any, folder: Folder) -> Any:
    """Install two-level routing on a refactored model that transformers has loaded; returns the model.

    A forward pass reads `model.prism_active`, so one model must not run in two threads at different k.

    Args:
        model: from `AutoModelForCausalLM.from_pretrained(folder)`.
        folder: the refactored checkpoint.

    Raises:
        ValueError: not a refactored model, or one written with the router 'replicate', which has no sub-router.

    Example:
        >>> model = prism_refactor.attach(AutoModelForCausalLM.from_pretrained("demo-output"), "demo-output")
    """
    return modeling_prism.attach(model, os.fspath(folder))


def set_active(model: Any, k: int | Sequence[int] | None = None, budget: float | None = None) -> None:
    """Run a refactored model, stock or two-level, with k sub-experts per token, or within a budget, from now on.

    Args:
        model: from `load`, `attach` or transformers.
        k: a number for all layers, 1 to N times the original top-k, or one number per MoE layer.
        budget: in the place of k, the share of the sub-experts that tokens run on average, above 0 and at most 1. A token runs those
            that it needs more than a threshold (weight x predicted size, against that of all it could run), at least one. Needs two-level
            routing.

    Raises:
        ValueError: k or the budget is out of range, both or neither are given, or k has not one number per MoE layer.

    Example:
        >>> prism_refactor.set_active(model, 6)
        >>> prism_refactor.set_active(model, [5, 3, 3, 5])
        >>> prism_refactor.set_active(model, budget=0.25)
    """
    modeling_prism.set_active(model, k, budget)


def refactor(model_dir: Folder, out_dir: Folder, workers: int | None = None, overwrite: bool = False, **options: Any) -> Manifest:
    """Split the experts of a checkpoint into sub-experts, as `prism-refactor` does; returns the manifest, as in prism.json.

    Args:
        model_dir: the checkpoint.
        out_dir: the folder to be.
        workers: processes that partition experts and fit routers; None: one per core.
        overwrite: replace an existing OUT_DIR that was written by this function.
        options: fields of `Recipe` (sub_experts, router, solver, ...) and of `Calibration` (datasets, num_samples, seed, ...).

    Raises:
        UsageError: an option or the output folder cannot work.
        InputError: the checkpoint or the text cannot be used.
        ResourceError: there is too little memory or disk.

    Example:
        >>> prism_refactor.refactor("OLMoE-1B-7B", "out", sub_experts=8, datasets=("my.jsonl",))
    """
    known = {"recipe": {field.name for field in fields(Recipe)}, "calibration": {field.name for field in fields(Calibration)}}
    _check_options(options, known["recipe"] | known["calibration"])
    source, target = Path(model_dir), Path(out_dir)
    calibration = Calibration(**{name: value for name, value in options.items() if name in known["calibration"]})
    check_target(target, source, overwrite, MANIFEST)
    checkpoint, pool = Checkpoint(source), Workers(workers or len(os.sched_getaffinity(0)))
    recipe = Recipe.of({name: value for name, value in options.items() if name in known["recipe"]}, checkpoint.dense is not None)
    plan = make_plan(checkpoint, recipe, calibration, target, True, pool.count or 1)
    check_memory(plan.memory_needed)
    check_disk(target, plan.disk_needed)
    profile = Profile(checkpoint, calibration, calibration.rows(checkpoint))
    return Refactoring(checkpoint, recipe, plan, pool).run(profile, target)


def profile(model_dir: Folder, stats_dir: Folder, overwrite: bool = False, **options: Any) -> list[dict[str, Any]]:
    """Write activation statistics of a checkpoint, as `prism-profile` does; returns a summary of each MoE layer.

    Args:
        model_dir: the checkpoint.
        stats_dir: the folder to be.
        overwrite: replace an existing STATS_DIR that was written by this function.
        options: fields of `Calibration`: datasets, num_samples, seed, ...

    Raises:
        UsageError: an option or the output folder cannot work.
        InputError: the checkpoint or the text cannot be used.

    Example:
        >>> prism_refactor.profile("OLMoE-1B-7B", "stats", num_samples=64)[0]["top_quarter_share"]
    """
    _check_options(options, {field.name for field in fields(Calibration)})
    source, target, calibration = Path(model_dir), Path(stats_dir), Calibration(**options)
    check_target(target, source, overwrite, INDEX)
    checkpoint = Checkpoint(source)
    check_memory(memory_needed(LayeredModel(checkpoint, None), calibration))
    check_disk(target, estimated_bytes(checkpoint, calibration))
    records = write_statistics(target, Profile(checkpoint, calibration, calibration.rows(checkpoint)))
    return [record["summary"] for record in records]


def evaluate(
    model_dir: Folder, refactored_dir: Folder, k: Sequence[int] | None = None, budgets: Sequence[float] = (), **options: Any
) -> tuple[Curve, Curve]:
    """Measure perplexity, as `prism-eval` does; returns the curves of the original and of the refactored model.

    Args:
        model_dir: the original checkpoint.
        refactored_dir: a model refactored from it; its two-level router is used where it has one.
        k: active sub-experts per token, rising; None: whole experts' worth.
        budgets: shares of the sub-experts that tokens run on average; the points are the curve's `budgets`.
        options: fields of `Calibration`: datasets, max_seq_length, batch_size, ...; `num_samples` is not used.

    Raises:
        InputError: a checkpoint or the text cannot be used, or the models do not belong together.
        UsageError: a budget is no share, or the refactored model cannot run within one.

    Example:
        >>> original, refactored = prism_refactor.evaluate("OLMoE-1B-7B", "out", k=[8, 16])
        >>> [(point.k, point.perplexity) for point in refactored.points]
    """
    _check_options(options, {field.name for field in fields(Calibration)})
    original, refactored, calibration = Checkpoint(Path(model_dir)), RefactoredCheckpoint(Path(refactored_dir)), Calibration(**options)
    refactored.check_source(original)
    comparison = Comparison(original, read_windows(calibration, original), calibration.compute(original), calibration.seed)
    prism = refactored.prism
    if budgets and not refactored.has_thresholds:
        raise UsageError(f"`budgets`: {refactored.path} has no thresholds; refactor it again, with a sub-expert router")
    choices = prism.whole_experts if k is None else sorted(k)
    return comparison.original, comparison.curves(refactored, [prism.best_router], choices, budgets=checked_budgets(budgets))[0]


def _check_options(options: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(options.keys() - known)
    if unknown:
        raise UsageError(f"unknown option `{unknown[0]}`; choose from {', '.join(sorted(known))}")
