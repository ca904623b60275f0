"""Next-token losses of one checkpoint at many operating points, in one pass over its layers."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@dataclass(frozen=True)
class Point:
    """One way to run a checkpoint.

    Attributes:
        router: 'original', 'stock' or 'two-level'.
        k: active experts, or sub-experts.
        budget: of the two-level router, in the place of k: the share of the sub-experts that tokens run on average; None: k.
    """

    router: str
    k: int
    budget: float | None = None


@dataclass(frozen=True)
class Losses:
    """Result of `stream_losses`.

    Attributes:
        sums: float64 [P, S]: per operating point and window, summed negative log-likelihood of its scored tokens, nats.
        active: float64 [P, L]: (sub-)experts that scored tokens ran in each MoE layer, on average.
        sample: float64 [P, S]: (sub-)experts that each token of `Windows.sample` ran, mean over MoE layers.
    """

    sums: torch.Tensor
    active: torch.Tensor
    sample: torch.Tensor

    def part(self, points: slice) -> "Losses":
        """Those of some of the operating points."""
        return Losses(self.sums[points], self.active[points], self.sample[points])


@torch.inference_mode()
def stream_losses(
    checkpoint: Checkpoint,
    windows: Windows,
    points: list[Point],
    compute: ComputeOptions,
    events: Events | None = None,
) -> Losses:
    """Run text through a checkpoint once: each layer is read once and every operating point's hidden states pass through it.

    Args:
        checkpoint: original or refactored.
        windows: the text.
        points: operating points.
        compute: how to run.
        events: told of the operating points that have passed a layer.
    """
    events, name = events or Events(), checkpoint.path.resolve().name
    stream = LayerStream(checkpoint, windows.rows, compute, len(points))
    run_experts_with(stream.model, EXPERTS)
    routers = router_tensors(checkpoint.path / ROUTER_FILE) if any(point.router == "two-level" for point in points) else {}
    active: list[list[float]] = [[] for _ in points]
    sample = torch.zeros(len(points), len(windows.sample), dtype=torch.float64)
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            found = moe_block(layer)
            two_level = None
            if found is not None and routers:
                two_level = two_level_router(found[1], checkpoint.config, routers[stream.layered.moe_blocks[index]])
            for number, point in enumerate(points):
                if found is None:
                    stream.advance(index, state=number)
                else:
                    with _routed(found[1], two_level, point, checkpoint.architecture.top_k) as ran:
                        stream.advance(index, state=number)
                    every = torch.cat(ran).double() if ran else torch.full((windows.rows.numel(),), point.k, dtype=torch.float64)
                    every = every.view_as(windows.rows)
                    active[number].append(every[windows.scored].mean().item())
                    sample[number] += every[windows.sample_row, : sample.shape[1]]
                events.progress(f"{name}, operating points", number + 1, len(points), (index, len(stream)))
    with stream.head() as head:
        sums = torch.stack([_sums(head, state, windows, compute.device) for state in stream.states])
    return Losses(sums, torch.tensor(active, dtype=torch.float64), sample / max(len(active[0]), 1))


@contextmanager
def _routed(block: MoeBlock, two_level: Any, point: Point, key: str) -> Iterator[list[torch.Tensor]]:
    """Let a block route as an operating point says; `key`: what the config calls the number of a token's experts.

    Gives the numbers of sub-experts that tokens run, int64 [T], as they come; none where the family's own router routes.
    """
    ran: list[torch.Tensor] = []
    if point.router != "two-level":
        set_top_k(router_of(block), key, point.k)
        handle = block.experts.register_forward_pre_hook(functools.partial(_heaviest, point.k))
        try:
            yield ran
        finally:
            handle.remove()
        return
    install(block, two_level, ActiveK([point.k], budget=point.budget), 0)
    skipped = two_level.num_experts * two_level.sub_experts
    handle = two_level.register_forward_hook(lambda _, __, output: ran.append((output[1] != skipped).sum(1).cpu()))
    try:
        yield ran
    finally:
        handle.remove()
        uninstall(block)


def _heaviest(k: int, _: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """What experts are given: of a router that always chooses the same number, the k of the largest weights."""
    hidden, experts, weights = arguments
    if experts.shape[1] <= k:
        return None
    kept = weights.topk(k).indices
    return hidden, experts.gather(1, kept), weights.gather(1, kept)


def _sums(head: Callable[[torch.Tensor], torch.Tensor], state: torch.Tensor, windows: Windows, device: str) -> torch.Tensor:
    """Summed loss of each window's scored tokens, float64 [S]; the logits of one window at a time."""
    sums = []
    for row, tokens, scored in zip(state, windows.rows, windows.scored, strict=True):
        positions = torch.nonzero(scored[1:]).flatten()
        logits = head(row[positions].to(device)).float()
        sums.append(F.cross_entropy(logits, tokens[1:][positions].to(device), reduction="sum").item())
    return torch.tensor(sums, dtype=torch.float64)
