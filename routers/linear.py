"""The linear sub-router: how large each sub-expert's output will be, predicted from the MoE input by ridge regression."""

from dataclasses import dataclass
from typing import Any

import torch

from routers.routed import Routed
from routers.runtime import sub_expert_activations, sub_expert_outputs

# Ridge strengths tried, as shares of the inputs' mean variance.
STRENGTHS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 1e1, 1e2)
# Sizes are compared as logarithms; smaller outputs than this share of the largest are all the same.
SMALLEST = 1e-6


@dataclass
class Moments:
    """Streamed sufficient statistics of a linear regression of several targets Y [n, M] on X [n, D], in float64."""

    count: int
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor

    @classmethod
    def empty(cls, features: int, targets: int) -> "Moments":
        """Of no observation."""
        shapes = ((features,), (targets,), (features, features), (features, targets), (targets,))
        return cls(0, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in x [n, D] and y [n, M]."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum(0)

    def centred(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(X^T X, X^T Y, Y^T Y) about the means."""
        x, y = self.x / self.count, self.y / self.count
        xx = self.xx - self.count * torch.outer(x, x)
        return xx, self.xy - self.count * torch.outer(x, y), (self.yy - self.count * y.square()).clamp_min(0)


def ridge(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression with an intercept; one strength for all targets, by generalised cross-validation (Golub, Heath, Wahba 1979).

    Returns:
        weight float32 [M, D], bias float32 [M].
    """
    xx, xy, yy = moments.centred()
    values, vectors = torch.linalg.eigh(xx)
    values, rotated = values.clamp_min(0), vectors.T @ xy
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    for strength in STRENGTHS:
        shrunk = values + strength * values.mean().clamp_min(1e-12)
        residual = (yy - (rotated.square() * ((2 * shrunk - values) / shrunk.square())[:, None]).sum(0)).clamp_min(0).sum()
        freedom = moments.count - 1 - (values / shrunk).sum()
        # Too few observations for this strength; the strongest is the fallback.
        score = residual / freedom.square() if freedom > 0 else torch.tensor(torch.inf)
        if best is None or score < best[0] or (strength == STRENGTHS[-1] and torch.isinf(best[0])):
            best = (score, vectors @ (rotated / shrunk[:, None]))
    assert best is not None
    weight = best[1].T
    return weight.float(), ((moments.y - weight @ moments.x) / moments.count).float()


def log_sizes(outputs: torch.Tensor) -> torch.Tensor:
    """Log of the norms of sub-expert outputs [n, N, H]: [n, N]."""
    sizes = outputs.norm(dim=-1)
    return sizes.clamp_min(SMALLEST * sizes.max().clamp_min(1e-30)).log()


@torch.inference_mode()
def fit_linear(experts: Any, routed: Routed, num_experts: int, sub_experts: int) -> dict[str, torch.Tensor]:
    """Regress the log of the norm of each sub-expert's output on the MoE input, over the tokens routed to its expert.

    Args:
        experts: the refactored experts module with its weights, E * N sub-experts.
        routed: sample to fit on.
        num_experts: E.
        sub_experts: N.

    Returns:
        weight float32 [E, N, H], bias float32 [E, N], ceiling float32 [E, N]: the largest log norm seen, above which no prediction goes.
    """
    fitted: dict[str, list[torch.Tensor]] = {"weight": [], "bias": [], "ceiling": []}
    for expert in range(num_experts):
        moments = Moments.empty(routed.inputs.shape[1], sub_experts)
        ceiling = torch.full((sub_experts,), -torch.inf)
        for inputs in routed.inputs_of(expert):
            target = log_sizes(sub_expert_outputs(experts, expert, sub_expert_activations(experts, expert, sub_experts, inputs)))
            moments.add(inputs, target)
            ceiling = torch.maximum(ceiling, target.amax(0))
        weight, bias = ridge(moments)
        for name, value in (("weight", weight), ("bias", bias), ("ceiling", ceiling)):
            fitted[name].append(value)
    return {name: torch.stack(values) for name, values in fitted.items()}
