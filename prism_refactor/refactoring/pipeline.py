"""The main path: statistics of each layer in, a refactored checkpoint out."""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from prism_refactor.calibration.statistics import LayerStatistics, StatisticsSource
from prism_refactor.errors import InputError
from prism_refactor.events import Events
from prism_refactor.files import output_folder, write_json
from prism_refactor.formats import CARD, MANIFEST_FORMAT, PICTURE_FILE, LayerReport, Manifest, PrismConfig, Source, parse
from prism_refactor.models import modeling_prism
from prism_refactor.models.architectures import dotted, replaced_parts, router_name
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.discovery import FURTHER_LAYERS
from prism_refactor.models.layered import LayeredModel, dtype_name
from prism_refactor.models.modeling_prism import MODELING_FILE, PLAIN, ROUTER_FILE, auto_class
from prism_refactor.models.side_files import side_files
from prism_refactor.models.transformers_models import build_meta_model
from prism_refactor.models.writer import ShardWriter
from prism_refactor.progress import Progress, versions
from prism_refactor.recipe import Recipe
from prism_refactor.refactoring.card import model_card
from prism_refactor.refactoring.layer import LayerRefactoring, Run, column_norms, partition_layers
from prism_refactor.refactoring.plan import Plan, layers_together
from prism_refactor.refactoring.timings import Timings
from prism_refactor.refactoring.workers import Workers
from prism_refactor.solvers import Partition
from prism_refactor.tensors import save_tensors

SOURCE_CARD = "README.source.md"


class Refactoring:
    """One run of `prism-refactor`: the statistics of each layer in, a refactored checkpoint out.

    Memory is one layer: its statistics, its weights as stored, and its refactored weights. Where a layer has fewer experts than there are
    workers, statistics are those of several layers (`plan.layers_together`).

    Args:
        checkpoint: the source.
        recipe: what to do. Equal recipes and statistics give equal bytes.
        plan: of this run.
        workers: that partition experts and fit routers, not yet entered; None: this process.
        events: told of progress.
        strict: refuse experts that saw no token instead of reporting them.

    Attributes:
        timings: seconds of each stage.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        plan: Plan,
        workers: Workers | None = None,
        events: Events | None = None,
        strict: bool = False,
    ):
        self.checkpoint, self.recipe, self.plan, self.strict = checkpoint, recipe, plan, strict
        self.workers, self.events, self.timings = workers or Workers(), events or Events(), Timings()

    def run(self, statistics: StatisticsSource, target: Path, resume: bool = False) -> Manifest:
        """Write the refactored checkpoint. The folder `target` appears only when it is complete.

        A run that ends before leaves its finished layers in TARGET.partial, if there are any.

        Args:
            statistics: of every MoE layer, in order.
            target: output folder.
            resume: go on after the last finished layer of an interrupted run with the same checkpoint, statistics, recipe and versions,
                if there is one. The bytes are those of a run that was not interrupted.

        Returns:
            The manifest, as written to prism.json.

        Raises:
            InputError: the statistics or the weights cannot be used.
        """
        identity = {
            "source": self.checkpoint.fingerprint(),
            "calibration": statistics.recorded,
            "recipe": self.recipe.recorded(),
            "versions": versions(),
            "statistics": statistics.origin(),
        }
        with self.workers as workers, output_folder(target, identity, resume) as folder:
            return _Writing(self, workers, folder).finish(statistics)


class _Writing:
    """A `Refactoring` on its way into one unfinished folder."""

    def __init__(self, job: Refactoring, workers: Workers, folder: Path):
        self.job, self.checkpoint, self.folder = job, job.checkpoint, folder
        self.source = LayeredModel(job.checkpoint, None)
        self.config = _write_config(job.checkpoint, self.source, folder, job.recipe, job.plan)
        self.target = build_meta_model(self.config, torch.float32)
        self.writer = ShardWriter(folder, job.recipe.max_shard_bytes)
        self.layer_run = Run(job.recipe, job.checkpoint.architecture, workers, len(self.source.layers), job.events, job.timings)
        self.progress = Progress(folder)
        # Of the finished layers: tensors of the two files that are written at the end, and reports for the manifest.
        self.files: dict[str, dict[str, torch.Tensor]] = {"router": {}, "pictures": {}}
        self.reports: list[LayerReport] = []
        # Layers whose experts are partitioned side by side, and the last layer that was drawn.
        experts = job.plan.before[job.checkpoint.architecture.num_experts]
        self.together, self.drawn = layers_together(len(job.plan.moe_layers), experts, workers.cores), -1

    def finish(self, statistics: StatisticsSource) -> Manifest:
        """Write everything that is not there yet; returns the manifest."""
        for record, groups in self.progress.restored():
            report = record["report"]
            self._count(parse(LayerReport, report) if report else None, groups)
            self.writer.restore(record["shards"])
        done = self.progress.layers
        statistics.restore(self.progress.hidden_states(), done)
        self.job.events.resumed(done - 1, done)
        if not done:
            self._copy_outer_tensors()
        arriving = self._partitioned(statistics)
        for index in range(done, len(self.source.layers)):
            report, groups = self._layer(index, arriving)
            with self.job.timings.stage("writing"):
                self.writer.close_shard()
                record = {"shards": self.writer.shards, "report": asdict(report) if report else None}
                state = statistics.state() if index >= self.drawn else None
                self.progress.finish_layer(record, state, self.writer.unsynced(), groups)
                self._count(report, groups)
        self.writer.finish()
        manifest = _manifest(self.job, statistics.recorded, self.reports)
        save_tensors(self.files["router"], self.folder / ROUTER_FILE)
        save_tensors(self.files["pictures"], self.folder / PICTURE_FILE)
        _write_side_files(self.checkpoint, self.folder, manifest)
        manifest.write(self.folder)
        return manifest

    def _count(self, report: LayerReport | None, groups: dict[str, dict[str, torch.Tensor]]) -> None:
        for name, tensors in groups.items():
            self.files[name] |= tensors
        if report is not None:
            self.reports.append(report)

    def _partitioned(self, statistics: StatisticsSource) -> Iterator[tuple[LayerStatistics, list[Partition]]]:
        """The statistics of each layer, and the partitions of its experts."""
        arriving = iter(statistics)
        while drawn := self._draw(arriving):
            solved = partition_layers([(each, self._column_norms(each.layer)) for each in drawn], self.layer_run)
            partitioned = []
            for index in [each.layer for each in drawn]:
                with self._naming(index), self.job.timings.stage("partitioning"):
                    partitioned.append(next(solved))
            # Not kept while the next layers run.
            del solved
            while drawn:
                yield drawn.pop(0), partitioned.pop(0)

    def _draw(self, arriving: Iterator[LayerStatistics]) -> list[LayerStatistics]:
        """The statistics of the next layers."""
        with self.job.timings.stage("statistics"):
            drawn = list(itertools.islice(arriving, self.together))
        for each in drawn:
            if self.job.strict and each.unrouted:
                raise InputError(
                    f"layer {each.layer}: experts {each.unrouted} saw no token (`strict`); use more or other text (`num_samples`, "
                    "`datasets`)"
                )
            self.drawn = each.layer
        return drawn

    def _column_norms(self, index: int) -> torch.Tensor:
        name = self.source.moe_blocks[index]
        block = self.source.model.get_submodule(name)
        with self.source.loaded(*replaced_parts(name, block)), self._naming(index):
            return column_norms(block)

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Name the layer in errors."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.checkpoint.path}: layer {index}: {error}") from error
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:
            raise InputError(
                f"{self.checkpoint.path}: layer {index}: its outputs are beyond float32, no router can be fitted; check the checkpoint"
            ) from error

    def _layer(
        self, index: int, arriving: Iterator[tuple[LayerStatistics, list[Partition]]]
    ) -> tuple[LayerReport | None, dict[str, dict[str, torch.Tensor]]]:
        """Queue one layer's tensors; returns its report (None for one without experts) and its tensors of the last two files."""
        if index not in self.job.plan.moe_layers:
            self._copy(self.source.tensors_under(self.source.layer_name(index)))
            return None, {}
        statistics, partitions = next(arriving, (None, []))
        if statistics is None or statistics.layer != index:
            raise InputError(f"the statistics do not hold layer {index}; run prism-profile again")
        return self._refactor_layer(statistics, partitions)

    def _refactor_layer(
        self, statistics: LayerStatistics, partitions: list[Partition]
    ) -> tuple[LayerReport, dict[str, dict[str, torch.Tensor]]]:
        index, source = statistics.layer, self.source
        name = source.moe_blocks[index]
        block = self.target.get_submodule(name)
        with source.loaded(*replaced_parts(name, block)), self._naming(index):
            result = LayerRefactoring(source.model.get_submodule(name), block, self.config, statistics, partitions, self.layer_run).result()
            # Clones: leaving the block sends the source's own tensors back to the meta device.
            prefix = dotted(name, router_name(block))
            router = {f"{prefix}.{leaf}": value.clone().contiguous() for leaf, value in result.router.items()}
        block.to("meta")
        parts = replaced_parts(name, block, self.checkpoint.architecture.stock)
        converted = {tensor for part in parts for tensor in source.tensors_under(part)}
        self._copy([tensor for tensor in source.tensors_under(source.layer_name(index)) if tensor not in converted])
        experts = {f"{name}.{leaf}": value for leaf, value in result.weights.items() if leaf.startswith("experts.")}
        self._add({f"{name}.{leaf}": value for leaf, value in result.weights.items() if not leaf.startswith("experts.")})
        # Alone in their shards sub-experts lie at whole blocks, as most are whole blocks long: offloading reads them without a copy.
        self.writer.close_shard()
        self._add(experts)
        pictures = {f"layer.{index}.{leaf}": value.contiguous() for leaf, value in result.pictures.items()}
        return result.report, {"router": router, "pictures": pictures}

    def _copy(self, names: list[str]) -> None:
        """Queue some of the source's tensors as they are."""
        with self.checkpoint.slices(sorted(names)) as slices:
            for name, part in slices.items():
                self.writer.add(name, part[...])

    def _add(self, state: dict[str, torch.Tensor]) -> None:
        """Queue some of the refactored model's tensors under their names on disk."""
        for name, tensor in self.source.names_on_disk(self.target, state).items():
            self.writer.add(name, tensor)

    def _copy_outer_tensors(self) -> None:
        """Queue everything outside the decoder layers, and whatever transformers does not know, byte for byte."""
        source = self.source
        inside = {name for index in range(len(source.layers)) for name in source.tensors_under(source.layer_name(index))}
        self._copy([name for name in self.checkpoint.weight_map if name not in inside])
        self.writer.close_shard()


def _write_config(checkpoint: Checkpoint, layered: LayeredModel, folder: Path, recipe: Recipe, plan: Plan) -> Any:
    """The source's config.json with the new sizes; `prism` tells the two-level router what the original was."""
    architecture = checkpoint.architecture
    values = dict(checkpoint.config_json)
    # Its tensors are written as they were read: not quantised.
    values.pop("quantization_config", None)
    wraps = checkpoint.text_config is not checkpoint.config
    text = dict(values["text_config"]) if wraps else values
    text.pop("quantization_config", None)
    for key, value in (plan.after if architecture.stock else {}).items():
        # A size may be stored under another name that transformers accepts for it.
        names = {name for pair in checkpoint.text_config.attribute_map.items() if key in pair for name in pair} & text.keys()
        text |= dict.fromkeys(names or {key}, value)
    factor = architecture.factor(recipe.sub_experts)
    text["prism"] = asdict(
        PrismConfig(
            recipe.sub_experts,
            factor,
            recipe.router,
            architecture.top_k,
            plan.before,
            architecture.groups(checkpoint.config),
            [*architecture.carried],
            [*architecture.keys],
            architecture.stock,
            architecture.plain_router,
            [*architecture.tokens],
        )
    )
    if recipe.has_router:
        values["auto_map"] = values.get("auto_map", {}) | {
            auto_class(checkpoint.config).__name__: f"{Path(MODELING_FILE).stem}.PrismForCausalLM"
        }
    stored = checkpoint.dtypes[layered.tensors_under(next(iter(layered.moe_blocks.values())) + ".experts")[0]]
    if stored is not None:
        # Whatever the source says: experts in slow memory are read as they are stored.
        values["dtype"] = dtype_name(stored)
    for part in (values, text):
        for key in ("torch_dtype", *(("dtype",) if part is not values else ())):
            part.pop(key, None)
        # A training's leftovers, which have models give more than logits, or compute all again for every token.
        part |= {key: value for key, value in PLAIN.items() if key in part}
    if architecture.stock:
        # The layers that predict further tokens are copied as they are, and do not fit the sizes above.
        text |= {key: 0 for key in FURTHER_LAYERS if text.get(key)}
    if wraps:
        values["text_config"] = text
    write_json(folder / "config.json", values)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _manifest(job: Refactoring, calibration: dict[str, Any], reports: list[LayerReport]) -> Manifest:
    checkpoint = job.checkpoint
    source = Source(
        checkpoint.path.resolve().name,
        checkpoint.fingerprint(),
        checkpoint.config.model_type,
        job.plan.before,
        checkpoint.quantised,
        checkpoint.dense,
        checkpoint.architecture.stock,
        checkpoint.architecture.plain_router,
        checkpoint.inside,
    )
    recipe = replace(job.recipe, keep=job.recipe.kept)
    return Manifest(MANIFEST_FORMAT, source, job.plan.after, recipe, calibration, versions(), reports)


def copied_name(relative: Path) -> Path:
    """Where a side file of the source goes: its place, but for its model card, which makes room for ours."""
    return Path(SOURCE_CARD) if relative == Path(CARD) else relative


def _write_side_files(checkpoint: Checkpoint, folder: Path, manifest: Manifest) -> None:
    """Every side file of the source (its model card under another name), the modeling file and our model card."""
    for relative in side_files(checkpoint.path):
        destination = folder / copied_name(relative)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.path / relative, destination)
    if manifest.recipe.has_router:
        shutil.copyfile(modeling_prism.__file__, folder / MODELING_FILE)
    (folder / CARD).write_text(model_card(manifest, checkpoint.config))
