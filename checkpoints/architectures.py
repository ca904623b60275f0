"""What transformers does not tell about a Mixture-of-Experts family: which config keys hold its sizes."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from prism_errors import InputError, UsageError


@dataclass(frozen=True)
class Architecture:
    """One family whose router is a softmax over its rows.

    With every router row repeated N times each selected weight comes out divided by N, whether or not the family renormalises its
    top-k, so `down_proj` absorbs the factor N. `num_experts`, `top_k` and `width` name the keys of config.json.
    """

    model_type: str
    num_experts: str
    top_k: str
    width: str

    def sizes(self, config: Any) -> dict[str, int]:
        """The three sizes as {config key: value}, from a transformers config."""
        return {key: int(getattr(config, key)) for key in (self.num_experts, self.top_k, self.width)}

    def refactored_sizes(self, config: Any, sub_experts: int) -> dict[str, int]:
        """The sizes after splitting every expert into `sub_experts`.

        Raises:
            UsageError: `sub_experts` is not a power of two greater than one or does not divide the expert width.
        """
        sizes = self.sizes(config)
        if sub_experts < 2 or sub_experts & (sub_experts - 1):
            raise UsageError(
                f"--sub-experts {sub_experts}: must be a power of two (2, 4, 8, ...), so that scaling down_proj by it is exact"
            )
        if sizes[self.width] % sub_experts:
            raise UsageError(
                f"--sub-experts {sub_experts}: does not divide the expert width {sizes[self.width]} ({self.width} in config.json)"
            )
        return {
            self.num_experts: sizes[self.num_experts] * sub_experts,
            self.top_k: sizes[self.top_k] * sub_experts,
            self.width: sizes[self.width] // sub_experts,
        }


ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("olmoe", "num_experts", "num_experts_per_tok", "intermediate_size"),
        Architecture("qwen2_moe", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        Architecture("qwen3_moe", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        Architecture("mixtral", "num_local_experts", "num_experts_per_tok", "intermediate_size"),
    )
}


def describe(config: Any, where: str) -> Architecture:
    """The architecture of a transformers config.

    Raises:
        InputError: not a supported Mixture-of-Experts; the message lists what is.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"{where}: model_type '{config.model_type}' is not a supported Mixture-of-Experts; supported: {supported}")
    return architecture


def moe_block(layer: nn.Module) -> tuple[str, Any] | None:
    """The (name, module) of a decoder layer's MoE block, recognised by its `gate` and `experts` children; None in a dense layer."""
    for name, module in layer.named_modules():
        if isinstance(getattr(module, "experts", None), nn.Module) and isinstance(getattr(module, "gate", None), nn.Module):
            return name, module
    return None
