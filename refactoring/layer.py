"""Refactor one MoE layer: partition its experts, fit its router, split its weights."""

from collections.abc import Callable, Iterator
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
from routers import choose_tilt, fit_linear, gate_neurons

OnExpert = Callable[[int], None]


@dataclass
class RefactoredLayer:
    """One layer's result.

    Attributes:
        state: parameters of the refactored block, by name inside the block ('gate.weight', 'experts.gate_up_proj', ...).
        router: its entries of the router file, by name inside the block's gate.
        report: for the manifest: tilt, and tokens and losses per expert.
    """

    state: dict[str, torch.Tensor]
    router: dict[str, torch.Tensor]
    report: dict[str, Any] = field(default_factory=dict)


def refactor_layer(
    source: Any,
    target: Any,
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
        statistics: of the layer; its router-fit moments are dropped.
        recipe: what to do.
        workers: processes that partition experts.
        tilt_bound: full-k error that the tilt of the stock gate may cause, see `routers.choose_tilt`.
        on_expert: told the number of experts partitioned so far.
    """
    gate_up, down = source.experts.gate_up_proj.data, source.experts.down_proj.data
    column_norm = torch.stack([matrix.float().norm(dim=0) for matrix in down])
    if not (torch.isfinite(column_norm).all() and torch.isfinite(source.gate.weight).all()):
        raise InputError("a weight of its experts' down_proj or of its gate is not finite; check the checkpoint")
    partitions = _partition(statistics, column_norm, recipe, workers, on_expert)
    labels = torch.from_numpy(np.stack([partition.labels for partition in partitions])).long()
    order = torch.from_numpy(np.stack([partition.order() for partition in partitions]))
    gate = source.gate.weight.data
    router = {f"original.{name}": value for name, value in source.gate.state_dict().items()} | {"neuron_sub_expert": labels.int()}
    if recipe.router != "replicate":
        chosen = [gate_neurons(statistics.marks(expert), labels[expert], recipe.sub_experts) for expert in range(len(labels))]
        router["gate_neurons"] = torch.stack(chosen)
    # The paper's proxy and replicate leave the stock gate as it was.
    rows, tilt = gate.repeat_interleave(recipe.sub_experts, 0), {"tilt": 0.0, "full_k_error": 0.0}
    if recipe.router == "linear":
        weight, bias = fit_linear(statistics, labels, column_norm, recipe.sub_experts)
        router |= {"weight": weight, "bias": bias}
        contribution = torch.einsum("enh,eh->en", weight, statistics.input_mean) + bias
    statistics.drop_moments()
    new_gate_up, new_down = split_experts(gate_up, down, order, recipe.sub_experts)
    if recipe.router == "linear":
        target.experts.gate_up_proj = nn.Parameter(new_gate_up, requires_grad=False)
        target.experts.down_proj = nn.Parameter(new_down, requires_grad=False)
        rows, tilt = choose_tilt(target, gate, weight, contribution, statistics.inputs, tilt_bound)
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
        report={"layer": statistics.layer, **tilt, "unrouted": statistics.unrouted, "experts": experts},
    )


def _saliency(statistics: LayerStatistics, column_norm: torch.Tensor, recipe: Recipe, expert: int) -> np.ndarray:
    saliency = statistics.activations[expert].float().abs()
    if recipe.saliency == "contribution":
        saliency = saliency * column_norm[expert]
    return saliency.numpy()


def _partition(
    statistics: LayerStatistics, column_norm: torch.Tensor, recipe: Recipe, workers: int, on_expert: OnExpert | None
) -> list[solvers.Partition]:
    """Partition every expert; each task has its own seed, so the number of workers changes nothing."""

    def tasks() -> Iterator[Any]:
        for expert in range(len(statistics.activations)):
            seed = int(np.random.SeedSequence([recipe.seed, statistics.layer, expert]).generate_state(1)[0])
            saliency = _saliency(statistics, column_norm, recipe, expert)
            yield delayed(solvers.solve)(saliency, recipe.sub_experts, recipe.kept, recipe.solver, seed)

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
