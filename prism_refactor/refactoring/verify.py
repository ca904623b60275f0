"""Is a refactored checkpoint the same model? Tensor by tensor, then logit by logit, one layer in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from prism_refactor.errors import InputError
from prism_refactor.events import Events
from prism_refactor.formats import PrismConfig
from prism_refactor.models.architectures import Architecture, original_routing, repeat_routing, replaced_parts, routing_state
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.layered import LayeredModel
from prism_refactor.models.modeling_prism import (
    MODELING_FILE,
    ROUTER_FILE,
    ActiveK,
    full_k,
    install,
    moe_block,
    places,
    router_tensors,
    two_level_router,
)
from prism_refactor.models.side_files import side_files
from prism_refactor.models.stream import ComputeOptions, LayerStream
from prism_refactor.models.transformers_models import FusedExperts
from prism_refactor.recipe import LOGIT_TOLERANCE
from prism_refactor.refactoring.pipeline import copied_name
from prism_refactor.refactoring.plan import replaced_state


@dataclass(frozen=True)
class LogitComparison:
    """Full-k logits of one way to run the refactored model against the original's, over the verification text.

    Attributes:
        mode: 'stock' or 'two-level'.
        tokens: positions compared.
        max_difference: largest |logit difference|.
        mean_kl: mean KL(original || refactored), nats per token.
        same_top1: share of positions with the same most likely token.
        passed: `max_difference` is within the tolerance.
    """

    mode: str
    tokens: int
    max_difference: float
    mean_kl: float
    same_top1: float
    passed: bool


def compare_files(source: Checkpoint, result: Checkpoint) -> list[str]:
    """Check that every side file of the source is there unchanged and that the two-level router's code is there.

    Returns:
        What is wrong, one line each.
    """
    problems = []
    for relative in side_files(source.path):
        copy = result.path / copied_name(relative)
        if not copy.exists() or copy.read_bytes() != (source.path / relative).read_bytes():
            problems.append(f"file {copy.name} is not the source's")
    if PrismConfig.required(result.config, result.path).has_router and not (result.path / MODELING_FILE).exists():
        problems.append(f"file {MODELING_FILE} is missing")
    return problems


def compare_tensors(source: Checkpoint, result: Checkpoint, events: Events | None = None) -> list[str]:
    """Check the inventory of the refactored checkpoint, then every tensor bit for bit against what the split of the source gives.

    Returns:
        What is wrong, one line each; empty when nothing is.
    """
    old = LayeredModel(source, None)
    blocks = old.moe_blocks.values()
    stock = source.architecture.stock
    parts = [part for name in blocks for part in replaced_parts(name, old.model.get_submodule(name), stock)]
    split = {tensor for part in parts for tensor in old.tensors_under(part)}
    kept = set(source.weight_map) - split
    missing = sorted(kept - set(result.weight_map))
    if missing:
        return [f"missing tensor {name}" for name in missing]
    try:
        new = LayeredModel(result, None)
    except InputError as error:
        return [str(error)]
    expected: dict[str, tuple[int, ...]] = {}
    for name in blocks:
        state = replaced_state(name, new.model.get_submodule(name), stock)
        expected |= {tensor: tuple(value.shape) for tensor, value in old.names_on_disk(new.model, state).items()}
    names = kept | set(expected)
    problems = [f"missing tensor {name}" for name in sorted(names - set(result.weight_map))]
    problems += [f"unexpected tensor {name}" for name in sorted(set(result.weight_map) - names)]
    if problems:
        return problems
    with result.slices(expected) as slices:
        for name, shape in expected.items():
            found = tuple(slices[name].get_shape())
            if found != shape:
                problems.append(f"tensor {name} has shape {found}, not {shape}")
    for name in sorted(kept):
        with source.slices([name]) as before, result.slices([name]) as after:
            if before[name].get_dtype() != after[name].get_dtype() or not _same_bytes(before[name][...], after[name][...]):
                problems.append(f"tensor {name} is not the source's")
    return problems or _compare_experts(old, new, events or Events())


def _compare_experts(old: LayeredModel, new: LayeredModel, events: Events) -> list[str]:
    routers = router_tensors(new.checkpoint.path / ROUTER_FILE)
    problems = []
    for index, name in old.moe_blocks.items():
        parts = replaced_parts(name, old.model.get_submodule(name))
        with old.loaded(*parts), new.loaded(*parts):
            before, after = old.model.get_submodule(name), new.model.get_submodule(name)
            found = _compare_block(before, after, routers.get(name, {}), new.checkpoint.config, old.checkpoint.architecture)
            problems += [f"layer {index}: {problem}" for problem in found]
        events.progress("tensors checked", 1, 1, (index, len(old.layers)))
    return problems


def _compare_block(before: Any, after: Any, router: dict[str, torch.Tensor], config: Any, architecture: Architecture) -> list[str]:
    """What is wrong with one refactored MoE block and its entries of the router file."""
    prism = PrismConfig.required(config, ROUTER_FILE)
    sub_experts, kind = prism.sub_experts, prism.router
    experts, hidden, neurons = FusedExperts(before.experts).shape
    shapes: dict[str, tuple[int, ...]] = {"neuron_sub_expert": (experts, neurons)}
    if kind == "linear":
        shapes["weight"] = (experts, sub_experts, hidden)
    if kind == "proxy":
        gate_neurons = router.get("gate_neurons", torch.empty(0)).shape[-1]
        shapes["gate_neurons"] = (experts, sub_experts, gate_neurons)
    if kind == "linear":
        shapes |= dict.fromkeys(("bias", "ceiling"), (experts, sub_experts))
        shapes["compensation"] = (2, experts, sub_experts, hidden)
        shapes["scale"] = (full_k(config),)
        rank = len(router.get("map_in", ()))
        shapes |= {"map_in": (rank, hidden), "map_out": (hidden, rank)}
    if prism.has_router:
        shapes["threshold"] = (full_k(config),)
    original = original_routing(before) if prism.stock else {}
    if {name: tuple(value.shape) for name, value in router.items()} != shapes | {
        name: tuple(value.shape) for name, value in original.items()
    }:
        return [f"{ROUTER_FILE} does not hold the tensors of a '{kind}' router"]
    problems = []
    routing, held = routing_state(after), places(experts, sub_experts, prism.groups)
    if not all(torch.isfinite(value).all() for value in [*router.values(), *routing.values()]):
        problems.append(f"a router tensor of {ROUTER_FILE} or of the stock gate is not finite")
    if not all(torch.equal(value, router[name]) for name, value in original.items()):
        problems.append(f"the original gate in {ROUTER_FILE} is not the source's")
    repeated = repeat_routing(before, after, architecture, held) if prism.stock else {}
    if not all(torch.equal(routing[name], value) for name, value in repeated.items()):
        problems.append("the stock gate is not the source's repeated")
    groups = router["neuron_sub_expert"]
    if not all((row.bincount(minlength=sub_experts) == neurons // sub_experts).all() for row in groups.clamp(0, sub_experts)):
        return [*problems, f"the partition in {ROUTER_FILE} is not balanced"]
    order = groups.argsort(dim=1, stable=True)
    fused = FusedExperts(before.experts)
    expected = fused.split(order, held, prism.factor) if prism.stock else fused.reordered(order)
    if not all(torch.equal(value, getattr(after.experts, name)) for name, value in expected.items()):
        problems.append(f"its sub-experts are not the source's experts split by {ROUTER_FILE}")
    return problems


@torch.inference_mode()
def compare_logits(
    source: Checkpoint,
    result: Checkpoint,
    rows: torch.Tensor,
    compute: ComputeOptions,
    tolerance: float = LOGIT_TOLERANCE,
    events: Events | None = None,
) -> list[LogitComparison]:
    """Compare logits at full k, in every way the refactored checkpoint can be run.

    Args:
        source, result: the two checkpoints.
        rows: int64 [S, T] token ids.
        compute: how to run; the tolerance is for float32.
        tolerance: on |logit difference|.
        events: told of every layer.
    """
    modes = ["stock", "two-level"] if PrismConfig.required(result.config, result.path).has_router else ["stock"]
    events = events or Events()
    original = _final_hidden(LayerStream(source, rows, compute), "original", events)
    hidden = {mode: _final_hidden(LayerStream(result, rows, compute), mode, events).hidden for mode in modes}
    with original.head() as head:
        return [_compare(mode, lambda row: head(row.to(compute.device)), original.hidden, hidden[mode], tolerance) for mode in modes]


def _final_hidden(stream: LayerStream, mode: str, events: Events) -> LayerStream:
    """Send the text through all layers."""
    checkpoint = stream.layered.checkpoint
    routers = router_tensors(checkpoint.path / ROUTER_FILE) if mode == "two-level" else {}
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            found = moe_block(layer)
            if found and routers:
                two_level = two_level_router(found[1], checkpoint.config, routers[stream.layered.moe_blocks[index]])
                install(found[1], two_level, ActiveK([full_k(checkpoint.config)]), 0)
            stream.advance(index)
        events.progress(f"{mode} checked", 1, 1, (index, len(stream)))
    return stream


def _same_bytes(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Equal as stored: what is not a number equals itself."""
    return before.shape == after.shape and torch.equal(*(value.reshape(-1).view(torch.uint8) for value in (before, after)))


def _compare(
    mode: str, head: Callable[[torch.Tensor], torch.Tensor], before: torch.Tensor, after: torch.Tensor, tolerance: float
) -> LogitComparison:
    differences, divergence, same = [], 0.0, 0.0
    tokens = before.shape[0] * before.shape[1]
    for reference_row, row in zip(before, after, strict=True):
        reference, logits = head(reference_row), head(row)
        differences.append((reference - logits).abs().max())
        divergence += torch.nn.functional.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum").item()
        same += (reference.argmax(-1) == logits.argmax(-1)).sum().item()
    # Not a number does not pass: torch's maximum keeps it and comparisons with it are false.
    largest = torch.stack(differences).max().item()
    return LogitComparison(mode, tokens, largest, divergence / tokens, same / tokens, largest <= tolerance)
