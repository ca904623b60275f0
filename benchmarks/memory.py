"""Peak resident memory of `prism-profile` and `prism-refactor` against the promised bound, for 4 and for 16 layers.

    python benchmarks/memory.py

Writes checkpoints with random weights whose layers are large enough to see (about 200 MiB each in float32), runs the commands in
processes of their own and reads each process's peak resident set size. The bound: 2.5 x the largest decoder layer in the compute dtype
+ the hidden-state store + the samples of activations + 1 GiB.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import EXAMPLE, print_provenance
from transformers import OlmoeConfig, OlmoeForCausalLM

from prism_refactor.tables import table

SAMPLES, LENGTH, TOKENS_PER_EXPERT = 32, 256, 512
BIN = Path(sys.executable).parent


def write_model(folder: Path, layers: int) -> OlmoeConfig:
    config = OlmoeConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        dtype="bfloat16",
        eos_token_id=0,
    )
    torch.manual_seed(0)
    OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EXAMPLE / name).read_bytes())
    return config


def peak(arguments: list[str]) -> int:
    """Peak resident set size of a command, in bytes."""
    script = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return int(run.stdout) * 1024


def main() -> None:
    options = ["--num-samples", SAMPLES, "--max-seq-length", LENGTH, "--tokens-per-expert", TOKENS_PER_EXPERT, "--quiet"]
    options = [str(option) for option in options]
    lines = []
    for layers in (4, 16):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "model"
            config = write_model(folder, layers)
            experts = 3 * config.num_experts * config.hidden_size * config.intermediate_size
            layer = 4 * (experts + config.num_experts * config.hidden_size + 4 * config.hidden_size**2)
            store = 4 * SAMPLES * LENGTH * config.hidden_size
            sample = 4 * config.num_experts * TOKENS_PER_EXPERT * config.intermediate_size
            bound = 2.5 * layer + store + sample + 2**30
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            commands = {
                "prism-profile": [str(folder), f"{root}/stats"],
                "prism-refactor": [str(folder), f"{root}/out", "--solver", "ascent", "--workers", "1"],
            }
            for name, arguments in commands.items():
                used = peak([str(BIN / name), *arguments, *options])
                lines.append([name, layers, *(f"{value / 2**20:.0f}" for value in (size, layer, used, bound)), f"{used / bound:.2f}"])
    print("MiB")
    print(table(["command", "layers", "checkpoint", "layer, float32", "peak", "bound", "peak / bound"], lines))


if __name__ == "__main__":
    print_provenance()
    main()
