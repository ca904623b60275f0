import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

# Tests run side by side, a core each; so do the commands that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, set_seed
from transformers.utils import logging

from prism_refactor.cli import app as door
from prism_refactor.cli import bench, evaluate, finetune, loadtest, profile, refactor, replay, run, serve, verify
from prism_refactor.models.modeling_prism import auto_class

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would the commands that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

EXAMPLE = Path(__file__).parents[1] / "examples" / "olmoe-tiny"
COMMANDS = {
    "prism-bench": bench,
    "prism-eval": evaluate,
    "prism-finetune": finetune,
    "prism-loadtest": loadtest,
    "prism-profile": profile,
    "prism-refactor": refactor,
    "prism-replay": replay,
    "prism-run": run,
    "prism-serve": serve,
    "prism-verify": verify,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}
SHARED = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "num_key_value_heads": 4,
}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": None}
FAMILIES = {
    "olmoe": {"num_experts": 6, "intermediate_size": 16, "tie_word_embeddings": True},
    "olmoe-renormalised": {"model_type": "olmoe", "num_experts": 4, "intermediate_size": 16, "norm_topk_prob": True},
    # One dense layer between two sparse ones, a shared expert in those.
    "qwen2_moe": {
        "num_hidden_layers": 3,
        "num_experts": 4,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"num_experts": 4, "intermediate_size": 48, "moe_intermediate_size": 16, "norm_topk_prob": True, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 32},
    # Dense first layers, shared experts, groups of experts of which some are chosen.
    "deepseek_v2": LATENT | SHARED | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
    "deepseek_v3": LATENT | SHARED | {"n_group": 1, "topk_group": 1, "q_lora_rank": 12, "norm_topk_prob": True},
    # Groups are chosen by the sum of their two best experts.
    "deepseek_v3-grouped": LATENT | SHARED | {"model_type": "deepseek_v3", "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "dots1": SHARED | {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "head_dim": 8},
    # Its sigmoid scores are used as they are: no factor N.
    "dots1-unnormalised": SHARED | {"model_type": "dots1", "norm_topk_prob": False, "routed_scaling_factor": 0.7, "head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1, "intermediate_size": 48},
    "flex_olmo": {"num_experts": 4, "intermediate_size": 16, "pad_token_id": None},
    "glm4_moe": SHARED | {"head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 32, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": {"num_local_experts": 4, "intermediate_size": 32, "logits_scaling": 4.0, "embedding_multiplier": 2.0},
    # A dense network beside the experts, whose tensors have the experts' names.
    "granitemoeshared": {"num_local_experts": 4, "intermediate_size": 32, "shared_intermediate_size": 48},
    # A convolution and an attention layer; a dense one first.
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
    },
    "minimax_m2": {"num_local_experts": 4, "intermediate_size": 32, "head_dim": 8},
    # Experts without a gate, in layers of their own between others.
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "intermediate_size": 48,
        "head_dim": 8,
        **{"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16},
    },
    # Linear attention and a full one, a shared expert.
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "head_dim": 8,
    },
    # Layers give the next one the positions that attention may look at.
    "glm_moe_dsa": LATENT
    | SHARED
    | {
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 12,
        "head_dim": 8,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "indexer_types": ["full", "shared", "full"],
        "index_topk": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
    # Its router is given all its block's inputs in one piece, and a bias that the block keeps.
    "afmoe": {
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_shared_experts": 1,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 16,
    },
    # Its layers hold their experts themselves; their router has other inputs, a scale for each expert, and no top-k of its own.
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "hidden_size_per_layer_input": 0,
        "head_dim": 8,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
    # Of images and text; its experts are not marked as ones that other implementations can run, and their activations are clamped.
    "step3p7": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "n_routed_experts": 4,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "share_expert_dim": 24,
        "head_dim": 8,
        "sliding_window": 16,
        "swiglu_limits": [0.0, 0.0, 0.5],
        "vision": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1.0, "image_size": 28},
    },
    # A model of images and text: its language model is split, the rest is copied.
    "qwen3_vl_moe": {
        "num_experts": 4,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "vision": {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "patch_size": 4}
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
}
# The vLLM plugin routes them: their routers read what their experts read.
PLAIN = [family for family in FAMILIES if family != "gemma4_text"]
LLAMA4 = {
    "num_hidden_layers": 3,
    "num_experts_per_tok": 1,
    "num_local_experts": 4,
    "intermediate_size": 32,
    "intermediate_size_mlp": 48,
    "interleave_moe_layer_step": 1,
    "moe_layers": [1, 2],
    "head_dim": 8,
    "no_rope_layers": [1, 1, 0],
    "attention_chunk_size": 16,
}
# Their own classes cannot run split experts.
IN_PLACE = {
    # Layers of hyper-connections; the first chooses experts by a table of tokens.
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "num_hash_layers": 1,
    },
    # Its router chooses one expert or none, and gives the next layer's its state.
    "zaya": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 1, "head_dim": 8, "router_hidden_size": 16},
    # Its dense network has the width of its experts.
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "intermediate_size": 32, "head_dim": 8},
    # So have its dense layers; a mamba and an attention layer.
    "jamba": {
        "num_hidden_layers": 3,
        "num_experts": 4,
        "intermediate_size": 32,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_d_conv": 2,
        "mamba_dt_rank": 8,
    },
    # Its router chooses two experts, whatever it is told.
    "phimoe": {"num_local_experts": 4, "intermediate_size": 32},
    # Its shared expert has the width of its experts, which are given every token, weighted; attention in chunks, and without positions.
    "llama4_text": LLAMA4,
    # Of images and text.
    "llama4": LLAMA4
    | {
        "vision": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 28}
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    },
}
# Of a model of images and text: in the example's vocabulary.
IMAGE_TOKENS = {"image_token_id": 4000, "video_token_id": 4001, "vision_start_token_id": 4002, "vision_end_token_id": 4003}
# Enough calibration for a meaningful router, little enough for a test.
FAST = ["--num-samples", "8", "--max-seq-length", "64", "--tokens-per-expert", "64", "--solver", "ascent", "--workers", "1"]

logging.disable_progress_bar()


def mostly_long(values, *quick):
    """Parameters of which only some are quick enough for `make test`; the others are for `make test-all`."""
    parts = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*part, marks=() if value in quick else pytest.mark.long) for value, part in zip(values, parts, strict=True)]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys):
    """Run a console command in this process: command('prism-refactor', ...) -> exit code and output."""

    def call(name, *arguments):
        capsys.readouterr()
        code = door.run(COMMANDS[name].main.command, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def build(family: str, folder: Path, **changes) -> Path:
    """Save a small random model of a family, with the example's tokenizer; large weights, so that routing is not degenerate."""
    values = SMALL | (FAMILIES | IN_PLACE).get(family, {}) | {"initializer_range": 0.2} | changes
    model_type = values.pop("model_type", family)
    set_seed(0)
    if "vision" in values:
        vision, text_type = values.pop("vision"), values.pop("text_type", None)
        text = values | ({"model_type": text_type} if text_type else {})
        config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **IMAGE_TOKENS)
    else:
        config = AutoConfig.for_model(model_type, **values)
    model = auto_class(config).from_config(config)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        # Zero in a new model, and then nothing would show what becomes of them.
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.2)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(EXAMPLE / name, folder / name)
    return folder


FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def _quantised(source: Path, folder: Path, quantise, config: dict) -> Path:
    """Save a checkpoint with some tensors quantised, and the bfloat16 one that it stands for beside it as 'twin'; returns the latter.

    `quantise(name, tensor)` gives None or ({name on disk: tensor}, dequantised tensor).
    """
    twin = folder.with_name("twin")
    for target in (folder, twin):
        shutil.copytree(source, target)
    stored, plain = {}, {}
    for name, value in load_file(source / "model.safetensors").items():
        parts, plain[name] = quantise(name, value.bfloat16()) or ({name: value.bfloat16()}, value.bfloat16())
        stored |= parts
    for target, tensors in ((folder, stored), (twin, plain)):
        save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (twin / "config.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    return twin


def quantise_fp8(source: Path, folder: Path, block: tuple[int, int] | None) -> Path:
    """Every matrix of a layer but its router's in FP8, with a scale for each block, or row: see `_quantised`."""

    def quantise(name, value):
        if value.ndim != 2 or ".layers." not in name or name.endswith(("gate.weight", "router.weight")):
            return None
        size = block or (1, value.shape[1])
        rows, columns = (-(-length // step) for length, step in zip(value.shape, size, strict=True))
        scales, stored, plain = torch.empty(rows, columns), torch.empty_like(value, dtype=torch.float8_e4m3fn), torch.empty_like(value)
        for row in range(rows):
            for column in range(columns):
                part = tuple(slice(at * step, (at + 1) * step) for at, step in zip((row, column), size, strict=True))
                scales[row, column] = value[part].float().abs().max() / 448
                stored[part] = (value[part].float() / scales[row, column]).to(torch.float8_e4m3fn)
                plain[part] = (stored[part].float() * scales[row, column]).bfloat16()
        return {name: stored, f"{name}_scale_inv": scales}, plain

    return _quantised(source, folder, quantise, {"quant_method": "fp8", "weight_block_size": list(block) if block else None})


def quantise_packed(source: Path, folder: Path, bits: int, group: int | None) -> Path:
    """Every matrix of a layer but its router's as packed integers, with a scale for each group of columns, or row: see `_quantised`."""

    def quantise(name, value):
        if value.ndim != 2 or ".layers." not in name or name.endswith(("gate.weight", "router.weight")):
            return None
        rows, columns = value.shape
        groups = value.float().view(rows, -1, group or columns)
        scales = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).bfloat16()
        integers = (groups / scales.float()[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        plain = (integers * scales.float()[..., None]).view(rows, columns).bfloat16()
        unsigned = (integers.view(rows, columns).long() + 2 ** (bits - 1)).tolist()
        each = 32 // bits
        words = [
            [sum(value << (bits * place) for place, value in enumerate(row[start : start + each])) for start in range(0, columns, each)]
            for row in unsigned
        ]
        packed = torch.tensor([[word - 2**32 if word >= 2**31 else word for word in row] for row in words], dtype=torch.int32)
        return {f"{name}_packed": packed, f"{name}_scale": scales, f"{name}_shape": torch.tensor([rows, columns])}, plain

    weights = {"type": "int", "num_bits": bits, "symmetric": True, "group_size": group, "strategy": "group" if group else "channel"}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}
    return _quantised(source, folder, quantise, config)


def quantise_mxfp4(source: Path, folder: Path) -> Path:
    """The experts of a gpt-oss in MXFP4: see `_quantised`."""
    values = torch.tensor(FP4_VALUES)

    def quantise(name, value):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return None
        rows = value.float().transpose(1, 2).unflatten(2, (-1, 32))
        exponents = rows.abs().amax(-1).clamp_min(1e-12).log2().floor() - 2
        codes = (rows / exponents.exp2()[..., None]).unsqueeze(-1).sub(values).abs().argmin(-1)
        plain = (values[codes] * exponents.exp2()[..., None]).flatten(2).transpose(1, 2).bfloat16()
        blocks = (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": (exponents + 127).to(torch.uint8)}, plain

    return _quantised(source, folder, quantise, {"quant_method": "mxfp4"})


class Models(dict):
    """Folder of a small random model of each family, made when it is first asked for."""

    def __init__(self, root: Path):
        self.root = root

    def __missing__(self, family: str) -> Path:
        self[family] = build(family, self.root / family)
        return self[family]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def token_ids():
    return torch.randint(2, 4096, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def elastic(tmp_path_factory):
    """The example checkpoint, refactored with the default solver and router."""
    target = tmp_path_factory.mktemp("elastic") / "out"
    options = ["--num-samples", "96", "--max-seq-length", "256", "--tokens-per-expert", "512", "--quiet"]
    assert door.run(refactor.main.command, [str(EXAMPLE), str(target), *options]) == 0
    return target


# Of what `serving.served` gives, with the options of each file of tests.
@pytest.fixture
def site(site_and_url):
    return site_and_url[0]


@pytest.fixture
def url(site_and_url):
    return site_and_url[1]


def load(folder, **options):
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **{"dtype": torch.float32} | options).eval()


@torch.inference_mode()
def logits(model, token_ids):
    return model(input_ids=token_ids).logits


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
