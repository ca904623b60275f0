"""What a MoE block costs, split and not: milliseconds at every number of tokens, and the share of the two-level router.

    python benchmarks/cost.py [--hidden 2048] [--neurons 1024] [--experts 32] [--top-k 8] [--sub-experts 4,8,16] [--tokens 1,16,256]

A block of random float32 weights of that size. "whole" are the original's experts, "split" its sub-experts, in the same memory, at full
k, "half" at half of it, each run by transformers' grouped product ("grouped") and by this project's loop ("loop"). "router" is the
two-level router at half of k, stand-ins for what is dropped included, "budget" the same within a budget of a half. The last columns divide
by the faster of "grouped" and "loop". Medians of nine rounds, in each of which everything runs once; one round before them is thrown away.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import markdown, print_provenance
from transformers import AutoModelForCausalLM, OlmoeConfig

from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.modeling_prism import TwoLevelRouter
from prism_refactor.routing.compensation import map_rank

ROUNDS = 9
GROUPED = "grouped_mm"


def experts_module(hidden: int, neurons: int, count: int, top_k: int) -> Any:
    """A fused experts module of OLMoE's with random weights."""
    config = OlmoeConfig(
        hidden_size=hidden,
        intermediate_size=neurons,
        num_experts=count,
        num_experts_per_tok=top_k,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        num_key_value_heads=1,
        vocab_size=64,
    )
    experts: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.layers[0].mlp.experts
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.02)
    return experts


def random_router(hidden: int, neurons: int, count: int, size: int, top_k: int) -> TwoLevelRouter:
    """A linear two-level router of random tensors; its thresholds let half of the sub-experts run."""
    rank, full = map_rank(hidden, neurons, top_k), top_k * size
    tensors = {
        "weight": torch.randn(count, size, hidden) / hidden**0.5,
        "bias": torch.zeros(count, size),
        "ceiling": torch.full((count, size), 10.0),
        "compensation": torch.randn(2, count, size, hidden),
        "scale": torch.ones(full),
        "map_in": torch.randn(rank, hidden),
        "map_out": torch.randn(hidden, rank),
        "threshold": torch.zeros(full),
    }
    router = TwoLevelRouter(None, count, size, 1, "linear", tensors)
    inputs, weights, experts = routing(1024, hidden, count, top_k)
    needs = router.need(router.rank(inputs, weights, experts))
    router.threshold = torch.full((full,), needs.median().item())
    return router


def routing(tokens: int, hidden: int, count: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random inputs [T, H], weights [T, K] and experts int64 [T, K]."""
    weights, experts = torch.rand(tokens, count).topk(top_k)
    return torch.randn(tokens, hidden), weights / weights.sum(1, keepdim=True), experts


def timed(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of each, medians."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(each[1:]) for name, each in seconds.items()}


@torch.inference_mode()
def main(hidden: int, neurons: int, count: int, top_k: int, sizes: list[int], tokens: list[int]) -> None:
    whole = experts_module(hidden, neurons, count, top_k)

    def by(implementation: str, experts: Any, *arguments: torch.Tensor) -> Callable[[], Any]:
        def run() -> Any:
            experts.config._experts_implementation = implementation
            return experts(*arguments)

        return run

    rows = []
    for size in sizes:
        full = top_k * size
        split, router = experts_module(hidden, neurons // size, count * size, full), random_router(hidden, neurons, count, size, top_k)
        for name, value in split.named_parameters():
            # The place of two copies in memory would change the times by more than the splitting does.
            value.data = getattr(whole, name).data.view(value.shape)
        for number in tokens:
            inputs, weights, experts = routing(number, hidden, count, top_k)
            all_weights, all_experts, _ = router(inputs, weights, experts, full)
            half_weights, half_experts, _ = router(inputs, weights, experts, full // 2)
            runs = {
                f"{name}, {label}": by(implementation, module, inputs, chosen, shares)
                for label, implementation in (("grouped", GROUPED), ("loop", EXPERTS))
                for name, module, chosen, shares in (
                    ("whole", whole, experts, weights),
                    ("split", split, all_experts, all_weights),
                    ("half", split, half_experts, half_weights),
                )
            }
            runs["router"] = functools.partial(router, inputs, weights, experts, full // 2)
            runs["budget"] = functools.partial(router, inputs, weights, experts, full, budget=0.5)
            found = timed(runs)
            best = {name: min(found[f"{name}, grouped"], found[f"{name}, loop"]) for name in ("whole", "split", "half")}
            ratios = [f"{best['split'] / best['whole']:.2f}", f"{best['half'] / best['split']:.2f}"]
            shares = [f"{found[name] / best['split']:.1%}" for name in ("router", "budget")]
            rows.append([size, number, *(f"{value:.1f}" for value in found.values()), *ratios, *shares])
    header = ["N", "tokens", *found, "split / whole", "half / split", "router / split", "budget / split"]
    print(f"hidden {hidden}, {count} experts of {neurons} neurons, {top_k} a token; milliseconds\n")
    print(markdown(header, rows))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--neurons", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--sub-experts", type=numbers, default=[4, 8, 16])
    parser.add_argument("--tokens", type=numbers, default=[1, 16, 256])
    given = parser.parse_args()
    torch.manual_seed(0)
    print_provenance()
    main(given.hidden, given.neurons, given.experts, given.top_k, given.sub_experts, given.tokens)
