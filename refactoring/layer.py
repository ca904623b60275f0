"""Refactor one MoE layer: partition its experts, fit its router, split its weights."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from torch import nn

import solvers
from calibration import LayerStatistics
from checkpoints import split_experts
from prism_errors import InputError
from refactoring.recipe import Recipe
from routers import (
    Routed,
    choose_tilt,
    coactive_marks,
    fit_compensation,
    fit_linear,
    fit_proxy,
    gate_neurons,
    relative_error,
    stock_output,
    two_level_output,
    two_level_router,
)

OnExpert = Callable[[int], None]
# Held-out inputs that the reported output errors are measured on.
JUDGED = 2048


@dataclass
class RefactoredLayer:
    """One layer's result.

    Attributes:
        state: parameters of the refactored block, by name inside the block ('gate.weight', 'experts.gate_up_proj', ...).
        router: its entries of the router file, by name inside the block's gate.
        picture: co-activation of its busiest expert's neurons, 'before' in stored order and 'after' by sub-expert, float32 [P, P]:
            mean over blocks of neurons of how often two are active together, relative to chance.
        report: for the manifest: tilt, output errors, and tokens and losses per expert.
    """

    state: dict[str, torch.Tensor]
    router: dict[str, torch.Tensor]
    picture: dict[str, torch.Tensor]
    report: dict[str, Any] = field(default_factory=dict)


def refactor_layer(
    source: Any,
    target: Any,
    config: Any,
    statistics: LayerStatistics,
    recipe: Recipe,
    workers: int,
    tilt_bound: float,
    on_expert: OnExpert | None = None,
) -> RefactoredLayer:
    """Split the experts of one MoE block.

    Args:
        source: the block with its weights, as stored.
        target: the refactored model's block, on the meta device.
        config: the refactored model's config.
        statistics: of the layer.
        recipe: what to do.
        workers: processes that partition experts.
        tilt_bound: full-k error that the tilt of the stock gate may cause, see `routers.choose_tilt`.
        on_expert: told the number of experts partitioned so far.
    """
    gate_up, down = source.experts.gate_up_proj.data, source.experts.down_proj.data
    column_norm = torch.stack([matrix.float().norm(dim=0) for matrix in down])
    if not (torch.isfinite(column_norm).all() and torch.isfinite(source.gate.weight).all()):
        raise InputError("a weight of its experts' down_proj or of its gate is not finite; check the checkpoint")
    partitions = partition_experts(statistics, column_norm, recipe, workers, on_expert)
    labels = torch.from_numpy(np.stack([partition.labels for partition in partitions])).long()
    order = torch.from_numpy(np.stack([partition.order() for partition in partitions]))
    gate = source.gate.weight.data
    new_gate_up, new_down = split_experts(gate_up, down, order, recipe.sub_experts)
    target.experts.gate_up_proj = nn.Parameter(new_gate_up, requires_grad=False)
    target.experts.down_proj = nn.Parameter(new_down, requires_grad=False)
    target.gate.weight = nn.Parameter(gate.repeat_interleave(recipe.sub_experts, 0), requires_grad=False)
    fitting, held_out = Routed.by(source.gate, statistics.inputs).split()
    router = {f"original.{name}": value for name, value in source.gate.state_dict().items()} | {"neuron_sub_expert": labels.int()}
    original = {name: value.float() for name, value in router.items() if name.startswith("original.")}
    with _in_float32(target):
        router |= _fit_router(target, config, original, statistics, labels, fitting, recipe)
    # The paper's proxies and replicate leave the stock gate as it was.
    rows, tilt = target.gate.weight.data, {"tilt": 0.0, "full_k_error": 0.0}
    if recipe.router == "linear":
        rows, tilt = choose_tilt(target, gate, router["weight"], held_out.inputs, tilt_bound)
    errors = _output_errors(source, target, config, router | original, rows, held_out.inputs[:JUDGED], recipe)
    experts = [
        {"tokens": tokens, "loss_before": round(partition.stored_loss, 6), "loss_after": round(partition.loss, 6)}
        for tokens, partition in zip(statistics.tokens_routed.tolist(), partitions, strict=True)
    ]
    return RefactoredLayer(
        state={
            "gate.weight": rows,
            "experts.gate_up_proj": new_gate_up,
            "experts.down_proj": new_down,
        },
        router=router,
        picture=_coactivation_picture(statistics, order, recipe),
        report={"layer": statistics.layer, **tilt, "output_error": errors, "unrouted": statistics.unrouted, "experts": experts},
    )


def _fit_router(
    target: Any,
    config: Any,
    original: dict[str, torch.Tensor],
    statistics: LayerStatistics,
    labels: torch.Tensor,
    fitting: Routed,
    recipe: Recipe,
) -> dict[str, torch.Tensor]:
    """The sub-router's entries of the router file."""
    if recipe.router == "replicate":
        return {}
    if recipe.router == "proxy":
        chosen = [
            gate_neurons(coactive_marks(activations, recipe.coactive_share), labels[expert], recipe.sub_experts, recipe.gate_neurons)
            for expert, activations in enumerate(statistics.activations)
        ]
        return {"gate_neurons": torch.stack(chosen)}
    if recipe.router == "linear":
        fitted = fit_linear(target.experts, fitting, len(labels), recipe.sub_experts)
    else:
        fitted = fit_proxy(target.experts, fitting, len(labels), recipe.sub_experts, recipe.gate_neurons)
    router = two_level_router(target, config, original | fitted)
    return fitted | fit_compensation(router, target.experts, fitting.inputs)


def _output_errors(
    source: Any, target: Any, config: Any, router: dict[str, torch.Tensor], rows: torch.Tensor, inputs: torch.Tensor, recipe: Recipe
) -> dict[str, list[Any]]:
    """Squared relative error of the layer's output at k = N, 2 N, ... K N sub-experts and at as many whole experts of the original."""
    stored, top_k = source.gate.weight, source.gate.top_k
    experts = range(1, top_k + 1)
    exact = stock_output(source, stored.data, inputs, top_k)
    outputs: dict[str, Iterable[torch.Tensor]] = {
        "original": (stock_output(source, stored.data, inputs, k) for k in experts),
        "stock": (stock_output(target, rows, inputs, recipe.sub_experts * k) for k in experts),
    }
    if recipe.router != "replicate":
        with _in_float32(target):
            two_level = two_level_router(target, config, router)
        outputs["two-level"] = (two_level_output(two_level, target.experts, inputs, recipe.sub_experts * k) for k in experts)
    errors = {name: [round(relative_error(output, exact), 8) for output in each] for name, each in outputs.items()}
    source.gate.weight, source.gate.top_k = stored, top_k
    return {"k": [recipe.sub_experts * k for k in experts]} | errors


@contextmanager
def _in_float32(block: Any) -> Iterator[None]:
    """Let a block's gate compute in float32 for a while; the experts follow their input's type."""
    stored = block.gate.weight
    block.gate.weight = nn.Parameter(stored.float(), requires_grad=False)
    try:
        yield
    finally:
        block.gate.weight = stored


def _coactivation_picture(statistics: LayerStatistics, order: torch.Tensor, recipe: Recipe) -> dict[str, torch.Tensor]:
    expert, share = int(statistics.tokens_routed.argmax()), 1 / (2 * recipe.sub_experts)
    return {
        "before": statistics.coactivation_picture(expert, share),
        "after": statistics.coactivation_picture(expert, share, order[expert]),
        "expert": torch.tensor([expert]),
    }


def _saliency(activations: torch.Tensor, recipe: Recipe) -> np.ndarray:
    saliency = activations.float().abs()
    return (saliency.square() if recipe.saliency == "energy" else saliency).numpy()


def _weights(column_norm: torch.Tensor, recipe: Recipe) -> np.ndarray | None:
    """What the saliency of each neuron is multiplied with, from the norms of its expert's down_proj columns."""
    if recipe.saliency == "activation":
        return None
    return (column_norm.square() if recipe.saliency == "energy" else column_norm).numpy()


def partition_experts(
    statistics: LayerStatistics, column_norm: torch.Tensor, recipe: Recipe, workers: int, on_expert: OnExpert | None
) -> list[solvers.Partition]:
    """Partition every expert of a layer.

    Args:
        statistics: `layer` and `activations` ([tokens, neurons] per expert) are read.
        column_norm: float32 [experts, neurons], norms of down_proj's columns.
        recipe: solver, sub-experts, saliency and seed; each expert's seed is its own, so the number of workers changes nothing.
        workers: processes.
        on_expert: called with the number of experts done.
    """

    def tasks() -> Iterator[Any]:
        for expert in range(len(statistics.activations)):
            seed = int(np.random.SeedSequence([recipe.seed, statistics.layer, expert]).generate_state(1)[0])
            saliency, weights = _saliency(statistics.activations[expert], recipe), _weights(column_norm[expert], recipe)
            yield delayed(solvers.solve)(saliency, recipe.sub_experts, recipe.kept, recipe.solver, seed, weights)

    partitions: list[solvers.Partition] = []
    try:
        for partition in Parallel(n_jobs=workers, return_as="generator")(tasks()):
            partitions.append(partition)
            if on_expert:
                on_expert(len(partitions))
    except BaseException:
        # Interrupted or failed: no worker process outlives the run.
        get_reusable_executor().shutdown(wait=True, kill_workers=True)
        raise
    return partitions
