"""What dropped sub-experts would have added: its mean, fitted in closed form, stands in for them.

Beyond MoE-Prism, which lets a dropped sub-expert give nothing. For a dropped sub-expert j of an expert with weight p, predicted size s_j:

    p * mean_j + p * s_j * direction_j

with the two vectors of every sub-expert, and a factor c_k on the kept output, fitted by least squares to the layer's full output.
"""

import numpy as np
import torch

from prism_refactor.models.experts import by_expert, sub_expert_activations, sub_expert_outputs
from prism_refactor.models.modeling_prism import TwoLevelRouter
from prism_refactor.models.transformers_models import ExpertsModule
from prism_refactor.routing.sample import Routed

# Shares of the sub-experts that are kept while fitting; other k interpolate the factors.
KEPT_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
RIDGE = 1e-3
ROUNDS = 3


class _Accumulator:
    """Sums over tokens from which means, directions and factors follow; M is 2 E N features, H the hidden size."""

    def __init__(self, features: int, hidden: int, choices: int):
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.missing = torch.zeros(features, hidden, dtype=torch.float64)
        self.kept = torch.zeros(choices, features, hidden)
        self.kept_square = torch.zeros(choices, dtype=torch.float64)
        self.kept_missing = torch.zeros(choices, dtype=torch.float64)
        self.weight: torch.Tensor | None = None

    def add(self, features: torch.Tensor, kept: torch.Tensor, missing: torch.Tensor) -> None:
        """Take in a chunk: features [choices, T, M], kept and missing output [choices, T, H]."""
        if self.weight is None:
            # Every k counts by the inverse of its error, as the first chunk shows it.
            self.weight = 1 / missing.square().sum((1, 2)).clamp_min(1e-30)
        for choice, (rows, here, gone) in enumerate(zip(features, kept, missing, strict=True)):
            self.gram += (self.weight[choice] * (rows.T @ rows)).double()
            self.missing += (self.weight[choice] * (rows.T @ gone)).double()
            self.kept[choice] += rows.T @ here
            self.kept_square[choice] += here.square().sum()
            self.kept_missing[choice] += (here * gone).sum()

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(vectors [M, H], factors [choices]), by turns: each is the least-squares answer to the other."""
        assert self.weight is not None
        gram = self.gram.clone()
        gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-30))
        factor = torch.linalg.cholesky(gram)
        extra = torch.zeros_like(self.kept_square)
        for _ in range(ROUNDS):
            target = self.missing + torch.einsum("k,kmh->mh", self.weight.double() * extra, self.kept.double())
            # A kept output that is scaled by 1 - extra leaves extra x kept to be made up for.
            vectors = torch.cholesky_solve(target, factor)
            made_up = (self.kept.double() * vectors).sum((1, 2))
            extra = -(self.kept_missing - made_up) / self.kept_square.clamp_min(1e-30)
        return vectors.float(), (1 - extra).float()


@torch.inference_mode()
def fit_compensation(router: TwoLevelRouter, experts: ExpertsModule, routed: Routed) -> dict[str, torch.Tensor]:
    """Fit the compensation of one layer.

    Args:
        router: the layer's two-level router, without compensation.
        experts: the refactored experts module with its weights.
        routed: sample to fit on.

    Returns:
        compensation float32 [2, E, N, H]: mean and direction of every sub-expert; scale float32 [K * N]: factor on the kept output at
        k = 1 .. K * N, 1 at the last.
    """
    sub_experts, total = router.sub_experts, experts.num_experts
    width = routed.experts.shape[1] * sub_experts
    choices = torch.tensor(sorted({max(1, round(share * width)) for share in KEPT_SHARES} - {width}))
    accumulator = _Accumulator(2 * total, routed.inputs.shape[1], len(choices))
    for part in routed.chunks():
        chunk, weights, chosen = part.inputs, part.weights, part.experts
        value = router.rank(chunk, weights, chosen)
        position = value.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        dropped = (position >= choices[:, None, None]).float()
        index = (chosen[..., None] * sub_experts + torch.arange(sub_experts)).flatten(1)
        shares = torch.cat([weights.float().repeat_interleave(sub_experts, 1), value.exp()], 1)
        features = torch.zeros(len(choices), len(chunk), 2 * total)
        features.scatter_(2, torch.cat([index, index + total], 1).expand(len(choices), -1, -1), shares * dropped.repeat(1, 1, 2))
        missing = torch.zeros(len(choices), *chunk.shape)
        full = torch.zeros_like(chunk)
        by_slot = dropped.view(len(choices), len(chunk), -1, sub_experts)
        for expert, tokens, slots in by_expert(chosen, total // sub_experts):
            activations = sub_expert_activations(experts, expert, chunk[tokens])
            outputs = sub_expert_outputs(experts, expert, activations) * weights[tokens, slots, None, None]
            full.index_add_(0, tokens, outputs.sum(1))
            missing.index_add_(1, tokens, torch.einsum("ktn,tnh->kth", by_slot[:, tokens, slots], outputs))
        accumulator.add(features, full - missing, missing)
    vectors, factors = accumulator.solve()
    scale = np.interp(np.arange(1, width + 1), [*choices.tolist(), width], [*factors.tolist(), 1.0])
    return {
        "compensation": vectors.view(2, total // sub_experts, sub_experts, -1),
        "scale": torch.from_numpy(scale).float(),
    }
