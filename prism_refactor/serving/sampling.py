"""The next token of requests that each have their own temperature, top_p and seed."""

import torch


def sample(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Draw one token per row from its softmax, by inverting the distribution: equal draws give equal tokens, whatever the other rows are.

    Args:
        logits: float32 [R, V].
        temperature: float32 [R], above 0.
        top_p: float32 [R]: only the most likely tokens that together reach it can be drawn; 1: all.
        draw: float32 [R], uniform in [0, 1).

    Returns:
        Token ids, int64 [R].
    """
    probabilities = (logits / temperature[:, None]).softmax(-1)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    cut = top_p < 1
    # Sorting a vocabulary is by far the most expensive part, so only rows that need it are.
    tokens[~cut] = _invert(probabilities[~cut], draw[~cut], top_p[~cut])
    ordered, order = probabilities[cut].sort(dim=-1, descending=True, stable=True)
    tokens[cut] = order.gather(1, _invert(ordered, draw[cut], top_p[cut])[:, None])[:, 0]
    return tokens


def _invert(probabilities: torch.Tensor, draw: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Where the cumulative probabilities pass draw x (what is kept): positions int64 [R]; kept are all up to the one that reaches top_p."""
    cumulative = probabilities.double().cumsum(-1)
    last = (cumulative < top_p[:, None]).sum(-1, keepdim=True).clamp_max(cumulative.shape[1] - 1)
    position = torch.searchsorted(cumulative, draw[:, None] * cumulative.gather(1, last), right=True)
    return torch.minimum(position, last)[:, 0]
