"""What a token costs at a number of active experts: parameters and floating-point operations."""

import math
from collections.abc import Sequence
from typing import Any

from safetensors import safe_open

from prism_refactor.formats import Cost, Manifest, PrismConfig
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.layered import LayeredModel
from prism_refactor.models.modeling_prism import ROUTER_FILE, moe_blocks, router_of
from prism_refactor.models.transformers_models import FusedExperts, MoeBlock


class CostModel:
    """Costs of one checkpoint, from its shapes.

    Args:
        checkpoint: original or refactored.
        router: 'original', 'stock' or 'two-level'.
        length: tokens per window.
    """

    def __init__(self, checkpoint: Checkpoint, router: str, length: int):
        self.router, self.prism = router, PrismConfig.of(checkpoint.config)
        # Of what is stored as one expert.
        self.parts = 1 if self.prism is None or self.prism.stock else self.prism.sub_experts
        is_proxy = router == "two-level" and self.prism is not None and self.prism.router == "proxy"
        self.gate_neurons = Manifest.read(checkpoint.path).recipe.gate_neurons if is_proxy else 0
        self.rank = _map_rank(checkpoint) if router == "two-level" and not is_proxy else 0
        model: Any = LayeredModel(checkpoint, None).model
        self.blocks = moe_blocks(model)
        experts = sum(parameter.numel() for block in self.blocks for parameter in block.experts.parameters())
        embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        tied = output is embedding
        # Not what encodes images.
        own = sum(parameter.numel() for parameter in model.get_decoder().parameters())
        self.dense = own + (0 if tied else output.numel()) - experts
        config = checkpoint.text_config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Keys and values of latent attention have sizes of their own.
        widths = config.qk_head_dim + config.v_head_dim if hasattr(config, "qk_head_dim") else 2 * head
        kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
        attention_layers = sum("attention" in kind for kind in kinds)
        attention = 2 * config.num_attention_heads * widths * (length // 2) * attention_layers
        self.fixed_flops = 2 * (self.dense - (0 if tied else embedding.numel())) + attention

    def at(self, per_layer: Sequence[float]) -> Cost:
        """At k experts, or sub-experts, in each MoE layer; means where tokens differ."""
        parameters, flops = float(self.dense), float(self.fixed_flops)
        for block, k in zip(self.blocks, per_layer, strict=True):
            one = sum(math.prod(parameter.shape[1:]) for parameter in block.experts.parameters()) // self.parts
            extra_parameters, extra_flops = self._two_level(block, k) if self.router == "two-level" else (0, 0)
            parameters += k * one + extra_parameters
            flops += 2 * k * one + extra_flops
        return Cost(round(parameters), round(flops))

    def _two_level(self, block: MoeBlock, k: float) -> tuple[float, float]:
        """What the two-level router adds: the original router for the stock one and, below full k, the sub-router and the compensation."""
        assert self.prism is not None
        sub_experts, full = self.prism.sub_experts, self.prism.max_active
        stored, hidden, _ = FusedExperts(block.experts).shape
        total = stored * self.parts
        # Of the stock router what has a row for every sub-expert has one for every expert in the original.
        rows = [parameter.numel() for parameter in router_of(block).parameters() if self.prism.stock and total in parameter.shape]
        gate = sum(rows) // sub_experts - sum(rows)
        if k == full:
            return gate, 2 * gate
        linear = self.prism.router == "linear"
        sub_router = total * hidden if linear else 2 * self.gate_neurons * full * hidden
        compensation = 2 * (full - k + self.rank) * hidden if linear else 0
        return gate + sub_router + compensation, 2 * (gate + sub_router + compensation)


def _map_rank(checkpoint: Checkpoint) -> int:
    """Rank of the map of a layer's compensation; 0 where it has none."""
    with safe_open(checkpoint.path / ROUTER_FILE, framework="pt") as file:
        maps = [name for name in file.keys() if name.endswith(".map_in")]  # noqa: SIM118  (a safetensors handle is not iterable)
        return file.get_slice(maps[0]).get_shape()[0] if maps else 0
