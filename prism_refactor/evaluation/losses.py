"""Next-token losses of one checkpoint at many operating points, in one pass over its layers."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from prism_refactor.evaluation.windows import Windows
from prism_refactor.events import Events
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.modeling_prism import (
    ROUTER_FILE,
    ActiveK,
    install,
    moe_block,
    router_of,
    router_tensors,
    set_top_k,
    two_level_router,
    uninstall,
)
from prism_refactor.models.stream import ComputeOptions, LayerStream
from prism_refactor.models.transformers_models import MoeBlock, run_experts_with
from prism_refactor.routing.output import two_level_output
from prism_refactor.routing.sample import Routed

# Tokens that the output errors of a layer are measured on.
JUDGED = 4096


@dataclass(frozen=True)
class Point:
    """One way to run a checkpoint.

    Attributes:
        router: 'original', 'stock' or 'two-level'.
        k: active experts, or sub-experts, of each MoE layer.
        budget: of the two-level router, in the place of k: the share of the sub-experts that tokens run on average; None: k.
    """

    router: str
    k: tuple[int, ...]
    budget: float | None = None


@dataclass(frozen=True)
class Losses:
    """Result of `stream_losses`.

    Attributes:
        sums: float64 [P, S]: per operating point and window, summed negative log-likelihood of its scored tokens, nats.
        active: float64 [P, L]: sub-experts that tokens ran in each MoE layer, on average.
        layer_errors: float64 [L, K * N] or None: squared error of each MoE layer's output at k = 1, 2, ..., mean over tokens, on the
            inputs it gets in the full model. Not relative to the layer's own norm: all layers add to the same residual stream.
    """

    sums: torch.Tensor
    active: torch.Tensor
    layer_errors: torch.Tensor | None


@torch.inference_mode()
def stream_losses(
    checkpoint: Checkpoint,
    windows: Windows,
    points: list[Point],
    compute: ComputeOptions,
    measure_layers: bool = False,
    events: Events | None = None,
) -> Losses:
    """Run text through a checkpoint once: each layer is read once and every operating point's hidden states pass through it.

    Args:
        checkpoint: original or refactored.
        windows: the text.
        points: operating points.
        compute: how to run.
        measure_layers: also measure `Losses.layer_errors`; the first point must then be two-level at full k.
        events: told of the operating points that have passed a layer.
    """
    events, name = events or Events(), checkpoint.path.resolve().name
    stream = LayerStream(checkpoint, windows.rows, compute, len(points))
    run_experts_with(stream.model, EXPERTS)
    routers = router_tensors(checkpoint.path / ROUTER_FILE) if any(point.router == "two-level" for point in points) else {}
    errors: list[torch.Tensor] = []
    active: list[list[float]] = [[] for _ in points]
    moe_layers = 0
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            found = moe_block(layer)
            two_level = None
            if found is not None and routers:
                two_level = two_level_router(found[1], checkpoint.config, routers[stream.layered.moe_blocks[index]])
            for number, point in enumerate(points):
                with ExitStack() as stack:
                    ran = stack.enter_context(_active_of(two_level)) if point.budget is not None and found is not None else None
                    if found is not None:
                        stack.enter_context(_routed(found[1], two_level, point, moe_layers, checkpoint.architecture.top_k))
                    calls = stack.enter_context(_calls_of(found[1])) if found is not None and measure_layers and number == 0 else None
                    stream.advance(index, state=number)
                    if found is not None and calls is not None:
                        errors.append(_layer_errors(found[1], calls))
                    if found is not None:
                        active[number].append(point.k[moe_layers] if ran is None else torch.cat(ran).double().mean().item())
                events.progress(f"{name}, operating points", number + 1, len(points), (index, len(stream)))
            moe_layers += found is not None
    with stream.head() as head:
        sums = torch.stack([_sums(head, state, windows, compute.device) for state in stream.states])
    return Losses(sums, torch.tensor(active, dtype=torch.float64), torch.stack(errors) if errors else None)


@contextmanager
def _routed(block: MoeBlock, two_level: Any, point: Point, moe_layer: int, key: str) -> Iterator[None]:
    """Let a block route as an operating point says; `key`: what the config calls the number of a token's experts."""
    if point.router != "two-level":
        k = point.k[moe_layer]
        set_top_k(router_of(block), key, k)
        handle = block.experts.register_forward_pre_hook(functools.partial(_heaviest, k))
        try:
            yield
        finally:
            handle.remove()
        return
    install(block, two_level, ActiveK(point.k, budget=point.budget), moe_layer)
    try:
        yield
    finally:
        uninstall(block)


def _heaviest(k: int, _: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """What experts are given: of a router that always chooses the same number, the k of the largest weights."""
    hidden, experts, weights = arguments
    if experts.shape[1] <= k:
        return None
    kept = weights.topk(k).indices
    return hidden, experts.gather(1, kept), weights.gather(1, kept)


@contextmanager
def _active_of(two_level: Any) -> Iterator[list[torch.Tensor]]:
    """Give the number of sub-experts that each token runs, int64 [T], as it comes."""
    ran: list[torch.Tensor] = []
    skipped = two_level.num_experts * two_level.sub_experts
    handle = two_level.register_forward_hook(lambda _, __, output: ran.append((output[1] != skipped).sum(1).cpu()))
    try:
        yield ran
    finally:
        handle.remove()


@contextmanager
def _calls_of(block: MoeBlock) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Give what a block's experts are given, as it comes: inputs [T, H], experts int64 [T, K], weights [T, K]."""
    calls: list[tuple[torch.Tensor, ...]] = []
    handle = block.experts.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    try:
        yield calls
    finally:
        handle.remove()


def _layer_errors(block: MoeBlock, calls: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Squared error of the experts' output at k = 1, 2, ..., K N, mean over a sample of the tokens, see `_calls_of`."""
    router = block.experts.two_level
    inputs, experts, weights = map(torch.cat, zip(*calls, strict=True))
    chosen = torch.linspace(0, len(inputs) - 1, min(JUDGED, len(inputs))).long().to(inputs.device)
    routed = Routed(inputs[chosen], weights[chosen], experts[chosen])
    full = experts.shape[1] * router.sub_experts
    exact = two_level_output(router, block.experts, routed, full)
    errors = [
        (two_level_output(router, block.experts, routed, k) - exact).float().square().sum(1).mean().item() for k in range(1, full + 1)
    ]
    return torch.tensor(errors, dtype=torch.float64)


def _sums(head: Callable[[torch.Tensor], torch.Tensor], state: torch.Tensor, windows: Windows, device: str) -> torch.Tensor:
    """Summed loss of each window's scored tokens, float64 [S]; the logits of one window at a time."""
    sums = []
    for row, tokens, scored in zip(state, windows.rows, windows.scored, strict=True):
        positions = torch.nonzero(scored[1:]).flatten()
        logits = head(row[positions].to(device)).float()
        sums.append(F.cross_entropy(logits, tokens[1:][positions].to(device), reduction="sum").item())
    return torch.tensor(sums, dtype=torch.float64)
