"""The paper's training-free proxy gate: a few neurons of a sub-expert speak for it."""

import torch

GATE_NEURONS = 4


def gate_neurons(coactivation: torch.Tensor, labels: torch.Tensor, sub_experts: int) -> torch.Tensor:
    """In each sub-expert, the r = 4 neurons with the largest summed co-activation within it (MoE-Prism, Gating Mechanism Reconstructor).

    Args:
        coactivation: int32 [C, C] of one expert.
        labels: int64 [C], sub-expert of each neuron.
        sub_experts: N.

    Returns:
        int64 [N, r], positions inside the sub-expert (its neurons in stored order); r is smaller where sub-experts are.
    """
    chosen = []
    for sub_expert in range(sub_experts):
        members = torch.nonzero(labels == sub_expert).flatten()
        totals = coactivation[members][:, members].sum(1)
        chosen.append(totals.argsort(descending=True, stable=True)[:GATE_NEURONS])
    return torch.stack(chosen)
