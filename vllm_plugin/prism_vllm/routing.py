"""The two-level routing of one MoE layer: functions of tensors, which know nothing of vLLM.

The mathematics is that of `modeling_prism.TwoLevelRouter`, in a form for serving: every token has its own k or budget, no branch depends
on a tensor's values, and shapes depend on the number of tokens alone. So it can be compiled, and captured in a CUDA graph.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Below every weight that counts; its logarithm is finite.
SMALLEST = 1e-30
# As `modeling_prism.RELATIVE`.
RELATIVE = 0.75
# Of gpt-oss' activation function.
_CLAMP, _ALPHA = 7.0, 1.702


class SubRouter(NamedTuple):
    """The sub-expert router of one layer: E experts of N sub-experts, of which a token uses K experts; hidden size H.

    Attributes:
        weight: of the router 'linear' float32 [E, N, H], which predicts the log size of each sub-expert's output; of the router 'proxy'
            [E, N, 2, r, H] in the model's type: the gate and up rows of r neurons of each sub-expert; 1 in place of 2 without gate.
        bias: [E, N] or [E, N, 2, r]; None where there is none.
        ceiling: float32 [E, N], the largest log size that may be predicted; None for the router 'proxy'.
        expected: float32 [2 * E * N, H], the mean output of every sub-expert, then its mean direction; None without compensation.
        scale: float32 [K * N + 1], what the kept weights are multiplied with, by k; 1 at full k. None without compensation.
        map_in, map_out: float32 [R, H] and [H, R], the linear map of the inputs that stands in for all that is dropped together, times its
            size. None where there is none.
        threshold: float32 [K * N], above which need (see `modeling_prism.TwoLevelRouter.need`) sub-experts run so that 1, 2, ... of them
            do, on average over tokens. None in a checkpoint without.
        places: int64 [E * N], which of the model's experts sub-expert e N + n is; None where it is number e N + n.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    ceiling: torch.Tensor | None
    expected: torch.Tensor | None
    scale: torch.Tensor | None
    places: torch.Tensor | None
    map_in: torch.Tensor | None = None
    map_out: torch.Tensor | None = None
    threshold: torch.Tensor | None = None

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], activation: str) -> "SubRouter":
        """Return the sub-router of one layer's tensors in the router file, and of `rows` and `row_bias` for the router 'proxy'.

        `activation`: see `route`.
        """
        expected = tensors["compensation"].float().flatten(0, 2).contiguous() if "compensation" in tensors else None
        scale = None
        if "scale" in tensors:
            # Position 0 is no k; at full k nothing is dropped, so nothing is rescaled.
            one = torch.ones(1, device=tensors["scale"].device)
            scale = torch.cat([one, tensors["scale"].float()[:-1], one])
        threshold = tensors.get("threshold")
        if "rows" in tensors:
            parts = 1 if activation in UNGATED else 2
            halves = {name: tensors[name].unflatten(2, (parts, -1)) for name in ("rows", "row_bias") if name in tensors}
            rows = halves["rows"].contiguous()
            return cls(rows, halves.get("row_bias"), None, expected, scale, tensors.get("places"), threshold=threshold)
        weight, bias, ceiling = (tensors[name].float() for name in ("weight", "bias", "ceiling"))
        map_in, map_out = (tensors[name].float() if name in tensors else None for name in ("map_in", "map_out"))
        return cls(weight, bias, ceiling, expected, scale, tensors.get("places"), map_in, map_out, threshold)

    @property
    def sub_experts(self) -> int:
        """N."""
        return self.weight.shape[1]


def _swigluoai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=_CLAMP), up.clamp(-_CLAMP, _CLAMP)
    return (up + 1) * gate * torch.sigmoid(gate * _ALPHA)


# Gating functions of (gate, up), by the name that vLLM gives the activation.
ACTIVATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "swigluoai": _swigluoai,
}
# And functions of experts without a gate.
UNGATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu2_no_mul": lambda up: F.relu(up).square()}


def log_sizes(router: SubRouter, hidden: torch.Tensor, activation: str) -> torch.Tensor:
    """Predict the log size of the output of every sub-expert: float32 [T, E, N] for inputs [T, H]."""
    if router.ceiling is not None and router.bias is not None:
        predicted = F.linear(hidden.float(), router.weight.flatten(0, 1), router.bias.flatten())
        return torch.minimum(predicted.view(-1, *router.ceiling.shape), router.ceiling)
    bias = None if router.bias is None else router.bias.flatten().to(hidden.dtype)
    both = F.linear(hidden, router.weight.flatten(0, 3).to(hidden.dtype), bias)
    parts = both.view(-1, *router.weight.shape[:-1]).unbind(3)
    activate: Callable[..., torch.Tensor] = UNGATED[activation] if activation in UNGATED else ACTIVATIONS[activation]
    return activate(*parts).abs().float().mean(-1).clamp_min(SMALLEST).log()


def _numbers(router: SubRouter, value: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """How many sub-experts each token runs, int64 [T]; arguments: see `route`, and `value` float32 [T, K * N]."""
    k = active.long()
    if router.threshold is None:
        return k
    last = value.shape[1] - 1
    place = (active * value.shape[1] - 1).clamp(0, last)
    before = place.long()
    threshold = torch.lerp(router.threshold[before], router.threshold[(before + 1).clamp(max=last)], place - before)
    need = value - RELATIVE * value.logsumexp(1, keepdim=True)
    within = (need > threshold[:, None]).sum(1).clamp(min=1)
    return torch.where(active < 1, within, k)


def route(
    router: SubRouter,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    active: torch.Tensor,
    factor: int,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rank the sub-experts of each token's chosen experts; the best of each token are to run.

    Args:
        router: of the layer.
        hidden: MoE inputs [T, H].
        weights: [T, K], of the chosen experts in the original model.
        experts: [T, K], the chosen experts of the original model.
        active: float32 [T], sub-experts of each token, 1 to K * N; below 1 a budget: the share of them that tokens run on average, of
            which each runs what it needs. Needs `router.threshold`.
        factor: what `down_proj` is multiplied with.
        activation: of the experts, a key of `ACTIVATIONS` or `UNGATED`; only the router 'proxy' uses it.

    Returns:
        (weights float32 [T, K * N], sub-experts int64 [T, K * N], what the others are expected to add, float32 [T, H] or None). A
        token's best sub-expert comes first. Places that it does not run hold its best sub-expert again, with weight 0.
    """
    size = router.sub_experts
    weights, experts = weights.float(), experts.long()
    predicted = log_sizes(router, hidden, activation).gather(1, experts[..., None].expand(-1, -1, size))
    value = (predicted + weights.clamp_min(SMALLEST).log()[..., None]).flatten(1)
    value, order = value.sort(dim=1, descending=True)
    k = _numbers(router, value, active)
    place = order // size
    ids = experts.gather(1, place) * size + order % size
    shares = weights.gather(1, place)
    dropped = torch.arange(order.shape[1], device=order.device) >= k[:, None]
    kept = shares / factor
    if router.scale is not None:
        kept = kept * router.scale[k][:, None]
    missing = None
    if router.expected is not None:
        left = value.exp() * dropped
        both = torch.cat([ids, ids + len(router.expected) // 2], 1)
        missing = F.embedding_bag(both, router.expected, per_sample_weights=torch.cat([shares * dropped, left], 1), mode="sum")
        if router.map_in is not None and router.map_out is not None:
            missing = missing + left.sum(1, keepdim=True) * F.linear(F.linear(hidden.float(), router.map_in), router.map_out)
    chosen = torch.where(dropped, ids[:, :1], ids)
    return kept.masked_fill(dropped, 0), chosen if router.places is None else router.places[chosen], missing
