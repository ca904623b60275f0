"""Budgets: tokens run as many sub-experts as they need, and so many on average.

A sub-expert runs where its token needs it more than a threshold of its layer (see `TwoLevelRouter.need`); every token runs its best one.
The thresholds come from the calibration text.
"""

import numpy as np
import torch


def thresholds(needs: torch.Tensor) -> torch.Tensor:
    """Above which need sub-experts run so that 1, 2, ..., K * N of them do, on average over tokens.

    Where many are equal (predicted sizes at their ceiling, a proxy's gate neurons that are all off) fewer may run.

    Args:
        needs: float32 [T, K * N], of the sub-experts of a layer's tokens; K * N is 2 at least.

    Returns:
        float32 [K * N], falling.

    Example:
        >>> thresholds(torch.tensor([[0.0, 3.0, 1.0], [5.0, 2.0, 4.0]]))
        tensor([4.0000, 1.5000, 0.0000])
    """
    # Of every token all but the best may be left out.
    rest = needs.sort(1).values[:, :-1].numpy()
    return torch.from_numpy(np.quantile(rest, np.linspace(1, 0, needs.shape[1]))).float()
