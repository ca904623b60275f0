"""Refactor one MoE layer: partition its experts, fit its router, split its weights."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from prism_refactor import solvers
from prism_refactor.calibration.statistics import LayerStatistics, coactive_marks
from prism_refactor.errors import InputError
from prism_refactor.models.architectures import ARCHITECTURES, router_name, routing_state
from prism_refactor.models.modeling_prism import router_of, two_level_router
from prism_refactor.models.split import repeat_routing, split_experts
from prism_refactor.refactoring.recipe import Recipe
from prism_refactor.refactoring.timings import Timings
from prism_refactor.refactoring.workers import Task, Workers
from prism_refactor.routing.compensation import fit_compensation
from prism_refactor.routing.linear import fit_linear
from prism_refactor.routing.output import relative_error, stock_output, two_level_output
from prism_refactor.routing.proxy import fit_proxy, gate_neurons
from prism_refactor.routing.sample import Routed, in_float32
from prism_refactor.routing.tilt import choose_tilt

OnExpert = Callable[[int], None]
# Held-out inputs that the reported output errors are measured on.
JUDGED = 2048


@dataclass
class RefactoredLayer:
    """One layer's result.

    Attributes:
        state: tensors of the refactored block, by name inside the block ('gate.weight', 'experts.gate_up_proj', ...).
        router: its entries of the router file, by name inside the block's router.
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
    workers: Workers,
    tilt_bound: float,
    timings: Timings,
    on_expert: OnExpert | None = None,
) -> RefactoredLayer:
    """Split the experts of one MoE block.

    Args:
        source: the block with its weights, as stored.
        target: the refactored model's block, on the meta device.
        config: the refactored model's config.
        statistics: of the layer.
        recipe: what to do.
        workers: that partition experts and fit the router.
        tilt_bound: full-k error that the tilt of the stock gate may cause, see `routers.choose_tilt`.
        timings: told the seconds of each stage.
        on_expert: told the number of experts partitioned so far.
    """
    output_axis = 1 if source.experts.is_transposed else 0
    column_norm = torch.stack([matrix.float().norm(dim=output_axis) for matrix in source.experts.down_proj.data])
    if not torch.isfinite(column_norm).all():
        expert = int(torch.nonzero(~torch.isfinite(column_norm).all(1))[0])
        raise InputError(f"the down_proj of expert {expert} is not finite, or too large to be squared; check the checkpoint")
    for name, value in routing_state(source).items():
        if not torch.isfinite(value).all():
            raise InputError(f"{name} is not finite; check the checkpoint")
    with timings.stage("partitioning"):
        partitions = partition_experts(statistics, column_norm, recipe, workers, on_expert)
    labels = torch.from_numpy(np.stack([partition.labels for partition in partitions])).long()
    order = torch.from_numpy(np.stack([partition.order() for partition in partitions]))
    state = repeat_routing(source, ARCHITECTURES[config.model_type], recipe.sub_experts)
    split = split_experts(source.experts, order, recipe.sub_experts, config.prism["factor"])
    state |= {f"experts.{name}": value for name, value in split.items()}
    _fill(target, state)
    fitting, held_out = Routed.by(source, statistics.inputs).split()
    stored = original_routing(source)
    router = stored | {"neuron_sub_expert": labels.int()}
    original = {name: value.float() for name, value in stored.items()}
    with timings.stage("fitting"), in_float32(target):
        router |= _fit_router(target, config, original, statistics, labels, fitting, recipe, workers)
    # The paper's proxies and replicate leave the stock gate as it was.
    row_name = f"{router_name(source)}.weight"
    tilt = {"tilt": 0.0, "full_k_error": 0.0}
    if recipe.router == "linear":
        rows = router_of(source).weight.data
        with timings.stage("tilting"):
            state[row_name], tilt = choose_tilt(target, rows, router["weight"], held_out.inputs, tilt_bound)
    with timings.stage("judging"):
        errors = _output_errors(source, target, config, router | original, state[row_name], held_out.inputs[:JUDGED], recipe)
    if not np.isfinite([value for values in errors.values() for value in values]).all():
        raise InputError("its outputs are not finite; check the checkpoint")
    experts = [
        {"tokens": tokens, "loss_before": round(partition.stored_loss, 6), "loss_after": round(partition.loss, 6)}
        for tokens, partition in zip(statistics.tokens_routed.tolist(), partitions, strict=True)
    ]
    return RefactoredLayer(
        state=state,
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
    workers: Workers,
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
        fitted = fit_linear(target.experts, fitting, len(labels), recipe.sub_experts, workers.run)
    else:
        fitted = fit_proxy(target.experts, fitting, len(labels), recipe.sub_experts, recipe.gate_neurons, workers.run)
    router = two_level_router(target, config, original | fitted)
    return fitted | fit_compensation(router, target.experts, fitting.inputs)


def _output_errors(
    source: Any, target: Any, config: Any, router: dict[str, torch.Tensor], rows: torch.Tensor, inputs: torch.Tensor, recipe: Recipe
) -> dict[str, list[Any]]:
    """Squared relative error of the layer's output at k = N, 2 N, ... K N sub-experts and at as many whole experts of the original."""
    original_router = router_of(source)
    stored, top_k = original_router.weight, original_router.top_k
    experts = range(1, top_k + 1)
    exact = stock_output(source, stored.data, inputs, top_k)
    outputs: dict[str, Iterable[torch.Tensor]] = {
        "original": (stock_output(source, stored.data, inputs, k) for k in experts),
        "stock": (stock_output(target, rows, inputs, recipe.sub_experts * k) for k in experts),
    }
    if recipe.router != "replicate":
        with in_float32(target):
            two_level = two_level_router(target, config, router)
        outputs["two-level"] = (two_level_output(two_level, target.experts, inputs, recipe.sub_experts * k) for k in experts)
    errors = {name: [round(relative_error(output, exact), 8) for output in each] for name, each in outputs.items()}
    original_router.weight, original_router.top_k = stored, top_k
    return {"k": [recipe.sub_experts * k for k in experts]} | errors


def original_routing(block: Any) -> dict[str, torch.Tensor]:
    """What the router file keeps of the original block: its router's state as 'original.*', and the 'correction' it holds itself."""
    router = f"{router_name(block)}."
    return {
        f"original.{name.removeprefix(router)}" if name.startswith(router) else "correction": value.detach()
        for name, value in routing_state(block).items()
    }


def _fill(block: Any, state: dict[str, torch.Tensor]) -> None:
    """Give the tensors of a block on the meta device their values."""
    for name, value in state.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = block.get_submodule(owner_name)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        else:
            setattr(owner, leaf, value)


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
    statistics: LayerStatistics, column_norm: torch.Tensor, recipe: Recipe, workers: Workers, on_expert: OnExpert | None
) -> list[solvers.Partition]:
    """Partition every expert of a layer.

    Args:
        statistics: `layer` and `activations` ([tokens, neurons] per expert) are read.
        column_norm: float32 [experts, neurons], norms of down_proj's columns.
        recipe: solver, sub-experts, saliency and seed; each expert's seed is its own, so the number of workers changes nothing.
        workers: that run the solver.
        on_expert: called with the number of experts done.
    """

    def tasks() -> Iterator[Task]:
        for expert in range(len(statistics.activations)):
            seed = int(np.random.SeedSequence([recipe.seed, statistics.layer, expert]).generate_state(1)[0])
            saliency, weights = _saliency(statistics.activations[expert], recipe), _weights(column_norm[expert], recipe)
            yield solvers.solve, (saliency, recipe.sub_experts, recipe.kept, recipe.solver, seed, weights)

    partitions: list[solvers.Partition] = []
    for partition in workers.run(tasks()):
        partitions.append(partition)
        if on_expert:
            on_expert(len(partitions))
    return partitions
