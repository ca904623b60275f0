"""Next-token losses of one checkpoint at many operating points, in one pass over its layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from prism_refactor.evaluation.windows import Windows
from prism_refactor.models.architectures import moe_block
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.modeling_prism import ROUTER_FILE, attach_block, router_of, router_tensors
from prism_refactor.models.stream import LayerStream
from prism_refactor.routing.output import two_level_output

# Tokens that the output errors of a layer are measured on.
JUDGED = 4096
OnLayer = Callable[[int, int, int, int], None]


@dataclass(frozen=True)
class Point:
    """One way to run a checkpoint.

    Attributes:
        router: 'original', 'stock' or 'two-level'.
        k: active experts, or sub-experts, of each MoE layer.
    """

    router: str
    k: tuple[int, ...]


@dataclass(frozen=True)
class Losses:
    """Result of `stream_losses`.

    Attributes:
        sums: float64 [P, S]: per operating point and window, summed negative log-likelihood of its scored tokens, nats.
        layer_errors: float64 [L, K * N] or None: squared error of each MoE layer's output at k = 1, 2, ..., mean over tokens, on the
            inputs it gets in the full model. Not relative to the layer's own norm: all layers add to the same residual stream.
    """

    sums: torch.Tensor
    layer_errors: torch.Tensor | None


@torch.inference_mode()
def stream_losses(
    checkpoint: Checkpoint,
    windows: Windows,
    points: list[Point],
    dtype: torch.dtype,
    device: str,
    batch_size: int,
    measure_layers: bool = False,
    on_layer: OnLayer | None = None,
) -> Losses:
    """Run text through a checkpoint once: each layer is read once and every operating point's hidden states pass through it.

    Args:
        checkpoint: original or refactored.
        windows: the text.
        points: operating points.
        dtype: compute type.
        device: 'cpu' or 'cuda'.
        batch_size: windows per forward.
        measure_layers: also measure `Losses.layer_errors`; the first point must then be two-level at full k.
        on_layer: told (layer, layers, points done, points in all).
    """
    stream = LayerStream(checkpoint, windows.rows, dtype, device, batch_size, len(points))
    stream.model.set_experts_implementation(EXPERTS)
    routers = router_tensors(checkpoint.path / ROUTER_FILE) if any(point.router == "two-level" for point in points) else {}
    # The stock router first: attaching the two-level one cannot be undone while the layer is loaded.
    turns = sorted(range(len(points)), key=lambda number: points[number].router == "two-level")
    errors: list[torch.Tensor] = []
    moe_layers = 0
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            found = moe_block(layer)
            for done, number in enumerate(turns, 1):
                point = points[number]
                judged: list[torch.Tensor] = []
                handle = None
                if found is not None:
                    block = found[1]
                    if point.router == "two-level" and not hasattr(router_of(block), "two_level"):
                        attach_block(block, checkpoint.config, routers[f"{stream.layered.layer_name(index)}.{found[0]}"])
                    router_of(block).top_k = point.k[moe_layers]
                    if measure_layers and number == 0:
                        handle = block.register_forward_pre_hook(lambda _, inputs, judged=judged: judged.append(inputs[0].flatten(0, 1)))
                stream.advance(index, state=number)
                if handle is not None:
                    handle.remove()
                    errors.append(_layer_errors(block, torch.cat(judged)))
                if on_layer:
                    on_layer(index, len(stream), done, len(points))
            moe_layers += found is not None
    with stream.head() as head:
        sums = torch.stack([_sums(head, state, windows, device) for state in stream.states])
    return Losses(sums, torch.stack(errors) if errors else None)


def _layer_errors(block: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Squared error of the experts' output at k = 1, 2, ..., K N, mean over a sample of the inputs [T, H]."""
    router = router_of(block).two_level
    chosen = torch.linspace(0, len(inputs) - 1, min(JUDGED, len(inputs))).long()
    inputs = inputs[chosen.to(inputs.device)]
    full = router.original.top_k * router.sub_experts
    exact = two_level_output(router, block.experts, inputs, full)
    errors = [
        (two_level_output(router, block.experts, inputs, k) - exact).float().square().sum(1).mean().item() for k in range(1, full + 1)
    ]
    router.missing = None
    return torch.tensor(errors, dtype=torch.float64)


def _sums(head: Callable[[torch.Tensor], torch.Tensor], state: torch.Tensor, windows: Windows, device: str) -> torch.Tensor:
    """Summed loss of each window's scored tokens, float64 [S]; the logits of one window at a time."""
    sums = []
    for row, tokens, scored in zip(state, windows.rows, windows.scored, strict=True):
        positions = torch.nonzero(scored[1:]).flatten()
        logits = head(row[positions].to(device)).float()
        sums.append(F.cross_entropy(logits, tokens[1:][positions].to(device), reduction="sum").item())
    return torch.tensor(sums, dtype=torch.float64)
