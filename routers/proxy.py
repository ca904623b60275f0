"""Proxy gates: a few neurons of a sub-expert speak for it. The paper's choice of them, and a calibrated one."""

from typing import Any

import torch

from checkpoints import expert_shape
from routers.linear import Moments, log_sizes, ridge
from routers.routed import Routed
from routers.runtime import sub_expert_activations, sub_expert_outputs

GATE_NEURONS = 4
COACTIVE_SHARE = 0.75


def coactive_marks(activations: torch.Tensor, share: float = COACTIVE_SHARE) -> torch.Tensor:
    """The paper's binarised activations: 1 for each token's k_a = share x C largest |activations|; [B, C] -> float32 [B, C]."""
    magnitude = activations.abs().float()
    largest = magnitude.topk(max(1, round(share * magnitude.shape[1])), dim=1).indices
    return torch.zeros_like(magnitude).scatter_(1, largest, 1.0)


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
def fit_proxy(experts: Any, routed: Routed, num_experts: int, sub_experts: int, count: int = GATE_NEURONS) -> dict[str, torch.Tensor]:
    """The calibrated proxy: neurons picked one by one for how much of the sub-expert's log norm their |activations| explain together.

    Args:
        experts: the refactored experts module with its weights, E * N sub-experts.
        routed: sample to fit on.
        num_experts: E.
        sub_experts: N.
        count: r.

    Returns:
        gate_neurons int64 [E, N, r], positions inside the sub-expert; coefficient float32 [E, N, r], bias and ceiling float32 [E, N]:
        log norm = coefficient . |activation| + bias, at most ceiling.
    """
    fitted: dict[str, list[torch.Tensor]] = {"gate_neurons": [], "coefficient": [], "bias": [], "ceiling": []}
    for expert in range(num_experts):
        width = expert_shape(experts)[2]
        moments = [Moments.empty(width, 1) for _ in range(sub_experts)]
        ceiling = torch.full((sub_experts,), -torch.inf)
        for inputs in routed.inputs_of(expert):
            activations = sub_expert_activations(experts, expert, sub_experts, inputs)
            target = log_sizes(sub_expert_outputs(experts, expert, activations))
            ceiling = torch.maximum(ceiling, target.amax(0))
            for part in range(sub_experts):
                moments[part].add(activations[:, part].abs(), target[:, part : part + 1])
        rows = [_pick(part, min(count, width)) for part in moments]
        values = [torch.stack(column) for column in zip(*rows, strict=True)]
        for name, value in zip(fitted, [*values, ceiling], strict=True):
            fitted[name].append(value)
    return {name: torch.stack(values) for name, values in fitted.items()}


def _pick(moments: Moments, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Greedy forward selection of `count` features, then ridge regression on them: (positions [r], coefficient [r], bias [])."""
    xx, xy, _ = moments.centred()
    target = xy[:, 0].clone()
    scale = xx.diagonal().mean().clamp_min(1e-30)
    chosen: list[int] = []
    for _ in range(count):
        gain = target.square() / xx.diagonal().clamp_min(1e-9 * scale)
        gain[chosen] = -1.0
        pick = int(gain.argmax())
        chosen.append(pick)
        # Sweep the pick out of the features and of the target.
        column, pivot = xx[:, pick].clone(), xx[pick, pick].clamp_min(1e-9 * scale)
        target = target - column * (target[pick] / pivot)
        xx = xx - torch.outer(column, column) / pivot
    order = torch.tensor(chosen)
    reduced = Moments(moments.count, moments.x[order], moments.y, moments.xx[order][:, order], moments.xy[order], moments.yy)
    weight, bias = ridge(reduced)
    return order, weight[0], bias[0]
