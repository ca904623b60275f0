"""Refactor one MoE layer: partition its experts, fit its router, split its weights."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from prism_refactor import solvers
from prism_refactor.calibration.statistics import LayerStatistics, coactive_marks
from prism_refactor.errors import InputError
from prism_refactor.events import Events
from prism_refactor.formats import ExpertReport, LayerReport, PrismConfig
from prism_refactor.models.architectures import Architecture, original_routing, repeat_routing, routing, routing_state
from prism_refactor.models.experts import experts_forward
from prism_refactor.models.modeling_prism import cut, places, router_of, two_level_router
from prism_refactor.models.transformers_models import FusedExperts, MoeBlock
from prism_refactor.recipe import Recipe
from prism_refactor.refactoring.timings import Timings
from prism_refactor.refactoring.workers import Task, Workers
from prism_refactor.routing.budget import thresholds
from prism_refactor.routing.compensation import fit_compensation
from prism_refactor.routing.linear import fit_linear
from prism_refactor.routing.output import relative_error, stock_output, two_level_output
from prism_refactor.routing.proxy import gate_neurons
from prism_refactor.routing.sample import Routed, in_float32

# Held-out inputs that the reported output errors are measured on, and what rounding can do to the output at full k.
MEASURED, ROUNDING = 2048, 1e-4
Tensors = dict[str, torch.Tensor]


@dataclass
class Run:
    """What all layers of a refactoring share.

    Attributes:
        recipe: what to do.
        architecture: of the model.
        workers: processes that partition experts and fit routers, entered.
        layers: decoder layers of the model.
        events: told of every expert that is partitioned.
        timings: told the seconds of each stage.
    """

    recipe: Recipe
    architecture: Architecture
    workers: Workers
    layers: int
    events: Events = field(default_factory=Events)
    timings: Timings = field(default_factory=Timings)


@dataclass
class LayerResult:
    """One layer, refactored.

    Attributes:
        weights: tensors of the refactored block, by name inside the block ('gate.weight', 'experts.gate_up_proj', ...).
        router: its entries of the router file, by name inside the block's router.
        pictures: co-activation of its busiest expert's neurons, 'before' in stored order and 'after' by sub-expert, float32 [P, P]:
            mean over blocks of neurons of how often two are active together, relative to chance; 'expert' [1] is that expert.
        report: for the manifest: output errors, and tokens and losses per expert.
    """

    weights: Tensors
    router: Tensors
    pictures: Tensors
    report: LayerReport


class LayerRefactoring:
    """The refactoring of one MoE block.

    Args:
        source: the block with its weights, as stored.
        target: the refactored model's block, on the meta device; it is given its weights.
        config: the refactored model's config.
        statistics: of the layer.
        partitions: of its experts.
        run: what all layers share.
    """

    def __init__(
        self,
        source: MoeBlock,
        target: MoeBlock,
        config: Any,
        statistics: LayerStatistics,
        partitions: list[solvers.Partition],
        run: Run,
    ):
        self.source, self.target, self.config, self.statistics, self.run = source, target, config, statistics, run
        self.partitions = partitions
        self.recipe = run.recipe

    def result(self) -> LayerResult:
        """Split the weights, fit the router, and measure the layer's output.

        Raises:
            InputError: a weight or an output is not finite.
        """
        labels = torch.from_numpy(np.stack([partition.labels for partition in self.partitions])).long()
        order = torch.from_numpy(np.stack([partition.order() for partition in self.partitions]))
        stock = self.run.architecture.stock
        weights = self._split(order) if stock else _named(FusedExperts(self.source.experts).reordered(order))
        _fill(self.target, weights)
        if not stock:
            del weights
            cut(self.target.experts, self.recipe.sub_experts)
        sample = self._sample()
        fitting, held_out = sample.split()
        stored = original_routing(self.source) if stock else {}
        original = {name: value.float() for name, value in stored.items()}
        with self.run.timings.stage("fitting"), in_float32(self.target):
            fitted = self._fit_router(original, labels, fitting)
            if self.recipe.has_router:
                fitted["threshold"] = self._thresholds(original | fitted, sample)
        with self.run.timings.stage("measuring"):
            errors = self._output_errors(original | fitted, held_out.part(slice(MEASURED)))
        experts = [
            ExpertReport(tokens, round(partition.stored_loss, 6), round(partition.loss, 6))
            for tokens, partition in zip(self.statistics.tokens_routed.tolist(), self.partitions, strict=True)
        ]
        report = LayerReport(self.statistics.layer, errors, self.statistics.unrouted, experts)
        if not stock:
            # Together again.
            weights = _named(self.target.experts.state_dict())
        router = stored | {"neuron_sub_expert": labels.int()} | fitted
        return LayerResult(weights, router, self._pictures(order), report)

    def _sample(self) -> Routed:
        """The sampled inputs and where the source sends them: found anew in float32 where that takes no more than they."""
        if self.run.architecture.plain_router:
            return Routed.by(self.source, self.statistics.inputs)
        return Routed(self.statistics.inputs.float(), self.statistics.weights.float(), self.statistics.experts)

    def _split(self, order: torch.Tensor) -> Tensors:
        """Return the tensors of the refactored block."""
        prism = PrismConfig.required(self.config, "the refactored model")
        held = places(len(order), prism.sub_experts, prism.groups)
        routing = repeat_routing(self.source, self.target, self.run.architecture, held)
        split = FusedExperts(self.source.experts).split(order, held, prism.factor)
        return routing | _named(split)

    def _fit_router(self, original: Tensors, labels: torch.Tensor, fitting: Routed) -> Tensors:
        """Return the sub-router's entries of the router file."""
        recipe, experts = self.recipe, self.target.experts
        if not recipe.has_router:
            return {}
        if recipe.router == "proxy":
            chosen = [
                gate_neurons(coactive_marks(activations, recipe.coactive_share), labels[expert], recipe.sub_experts, recipe.gate_neurons)
                for expert, activations in enumerate(self.statistics.activations)
            ]
            return {"gate_neurons": torch.stack(chosen)}
        fitted = fit_linear(experts, fitting, len(labels), recipe.sub_experts, self.run.workers.run)
        return fitted | fit_compensation(two_level_router(self.target, self.config, original | fitted), experts, fitting)

    @torch.inference_mode()
    def _thresholds(self, router: Tensors, routed: Routed) -> torch.Tensor:
        two_level = two_level_router(self.target, self.config, router)
        values = torch.cat([two_level.rank(part.inputs, part.weights, part.experts) for part in routed.chunks()])
        return thresholds(two_level.need(values))

    def _output_errors(self, router: Tensors, routed: Routed) -> dict[str, list[Any]]:
        """Return the squared relative error of the layer's output at k = N, 2 N, ... K N sub-experts, and of the original at 1 ... K.

        The latter and the stock router's only where the router is plain.
        """
        inputs, sub_experts = routed.inputs, self.recipe.sub_experts
        experts = range(1, routed.experts.shape[1] + 1)
        exact = experts_forward(self.source.experts, inputs, routed.experts, routed.weights)
        outputs: dict[str, Iterable[torch.Tensor]] = {}
        if self.run.architecture.plain_router:
            outputs["original"] = (stock_output(self.source, inputs, k) for k in experts)
            if self.run.architecture.stock:
                outputs["stock"] = (stock_output(self.target, inputs, sub_experts * k) for k in experts)
        if self.recipe.has_router:
            with in_float32(self.target):
                two_level = two_level_router(self.target, self.config, router)
            outputs["two-level"] = (two_level_output(two_level, self.target.experts, routed, sub_experts * k) for k in experts)
        elif not outputs:
            # Nothing to report; what is split must be right all the same.
            everything = two_level_output(
                two_level_router(self.target, self.config, router), self.target.experts, routed, sub_experts * experts[-1]
            )
            self._check(relative_error(everything, exact))
        errors = {name: [round(relative_error(output, exact), 8) for output in each] for name, each in outputs.items()}
        if not np.isfinite([value for values in errors.values() for value in values]).all():
            raise InputError("its outputs are not finite; check the checkpoint")
        # Between experts of equal scores the stock router of the split model may choose otherwise.
        exempt = {"original"} | ({"stock"} if "stock" in errors and _ties(self.source, inputs) else set())
        self._check(max((each[-1] for name, each in errors.items() if name not in exempt), default=0.0))
        return {"k": [sub_experts * k for k in experts]} | errors

    def _check(self, wrong: float) -> None:
        if wrong > ROUNDING:
            raise InputError(
                f"at full k its output is not the source's (squared relative error {wrong:.1e}); please report this checkpoint"
            )

    def _pictures(self, order: torch.Tensor) -> Tensors:
        expert, share = int(self.statistics.tokens_routed.argmax()), 1 / (2 * self.recipe.sub_experts)
        return {
            "before": self.statistics.coactivation_picture(expert, share),
            "after": self.statistics.coactivation_picture(expert, share, order[expert]),
            "expert": torch.tensor([expert]),
        }


def _named(experts: Tensors) -> Tensors:
    """Tensors of an experts module by their names in the block."""
    return {f"experts.{name}": value for name, value in experts.items()}


@torch.inference_mode()
def _ties(block: MoeBlock, inputs: torch.Tensor) -> bool:
    """Whether a block's router gives equal scores to the last expert that it chooses and the next, for some of the inputs."""
    with in_float32(block):
        scores, _, _ = routing(block, inputs)
    ranked, top_k = scores.float().sort(-1, descending=True).values, router_of(block).top_k
    return top_k < ranked.shape[-1] and bool((ranked[:, top_k - 1] == ranked[:, top_k]).any())


def _fill(block: MoeBlock, state: Tensors) -> None:
    """Give the tensors of a block on the meta device their values."""
    for name, value in state.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = block.get_submodule(owner_name)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        else:
            setattr(owner, leaf, value)


def column_norms(block: MoeBlock) -> torch.Tensor:
    """Return the norms of down_proj's columns, float32 [E, C], of a block with its weights.

    Raises:
        InputError: they or a routing tensor are not finite.
    """
    norms = FusedExperts(block.experts).column_norms()
    if not torch.isfinite(norms).all():
        expert = int(torch.nonzero(~torch.isfinite(norms).all(1))[0])
        raise InputError(f"the down_proj of expert {expert} is not finite, or too large to be squared; check the checkpoint")
    for name, value in routing_state(block).items():
        if not torch.isfinite(value).all():
            raise InputError(f"{name} is not finite; check the checkpoint")
    return norms


def partition_layers(layers: list[tuple[LayerStatistics, torch.Tensor]], run: Run) -> Iterator[list[solvers.Partition]]:
    """Partition every expert of some layers, side by side; yields the partitions of each layer.

    Args:
        layers: of each layer, its statistics, of which `layer` and `activations` ([tokens, neurons] per expert) are read, and the norms of
            down_proj's columns, float32 [experts, neurons].
        run: each expert's seed is its own, so the number of workers changes nothing.
    """
    recipe = run.recipe

    def tasks() -> Iterator[Task]:
        for statistics, norms in layers:
            for expert, sample in enumerate(statistics.activations):
                seed = int(np.random.SeedSequence([recipe.seed, statistics.layer, expert]).generate_state(1)[0])
                weights = norms[expert].numpy() if recipe.saliency == "contribution" else None
                yield solvers.solve, (sample.float().abs().numpy(), recipe.sub_experts, recipe.kept, recipe.solver, seed, weights)

    solved = run.workers.run(tasks())
    for statistics, _ in layers:
        partitions: list[solvers.Partition] = []
        for _ in statistics.activations:
            partitions.append(next(solved))
            run.events.progress("experts partitioned", len(partitions), len(statistics.activations), (statistics.layer, run.layers))
        yield partitions
