"""Latency of a token when only some of the experts fit in fast memory: accelerate, whole experts, sub-experts, prefetch, skipping.

    python benchmarks/offload.py WORK_DIR [--rounds 3] [--systems a,b,c,d,p,e,f] [--shares 25,50,75] [--k 16]

The model is examples/olmoe-tiny, whose router is trained, with experts 32 times as wide: every neuron is there 32 times with 1/32 of its
output weights. That computes what the example computes and routes as it does, and an expert is 12 MiB as in OLMoE-1B-7B; 4 layers, 16
experts, top 4, bf16, 805 MB of experts; refactored with N = 4. WORK_DIR keeps both. At k below 16 the original runs its top k / 4.

Text the model was not trained on is decoded token by token after a prompt (the next token is the text's, so that every system
decodes the same and routing is that of real text). All systems are loaded at once and every text goes through each of them in turn:
ratios are of the same text, seconds apart, because disk and machine are shared and drift. Slow memory is the checkpoint's files, and
cold: ours are read with O_DIRECT, past the page cache; accelerate maps files, which are dropped from the page cache before every token
(posix_fadvise). A sampler watches the resident memory while ours decode: what it was when all models were loaded, their budgets taken,
+ 64 MiB is the bound.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from common import EXAMPLE, TEXT, markdown, print_provenance
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.loading import load
from prism_refactor.models.modeling_prism import moe_gates, set_active
from prism_refactor.models.writer import ShardWriter
from prism_refactor.offload.cache import Counters
from prism_refactor.offload.manager import load_offloaded
from prism_refactor.offload.options import CacheBudget, LatencyTarget
from prism_refactor.offload.policies import POLICIES
from prism_refactor.offload.replay import Trace, belady, hit_rate

WIDER = 32
PROMPT, TOKENS, REQUESTS = 24, 40, 6
# MiB.
CONSTANT = 64
SYSTEMS = {
    "a": "accelerate, layers on disk",
    "b": "whole experts, LRU",
    "c": "sub-experts, LRU",
    "d": "sub-experts, best policy",
    "p": "as d, fetching ahead",
    "e": "as d, skipping for a target",
    "f": "as d, at the least k that is as good as b",
}


def widen(source: Path, target: Path) -> None:
    """A checkpoint with every expert's neurons repeated and their output weights divided: the same function."""
    shutil.copytree(source, target)
    writer = ShardWriter(target, 2**40)
    for path in sorted(target.glob("model*.safetensors")):
        tensors = load_file(path)
        path.unlink()
        experts = {name: value for name, value in tensors.items() if ".experts." in name}
        for name in tensors.keys() - experts:
            writer.add(name, tensors[name])
        # As in our checkpoints: experts begin at a block.
        writer.close_shard()
        for name, value in experts.items():
            writer.add(name, value.repeat_interleave(WIDER, 1) / WIDER if "down_proj" in name else value.repeat_interleave(WIDER, 0))
        writer.close_shard()
    writer.finish()
    config = json.loads((target / "config.json").read_text())
    config["intermediate_size"] *= WIDER
    if "prism" in config:
        config["prism"]["source"]["intermediate_size"] *= WIDER
    (target / "config.json").write_text(json.dumps(config))


def models(work: Path) -> tuple[Path, Path]:
    original, refactored = work / "original", work / "refactored"
    if not refactored.exists():
        work.mkdir(parents=True, exist_ok=True)
        narrow = work / "narrow"
        subprocess.run([Path(sys.executable).parent / "prism-refactor", EXAMPLE, narrow, "--overwrite", "--quiet"], check=True)
        widen(EXAMPLE, original)
        widen(narrow, refactored)
    return original, refactored


def texts(count: int) -> list[torch.Tensor]:
    """The beginnings of held-out documents, [1, PROMPT + TOKENS + 1] each."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    rows = []
    for line in (TEXT / "evaluation.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"][:2000]).input_ids
        if len(ids) > PROMPT + TOKENS:
            rows.append(torch.tensor([ids[: PROMPT + TOKENS + 1]]))
    return rows[:: max(len(rows) // count, 1)][:count]


@dataclass
class Outcome:
    """What decoding took: milliseconds per token of every text, logits and losses of every token of the first round."""

    ms: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.losses, dtype=torch.float64).mean().exp())


class Sampler(threading.Thread):
    """The largest resident memory while it is on."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.peak, self.on = psutil.Process(), 0, False

    def run(self) -> None:
        while True:
            if self.on:
                self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.002)


@torch.inference_mode()
def decode(model: Any, row: torch.Tensor, outcome: Outcome, keep: bool = True, before_token: Any = None) -> None:
    """Decode a text, a token at a time."""
    cache = DynamicCache(config=model.config)
    model(input_ids=row[:, :PROMPT], past_key_values=cache)
    seconds = 0.0
    for position in range(PROMPT, PROMPT + TOKENS):
        if before_token:
            before_token()
        start = time.perf_counter()
        logits = model(input_ids=row[:, position : position + 1], past_key_values=cache).logits[0, -1]
        seconds += time.perf_counter() - start
        if keep:
            outcome.logits.append(logits)
            outcome.losses.append(torch.nn.functional.cross_entropy(logits.float()[None], row[0, position + 1 : position + 2]).item())
    outcome.ms.append(seconds / TOKENS * 1e3)
    if hasattr(model, "offload"):
        model.offload.end_request()


def set_k(model: Any, k: int) -> None:
    """Sub-experts per token, or a quarter as many experts of the original."""
    if getattr(model.config, "prism", None):
        set_active(model, k)
    else:
        for gate in moe_gates(model):
            gate.top_k = k // 4


def accelerated(folder: Path, share: int, k: int, work: Path) -> tuple[Any, Any]:
    """accelerate's offload of whole layers to disk, as many in memory as the budget holds; and what drops its files from the page cache."""
    layers = 4
    there = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    there |= {f"model.layers.{layer}": "cpu" if layer < layers * share // 100 else "disk" for layer in range(layers)}
    offload = work / "accelerate"
    shutil.rmtree(offload, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=there, offload_folder=offload).eval()
    set_k(model, k)
    files = [path for path in [*offload.rglob("*"), *folder.glob("*.safetensors")] if path.is_file()]

    def drop() -> None:
        for path in files:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    return model, drop


def cached(folder: Path, share: int, k: int, **options: str) -> Any:
    model = load_offloaded(folder, CacheBudget(f"{share}%"), **options)
    set_k(model, k)
    return model


def reference(folder: Path, rows: list[torch.Tensor], k: int) -> Outcome:
    """All in memory."""
    if (folder / "prism.json").exists():
        model = load(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        for parameter in model.parameters():
            # As `load` does: where a tensor lies in memory is in the last bit of its products.
            parameter.data = parameter.data.clone()
    set_k(model, k)
    model.set_experts_implementation(EXPERTS)
    outcome = Outcome()
    decode(model, rows[0], Outcome())
    for row in rows:
        decode(model, row, outcome)
    return outcome


def recorded(folder: Path, rows: list[torch.Tensor], k: int, path: Path) -> Trace:
    model = cached(folder, 100, k, prefetch="none")
    with open(path, "w") as file:
        model.offload.record(file)
        for row in rows:
            decode(model, row, Outcome())
    model.offload.close()
    return Trace.load(path)


def load_all(share: int, systems: str, folders: tuple[Path, Path], ks: tuple[int, int], arguments: Any) -> tuple[dict[str, Any], Any]:
    """The models of the systems, and what must be done before each token of accelerate's."""
    (original, refactored), (k, enough) = folders, ks
    models: dict[str, Any] = {}
    drop: Any = None
    for system in systems.split(","):
        if system == "a":
            models[system], drop = accelerated(original, share, k, arguments.work)
        elif system in "bc":
            models[system] = cached(original if system == "b" else refactored, share, k, policy="lru", prefetch="none")
        else:
            ahead = arguments.prefetch if system == "p" else "none"
            models[system] = cached(refactored, share, enough if system == "f" else k, policy=arguments.policy, prefetch=ahead)
    return models, drop


def compare(
    share: int,
    systems: str,
    folders: tuple[Path, Path],
    rows: list[torch.Tensor],
    ks: tuple[int, int],
    resident: dict[str, Outcome],
    arguments: Any,
) -> None:
    """Every text through every system in turn, so that a drift of the machine meets them all; prints the table."""
    k, enough = ks
    models, drop = load_all(share, systems, folders, ks, arguments)
    warm = {system: Outcome() for system in models}
    for row in rows[:2]:
        for system, model in models.items():
            decode(model, row, warm[system])
    if "e" in models:
        # Half way from all in memory to d.
        target = (statistics.fmean(resident["refactored"].ms) + warm["d"].ms[-1]) / 2
        models["e"].offload.set_latency(LatencyTarget(target / 1e3, k // 2))
    sampler = Sampler()
    base = psutil.Process().memory_info().rss
    sampler.start()
    found = {system: Outcome() for system in models}
    before = {system: model.offload.counters for system, model in models.items() if system != "a"}
    for number in range(arguments.rounds):
        for row in rows:
            for system, model in models.items():
                sampler.on = system != "a"
                if system != "a" or number == 0:
                    decode(model, row, found[system], number == 0, drop if system == "a" else None)
    sampler.on = False
    above = (sampler.peak - base) / 2**20
    table = []
    for system, outcome in found.items():
        cells = [SYSTEMS[system], *timed(outcome, found.get("b", outcome))]
        if system != "a":
            cells += counted(models[system], before[system], len(outcome.ms) * TOKENS, enough if system == "f" else k)
            wanted = resident["original" if system == "b" else "refactored"].logits
            same = sum(torch.equal(one, other) for one, other in zip(outcome.logits, wanted, strict=True))
            cells += ["" if system == "f" else f"{same} of {len(wanted)}", f"{outcome.perplexity:.2f}"]
            models[system].offload.close()
        table.append(cells + [""] * (len(HEADERS) - len(cells)))
    print(f"fast memory for {share} % of the experts\n\n{markdown(HEADERS, table)}\n")
    print(f"{above:.0f} MiB of memory above budgets and models while decoding\n", flush=True)
    assert above <= CONSTANT, above
    shutil.rmtree(arguments.work / "accelerate", ignore_errors=True)


def timed(outcome: Outcome, base: Outcome) -> list[str]:
    """Median time of a token, and its ratio to that of the same text in another system."""
    ratios = sorted(one / other for one, other in zip(outcome.ms, base.ms, strict=False))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return [f"{statistics.median(outcome.ms):.1f}", f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"]


HEADERS = ["system", "ms per token", "x whole experts (quartiles)", "hit rate", "with late hits", "MiB per token (wasted)", "mean k"]
HEADERS += ["logits as in memory", "perplexity"]


def counted(model: Any, before: Counters, tokens: int, k: int) -> list[str]:
    counters = model.offload.counters.since(before)
    uses = counters.hits + counters.late_hits + counters.misses
    loaded = f"{counters.loaded_bytes / tokens / 2**20:.1f} ({counters.wasted_bytes / max(counters.loaded_bytes, 1):.0%})"
    mean_k = k - counters.skipped / tokens / model.offload.cache.store.layers
    return [f"{counters.hit_rate:.1%}", f"{(counters.hits + counters.late_hits) / uses:.1%}", loaded, f"{mean_k:.1f}"]


def print_policies(trace: Trace, shares: list[int]) -> None:
    total = trace.layers * trace.experts
    table = []
    for share in shares:
        slots = total * share // 100
        bound = hit_rate(trace, belady(trace), slots)
        rates = [hit_rate(trace, policy(trace.layers, trace.experts), slots) for policy in POLICIES.values()]
        table.append([f"{share} %", *(f"{rate:.1%}" for rate in rates), f"{bound:.1%}"])
    print(f"hit rates on the trace, no prefetch\n\n{markdown(['fast memory', *POLICIES, 'belady'], table)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--shares", default="25,50,75")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--policy", default="activation")
    parser.add_argument("--prefetch", default="router")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print_provenance()
    original, refactored = models(arguments.work)
    rows, k = texts(REQUESTS), arguments.k
    shares = [int(share) for share in arguments.shares.split(",")]
    resident = {"original": reference(original, rows, k), "refactored": reference(refactored, rows, k)}
    for name, outcome in resident.items():
        label = f"{name}, top {k // 4}" if name == "original" else f"{name}, k = {k}"
        print(f"all in memory, {label}: {statistics.median(outcome.ms):.1f} ms per token, perplexity {outcome.perplexity:.2f}")
    good = resident["original"].perplexity
    enough = next(fewer for fewer in range(1, k + 1) if fewer == k or reference(refactored, rows, fewer).perplexity <= good)
    print(f"the least k as good as the original at top {k // 4}: {enough}\n")
    for share in shares:
        compare(share, arguments.systems, (original, refactored), rows, (k, enough), resident, arguments)
    print_policies(recorded(refactored, rows, k, arguments.work / "trace.jsonl"), shares)


if __name__ == "__main__":
    main()
