"""Is a refactored checkpoint the same model? Tensor by tensor, then logit by logit, one layer in memory."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration import LayerStream
from checkpoints import MANIFEST, Checkpoint, LayeredModel, moe_block, names_on_disk, split_experts
from prism_errors import InputError
from refactoring.plan import block_name, moe_layers
from routers import ROUTER_FILE, attach_block, router_tensors

# Largest |difference| of a logit at full k that floating-point reordering explains, in float32.
LOGIT_TOLERANCE = 1e-3
# Largest mean KL divergence, nats per token, that the tilt of the stock gate may cause at full k.
KL_TOLERANCE = 1e-3
OnLayer = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Comparison:
    """Full-k logits of one way to run the refactored model against the original's, over the verification text.

    Attributes:
        mode: 'stock' or 'two-level'.
        tokens: positions compared.
        max_difference: largest |logit difference|.
        mean_kl: mean KL(original || refactored), nats per token.
        same_top1: share of positions with the same most likely token.
        passed: within the tolerance of this mode.
    """

    mode: str
    tokens: int
    max_difference: float
    mean_kl: float
    same_top1: float
    passed: bool


def open_refactored(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """A refactored checkpoint and its manifest. Raises InputError when the folder is not one."""
    checkpoint = Checkpoint(path)
    if not hasattr(checkpoint.config, "prism") or not (path / MANIFEST).exists():
        raise InputError(f"{path}: not a refactored checkpoint; write one with prism-refactor")
    return checkpoint, json.loads((path / MANIFEST).read_text())


def compare_tensors(source: Checkpoint, result: Checkpoint, on_layer: OnLayer | None = None) -> list[str]:
    """Check the inventory of the refactored checkpoint, then every tensor bit for bit against what the split of the source gives.

    The stock gate rows are compared by shape only: they are tilted.

    Returns:
        What is wrong, one line each; empty when nothing is.
    """
    old, new = LayeredModel(source, None), LayeredModel(result, None)
    split: set[str] = set()
    expected: dict[str, tuple[int, ...]] = {}
    for index in moe_layers(old):
        name = block_name(old, index)
        split |= {tensor for part in ("gate", "experts") for tensor in old.tensors_under(f"{name}.{part}")}
        state = {
            f"{name}.{leaf}": value
            for leaf, value in new.model.get_submodule(name).state_dict().items()
            if leaf.startswith(("gate.", "experts."))
        }
        expected |= {tensor: tuple(value.shape) for tensor, value in names_on_disk(new.model, state).items()}
    kept = set(source.weight_map) - split
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
            if before[name].get_dtype() != after[name].get_dtype() or not torch.equal(before[name][...], after[name][...]):
                problems.append(f"tensor {name} is not the source's")
    return problems or _compare_experts(old, new, on_layer)


def _compare_experts(old: LayeredModel, new: LayeredModel, on_layer: OnLayer | None) -> list[str]:
    routers = router_tensors(new.checkpoint.path / ROUTER_FILE)
    sub_experts = new.checkpoint.config.prism["sub_experts"]
    problems = []
    for index in moe_layers(old):
        name = block_name(old, index)
        order = routers[name]["neuron_sub_expert"].argsort(dim=1, stable=True)
        with old.loaded(f"{name}.experts"), new.loaded(f"{name}.experts"):
            before, after = old.model.get_submodule(f"{name}.experts"), new.model.get_submodule(f"{name}.experts")
            gate_up, down = split_experts(before.gate_up_proj.data, before.down_proj.data, order, sub_experts)
            if not (torch.equal(gate_up, after.gate_up_proj) and torch.equal(down, after.down_proj)):
                problems.append(f"layer {index}: its sub-experts are not the source's experts split by {ROUTER_FILE}")
        with old.loaded(f"{name}.gate"):
            for leaf, value in old.model.get_submodule(f"{name}.gate").state_dict().items():
                if not torch.equal(value, routers[name][f"original.{leaf}"]):
                    problems.append(f"layer {index}: the original gate in {ROUTER_FILE} is not the source's")
        if on_layer:
            on_layer("tensors", index, len(old.layers))
    return problems


@torch.inference_mode()
def compare_logits(
    source: Checkpoint,
    result: Checkpoint,
    rows: torch.Tensor,
    device: str,
    batch_size: int,
    tolerance: float = LOGIT_TOLERANCE,
    on_layer: OnLayer | None = None,
) -> list[Comparison]:
    """Compare float32 logits at full k, in every way the refactored checkpoint can be run.

    Args:
        source, result: the two checkpoints.
        rows: int64 [S, T] token ids.
        device: 'cpu' or 'cuda'.
        batch_size: rows per forward.
        tolerance: on |logit difference| for modes that are exact: two-level, and stock with repeated rows.
        on_layer: told (mode, layer, layers).
    """
    kind = result.config.prism["router"]
    modes = ["stock"] if kind == "replicate" else ["stock", "two-level"]
    original = _final_hidden(source, rows, device, batch_size, "original", on_layer)
    hidden = {mode: _final_hidden(result, rows, device, batch_size, mode, on_layer).hidden for mode in modes}
    comparisons = []
    with original.head() as head:
        for mode in modes:
            exact = mode == "two-level" or kind != "linear"
            comparisons.append(_compare(mode, exact, head, original.hidden, hidden[mode], device, tolerance))
    return comparisons


def _final_hidden(
    checkpoint: Checkpoint, rows: torch.Tensor, device: str, batch_size: int, mode: str, on_layer: OnLayer | None
) -> LayerStream:
    stream = LayerStream(checkpoint, rows, torch.float32, device, batch_size)
    routers = router_tensors(checkpoint.path / ROUTER_FILE) if mode == "two-level" else {}
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            found = moe_block(layer)
            if found and routers:
                attach_block(found[1], checkpoint.config, routers[f"{stream.layered.layer_name(index)}.{found[0]}"])
            stream.advance(index)
        if on_layer:
            on_layer(mode, index, len(stream))
    return stream


def _compare(
    mode: str,
    exact: bool,
    head: Callable[[torch.Tensor], torch.Tensor],
    before: torch.Tensor,
    after: torch.Tensor,
    device: str,
    tolerance: float,
) -> Comparison:
    largest, divergence, same, tokens = 0.0, 0.0, 0.0, 0
    for row in range(len(before)):
        reference, logits = head(before[row].to(device)), head(after[row].to(device))
        largest = max(largest, (reference - logits).abs().max().item())
        divergence += torch.nn.functional.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum").item()
        same += (reference.argmax(-1) == logits.argmax(-1)).sum().item()
        tokens += len(reference)
    mean = max(0.0, divergence / tokens)
    passed = largest <= tolerance if exact else mean <= KL_TOLERANCE
    return Comparison(mode, tokens, largest, mean, same / tokens, passed)
