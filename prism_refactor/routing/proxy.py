"""The paper's proxy gate: a few neurons of a sub-expert speak for it (MoE-Prism, arXiv 2510.19366)."""

import torch


def gate_neurons(marks: torch.Tensor, labels: torch.Tensor, sub_experts: int, count: int = 4) -> torch.Tensor:
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
