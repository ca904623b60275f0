"""`prism-refactor`: a Mixture-of-Experts checkpoint in, an elastic one out."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from prism_refactor.calibration.settings import Calibration
from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import (
    CALIBRATION_NAMES,
    CALIBRATION_OPTIONS,
    INPUT_FOLDER,
    OUTPUT_FOLDER,
    STATS_FOLDER,
    Finite,
    Requirements,
    Size,
    add,
)
from prism_refactor.cli.resuming import RESUME, Resumption
from prism_refactor.errors import RequirementError, UsageError
from prism_refactor.formats import MANIFEST, Manifest
from prism_refactor.recipe import DENSE_SUB_EXPERTS, ENGINES, ROUTERS, SALIENCIES, SOLVERS, Recipe
from prism_refactor.refactoring.figures import FIGURES, check_position, figure
from prism_refactor.requirements import Requirement
from prism_refactor.resources import gib
from prism_refactor.tables import table

if TYPE_CHECKING:
    from prism_refactor.calibration.statistics import StatisticsSource
    from prism_refactor.refactoring.plan import Plan
    from prism_refactor.refactoring.workers import Workers

RECIPE_OPTIONS = (
    click.option(
        "--sub-experts",
        type=int,
        help=f"Parts per expert, a power of two.  [default: {Recipe.sub_experts}, of a dense model {DENSE_SUB_EXPERTS}]",
    ),
    click.option("--solver", type=click.Choice(SOLVERS), default=Recipe.solver, help="How neurons are partitioned."),
    click.option(
        "--router",
        type=click.Choice(ROUTERS),
        default=Recipe.router,
        help="Sub-expert router: ridge regression, the paper's gate neurons, or none.",
    ),
    click.option("--gate-neurons", type=click.IntRange(1), default=Recipe.gate_neurons, help="Neurons per sub-expert of --router proxy."),
    click.option(
        "--coactive-share",
        type=Finite(0, 1, min_open=True),
        default=Recipe.coactive_share,
        help="Share of a token's activations that counts as active when --router proxy chooses its neurons.",
    ),
    click.option("--keep", type=int, help="Sub-experts a token keeps in the partition objective.  [default: a quarter of --sub-experts]"),
    click.option(
        "--saliency",
        type=click.Choice(SALIENCIES),
        default=Recipe.saliency,
        help="What a neuron adds: |activation| x norm of its down_proj column, or |activation|, the paper's.",
    ),
    click.option(
        "--max-shard-size",
        "max_shard_bytes",
        type=Size(),
        default=f"{Recipe.max_shard_bytes // 10**9}GB",
        help="Largest safetensors shard.",
    ),
)


_TWO_LEVEL_ONLY = (
    "two-level only: its own classes cannot run split experts (prism-profile --explain says why), so experts are split when\n"
    "prism_refactor.load or trust_remote_code loads the result; a plain load is the original"
)


def _list_architectures(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """Callback of an eager flag: print the families and exit."""
    if asked:
        from prism_refactor.refactoring.families import listing

        click.echo(listing())
        context.exit()


@command()
@click.argument("model_dir", type=INPUT_FOLDER)
@click.argument("out_dir", type=OUTPUT_FOLDER)
@add(RECIPE_OPTIONS)
@click.option("--stats", type=STATS_FOLDER, help="Use statistics that prism-profile wrote instead of profiling.")
@add(CALIBRATION_OPTIONS)
@click.option("--workers", type=click.IntRange(1), help="Processes that partition experts and fit routers.  [default: one per core]")
@click.option(
    "--engine", type=click.Choice(ENGINES), default="local", help="Where those processes are: this machine, or a Ray cluster (extra [ray])."
)
@click.option("--ray-address", help="Of the cluster: auto or HOST:PORT.  [default: RAY_ADDRESS, or one started here]")
@Requirements(
    "--quality-gate",
    "write it as it was: --require 'error@50%<0.05'",
    "Exit with 4 unless true, e.g. 'error@50%<0.05', 'dropped<0.5', 'unrouted<=0'; OUT_DIR is written all the same.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--strict", is_flag=True, help="Fail when an expert saw no token.")
@click.option(
    "--list-architectures",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_architectures,
    help="Print the families that can be split and exit.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and touch nothing.")
@RESUME
@click.option("--overwrite", is_flag=True, help="Replace an existing OUT_DIR that this command wrote.")
@click.pass_context
def main(
    context: click.Context,
    reporter: Reporter,
    model_dir: Path,
    out_dir: Path,
    stats: Path | None,
    workers: int | None,
    engine: str,
    ray_address: str | None,
    require: tuple[str, ...],
    as_json: bool,
    strict: bool,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Split the experts of the checkpoint in MODEL_DIR into sub-experts; OUT_DIR is a checkpoint that runs at any number of them.

    An interrupted run keeps its finished layers in OUT_DIR.partial; --resume goes on with them.
    """
    from prism_refactor.calibration.profile import Profile
    from prism_refactor.calibration.store import Statistics
    from prism_refactor.files import check_target, unfinished_bytes
    from prism_refactor.models.checkpoint import Checkpoint
    from prism_refactor.refactoring.pipeline import Refactoring
    from prism_refactor.refactoring.plan import make_plan
    from prism_refactor.resources import check_disk, check_memory

    requirements = [Requirement.parse(text, FIGURES) for text in require]
    pool = _workers(workers, engine, ray_address)
    calibration = Calibration(**{field.name: options[field.name] for field in fields(Calibration)})
    check_target(out_dir, model_dir, overwrite, MANIFEST)
    checkpoint = Checkpoint(model_dir)
    recipe = Recipe.of({field.name: options[field.name] for field in fields(Recipe)}, checkpoint.dense is not None)
    statistics = None
    if stats is not None:
        _refuse_with_stats(context)
        statistics = Statistics(stats, checkpoint)
        calibration = Calibration(**statistics.calibration)
    plan = make_plan(checkpoint, recipe, calibration, out_dir, statistics is None, pool.count or 1)
    for requirement in requirements:
        check_position(requirement, [recipe.sub_experts * (k + 1) for k in range(plan.before[checkpoint.architecture.top_k])])
        if requirement.figure == "error" and not (recipe.has_router or plan.plain_router):
            raise UsageError(
                f"--require '{requirement.text}': without a sub-expert router the errors of a {plan.model_type} are not measured"
            )
    if dry_run:
        click.echo(_plan_table(plan, recipe, calibration, pool.count, statistics is not None))
    check_memory(plan.memory_needed)
    check_disk(out_dir, plan.disk_needed - (unfinished_bytes(out_dir) if resume else 0))
    if dry_run:
        return
    source: StatisticsSource
    if statistics is None:
        rows = calibration.rows(checkpoint)
        reporter.warn_of(calibration.shortage(rows, checkpoint))
        source = Profile(checkpoint, calibration, rows, reporter)
        # Of a layer's progress, the first half is profiling.
        reporter.stages = {"rows profiled": (0, 0.5), "experts partitioned": (0.5, 0.5)}
    else:
        source = statistics
    refactoring = Refactoring(checkpoint, recipe, plan, pool, reporter, strict)
    with Resumption(reporter, out_dir, checkpoint.text_config.num_hidden_layers):
        manifest = refactoring.run(source, out_dir, resume)
    reporter.close()
    _warn_unrouted(manifest, reporter)
    found = [(requirement, figure(requirement, manifest)) for requirement in requirements]
    seconds = refactoring.timings.seconds
    click.echo(_json_summary(manifest, out_dir, found, seconds) if as_json else _summary(manifest, out_dir))
    failed = [f"{requirement.text} does not hold, it is {value:.4g}" for requirement, value in found if not requirement.holds(value)]
    if failed:
        raise RequirementError("; ".join(failed))


def _workers(count: int | None, engine: str, address: str | None) -> "Workers":
    from prism_refactor.refactoring.workers import Workers

    if address is not None and engine != "ray":
        raise UsageError("--ray-address has no effect without --engine ray; add it")
    return Workers(len(os.sched_getaffinity(0)) if count is None and engine == "local" else count, engine, address)


def _refuse_with_stats(context: click.Context) -> None:
    for name in CALIBRATION_NAMES:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)
            raise UsageError(f"{option} has no effect with --stats; drop one of them")


def _warn_unrouted(manifest: Manifest, reporter: Reporter) -> None:
    for layer in manifest.layers:
        if layer.unrouted:
            names = ", ".join(map(str, layer.unrouted))
            reporter.warning(
                f"layer {layer.layer}: no token reached expert {names}; split by their weights' response to the layer's inputs",
                layer=layer.layer,
                experts=layer.unrouted,
            )


def _summary(manifest: Manifest, out_dir: Path) -> str:
    from prism_refactor.refactoring.engines import engine_notes

    rows = []
    for layer in manifest.layers:
        before, after = layer.dropped
        rows.append([layer.layer, len(layer.experts), min(expert.tokens for expert in layer.experts), f"{before:.3f}", f"{after:.3f}"])
    header = ["layer", "experts", "fewest tokens", "dropped, stored order", "dropped, partitioned"]
    changes = ", ".join(f"{key} {value} -> {manifest.result[key]}" for key, value in manifest.source.sizes.items())
    notes = "\n".join(engine_notes(manifest.result, manifest.source))
    if not manifest.source.stock:
        notes = f"{_TWO_LEVEL_ONLY}\n{notes}"
    recipe = manifest.recipe
    caption = (
        f"dropped: mean share of an expert's activation outside each token's best {recipe.kept} of {recipe.sub_experts} sub-experts\n"
        "(less is better)"
    )
    return f"{table(header, rows)}\n{caption}\n{changes}\n{notes}\nwritten to {out_dir}; its README.md says how to load it"


def _json_summary(manifest: Manifest, out_dir: Path, found: list[tuple[Requirement, float]], seconds: dict[str, float]) -> str:
    from prism_refactor.refactoring.engines import engine_notes

    layers = [
        {
            "layer": layer.layer,
            "experts": len(layer.experts),
            "fewest_tokens": min(expert.tokens for expert in layer.experts),
            "unrouted": layer.unrouted,
            **{name: round(share, 6) for name, share in zip(("dropped_stored", "dropped"), layer.dropped, strict=True)},
            "output_error": layer.output_error,
        }
        for layer in manifest.layers
    ]
    required = [{"requirement": item.text, "value": value, "holds": item.holds(value)} for item, value in found]
    seconds = {stage: round(value, 3) for stage, value in seconds.items()}
    sizes = {key: {"source": before, "result": manifest.result[key]} for key, before in manifest.source.sizes.items()}
    engines = engine_notes(manifest.result, manifest.source)
    found_all = {"sizes": sizes, "layers": layers, "engines": engines, "required": required, "seconds": seconds}
    return json.dumps({"out_dir": str(out_dir)} | found_all, indent=2)


def _plan_table(plan: "Plan", recipe: Recipe, calibration: Calibration, workers: int | None, has_statistics: bool) -> str:
    from prism_refactor.refactoring.engines import engine_notes
    from prism_refactor.refactoring.plan import partition_seconds, profile_seconds

    rows = [[key, before, plan.after[key]] for key, before in plan.before.items()]
    rows.append(["tensors", plan.tensors_in, plan.tensors_out])
    forward = 0.0 if has_statistics else profile_seconds(plan)
    partition = partition_seconds(plan, recipe, calibration.tokens_per_expert, workers or 1)
    shared = "one worker, and less by as many as the cluster has" if workers is None else f"{workers} workers"
    lines = [
        table(["", "source", "result"], rows),
        f"layers with experts: {len(plan.moe_layers)}",
        *([f"weights: {plan.quantised} in the source, written as bfloat16: {gib(plan.bytes_out)}"] if plan.quantised else []),
        f"disk: {gib(plan.disk_needed)} to write, {gib(plan.disk_free)} free",
        f"memory: about {gib(plan.memory_needed)} at the peak, {gib(plan.memory_free)} available",
        f"time: about {forward:.0f} s profiling and {partition:.0f} s partitioning with {shared}, besides fitting and writing",
        *([] if plan.stock else [_TWO_LEVEL_ONLY]),
        *engine_notes(plan.after, plan),
    ]
    return "\n".join(lines)
