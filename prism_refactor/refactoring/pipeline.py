"""The main path: statistics of each layer in, a refactored checkpoint out."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from prism_refactor.calibration.profile import Profile
from prism_refactor.calibration.statistics import LayerStatistics
from prism_refactor.calibration.store import Statistics
from prism_refactor.errors import InputError
from prism_refactor.files import output_folder, save_tensors, write_json
from prism_refactor.formats import MANIFEST
from prism_refactor.models import modeling_prism
from prism_refactor.models.architectures import replaced_parts
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.layered import LayeredModel, build_meta_model, names_on_disk
from prism_refactor.models.modeling_prism import ROUTER_FILE
from prism_refactor.models.side_files import side_files
from prism_refactor.models.writer import ShardWriter
from prism_refactor.progress import Progress, versions
from prism_refactor.refactoring.card import model_card
from prism_refactor.refactoring.layer import refactor_layer
from prism_refactor.refactoring.plan import CARD, MODELING_FILE, Plan
from prism_refactor.refactoring.recipe import Recipe
from prism_refactor.refactoring.timings import Timings
from prism_refactor.refactoring.workers import Workers
from prism_refactor.routing.tilt import FULL_K_BUDGET

OnExpert = Callable[[int, int, int], None]
FORMAT = 2
SOURCE_CARD = "README.source.md"
PICTURE_FILE = "coactivation.safetensors"


@dataclass
class Done:
    """The finished layers' share of what is written at the end: the router's tensors are 12 N H of a layer's 3 C H numbers per expert.

    Attributes:
        router, pictures: tensors of the two last files.
        reports: of the MoE layers, for the manifest.
    """

    router: dict[str, torch.Tensor] = field(default_factory=dict)
    pictures: dict[str, torch.Tensor] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)

    def take(self, report: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> None:
        """Add a layer: its report, None for a dense one, and its tensors as 'router.<name>' and 'pictures.<name>'."""
        for name, value in tensors.items():
            kind, _, key = name.partition(".")
            (self.router if kind == "router" else self.pictures)[key] = value
        if report is not None:
            self.reports.append(report)


def refactor(
    checkpoint: Checkpoint,
    target: Path,
    statistics: Profile | Statistics,
    calibration: dict[str, Any],
    recipe: Recipe,
    plan: Plan,
    workers: Workers | None = None,
    strict: bool = False,
    resume: bool = False,
    on_expert: OnExpert | None = None,
    on_start: Callable[[int, int], None] | None = None,
    timings: Timings | None = None,
) -> dict[str, Any]:
    """Write the refactored checkpoint. The folder `target` appears only when it is complete.

    A run that ends before leaves its finished layers in TARGET.partial, if there are any.

    Memory is one layer: its statistics, its weights as stored, and its refactored weights.

    Args:
        checkpoint: the source.
        target: output folder.
        statistics: of every MoE layer, in order.
        calibration: what made them, for the manifest.
        recipe: what to do. Equal recipes and statistics give equal bytes.
        plan: of this run.
        workers: that partition experts and fit routers, not yet entered; None: this process.
        strict: refuse experts that saw no token instead of reporting them.
        resume: go on after the last finished layer of an interrupted run with the same checkpoint, statistics, recipe and versions, if
            there is one. The bytes are those of a run that was not interrupted.
        on_expert: told (layer, experts done, experts in all).
        on_start: told how many layers an earlier run has finished, and the last of them.
        timings: told the seconds of each stage.

    Returns:
        The manifest, as written to prism.json.
    """
    timings = timings or Timings()
    identity = {
        "source": checkpoint.fingerprint(),
        "calibration": calibration,
        "recipe": recipe.recorded(),
        "versions": versions(),
        "statistics": statistics.origin(),
    }
    with workers or Workers() as running, output_folder(target, identity, resume) as folder:
        config = _write_config(checkpoint, folder, recipe, plan)
        source = LayeredModel(checkpoint, None)
        target_model = build_meta_model(config, torch.float32)
        writer = ShardWriter(folder, recipe.max_shard_bytes)
        progress, done = Progress(folder), Done()
        for record, tensors in progress.restored():
            done.take(record["report"], tensors)
            writer.restore(record["shards"])
        statistics.restore(progress.text(), progress.layers)
        if on_start:
            on_start(progress.layers, progress.layers - 1)
        if not progress.layers:
            _copy_outer_tensors(source, writer)
        tilt_bound = FULL_K_BUDGET / len(plan.moe_layers)
        arriving = iter(statistics)
        for index in range(progress.layers, len(source.layers)):
            tensors = {}
            report = None
            if index in plan.moe_layers:
                with timings.stage("statistics"):
                    layer_statistics = next(arriving, None)
                if layer_statistics is None or layer_statistics.layer != index:
                    raise InputError(f"the statistics do not hold layer {index}; run prism-profile again")
                if strict and layer_statistics.unrouted:
                    raise InputError(
                        f"layer {index}: experts {layer_statistics.unrouted} saw no token (--strict); "
                        "use more or other text (--num-samples, --dataset)"
                    )
                report, tensors = _refactor_layer(
                    source, target_model, layer_statistics, recipe, running, tilt_bound, on_expert, writer, timings
                )
                del layer_statistics
            else:
                _copy(source, source.tensors_under(source.layer_name(index)), writer)
            with timings.stage("writing"):
                writer.close_shard()
                record = {"shards": writer.shards, "report": report}
                progress.finish_layer(record, statistics.state(), writer.unsynced(), tensors)
                done.take(report, tensors)
        writer.finish()
        manifest = _manifest(checkpoint, calibration, recipe, plan, done.reports)
        save_tensors(done.router, folder / ROUTER_FILE)
        save_tensors(done.pictures, folder / PICTURE_FILE)
        _write_side_files(checkpoint, folder, manifest)
        write_json(folder / MANIFEST, manifest)
    return manifest


def _write_config(checkpoint: Checkpoint, folder: Path, recipe: Recipe, plan: Plan) -> Any:
    """The source's config.json with the new sizes; `prism` tells the two-level router what the original was."""
    architecture = checkpoint.architecture
    values = dict(checkpoint.config_json)
    for key, value in plan.after.items():
        # A size may be stored under another name that transformers accepts for it.
        names = {name for pair in checkpoint.config.attribute_map.items() if key in pair for name in pair} & values.keys()
        values |= dict.fromkeys(names or {key}, value)
    values["prism"] = {
        "sub_experts": recipe.sub_experts,
        # What down_proj is multiplied with.
        "factor": architecture.factor(checkpoint.config, recipe.sub_experts),
        "router": recipe.router,
        "top_k": architecture.top_k,
        "source": plan.before,
    }
    if recipe.router != "replicate":
        values["auto_map"] = values.get("auto_map", {}) | {"AutoModelForCausalLM": "modeling_prism.PrismForCausalLM"}
    # The layers that predict further tokens are copied as they are, and do not fit the sizes above.
    if values.get("num_nextn_predict_layers"):
        values["num_nextn_predict_layers"] = 0
    write_json(folder / "config.json", values)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _copy(source: LayeredModel, names: list[str], writer: ShardWriter) -> None:
    with source.checkpoint.slices(sorted(names)) as slices:
        for name, part in slices.items():
            writer.add(name, part[...])


def _add(model: Any, state: dict[str, torch.Tensor], writer: ShardWriter) -> None:
    """Queue some of a model's tensors under their names on disk."""
    for name, tensor in names_on_disk(model, state).items():
        writer.add(name, tensor)


def _copy_outer_tensors(source: LayeredModel, writer: ShardWriter) -> None:
    """Everything outside the decoder layers, and whatever transformers does not know, byte for byte."""
    inside = {name for index in range(len(source.layers)) for name in source.tensors_under(source.layer_name(index))}
    _copy(source, [name for name in source.checkpoint.weight_map if name not in inside], writer)
    writer.close_shard()


def _refactor_layer(
    source: LayeredModel,
    target_model: Any,
    statistics: LayerStatistics,
    recipe: Recipe,
    workers: Workers,
    tilt_bound: float,
    on_expert: OnExpert | None,
    writer: ShardWriter,
    timings: Timings,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Refactor one layer and queue its tensors; returns its report and its tensors for the last two files, see `Done`."""
    index = statistics.layer
    name = source.moe_blocks[index]
    target_block = target_model.get_submodule(name)
    total = len(statistics.activations)
    parts = replaced_parts(name, target_block)
    with source.loaded(*parts):
        try:
            result = refactor_layer(
                source.model.get_submodule(name),
                target_block,
                target_model.config,
                statistics,
                recipe,
                workers,
                tilt_bound,
                timings,
                (lambda done: on_expert(index, done, total)) if on_expert else None,
            )
        except InputError as error:
            raise InputError(f"{source.checkpoint.path}: layer {index}: {error}") from error
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:
            raise InputError(
                f"{source.checkpoint.path}: layer {index}: its outputs are beyond float32, no router can be fitted; check the checkpoint"
            ) from error
        # Clones: leaving the block sends the source's own tensors back to the meta device.
        tensors = {f"router.{parts[0]}.{leaf}": value.clone().contiguous() for leaf, value in result.router.items()}
    tensors |= {f"pictures.layer.{index}.{leaf}": value.contiguous() for leaf, value in result.picture.items()}
    target_block.to("meta")
    converted = {tensor for part in parts for tensor in source.tensors_under(part)}
    _copy(source, [tensor for tensor in source.tensors_under(source.layer_name(index)) if tensor not in converted], writer)
    state = {f"{name}.{leaf}": value for leaf, value in result.state.items()}
    experts = {leaf: value for leaf, value in state.items() if leaf.startswith(f"{name}.experts.")}
    _add(target_model, {leaf: value for leaf, value in state.items() if leaf not in experts}, writer)
    # Alone in their shards sub-experts lie at whole blocks, as most are whole blocks long: offloading reads them without a copy.
    writer.close_shard()
    _add(target_model, experts, writer)
    return result.report, tensors


def _manifest(
    checkpoint: Checkpoint, calibration: dict[str, Any], recipe: Recipe, plan: Plan, reports: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "source": {
            "name": checkpoint.path.resolve().name,
            "fingerprint": checkpoint.fingerprint(),
            "model_type": checkpoint.config.model_type,
        }
        | plan.before,
        "result": plan.after,
        "recipe": recipe.recorded(),
        "calibration": calibration,
        "versions": versions(),
        "layers": reports,
    }


def copied_name(relative: Path) -> Path:
    """Where a side file of the source goes: its place, but for its model card, which makes room for ours."""
    return Path(SOURCE_CARD) if relative == Path(CARD) else relative


def _write_side_files(checkpoint: Checkpoint, folder: Path, manifest: dict[str, Any]) -> None:
    """Every side file of the source (its model card under another name), the modeling file and our model card."""
    for relative in side_files(checkpoint.path):
        destination = folder / copied_name(relative)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.path / relative, destination)
    if manifest["recipe"]["router"] != "replicate":
        shutil.copyfile(modeling_prism.__file__, folder / MODELING_FILE)
    (folder / CARD).write_text(model_card(manifest))
