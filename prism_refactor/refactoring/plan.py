"""What a run will read, hold and write: checked before it starts, and all that `--dry-run` does."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism_refactor import solvers
from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.statistics import INPUT_SAMPLE
from prism_refactor.errors import InputError, UsageError
from prism_refactor.formats import CARD, MANIFEST, PrismConfig
from prism_refactor.models.architectures import replaced_parts, routing_state
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.layered import LayeredModel, dtype_name
from prism_refactor.models.modeling_prism import MODELING_FILE
from prism_refactor.models.side_files import check_side_files
from prism_refactor.models.transformers_models import FusedExperts, MoeBlock
from prism_refactor.recipe import Recipe
from prism_refactor.resources import allowed_memory, free_disk
from prism_refactor.solvers.genetic import LARGE

_FIXED_BYTES = 2**30
_LAYER_MARGIN = 1.1
# Of a worker process: its interpreter and libraries.
_WORKER_BYTES = 2**27
# Of the weights written: headers, indices, the tensors that an unfinished run keeps twice.
_DISK_MARGIN, _DISK_FIXED = 0.01, 2**22


@dataclass(frozen=True)
class Plan:
    """The numbers `--dry-run` prints. Sizes in bytes.

    Attributes:
        model_type: of the result.
        before, after: the config keys that change, with their values.
        moe_layers: indices of the layers with experts.
        tensors_in, tensors_out: number of tensors.
        stock, plain_router: see `Architecture`.
        inside: see `models.dense.Twin`.
        bytes_out: size of the weights written; the same as read, but for the gate rows.
        quantised: how the source's weights are; they are read and written as bfloat16. None if they are not.
        disk_needed, disk_free: at the output folder.
        memory_needed: estimate of the peak, see `memory_needed`.
        memory_free: available now.
        compute: multiply-adds of profiling, for the estimate of time.
    """

    model_type: str
    before: dict[str, int]
    after: dict[str, int]
    moe_layers: list[int]
    tensors_in: int
    tensors_out: int
    stock: bool
    plain_router: bool
    inside: str | None
    bytes_out: int
    quantised: str | None
    disk_needed: int
    disk_free: int
    memory_needed: int
    memory_free: int
    compute: int


def make_plan(checkpoint: Checkpoint, recipe: Recipe, calibration: Calibration, target: Path, profiled: bool, workers: int = 1) -> Plan:
    """Work out a run without doing any of it; `profiled`: it runs the calibration text itself.

    Raises:
        UsageError: the number of sub-experts does not fit the model.
        InputError: the checkpoint's tensors are not named as transformers names them for this family, or it has no MoE layer.
    """
    architecture, config = checkpoint.architecture, checkpoint.config
    if PrismConfig.of(config) is not None:
        raise InputError(f"{checkpoint.path}: is refactored already; start from the original checkpoint")
    after = architecture.refactored_sizes(config, recipe.sub_experts)
    if not architecture.stock and not recipe.has_router:
        raise UsageError(
            f"`router` {recipe.router}: a {config.model_type} cannot run split experts in its own classes, so it needs a sub-expert "
            "router; use linear or proxy"
        )
    layered = LayeredModel(checkpoint, None)
    layered.check()
    layers = [*layered.moe_blocks]
    _check_names(layered)
    extra_bytes = extra_tensors = 0
    for block in layered.moe_blocks.values():
        for part in replaced_parts(block, layered.model.get_submodule(block)) if architecture.stock else []:
            names = layered.tensors_under(part)
            repeated = [name for name in names if not part.endswith(".experts") or "down_proj_bias" in name]
            extra_bytes += (recipe.sub_experts - 1) * sum(checkpoint.sizes[name] for name in repeated)
            if part.endswith(".experts"):
                # Families store a tensor per expert, or one for all.
                state = layered.model.get_submodule(part).state_dict(prefix=f"{part}.")
                stored = len(layered.names_on_disk(layered.model, state))
                extra_tensors += stored * (recipe.sub_experts if stored > len(state) else 1) - len(names)
    side_bytes = check_side_files(checkpoint.path, (CARD, MANIFEST, MODELING_FILE))
    before = architecture.sizes(config)
    _check_row_bytes(checkpoint, layered.moe_blocks[layers[0]], layered, after[architecture.width], recipe.sub_experts)
    bytes_out = sum(checkpoint.sizes.values()) + extra_bytes
    router_bytes = 4 * len(layers) * after[architecture.num_experts] * config.get_text_config().hidden_size
    # The hidden states of the text, which --resume goes on with; the new ones are written before the old ones go.
    text_bytes = 2 * _text_bytes(layered, calibration) if profiled else 0
    return Plan(
        model_type=config.model_type,
        inside=checkpoint.inside,
        before=before,
        after=after,
        moe_layers=layers,
        tensors_in=len(checkpoint.sizes),
        tensors_out=len(checkpoint.sizes) + extra_tensors,
        stock=architecture.stock,
        plain_router=architecture.plain_router,
        bytes_out=bytes_out,
        quantised=checkpoint.quantised,
        disk_needed=int((1 + _DISK_MARGIN) * bytes_out) + _DISK_FIXED + 4 * router_bytes + text_bytes + side_bytes,
        disk_free=free_disk(target),
        memory_needed=memory_needed(layered, calibration, workers, recipe.sub_experts),
        memory_free=allowed_memory(),
        compute=_compute(layered, layers, calibration),
    )


def layers_together(layers: int, experts: int, workers: int) -> int:
    """Of how many layers the experts are partitioned side by side: as many as give every worker an expert."""
    return min(layers, max(1, workers // experts))


@dataclass(frozen=True)
class Splits:
    """How a checkpoint can be split.

    Attributes:
        layers: decoder layers.
        moe_layers: indices of those with experts.
        dtype: of the experts' weights as stored.
        possible: numbers of sub-experts that fit.
        reason: why the next one does not.
    """

    layers: int
    moe_layers: list[int]
    dtype: str
    possible: list[int]
    reason: str


def possible_splits(checkpoint: Checkpoint) -> Splits:
    """Into how many sub-experts the experts of a checkpoint can be split.

    Raises:
        InputError: its tensors are not named as transformers names them for this family, or it has no MoE layer.
    """
    layered = LayeredModel(checkpoint, None)
    _check_names(layered)
    layers = [*layered.moe_blocks]
    block = layered.moe_blocks[layers[0]]
    dtype = checkpoint.dtypes[layered.tensors_under(f"{block}.experts")[0]]
    possible: list[int] = []
    sub_experts = 2
    while True:
        try:
            width = checkpoint.architecture.refactored_sizes(checkpoint.config, sub_experts)[checkpoint.architecture.width]
            _check_row_bytes(checkpoint, block, layered, width, sub_experts)
        except UsageError as error:
            return Splits(len(layered.layers), layers, dtype_name(dtype), possible, str(error))
        possible.append(sub_experts)
        sub_experts *= 2


def _check_names(layered: LayeredModel) -> None:
    """The MoE tensors must be named on disk as transformers would name them, or the output could not be read back."""
    if layered.checkpoint.dense:
        # Named in `models.dense`.
        return
    for name in layered.moe_blocks.values():
        block = layered.model.get_submodule(name)
        found = {tensor for part in replaced_parts(name, block) for tensor in layered.tensors_under(part)}
        expected: set[str] = set()
        for tensor, value in replaced_state(name, block).items():
            on_disk = set(layered.names_on_disk(layered.model, {tensor: value}))
            stored = set(layered.tensors_under(tensor))
            # Or as the model itself names it: all experts in one.
            expected |= stored if len(stored) == 1 and tensor.endswith(tuple(stored)) else on_disk
        if expected != found:
            example = sorted(expected ^ found)[0]
            state_of = "missing" if example in expected else "not named as transformers names it"
            raise InputError(
                f"{layered.checkpoint.path}: tensor {example} is {state_of}; complete the checkpoint or save it with save_pretrained"
            )


def replaced_state(name: str, block: MoeBlock, stock: bool = True) -> dict[str, torch.Tensor]:
    """The state of what a refactoring replaces in the MoE block called `name`, by its names in the model; see `replaced_parts`."""
    state = (routing_state(block) if stock else {}) | block.experts.state_dict(prefix="experts.")
    return {f"{name}.{leaf}": value for leaf, value in state.items()}


def _check_row_bytes(checkpoint: Checkpoint, block: str, layered: LayeredModel, width: int, sub_experts: int) -> None:
    """torch.grouped_mm, which transformers runs experts with, takes rows of whole 16-byte units only."""
    dtype = checkpoint.dtypes[layered.tensors_under(f"{block}.experts")[0]]
    if dtype is not None and width * dtype.itemsize % 16:
        raise UsageError(
            f"`sub_experts` {sub_experts}: sub-experts of {width} neurons in {dtype} are too narrow for transformers' grouped "
            f"kernel, which needs a multiple of {16 // dtype.itemsize}; use fewer"
        )


def _text_bytes(layered: LayeredModel, calibration: Calibration) -> int:
    """Size of the hidden states of the calibration text."""
    checkpoint = layered.checkpoint
    return (
        calibration.tokens(checkpoint)
        * checkpoint.architecture.streams
        * checkpoint.text_config.hidden_size
        * calibration.resolved_dtype(checkpoint).itemsize
    )


def memory_needed(layered: LayeredModel, calibration: Calibration, workers: int | None = None, sub_experts: int = 1) -> int:
    """Bytes at the peak of profiling or, with a number of workers, of refactoring into `sub_experts` too, in all processes on this machine.

    Profiling holds a layer as stored and widened to the compute type; fitting holds it as stored and split, where it is not written split
    once more, and the Gram matrices of the workers or of the compensation.
    """
    width = calibration.resolved_dtype(layered.checkpoint).itemsize
    stored = max(dtype.itemsize for dtype in layered.checkpoint.dtypes.values() if dtype is not None)
    largest = max(sum(value.numel() for value in layer.parameters()) for layer in layered.layers)
    experts = layered.model.get_submodule(next(iter(layered.moe_blocks.values()))).experts
    count, hidden, neurons = FusedExperts(experts).shape
    tokens = calibration.tokens(layered.checkpoint)
    together = layers_together(len(layered.moe_blocks), count, workers or 1)
    # Of layers that are partitioned side by side the workers have all activations at once, twice in float32.
    copies = together * (1 if together == 1 else 3)
    sample = copies * count * min(calibration.tokens_per_expert, tokens) * neurons * width
    inputs = together * 4 * min(INPUT_SAMPLE, tokens) * hidden
    # The picture of a layer's co-activation, in four steps.
    picture = 4 * 4 * neurons**2
    peak = _LAYER_MARGIN * largest * (width + stored)
    if workers is not None:
        # A regression of D features needs about four D x D matrices in float64.
        regression = 4 * 8 * min(hidden, tokens) ** 2
        # The compensation of D features has five D x D matrices and seven D x H ones; no worker runs beside it.
        features = 2 * count * sub_experts + hidden
        matrices = max(workers * regression, 8 * features * (5 * features + 7 * hidden))
        processes = matrices + (workers * _WORKER_BYTES if workers > 1 else 0)
        copies_of_layer = 2 if layered.checkpoint.architecture.stock else 3
        peak = max(peak, copies_of_layer * _LAYER_MARGIN * largest * stored + processes + inputs)
    return int(peak) + _text_bytes(layered, calibration) + sample + 2 * inputs + picture + _FIXED_BYTES


def _compute(layered: LayeredModel, layers: list[int], calibration: Calibration) -> int:
    config, architecture = layered.checkpoint.text_config, layered.checkpoint.architecture
    block = layered.model.get_submodule(layered.moe_blocks[layers[0]])
    count, _, _ = FusedExperts(block.experts).shape
    inside = sum(value.numel() for value in block.experts.parameters())
    active = architecture.sizes(config)[architecture.top_k] * inside // count
    dense = sum(value.numel() for layer in layered.layers for value in layer.parameters()) - len(layers) * inside
    return calibration.tokens(layered.checkpoint) * (dense + len(layers) * active)


def profile_seconds(plan: Plan) -> float:
    """Estimated time of profiling on this CPU, from the speed of a matrix product; layers reach about half of it."""
    size = 1024
    matrix = torch.rand(size, size)
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    seconds = (time.perf_counter() - start) / 4
    return 2 * plan.compute * seconds / size**3


def partition_seconds(plan: Plan, recipe: Recipe, tokens: int, workers: int) -> float:
    """Estimated time of partitioning with `tokens` per expert, from one random problem with an eighth of them."""
    num_experts, _, width, *_ = plan.before.values()
    few = max(16, tokens // 8)
    saliency = np.random.default_rng(0).random((few, width), dtype=np.float32) ** 4
    solvers.solve(saliency[:16], recipe.sub_experts, recipe.kept, recipe.solver, 0)
    # As the whole problem is searched.
    options: dict[str, Any] = {"short": tokens * width > LARGE} if recipe.solver == "genetic" else {}
    start = time.perf_counter()
    solvers.solve(saliency, recipe.sub_experts, recipe.kept, recipe.solver, 0, **options)
    seconds = (time.perf_counter() - start) * tokens / few
    return seconds * num_experts * len(plan.moe_layers) / workers
