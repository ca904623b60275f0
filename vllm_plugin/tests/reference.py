"""What transformers computes, to compare vLLM with, and small random models of every family that vLLM can run."""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from conftest import FAMILIES as TESTED
from conftest import IN_PLACE, LATENT, SHARED, build

# vLLM's attention for CPUs takes heads of 32 and more.
_WIDER: dict[str, Any] = {"hidden_size": 128, "max_position_embeddings": 512}
# The one size of latent attention that vLLM takes on a CPU.
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
# vLLM's linear attention for CPUs takes no other type.
IN_BFLOAT16 = ("qwen3_next", "qwen3_5_moe_text")
# How DeepSeek-V3 and its kin score experts.
_NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
# Keys that vLLM reads, which published checkpoints have and transformers does not write.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"scoring_func": "softmax", "q_lora_rank": 32},
    "deepseek_v3": _NOAUX | {"q_lora_rank": 32},
    "deepseek_v3-grouped": _NOAUX | {"q_lora_rank": 32},
    "glm_moe_dsa": _NOAUX | {"q_lora_rank": 32, "index_head_dim": 128, "head_dim": 64},
    # Of this activation vLLM's kernel for CPUs takes widths that are multiples of 32.
    "gpt_oss": {"intermediate_size": 256},
    "hy_v3": {"first_k_dense_replace": 1},
    # In bfloat16 transformers' grouped product takes rows of 16 bytes, and vLLM's linear attention heads of 128.
    **{family: {"moe_intermediate_size": 64, "linear_key_head_dim": 128, "linear_value_head_dim": 128} for family in IN_BFLOAT16},
    # vLLM ties this one's output matrix whatever the config says.
    "lfm2_moe": {"tie_word_embeddings": True},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
}
# Families of which the product's own tests need no more than a proof.
_FURTHER: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"num_experts": 4, "intermediate_size": 32, "head_dim": 8},
    "exaone_moe": {
        **{key: value for key, value in SHARED.items() if "routed" not in key and "n_shared" not in key},
        **{"num_experts": 8, "num_shared_experts": 1, "head_dim": 8, "n_group": 1, "topk_group": 1},
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "glm4_moe_lite": LATENT | SHARED | {"q_lora_rank": 32},
    "hy_v3": {
        **{"num_experts": 4, "num_shared_experts": 1, "moe_intermediate_size": 16, "intermediate_size": 48, "head_dim": 8},
        "mlp_layer_types": ["dense", "sparse"],
    },
    # Dense ones.
    **{model_type: {"intermediate_size": 512} for model_type in ("llama", "qwen2")},
    "laguna": {
        **{"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "intermediate_size": 48, "head_dim": 8},
        "num_attention_heads_per_layer": [4, 4],
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["sparse", "sparse"],
    },
    "mellum": {
        **{"num_local_experts": 4, "moe_intermediate_size": 16, "intermediate_size": 48, "head_dim": 8},
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["sparse", "sparse"],
    },
    "qwen3_5_moe_text": {key: value for key, value in TESTED["qwen3_next"].items() if key != "intermediate_size"},
}
FAMILIES = TESTED | _FURTHER
# So little calibration that the sub-routers are bad; equal they are all the same.
QUICK: dict[str, Any] = {"num_samples": 8, "max_seq_length": 64, "tokens_per_expert": 64, "solver": "ascent", "workers": 1}


def random_model(family: str, folder: Path) -> Path:
    """Save a small random model of a family, of sizes that vLLM takes on a CPU."""
    known = (FAMILIES | IN_PLACE)[family]
    sizes = _WIDER | _PUBLISHED.get(family, {})
    sizes = ({"head_dim": 32} if "head_dim" in known else {}) | sizes
    sizes |= _LATENT if "kv_lora_rank" in known else {}
    return build(family, folder, **(_FURTHER.get(family, {}) | sizes))


def random_text(length: int = 60) -> list[int]:
    """Tokens that every such model has."""
    return torch.randint(2, 4000, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.inference_mode()
def log_probabilities(model: Any, tokens: list[int]) -> torch.Tensor:
    """That of each token but the first, given those before it."""
    logits = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int = 24) -> list[int]:
    """The tokens that follow a prompt."""
    return model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()


def difference(found: list[Any], expected: list[torch.Tensor]) -> float:
    """The largest one, between two lists of log probabilities."""
    return max((torch.as_tensor(one) - other).abs().max().item() for one, other in zip(found, expected, strict=True))
