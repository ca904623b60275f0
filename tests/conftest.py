import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.utils import logging

from prism_cli import door, evaluate, finetune, profile, refactor, verify

EXAMPLE = Path(__file__).parents[1] / "examples" / "olmoe-tiny"
COMMANDS = {
    "prism-eval": evaluate,
    "prism-finetune": finetune,
    "prism-profile": profile,
    "prism-refactor": refactor,
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
}
# Enough calibration for a meaningful router, little enough for a test.
FAST = ["--num-samples", "8", "--max-seq-length", "64", "--tokens-per-expert", "64", "--solver", "ascent", "--workers", "1"]

logging.disable_progress_bar()


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
    values = SMALL | FAMILIES[family] | {"initializer_range": 0.2} | changes
    model_type = values.pop("model_type", family)
    set_seed(0)
    config = AutoConfig.for_model(model_type, **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(EXAMPLE / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder of a small random model of each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: build(family, root / family) for family in FAMILIES}


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


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options).eval()


@torch.inference_mode()
def logits(model, token_ids):
    return model(input_ids=token_ids).logits


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
