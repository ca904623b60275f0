"""Latency of a token when only some of the experts fit in fast memory: accelerate, whole experts, sub-experts, prefetch, skipping.

    python benchmarks/offload.py WORK_DIR [--rounds 3] [--systems a,b,c,d,e,f] [--shares 25,50,75] [--k 16]

The model is examples/olmoe-tiny, whose router is trained, with experts 32 times as wide: every neuron is there 32 times with 1/32 of its
output weights. That computes what the example computes and routes as it does, and an expert is 12 MiB as in OLMoE-1B-7B; 4 layers, 16
experts, top 4, bf16, 805 MB of experts; refactored with N = 4. WORK_DIR keeps both. At k below 16 the original runs its top k / 4.

Text the model was not trained on is decoded token by token after a prompt (the next token is the text's, so that every system
decodes the same and routing is that of real text). Slow memory is the checkpoint's files, and cold: ours are read with O_DIRECT, past the
page cache; accelerate maps files, which are dropped from the page cache before every token (posix_fadvise). A sampler watches the
resident memory: what it is when the model is loaded, with the budget taken, + 64 MiB is the bound.
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
from common import EXAMPLE, markdown, print_provenance
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from routers import EXPERTS, moe_gates, set_active
from serving.engine import load
from serving.offload import POLICIES, Elastic, FastMemory, load_offloaded
from serving.offload.replay import Trace, belady, hit_rate

WIDER = 32
PROMPT, TOKENS, REQUESTS = 24, 40, 6
CONSTANT = 64 * 2**20
SYSTEMS = {
    "a": "accelerate, layers on disk",
    "b": "whole experts, LRU",
    "c": "sub-experts, LRU",
    "d": "sub-experts, best policy and prefetch",
    "e": "as d, skipping for a target",
    "f": "as d, at the least k that is as good as b",
}
TEXT = EXAMPLE.parents[1] / "calibration" / "data"


def widen(source: Path, target: Path) -> None:
    """A checkpoint with every expert's neurons repeated and their output weights divided: the same function."""
    shutil.copytree(source, target)
    for path in target.glob("model*.safetensors"):
        tensors = load_file(path)
        for name, value in tensors.items():
            if ".experts." in name and ("gate_proj" in name or "up_proj" in name):
                tensors[name] = value.repeat_interleave(WIDER, 0)
            elif ".experts." in name:
                tensors[name] = value.repeat_interleave(WIDER, 1) / WIDER
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})
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
    """What decoding took: seconds of every token, logits [tokens, V], and what the cache counted."""

    seconds: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    hit_rate: float = 0.0
    with_late: float = 0.0
    loaded: float = 0.0
    wasted: float = 0.0
    mean_k: float = 0.0
    above_budget: float = 0.0


class Sampler(threading.Thread):
    """The largest resident memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.peak, self.on = psutil.Process(), 0, True

    def run(self) -> None:
        while self.on:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.002)


@torch.inference_mode()
def decode(model: Any, rows: list[torch.Tensor], outcome: Outcome, before_token: Any = None) -> None:
    """Decode every text, a token at a time; the first one is warm-up."""
    for number, row in enumerate(rows):
        cache = DynamicCache(config=model.config)
        model(input_ids=row[:, :PROMPT], past_key_values=cache)
        for position in range(PROMPT, PROMPT + TOKENS):
            if before_token:
                before_token()
            start = time.perf_counter()
            logits = model(input_ids=row[:, position : position + 1], past_key_values=cache).logits[0, -1]
            if number:
                outcome.seconds.append(time.perf_counter() - start)
            outcome.logits.append(logits)
            outcome.losses.append(torch.nn.functional.cross_entropy(logits.float()[None], row[0, position + 1 : position + 2]).item())
        if hasattr(model, "offload"):
            model.offload.end_request()


def accelerated(folder: Path, share: int, rows: list[torch.Tensor], k: int, work: Path) -> Outcome:
    """accelerate's offload of whole layers to disk, as many in memory as the budget holds."""
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

    outcome = Outcome()
    decode(model, rows[:3], outcome, drop)
    shutil.rmtree(offload, ignore_errors=True)
    return outcome


def set_k(model: Any, k: int) -> None:
    """Sub-experts per token, or a quarter as many experts of the original."""
    if getattr(model.config, "prism", None):
        set_active(model, k)
    else:
        for gate in moe_gates(model):
            gate.top_k = k // 4


def cached(folder: Path, share: int, rows: list[torch.Tensor], k: int, elastic: Elastic | None = None, **options: str) -> Outcome:
    model = load_offloaded(folder, FastMemory(f"{share}%"), **options)
    set_k(model, k)
    model.offload.set_elastic(elastic)
    outcome, sampler = Outcome(), Sampler()
    store, base = model.offload.cache.store, psutil.Process().memory_info().rss
    sampler.start()
    decode(model, rows[:1], Outcome())
    before = model.offload.counters
    decode(model, rows, outcome)
    sampler.on = False
    sampler.join()
    counters = model.offload.counters.since(before)
    model.offload.close()
    tokens = len(rows) * TOKENS
    uses = counters.hits + counters.late_hits + counters.misses
    outcome.hit_rate, outcome.with_late = counters.hit_rate, (counters.hits + counters.late_hits) / uses
    outcome.loaded, outcome.wasted = counters.loaded_bytes / tokens / 2**20, counters.wasted_bytes / max(counters.loaded_bytes, 1)
    outcome.mean_k = k - counters.skipped / tokens / store.layers
    # The cache's memory is taken when it is made, so that it is in the base.
    outcome.above_budget = sampler.peak - base
    assert outcome.above_budget <= CONSTANT, f"{outcome.above_budget / 2**20:.0f} MiB above the budget"
    return outcome


def reference(folder: Path, rows: list[torch.Tensor], k: int) -> Outcome:
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
    decode(model, rows[:1], Outcome())
    decode(model, rows, outcome)
    return outcome


def recorded(folder: Path, rows: list[torch.Tensor], k: int, path: Path) -> Trace:
    model = load_offloaded(folder, FastMemory("100%"), prefetch="none")
    set_active(model, k)
    with open(path, "w") as file:
        model.offload.record(file)
        decode(model, rows, Outcome())
    model.offload.close()
    return Trace.load(path)


def perplexity(outcome: Outcome) -> float:
    return float(torch.tensor(outcome.losses, dtype=torch.float64).mean().exp())


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
    resident = {"original": reference(original, rows, k), "refactored": reference(refactored, rows, k)}
    best = {"policy": arguments.policy, "prefetch": arguments.prefetch}
    for name, outcome in resident.items():
        label = f"{name}, top {k // 4}" if name == "original" else f"{name}, k = {k}"
        print(f"all in memory, {label}: {statistics.fmean(outcome.seconds) * 1e3:.1f} ms per token, ppl {perplexity(outcome):.2f}")
    enough = next(
        fewer
        for fewer in range(1, k + 1)
        if perplexity(reference(refactored, rows, fewer)) <= perplexity(resident["original"]) or fewer == k
    )
    print(f"the least k as good as the original at top {k // 4}: {enough}\n")
    for share in map(int, arguments.shares.split(",")):
        found: dict[str, list[Outcome]] = {system: [] for system in arguments.systems.split(",")}
        for _ in range(arguments.rounds):
            for system, outcomes in found.items():
                if system == "a":
                    outcomes.append(accelerated(original, share, rows, k, arguments.work))
                elif system == "b":
                    outcomes.append(cached(original, share, rows, k, policy="lru", prefetch="none"))
                elif system == "c":
                    outcomes.append(cached(refactored, share, rows, k, policy="lru", prefetch="none"))
                elif system == "d":
                    outcomes.append(cached(refactored, share, rows, k, **best))
                elif system == "f":
                    outcomes.append(cached(refactored, share, rows, enough, **best))
                else:
                    # Half way from all in memory to d.
                    fastest = statistics.fmean(resident["refactored"].seconds)
                    target = (fastest + statistics.fmean(found["d"][-1].seconds)) / 2
                    outcomes.append(cached(refactored, share, rows, k, Elastic(target, k // 2), **best))
        print_table(share, found, resident)
    trace = recorded(refactored, rows, k, arguments.work / "trace.jsonl")
    print_policies(trace, [int(share) for share in arguments.shares.split(",")])


def print_table(share: int, found: dict[str, list[Outcome]], resident: dict[str, Outcome]) -> None:
    table = []
    for system, outcomes in found.items():
        means = [statistics.fmean(outcome.seconds) * 1e3 for outcome in outcomes]
        medians = statistics.median(statistics.median(outcome.seconds) * 1e3 for outcome in outcomes)
        ratios = [mean / (statistics.fmean(base.seconds) * 1e3) for mean, base in zip(means, found.get("b", outcomes), strict=True)]
        last = outcomes[-1]
        wanted = resident["original" if system in "ab" else "refactored"]
        same = [torch.equal(a, b) for a, b in zip(last.logits, wanted.logits, strict=False)]
        table.append(
            [
                SYSTEMS[system],
                f"{statistics.median(means):.1f} / {medians:.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                *(["", "", "", ""] if system == "a" else _counted(outcomes)),
                "" if system in "af" else "all the same" if all(same) else f"{sum(same)} of {len(same)}",
                f"{perplexity(last):.2f}" if system != "a" else "",
                f"{last.mean_k:.1f}" if last.mean_k else "",
            ]
        )
    headers = [
        "system",
        "ms per token, mean / median",
        "x whole experts",
        "hit rate",
        "with late hits",
        "MiB per token (wasted)",
        "MiB above budget",
    ]
    headers += ["logits as in memory", "perplexity", "mean k"]
    print(f"fast memory for {share} % of the experts\n\n{markdown(headers, table)}\n", flush=True)


def _counted(outcomes: list[Outcome]) -> list[str]:
    def middle(name: str) -> float:
        return statistics.median(getattr(outcome, name) for outcome in outcomes)

    above = max(outcome.above_budget for outcome in outcomes) / 2**20
    return [f"{middle('hit_rate'):.1%}", f"{middle('with_late'):.1%}", f"{middle('loaded'):.1f} ({middle('wasted'):.0%})", f"{above:.0f}"]


def print_policies(trace: Trace, shares: list[int]) -> None:
    total = trace.layers * trace.experts
    table = []
    for share in shares:
        slots = total * share // 100
        bound = hit_rate(trace, belady(trace), slots)
        rates = [hit_rate(trace, policy(trace.layers, trace.experts), slots) for policy in POLICIES.values()]
        table.append([f"{share} %", *(f"{rate:.1%}" for rate in rates), f"{bound:.1%}"])
    print(f"hit rates on the trace, no prefetch\n\n{markdown(['fast memory', *POLICIES, 'belady'], table)}")


if __name__ == "__main__":
    main()
