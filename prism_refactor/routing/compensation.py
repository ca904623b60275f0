"""What dropped sub-experts would have added is predicted in closed form: it stands in for them.

Beyond MoE-Prism, which lets a dropped sub-expert give nothing. For a dropped sub-expert j of an expert with weight p, predicted size s_j:

    p * mean_j + p * s_j * direction_j

with the two vectors of every sub-expert; for all that a token drops together, a linear map of the MoE input x, of low rank (reduced-rank
regression; Izenman, 1975), times their predicted sizes:

    (sum over the dropped of p * s_j) * map_out (map_in x)

and a factor c_k on the kept output. All are fitted by least squares to the layer's full output.
"""

import numpy as np
import torch
import torch.nn.functional as F

from prism_refactor.models.experts import by_expert, sub_expert_activations, sub_expert_outputs
from prism_refactor.models.modeling_prism import TwoLevelRouter
from prism_refactor.models.transformers_models import ExpertsModule, FusedExperts
from prism_refactor.routing.sample import Routed

# Shares of the sub-experts that are kept while fitting; other k interpolate the factors.
KEPT_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
# Relative to the mean of all vectors' features squared, and to each input's of the map: an input may be a thousand times another.
RIDGE, MAP_RIDGE = 1e-3, 1e-2
ROUNDS = 3
# Operations of the map, relative to those of a token's experts at full k.
MAP_COST = 1 / 32


def map_rank(hidden: int, neurons: int, top_k: int, matrices: int = 3) -> int:
    """Rank R of a layer's map: what `MAP_COST` pays for, at most half of the hidden size.

    The map takes 4 H R operations a token, an expert of C neurons 2 H C for each of its matrices: gate, up and down, or two.

    Example:
        >>> map_rank(576, 1536, 1)
        72
    """
    return max(1, min(hidden // 2, round(MAP_COST * matrices * neurons * top_k / 2)))


class _Accumulator:
    """Sums over tokens from which vectors, map and factors follow.

    Args:
        features: 2 E N, see `add`.
        hidden: H.
        choices: numbers of kept sub-experts.

    The last H of the M = 2 E N + H regressors are the input, times the summed size of what the token drops.
    """

    def __init__(self, features: int, hidden: int, choices: int):
        regressors = features + hidden
        self.features = features
        self.gram = torch.zeros(regressors, regressors, dtype=torch.float64)
        self.missing = torch.zeros(regressors, hidden, dtype=torch.float64)
        self.kept = torch.zeros(choices, regressors, hidden)
        self.kept_square = torch.zeros(choices, dtype=torch.float64)
        self.kept_missing = torch.zeros(choices, dtype=torch.float64)
        self.weight = torch.empty(0)

    def add(self, features: torch.Tensor, inputs: torch.Tensor, kept: torch.Tensor, missing: torch.Tensor) -> None:
        """Take in a chunk.

        Args:
            features: [choices, T, 2 E N], of every sub-expert that is dropped the share p, then the size p s.
            inputs: [T, H].
            kept, missing: output [choices, T, H].
        """
        if not len(self.weight):
            # Every k counts by the inverse of its error, as the first chunk shows it.
            self.weight = 1 / missing.square().sum((1, 2)).clamp_min(1e-30)
        cut = self.features
        amounts = features[..., cut // 2 :].sum(-1, keepdim=True)
        for choice, (rows, amount, here, gone) in enumerate(zip(features, amounts, kept, missing, strict=True)):
            columns = self.weight[choice] * rows.T
            self.gram[:cut, :cut] += (columns @ rows).double()
            self.gram[:cut, cut:] += (columns @ (amount * inputs)).double()
            self.missing[:cut] += (columns @ gone).double()
            self.kept[choice, :cut] += rows.T @ here
            self.kept[choice, cut:] += inputs.T @ (amount * here)
            self.kept_square[choice] += here.square().sum()
            self.kept_missing[choice] += (here * gone).sum()
        weighted = self.weight[:, None, None] * amounts
        self.missing[cut:] += (inputs.T @ (weighted * missing).sum(0)).double()
        self.gram[cut:, cut:] += (inputs.T @ ((weighted * amounts).sum(0) * inputs)).double()

    def solve(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(vectors [2 E N, H], map_in [R, H], map_out [H, R], factors [choices]), float32.

        Coefficients and factors by turns: each is the least-squares answer to the other. Then the map is cut to its rank, and the
        vectors are fitted again.
        """
        vectors, inputs = slice(self.features), slice(self.features, None)
        gram = torch.triu(self.gram)
        gram = gram + gram.triu(1).T
        diagonal, smallest = gram.diagonal(), self.gram.diagonal().mean().clamp_min(1e-30)
        diagonal[vectors] += RIDGE * diagonal[vectors].mean().clamp_min(1e-30)
        diagonal[inputs] += MAP_RIDGE * diagonal[inputs] + 1e-9 * smallest
        factor, extra = torch.linalg.cholesky(gram), torch.zeros_like(self.kept_square)
        for _ in range(ROUNDS):
            coefficients = torch.cholesky_solve(self._target(extra), factor)
            extra = self._extra(coefficients)
        whole = coefficients[inputs]
        # The directions of the output in which the map's predictions are largest, of what the vectors cannot explain: this block of the
        # factor is that of the Schur complement.
        root = factor[inputs, inputs].T @ whole
        map_out = torch.linalg.eigh(root.T @ root).eigenvectors[:, -rank:]
        map_in = (whole @ map_out).T
        coefficients[inputs] = map_in.T @ map_out.T
        rest = self._target(extra)[vectors] - gram[vectors, inputs] @ coefficients[inputs]
        coefficients[vectors] = torch.cholesky_solve(rest, torch.linalg.cholesky(gram[vectors, vectors]))
        factors = 1 - self._extra(coefficients)
        return coefficients[vectors].float(), map_in.float(), map_out.float(), factors.float()

    def _target(self, extra: torch.Tensor) -> torch.Tensor:
        """What the regressors are to explain, if the kept output is scaled by 1 - extra: extra x kept is to be made up for."""
        target = self.missing.clone()
        for share, kept in zip((self.weight.double() * extra).tolist(), self.kept, strict=True):
            target.add_(kept, alpha=share)
        return target

    def _extra(self, coefficients: torch.Tensor) -> torch.Tensor:
        made_up = torch.stack([torch.sum(kept * coefficients) for kept in self.kept])
        return -(self.kept_missing - made_up) / self.kept_square.clamp_min(1e-30)


@torch.inference_mode()
def fit_compensation(router: TwoLevelRouter, experts: ExpertsModule, routed: Routed) -> dict[str, torch.Tensor]:
    """Fit the compensation of one layer.

    Args:
        router: the layer's two-level router, without compensation.
        experts: the refactored experts module with its weights.
        routed: sample to fit on.

    Returns:
        compensation float32 [2, E, N, H]: mean and direction of every sub-expert; map_in float32 [R, H] and map_out float32
        [H, R]; scale float32 [K * N]: factor on the kept output at k = 1 .. K * N, 1 at the last.
    """
    sub_experts, total, top_k = router.sub_experts, experts.num_experts, routed.experts.shape[1]
    width = top_k * sub_experts
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
        # Of each token what every choice drops, and all.
        wanted = F.pad(dropped, (0, 0, 0, 0, 0, 1), value=1.0).permute(1, 2, 0).unflatten(1, (-1, sub_experts)) * weights[..., None, None]
        sums = torch.zeros(len(chunk), len(choices) + 1, chunk.shape[1])
        for expert, tokens, own in by_expert(chosen, wanted, total // sub_experts):
            outputs = sub_expert_outputs(experts, expert, sub_expert_activations(experts, expert, chunk[tokens]))
            sums.index_add_(0, tokens, own.mT @ outputs)
        missing = sums[:, :-1].transpose(0, 1)
        accumulator.add(features, chunk, sums[:, -1] - missing, missing)
    fused = FusedExperts(experts)
    _, hidden, neurons = fused.shape
    rank = map_rank(hidden, neurons * sub_experts, top_k, 3 if fused.inner == "gate_up_proj" else 2)
    vectors, map_in, map_out, factors = accumulator.solve(rank)
    scale = np.interp(np.arange(1, width + 1), [*choices.tolist(), width], [*factors.tolist(), 1.0])
    return {
        "compensation": vectors.view(2, total // sub_experts, sub_experts, -1),
        "scale": torch.from_numpy(scale).float(),
        "map_in": map_in.contiguous(),
        "map_out": map_out.contiguous(),
    }
