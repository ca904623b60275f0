"""Proxy gates: a few neurons of a sub-expert speak for it. The paper's choice of them, and a calibrated one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from prism_refactor.models.architectures import expert_shape
from prism_refactor.models.experts import sub_expert_activations, sub_expert_outputs
from prism_refactor.routing.linear import log_sizes
from prism_refactor.routing.sample import CHUNK, Routed, Run, run_here
from prism_refactor.solvers import ridge_on_few

GATE_NEURONS = 4


def gate_neurons(marks: torch.Tensor, labels: torch.Tensor, sub_experts: int, count: int = GATE_NEURONS) -> torch.Tensor:
    """In each sub-expert, the r neurons with the largest summed co-activation within it (MoE-Prism, Gating Mechanism Reconstructor).

    A neuron's co-activation with its sub-expert's neurons sums to marks[:, c] . (marks of the sub-expert per token), so the [C, C]
    matrix is not needed.

    Args:
        marks: float32 [B, C], the binarised activations of one expert.
        labels: int64 [C], sub-expert of each neuron.
        sub_experts: N.
        count: r.

    Returns:
        int64 [N, r], positions inside the sub-expert (its neurons in stored order); r is smaller where sub-experts are.
    """
    chosen = []
    for sub_expert in range(sub_experts):
        members = torch.nonzero(labels == sub_expert).flatten()
        own = marks[:, members]
        totals = own.T @ own.sum(1)
        chosen.append(totals.argsort(descending=True, stable=True)[:count])
    return torch.stack(chosen)


@torch.inference_mode()
def fit_proxy(
    experts: Any, routed: Routed, num_experts: int, sub_experts: int, count: int = GATE_NEURONS, run: Run = run_here
) -> dict[str, torch.Tensor]:
    """The calibrated proxy: neurons picked one by one for how much of the sub-expert's log norm their |activations| explain together.

    Args:
        experts: the refactored experts module with its weights, E * N sub-experts.
        routed: sample to fit on.
        num_experts: E.
        sub_experts: N.
        count: r.
        run: what runs the regressions.

    Returns:
        gate_neurons int64 [E, N, r], positions inside the sub-expert; coefficient float32 [E, N, r], bias and ceiling float32 [E, N]:
        log norm = coefficient . |activation| + bias, at most ceiling.
    """
    ceilings = []

    def tasks() -> Iterator[Any]:
        for expert in range(num_experts):
            features, targets = [], []
            for inputs in routed.inputs[routed.tokens_of(expert)].split(CHUNK):
                activations = sub_expert_activations(experts, expert, sub_experts, inputs)
                features.append(activations.abs())
                targets.append(log_sizes(sub_expert_outputs(experts, expert, activations)))
            feature, target = torch.cat(features), torch.cat(targets)
            ceilings.append(target.amax(0))
            for part in range(sub_experts):
                yield ridge_on_few, (feature[:, part].numpy(), target[:, part].numpy(), min(count, expert_shape(experts)[2]))

    fitted = zip(*run(tasks()), strict=True)
    names = ("gate_neurons", "coefficient", "bias")
    values = {name: torch.from_numpy(np.stack(value)).unflatten(0, (num_experts, -1)) for name, value in zip(names, fitted, strict=True)}
    return values | {"ceiling": torch.stack(ceilings)}
