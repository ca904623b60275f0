"""The whole refactoring of a checkpoint with the dimensions of OLMoE-1B-7B: time by stage, peak memory, disk read and written.

    python benchmarks/scale.py WORK_DIR [--layers 16] [--memory-limit 4]

Writes random weights (bfloat16, a shard per layer, 14 GB) into WORK_DIR/model if they are not there, and runs `prism-profile`,
`prism-refactor --stats`, and `prism-refactor` alone, which profiles too, on them with few calibration tokens. Needs 32 GB of disk.

Read and written are what the kernel counts at the disk (/proc/PID/io), after the checkpoint has been dropped from its cache. Memory is
the largest resident set of a process (which counts the mapped pages of the shard it reads), and, as root with the memory control group of
Linux mounted, --memory-limit holds all of the command's processes together, page cache included, to so many GiB: what is read twice has
to come from the disk again.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import EXAMPLE, print_provenance
from safetensors.torch import save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

from prism_refactor.tables import table

TEXT = ["--num-samples", "8", "--max-seq-length", "128", "--tokens-per-expert", "128"]
GROUP = Path("/sys/fs/cgroup/memory/prism-scale")
BIN = Path(sys.executable).parent
MEASURED = """
import json, os, resource, subprocess, sys, time
group = sys.argv[1]
if group:
    open(f"{group}/cgroup.procs", "w").write(str(os.getpid()))
start = time.monotonic()
code = subprocess.run(sys.argv[3:], stdout=open(sys.argv[2], "w")).returncode
io = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
print(json.dumps({"code": code, "seconds": time.monotonic() - start, "read": int(io["read_bytes"]), "written": int(io["write_bytes"]),
    "peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}))
"""


def write_model(folder: Path, layers: int) -> None:
    """OLMoE-1B-7B's config.json with random weights, written layer by layer."""
    config = OlmoeConfig(
        num_hidden_layers=layers,
        num_experts=64,
        num_experts_per_tok=8,
        intermediate_size=1024,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in OlmoeForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Size]) -> None:
        values = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator) for name, shape in tensors.items()}
        save_file({name: value + 1 if "norm" in name else value for name, value in values.items()}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for layer in range(layers):
        tensors = {name: shape for name, shape in shapes.items() if name.startswith(f"model.layers.{layer}.") and ".experts." not in name}
        for expert in range(config.num_experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            up, down = (
                torch.Size([config.intermediate_size, config.hidden_size]),
                torch.Size([config.hidden_size, config.intermediate_size]),
            )
            tensors |= {f"{prefix}.gate_proj.weight": up, f"{prefix}.up_proj.weight": up, f"{prefix}.down_proj.weight": down}
        save(f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors", tensors)
    save(
        f"model-{layers + 1:05d}-of-{layers + 1:05d}.safetensors", {name: shape for name, shape in shapes.items() if ".layers." not in name}
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder / name)
    # Last: a folder with a config.json is complete.
    config.architectures = ["OlmoeForCausalLM"]
    config.save_pretrained(folder)


def drop_from_cache(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def limit(gib: float) -> str:
    """A memory control group with a limit, or '' where there can be none."""
    if not gib or os.getuid() or not GROUP.parent.is_dir():
        return ""
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(int(gib * 2**30)))
    return str(GROUP)


def run(folder: Path, group: str, output: Path, *arguments: Any) -> dict[str, Any]:
    drop_from_cache(folder)
    script = [sys.executable, "-c", MEASURED, group, output, BIN / arguments[0], *arguments[1:]]
    found = json.loads(subprocess.run([str(part) for part in script], stdout=subprocess.PIPE, text=True, check=True).stdout)
    if found["code"]:
        sys.exit(f"{arguments[0]} ended with {found['code']}")
    return found


def main(work: Path, layers: int, gib: float) -> None:
    model, stats, out = work / "model", work / "stats", work / "out"
    if not (model / "config.json").exists():
        start = time.monotonic()
        shutil.rmtree(model, ignore_errors=True)
        write_model(model, layers)
        print(f"checkpoint written in {time.monotonic() - start:.0f} s")
    for folder in (stats, out):
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(path.stat().st_size for path in model.iterdir())
    group = limit(gib)
    runs = {
        "prism-profile": run(model, group, work / "profile.txt", "prism-profile", model, stats, *TEXT, "--quiet"),
        "prism-refactor --stats": run(
            model, group, work / "stats.json", "prism-refactor", model, out, "--stats", stats, "--json", "--quiet"
        ),
    }
    shutil.rmtree(out)
    runs["prism-refactor"] = run(model, group, work / "alone.json", "prism-refactor", model, out, *TEXT, "--json", "--quiet")
    held = f"all processes and their page cache held to {gib:g} GiB" if group else "memory not held to a limit"
    print(
        f"checkpoint {size / 1e9:.2f} GB, {layers} layers, {held}; peak resident set of the benchmark itself "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    )
    rows = []
    for name, found in runs.items():
        shares = [f"{found[key] / size:.3f}" for key in ("read", "written")]
        rows.append([name, f"{found['seconds']:.0f}", f"{found['peak'] / 2**30:.2f}", *shares])
    print(table(["command", "seconds", "peak, GiB", "read / checkpoint", "written / checkpoint"], rows))
    for name in ("stats", "alone"):
        seconds = json.loads((work / f"{name}.json").read_text())["seconds"]
        print(f"seconds, {name}: " + ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items()))
    if group:
        GROUP.rmdir()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--memory-limit", type=float, default=4.0, help="GiB; 0 for none")
    options = parser.parse_args()
    print_provenance()
    main(options.work, options.layers, options.memory_limit)
