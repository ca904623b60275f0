"""The linear sub-router: how much each sub-expert will contribute, predicted from the MoE input by ridge regression."""

import torch

from calibration import LayerStatistics

# Ridge strength as a share of the inputs' mean square; an expert that saw fewer tokens than H is shrunk more, by 1 + H / tokens.
RIDGE = 1e-2


def fit_linear(
    statistics: LayerStatistics, labels: torch.Tensor, column_norm: torch.Tensor, sub_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Regress each sub-expert's contribution s_j = sum over its neurons c of |a_c| * ||down_proj[:, c]|| on the MoE input.

    s_j is linear in |a|, so the regression needs only the streamed moments of x with x and with |a|, which do not depend on the
    partition. Solved in float64, with an intercept.

    Args:
        statistics: of the layer.
        labels: int64 [E, C], sub-expert of each neuron.
        column_norm: float32 [E, C], norms of the columns of down_proj.
        sub_experts: N.

    Returns:
        weight float32 [E, N, H], bias float32 [E, N].
    """
    weights, biases = [], []
    for expert in range(len(labels)):
        mean = statistics.input_mean[expert].double()
        covariance = statistics.input_moment[expert].double() - torch.outer(mean, mean)
        few = 1 + len(mean) / max(1, int(statistics.tokens_routed[expert]))
        covariance.diagonal().add_(RIDGE * few * statistics.input_moment[expert].diagonal().mean().clamp_min(1e-12))
        members = torch.nn.functional.one_hot(labels[expert], sub_experts).double() * column_norm[expert].double()[:, None]
        target_mean = statistics.mean_activation[expert].double() @ members
        cross = statistics.cross_moment[expert].double() @ members - torch.outer(mean, target_mean)
        rows = torch.linalg.solve(covariance, cross)
        weights.append(rows.T.float())
        biases.append((target_mean - mean @ rows).float())
    return torch.stack(weights), torch.stack(biases)
