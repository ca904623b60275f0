"""The linear sub-router: how large each sub-expert's output will be, predicted from the MoE input by ridge regression."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from prism_refactor.models.experts import sub_expert_activations, sub_expert_outputs
from prism_refactor.models.transformers_models import ExpertsModule
from prism_refactor.routing.sample import CHUNK, Routed, Run, run_here
from prism_refactor.solvers import ridge

# Sizes are compared as logarithms; smaller outputs than this share of the largest are all the same.
SMALLEST = 1e-6


def log_sizes(outputs: torch.Tensor) -> torch.Tensor:
    """Log of the norms of sub-expert outputs [n, N, H]: [n, N]."""
    sizes = outputs.norm(dim=-1)
    return sizes.clamp_min(SMALLEST * sizes.max().clamp_min(1e-30)).log()


@torch.inference_mode()
def fit_linear(experts: ExpertsModule, routed: Routed, num_experts: int, sub_experts: int, run: Run = run_here) -> dict[str, torch.Tensor]:
    """Regress the log of the norm of each sub-expert's output on the MoE input, over the tokens routed to its expert.

    Args:
        experts: the refactored experts module with its weights, E * N sub-experts.
        routed: sample to fit on.
        num_experts: E.
        sub_experts: N.
        run: what runs the regressions.

    Returns:
        weight float32 [E, N, H], bias float32 [E, N], ceiling float32 [E, N]: the largest log norm seen, above which no prediction goes.
    """
    inputs, ceilings = routed.inputs.numpy(), []

    def tasks() -> Iterator[Any]:
        for expert in range(num_experts):
            tokens = routed.tokens_of(expert)
            target = torch.cat(
                [
                    log_sizes(sub_expert_outputs(experts, expert, sub_expert_activations(experts, expert, some)))
                    for some in routed.inputs[tokens].split(CHUNK)
                ]
            )
            ceilings.append(target.amax(0))
            yield ridge, (inputs, target.numpy(), tokens.numpy())

    weight, bias = zip(*run(tasks()), strict=True)
    fitted = {"weight": torch.from_numpy(np.stack(weight)), "bias": torch.from_numpy(np.stack(bias))}
    return fitted | {"ceiling": torch.stack(ceilings)}
