"""Throughput and latency of the schedulers, beside the original model served first come, first served; and MoE time against k.

    python benchmarks/schedulers.py WORK_DIR [--loads low,medium,high] [--systems per-token,...] [--rounds 1]

WORK_DIR keeps the models (1.7 GB each) and the measured performance, so that a second run starts at once. The model is a Mixtral with
random weights whose expert compute dominates: hidden 1,024, intermediate 3,584, 8 experts of which 2 are chosen, 4 layers, 352 million
parameters, float32; refactored with N = 4 into 32 sub-experts, k = 1 to 8. Random weights are fine for speed and say nothing of quality.

The trace is Poisson, the same for every system at a load: prompts of about 220 tokens and answers of about 37 (the ratio of the
conversations in Azure's published trace is 5 to 1), every answer of its full length, floors Normal(4, 2) clipped to 1 to 8, the paper's.
The original model has one quality, its own, for everybody. A round serves the trace with every system in turn; figures are medians over
rounds, and the ratio to the original is taken within each round, because a shared machine drifts.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import EXAMPLE, markdown, print_provenance
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

from prism_refactor.formats import Arrival, LatencyGrid
from prism_refactor.loadtest.workload import Served, Slo, floors, poisson, summary
from prism_refactor.models.loading import load
from prism_refactor.models.modeling_prism import set_active
from prism_refactor.serving.engine import Chunk, Engine, GenerationRequest, Step, run_in_thread
from prism_refactor.serving.performance import PerformanceModel, Sampling, fit, powers
from prism_refactor.serving.scheduling import SCHEDULERS, Limits

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 1024, 3584, 8, 2, 4
PROMPT, ANSWER = 190, 32
LIMITS = Limits(tokens=512, requests=256, wait=1.0)
KV_TOKENS = 256 * 384
# Requests per second as a share of what the original model serves when it never waits, and requests of the trace.
LOADS = {"low": (0.3, 60), "medium": (0.7, 120), "high": (3.0, 240)}
SLO = Slo(first=10.0, per_token=1.0)
SEED = 7
ORIGINAL = "original, fifo"


def original_model(folder: Path) -> None:
    """A random Mixtral with the example's tokenizer."""
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(SEED)
    MixtralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder)


def models(work: Path) -> tuple[Path, Path]:
    original, refactored = work / "original", work / "refactored"
    if not (original / "model.safetensors").exists():
        original_model(original)
    if not (refactored / "prism.json").exists():
        # Random weights have no structure to find, so the fastest partition and little text do.
        options = ["--solver", "contiguous", "--num-samples", "16", "--tokens-per-expert", "256", "--overwrite"]
        subprocess.run([Path(sys.executable).parent / "prism-refactor", original, refactored, *options], check=True)
    return original, refactored


def load_model(folder: Path) -> Any:
    if folder.name == "refactored":
        return load(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def measured(folder: Path) -> PerformanceModel:
    """The performance model of the refactored model, measured once."""
    if (known := PerformanceModel.load(folder)) is not None:
        return known
    engine = Engine(load_model(folder), "fifo", replace(LIMITS, kv_tokens=LIMITS.requests * 512))
    decode = LatencyGrid(powers(LIMITS.requests), [1, 2, 4, 6, 8], [16, 256])
    prefill = LatencyGrid(powers(LIMITS.tokens, 16), [1, 2, 4, 6, 8], [0, 256])
    about = {"device": "cpu", "dtype": "float32", "threads": torch.get_num_threads()}
    performance = fit(engine.measure, engine.full_k, {"decode": decode, "prefill": prefill}, Sampling(12, 3), about)
    engine.close()
    performance.save(folder)
    return performance


@torch.no_grad()
def moe_seconds(model: Any, tokens: int, k: int, repeats: int = 7) -> float:
    """Median milliseconds of all MoE blocks of a forward pass over some random hidden states."""
    set_active(model, k)
    blocks = [layer.mlp for layer in model.model.layers]
    inputs = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for block in blocks:
            block(inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e3


def print_moe(folder: Path) -> None:
    model = load_model(folder)
    rows = []
    for tokens in (1, 4, 16, 64, 256, 512):
        full, *fewer = [moe_seconds(model, tokens, k) for k in (8, 6, 4, 2)]
        rows.append([tokens, f"{full:.1f}", *(f"{part:.1f} ({part / full:.2f})" for part in fewer)])
    print(markdown(["tokens", "k = 8 (full): ms", "k = 6", "k = 4", "k = 2"], rows) + "\n", flush=True)


def replay(engine: Engine, trace: list[Arrival], full_k: int) -> tuple[list[Served], float]:
    """Serve a trace, each request when it comes."""
    results: dict[str, Served] = {}
    done = threading.Semaphore(0)
    firsts: dict[str, float] = {}
    start = time.monotonic()

    def deliver(chunk: Chunk, arrival: Arrival, name: str) -> None:
        now = time.monotonic() - start - arrival.at
        if chunk.tokens:
            firsts.setdefault(name, now)
        if chunk.finish:
            finished = now if chunk.finish == "length" else None
            k = (arrival.k or full_k) if engine.full_k > 1 else full_k
            served = chunk.served_k if engine.full_k > 1 else full_k
            results[name] = Served(k, served, arrival.max_tokens, firsts.get(name), finished, chunk.error)
            done.release()

    for number, arrival in enumerate(trace):
        time.sleep(max(start + arrival.at - time.monotonic(), 0))
        tokens = torch.randint(1, 4096, (arrival.prompt_tokens,), generator=torch.Generator().manual_seed(number)).tolist()
        k = arrival.k if engine.full_k > 1 else None
        request = GenerationRequest(tokens, k, arrival.max_tokens, stop_at_eos=False)
        engine.submit(request, partial(deliver, arrival=arrival, name=str(number)))
    for _ in trace:
        done.acquire()
    return [results[str(number)] for number in range(len(trace))], time.monotonic() - start


def run(folder: Path, scheduler: str, performance: PerformanceModel | None, trace: list[Arrival], full_k: int) -> dict[str, Any]:
    steps: list[Step] = []
    engine = run_in_thread(lambda: Engine(load_model(folder), scheduler, replace(LIMITS, kv_tokens=KV_TOKENS), performance, steps.append))
    engine.start()
    served, seconds = replay(engine, trace, full_k)
    engine.close()
    result = summary(served, seconds, sum(arrival.prompt_tokens for arrival in trace), SLO)
    result["step"] = statistics.fmean(step.seconds for step in steps)
    result["scheduling_share"] = sum(step.scheduling for step in steps) / sum(step.seconds for step in steps)
    result["tokens_per_step"] = statistics.fmean(step.prefill + step.decode for step in steps)
    known = [step for step in steps if step.predicted]
    result["prediction_error"] = statistics.median(abs(step.predicted - step.seconds) / step.seconds for step in known) if known else None
    assert result["below_floor"] == 0, result
    assert result["done"] == len(trace), result
    return result


def row(name: str, results: list[dict[str, Any]], originals: list[dict[str, Any]]) -> list[str]:
    """Medians over the rounds, and the range of the ratio."""

    def middle(key: str) -> float:
        return statistics.median(result[key] for result in results)

    def both(kind: str) -> str:
        return " / ".join(f"{statistics.median(result[kind][share] for result in results):.2f}" for share in ("p50", "p99"))

    speed = "generated_tokens_per_second"
    ratios = [result[speed] / original[speed] for result, original in zip(results, originals, strict=True)]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return [
        name,
        f"{middle('tokens_per_second'):.0f}",
        f"{middle(speed):.1f}",
        f"{statistics.median(ratios):.2f}{spread}",
        both("ttft"),
        both("tpot"),
        both("e2e"),
        f"{middle('goodput_share'):.0%}",
        f"{middle('mean_asked_k'):.2f} / {middle('mean_served_k'):.2f}",
        f"{middle('step') * 1e3:.0f}",
        f"{middle('scheduling_share'):.2%}",
        "" if results[0]["prediction_error"] is None else f"{middle('prediction_error'):.0%}",
    ]


HEADERS = [
    "system",
    "tokens/s",
    "generated/s",
    "x original",
    "TTFT p50 / p99, s",
    "TPOT p50 / p99, s",
    "end to end p50 / p99, s",
    f"good (TTFT <= {SLO.first:.0f} s, TPOT <= {SLO.per_token:.0f} s)",
    "mean k asked / served",
    "step, ms",
    "scheduler's share",
    "prediction off by",
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--systems", default=",".join(SCHEDULERS))
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print_provenance()
    original, refactored = run_in_thread(models, arguments.work)
    performance = run_in_thread(measured, refactored)
    full_k = performance.full_k
    print(f"performance model: off by {performance.error():.1%} (median) and {performance.error(0.9):.1%} (p90) on held-out points\n")
    run_in_thread(print_moe, refactored)
    # What the original does when it never waits gives the scale of the loads.
    ks, weights = floors(full_k, None)
    at_once = poisson(96, float("inf"), (PROMPT, ANSWER), (ks, weights), SEED + 1)
    capacity = run(original, "fifo", None, at_once, full_k)["requests_per_second"]
    print(f"the original serves {capacity:.2f} requests/s when all are there at once\n")
    for load_name in arguments.loads.split(","):
        share, requests = LOADS[load_name]
        trace = poisson(requests, share * capacity, (PROMPT, ANSWER), (ks, weights), SEED)
        results: dict[str, list[dict[str, Any]]] = {ORIGINAL: []} | {scheduler: [] for scheduler in arguments.systems.split(",")}
        for _ in range(arguments.rounds):
            results[ORIGINAL].append(run(original, "fifo", None, trace, full_k))
            for scheduler in arguments.systems.split(","):
                results[scheduler].append(run(refactored, scheduler, performance, trace, full_k))
        rows = [row(name, found, results[ORIGINAL]) for name, found in results.items()]
        print(f"{load_name}: {share * capacity:.2f} requests/s, {len(trace)} requests\n")
        print(markdown(HEADERS, rows) + "\n", flush=True)


if __name__ == "__main__":
    main()
