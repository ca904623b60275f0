"""What transformers does not tell about a Mixture-of-Experts family: which config keys hold its sizes and how its router scores."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prism_refactor.errors import InputError, UsageError
from prism_refactor.models.transformers_models import FusedExperts, MoeBlock

SOFTMAX, SIGMOID, CHOSEN = "softmax over all experts", "sigmoid", "softmax over the chosen experts"
ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        model_type: as in config.json.
        num_experts, top_k, width: keys of config.json for its sizes.
        scores: how its router makes scores of its rows' products: `SOFTMAX`, `SIGMOID` or `CHOSEN`.
        shared: key of config.json for the number of shared experts, where their common width is that many times `width`: it is multiplied
            by N.
        correction: tensor of the block that is added to the scores when experts are chosen, one number per expert.
    """

    model_type: str
    num_experts: str
    top_k: str
    width: str
    scores: str = SOFTMAX
    shared: str | None = None
    correction: str | None = None

    def sizes(self, config: Any) -> dict[str, int]:
        """The sizes that change, as {config key: value}, from a transformers config: `num_experts`, `top_k`, `width`, perhaps `shared`.

        Raises:
            InputError: one of them is not there.
        """
        keys = [self.num_experts, self.top_k, self.width] + ([self.shared] if self.shared else [])
        missing = [key for key in keys if getattr(config, key, None) is None]
        if missing:
            raise InputError(f"has no {missing[0]}, which a {self.model_type} needs; complete it")
        return {key: int(getattr(config, key)) for key in keys}

    def refactored_sizes(self, config: Any, sub_experts: int) -> dict[str, int]:
        """The sizes after splitting every expert into `sub_experts`.

        Raises:
            UsageError: `sub_experts` is not a power of two greater than one or does not divide the expert width.
        """
        sizes = self.sizes(config)
        if sub_experts < 2 or sub_experts & (sub_experts - 1):
            raise UsageError(
                f"`sub_experts` {sub_experts}: must be a power of two (2, 4, 8, ...), so that scaling down_proj by it is exact"
            )
        if sizes[self.width] % sub_experts:
            raise UsageError(
                f"`sub_experts` {sub_experts}: does not divide the expert width {sizes[self.width]} ({self.width} in config.json)"
            )
        return {key: value // sub_experts if key == self.width else value * sub_experts for key, value in sizes.items()}

    def factor(self, config: Any, sub_experts: int) -> int:
        """What `down_proj` must be multiplied with: N where the weights of N copies of an expert share its weight, else 1.

        A softmax shares by itself; sigmoid scores are shared only where the family divides the chosen ones by their sum.
        """
        return sub_experts if self.scores != SIGMOID or getattr(config, "norm_topk_prob", True) else 1

    def correction_divisor(self, sub_experts: int) -> int:
        """What the correction must be divided by: as much as copies of a row shrink the scores that it is added to."""
        return sub_experts if self.scores == SOFTMAX else 1

    def obstacle(self, config: Any) -> str | None:
        """Why a model of this family cannot be split exactly; None if it can."""
        if self.scores == SIGMOID and (getattr(config, "n_group", None) or 1) > 1:
            return (
                f"n_group {config.n_group}: its router adds the two best experts of every group to choose among groups, "
                "and copies of an expert change that sum"
            )
        return None


_MOE_WIDTH = "moe_intermediate_size"
_GATE_CORRECTION = "gate.e_score_correction_bias"
ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("deepseek_v2", "n_routed_experts", "num_experts_per_tok", _MOE_WIDTH, shared="n_shared_experts"),
        Architecture("deepseek_v3", "n_routed_experts", "num_experts_per_tok", _MOE_WIDTH, SIGMOID, "n_shared_experts", _GATE_CORRECTION),
        Architecture("dots1", "n_routed_experts", "num_experts_per_tok", _MOE_WIDTH, SIGMOID, "n_shared_experts", _GATE_CORRECTION),
        Architecture(
            "ernie4_5_moe",
            "moe_num_experts",
            "moe_k",
            _MOE_WIDTH,
            shared="moe_num_shared_experts",
            correction="gate.moe_statics.e_score_correction_bias",
        ),
        Architecture("flex_olmo", "num_experts", "num_experts_per_tok", "intermediate_size"),
        Architecture("glm4_moe", "n_routed_experts", "num_experts_per_tok", _MOE_WIDTH, SIGMOID, "n_shared_experts", _GATE_CORRECTION),
        Architecture("gpt_oss", "num_local_experts", "num_experts_per_tok", "intermediate_size", CHOSEN),
        Architecture("granitemoe", "num_local_experts", "num_experts_per_tok", "intermediate_size", CHOSEN),
        Architecture("lfm2_moe", "num_experts", "num_experts_per_tok", _MOE_WIDTH, SIGMOID, correction="expert_bias"),
        Architecture(
            "minimax_m2", "num_local_experts", "num_experts_per_tok", "intermediate_size", SIGMOID, correction="e_score_correction_bias"
        ),
        Architecture("mixtral", "num_local_experts", "num_experts_per_tok", "intermediate_size"),
        Architecture("olmoe", "num_experts", "num_experts_per_tok", "intermediate_size"),
        Architecture("qwen2_moe", "num_experts", "num_experts_per_tok", _MOE_WIDTH),
        Architecture("qwen3_moe", "num_experts", "num_experts_per_tok", _MOE_WIDTH),
    )
}
# Families that were looked at, and why they cannot be split into a native checkpoint.
REFUSED = {
    "hunyuan_v1_moe": "its shared MLP takes its width from the same key of config.json as its experts (intermediate_size)",
    "phimoe": "its router is hard-wired to two experts",
}


def describe(config: Any, where: str) -> Architecture:
    """The architecture of a transformers config.

    Raises:
        InputError: not a supported Mixture-of-Experts; the message says why, or lists what is supported.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        supported = ", ".join(ARCHITECTURES)
        reason = REFUSED.get(config.model_type)
        what = f"cannot be split: {reason}" if reason else f"is not a supported Mixture-of-Experts; supported: {supported}"
        raise InputError(f"{where}: model_type '{config.model_type}' {what}")
    try:
        architecture.sizes(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    obstacle = architecture.obstacle(config)
    if obstacle:
        raise InputError(f"{where}: this {config.model_type} cannot be split: {obstacle}")
    return architecture


def moe_block(layer: nn.Module) -> tuple[str, Any] | None:
    """The (name, module) of a decoder layer's MoE block, recognised by its router and its `experts`; None in a dense layer."""
    for name, module in layer.named_modules():
        if isinstance(getattr(module, "experts", None), nn.Module) and router_name(module) is not None:
            return name, module
    return None


def router_name(block: object) -> str | None:
    """What a MoE block calls its router."""
    return next((name for name in ROUTER_NAMES if isinstance(getattr(block, name, None), nn.Module)), None)


def routing_state(block: MoeBlock) -> dict[str, Any]:
    """Every tensor that routes a MoE block, by its name in the block: its router's, and those it holds itself."""
    name = router_name(block)
    own = [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
    return {f"{name}.{leaf}": value for leaf, value in block.get_submodule(str(name)).state_dict().items()} | dict(own)


def replaced_parts(name: str, block: MoeBlock) -> list[str]:
    """Modules and buffers of the MoE block called `name` that a refactoring replaces: router, experts, routing tensors of its own."""
    own = [leaf for leaf in routing_state(block) if "." not in leaf]
    return [f"{name}.{part}" for part in (router_name(block), "experts", *own)]


def repeat_routing(block: MoeBlock, architecture: Architecture, sub_experts: int) -> dict[str, torch.Tensor]:
    """The router's tensors for the sub-experts, by their names in the block: everything there is per expert, N times in a row.

    With every row repeated the N copies of a chosen expert are all chosen, and share its weight where `Architecture.factor` says so.
    """
    total = FusedExperts(block.experts).shape[0]
    repeated = {}
    for name, value in routing_state(block).items():
        repeated[name] = value.detach().repeat_interleave(sub_experts, list(value.shape).index(total))
    if architecture.correction in repeated:
        repeated[architecture.correction] = repeated[architecture.correction] / architecture.correction_divisor(sub_experts)
    return repeated
