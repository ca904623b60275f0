"""`prism-run`: generate with a model that does not fit in memory."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import INPUT_FOLDER, OFFLOAD_OPTIONS, Finite, OutputFile, Share, add
from prism_refactor.errors import PrismError, UsageError
from prism_refactor.formats import PrismConfig
from prism_refactor.offload.options import CacheBudget, LatencyTarget

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from prism_refactor.models.checkpoint import Checkpoint
    from prism_refactor.offload.cache import Counters

# Prompt tokens of one forward pass: a long prompt must not need more memory than its answer.
CHUNK = 256


@command()
@click.argument("refactored_dir", type=INPUT_FOLDER)
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text to go on with; repeat for several, one after the other.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, help="Tokens to generate for each.")
@click.option("--k", type=click.IntRange(1), help="Sub-experts per token.  [default: all]")
@click.option("--budget", type=Share(), help="In place of --k: share of the sub-experts that tokens run on average, each what it needs.")
@click.option("--fast-memory", default="50%", help="Memory for sub-experts: bytes (2GiB) or a share of all of them (25%).")
@add(OFFLOAD_OPTIONS)
@click.option("--latency-target", type=Finite(0, min_open=True), help="Milliseconds per token; skips sub-experts to meet it.")
@click.option("--k-min", type=click.IntRange(1), help="With --latency-target: never fewer sub-experts per token.  [default: half of --k]")
@click.option("--trace", type=OutputFile(), help="Record the routing as JSON lines, for prism-replay.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where the model computes, and fast memory is.")
@click.option("--json", "as_json", is_flag=True, help="Print answers and figures as JSON.")
def main(reporter: Reporter, refactored_dir: Path, prompts: tuple[str, ...], trace: Path | None, as_json: bool, **options: Any) -> None:
    """Generate text, greedily, with the checkpoint in REFACTORED_DIR, of whose sub-experts only --fast-memory is in memory.

    Everything else of the model is in memory; sub-experts are read from the checkpoint when they are needed, or a little before. The
    text is the same as with the whole model in memory, unless --latency-target allows to skip sub-experts. Figures go to stderr.
    """
    from transformers import GenerationConfig

    from prism_refactor.calibration.text import load_tokenizer
    from prism_refactor.files import output_file
    from prism_refactor.models.checkpoint import Checkpoint
    from prism_refactor.models.loading import end_tokens
    from prism_refactor.offload.manager import load_offloaded

    if options["k_min"] is not None and options["latency_target"] is None:
        raise UsageError("--k-min: belongs to --latency-target")
    if trace is not None and refactored_dir.resolve() in trace.resolve().parents:
        raise UsageError(f"--trace {trace}: is in the checkpoint's folder; choose another")
    checkpoint = Checkpoint(refactored_dir)
    prism = PrismConfig.of(checkpoint.config)
    if prism is None:
        raise UsageError(f"{refactored_dir}: is not a refactored checkpoint; make one with prism-refactor")
    k = _mean_k(prism, options)
    tokenizer = load_tokenizer(refactored_dir)
    encoded = [_encode(tokenizer, prompt, checkpoint, options["max_new_tokens"]) for prompt in prompts]
    model = load_offloaded(
        refactored_dir, CacheBudget(options["fast_memory"]), options["policy"], options["prefetch"], options["read"], options["device"]
    )
    # Of generation_config.json what ends a text; how to search and sample is not asked there.
    ends = end_tokens(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=0)
    _set_active(model, k, options["budget"])
    store, slots = model.offload.cache.store, model.offload.cache.slots
    total = store.layers * store.experts
    reporter.line(
        f"{slots} of {total} sub-experts fit in fast memory, {slots * store.sub_expert_bytes / 2**20:,.0f} MiB", slots=slots, total=total
    )
    if options["latency_target"] is not None:
        model.offload.set_latency(LatencyTarget(options["latency_target"] / 1e3, options["k_min"] or max(k // 2, 1)))
    answers, failed = [], None
    with ExitStack() as stack:
        stack.callback(model.offload.close)
        if trace is not None:
            model.offload.record(stack.enter_context(open(stack.enter_context(output_file(trace)), "w", encoding="utf-8")))
        for prompt, ids in zip(prompts, encoded, strict=True):
            try:
                answers.append(_answer(reporter, model, tokenizer, ids, options["max_new_tokens"], k, as_json) | {"prompt": prompt})
            except PrismError as error:
                # The others may not need what could not be read.
                failed = error
                reporter.notice(str(error), "error", prompt=prompt)
                answers.append({"prompt": prompt, "error": str(error)})
            model.offload.end_request()
    if as_json:
        click.echo(json.dumps({"k": k, "budget": options["budget"], "slots": slots, "sub_experts": total, "answers": answers}, indent=2))
    if failed is not None:
        raise click.exceptions.Exit(failed.exit_code)


def _mean_k(prism: PrismConfig, options: dict[str, Any]) -> int:
    """Sub-experts per token, of a budget the mean, rounded up.

    Raises:
        UsageError: the options do not fit each other or the checkpoint.
    """
    full, k, budget = prism.max_active, options["k"], options["budget"]
    if budget is not None and k is not None:
        raise UsageError("--budget: takes the place of --k; leave one of them out")
    if budget is not None and not prism.has_router:
        raise UsageError("--budget: the checkpoint has no sub-expert router; use --k")
    k = k or (full if budget is None else math.ceil(budget * full))
    if k > full:
        raise UsageError(f"--k {k}: choose 1 to {full}")
    if (options["k_min"] or 1) > k:
        raise UsageError(f"--k-min {options['k_min']}: is more than the {k} sub-experts of a token; choose 1 to {k}")
    return k


def _set_active(model: Any, k: int, budget: float | None) -> None:
    from prism_refactor.models.modeling_prism import set_active

    if budget is None:
        set_active(model, k)
        return
    if not model.prism_active.has_thresholds:
        raise UsageError("--budget: the checkpoint was written before there were budgets; refactor it again, or use --k")
    set_active(model, budget=budget)


def _encode(tokenizer: "PreTrainedTokenizerBase", prompt: str, checkpoint: "Checkpoint", new: int) -> "torch.Tensor":
    from prism_refactor.calibration.text import check_tokens

    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("--prompt: is not UTF-8") from None
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    most = checkpoint.config.get_text_config().max_position_embeddings
    if not ids.shape[1]:
        raise UsageError("--prompt: is empty")
    check_tokens(checkpoint, tokenizer, int(ids.max()))
    if ids.shape[1] + new > most:
        raise UsageError(f"--prompt: {ids.shape[1]} tokens and {new} to generate are more than the model's {most}; shorten one")
    return ids


def _answer(
    reporter: Reporter, model: Any, tokenizer: "PreTrainedTokenizerBase", ids: "torch.Tensor", new: int, k: int, quiet: bool
) -> dict[str, Any]:
    """Generate for one prompt; its text and figures, which are also reported."""
    import torch

    from prism_refactor.cli.streaming import Clock

    clock, before = Clock(tokenizer, quiet), model.offload.counters
    start = time.perf_counter()
    with torch.inference_mode(), _active_of(model) as active:
        output = model.generate(
            ids.to(model.device),
            # Nothing is padded; without it transformers looks for padding in the prompt.
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=new,
            do_sample=False,
            streamer=clock,
            prefill_chunk_size=CHUNK,
        )
    # The streamer is given the prompt first.
    times = clock.times[1:]
    counters = model.offload.counters.since(before)
    # The last passes run one new token each. An answer of one token has none of these: then the prompt's last pass counts.
    decoding = active[-max(len(times) - 1, 1) :]
    figures = {
        "text": tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "tokens": len(times),
        "first_token_seconds": times[0] - start,
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
        "hit_rate": counters.hit_rate,
        "mean_k": sum(decoding) / len(decoding) if decoding else k,
        **asdict(counters),
    }
    reporter.line(_describe(figures, counters, k), **{key: value for key, value in figures.items() if key != "text"})
    return figures


@contextmanager
def _active_of(model: Any) -> Iterator[list[float]]:
    """Give the sub-experts that a token runs in a layer, mean of every forward pass, as they come; none without two-level routing."""
    active: list[float] = []
    routing = getattr(model, "prism_active", None)
    if routing is None:
        yield active
        return

    def begin(*_: Any) -> None:
        routing.ran = 0

    def end(*_: Any) -> None:
        active.append(routing.ran.double().mean().item() / len(routing.per_layer))

    hooks = model.register_forward_pre_hook(begin), model.register_forward_hook(end)
    try:
        yield active
    finally:
        for hook in hooks:
            hook.remove()
        routing.ran = None


def _describe(figures: dict[str, Any], counters: "Counters", k: int) -> str:
    speed = figures["tokens_per_second"]
    parts = [
        f"{figures['tokens']} tokens" + (f", {speed:.1f} tokens/s" if speed else ""),
        f"first after {figures['first_token_seconds']:.2f} s",
        f"hit rate {figures['hit_rate']:.1%}",
        f"{counters.late_hits} late",
        f"{counters.loaded_bytes / 2**20:,.0f} MiB loaded, {counters.wasted_bytes / 2**20:,.0f} of them for nothing",
    ]
    if counters.skipped:
        parts.append(f"{counters.skipped} sub-experts skipped")
    if figures["mean_k"] != k:
        parts.append(f"{figures['mean_k']:.1f} sub-experts per token and layer on average")
    return "; ".join(parts)
