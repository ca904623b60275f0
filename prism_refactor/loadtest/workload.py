"""Requests to replay: made up from a seed or read from a file, and what is said of how they were served."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prism_refactor.errors import InputError
from prism_refactor.formats import Arrival

# The paper's floors: Normal(4, 2) whole experts of OLMoE's 8, here as shares of full k.
FLOOR_MEAN, FLOOR_DEVIATION = 0.5, 0.25


@dataclass(frozen=True)
class Served:
    """How a request was served; times in seconds after it came.

    Attributes:
        asked_k: its floor.
        served_k: mean sub-experts per token that it ran with.
        tokens: generated.
        first: when its first token was there; None if none was.
        done: when the last one was; None if it was refused or failed.
        error: why it was refused or failed.
    """

    asked_k: int
    served_k: float
    tokens: int
    first: float | None
    done: float | None
    error: str | None = None

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first (TPOT)."""
        if self.first is None or self.done is None or self.tokens < 2:
            return None
        return (self.done - self.first) / (self.tokens - 1)


@dataclass(frozen=True)
class Slo:
    """What makes an answer a good one: seconds to the first token, seconds per token after it; None: any."""

    first: float | None = None
    per_token: float | None = None

    def met(self, served: Served) -> bool:
        """Whether an answer was good."""
        if served.done is None or served.first is None:
            return False
        within_first = self.first is None or served.first <= self.first
        return within_first and (self.per_token is None or (served.per_token or 0.0) <= self.per_token)


def floors(full_k: int | None, mix: str | None) -> tuple[list[int], list[float]]:
    """Floors and their weights: `mix` as "k:weight,k:weight,...", or None for Normal(4, 2) of 8 experts scaled to the model.

    Args:
        full_k: the largest floor; None: not known, then there must be a mix.
        mix: see above.

    Raises:
        ValueError: the mix cannot be read, or has a k out of range.
    """
    if mix is None:
        if full_k is None:
            raise ValueError("the server does not say how many sub-experts its model has; write K:WEIGHT,...")
        ks = np.arange(1, full_k + 1)
        weights = np.exp(-0.5 * ((ks / full_k - FLOOR_MEAN) / FLOOR_DEVIATION) ** 2)
        return ks.tolist(), (weights / weights.sum()).tolist()
    pairs = [part.split(":") for part in mix.split(",")]
    ks_given, shares = [int(pair[0]) for pair in pairs], [float(pair[1]) if len(pair) > 1 else 1.0 for pair in pairs]
    if not all(1 <= k <= (full_k or k) for k in ks_given) or min(shares) < 0 or not sum(shares):
        raise ValueError(f"k must be 1 to {full_k or 'all'} and weights positive")
    return ks_given, shares


def poisson(requests: int, rate: float, sizes: tuple[int, int], floors: tuple[Sequence[int], Sequence[float]], seed: int) -> list[Arrival]:
    """A trace with exponential times between requests, and lengths that vary by a factor of two either way around their means.

    Args:
        requests: how many.
        rate: per second; infinite: all at once.
        sizes: mean length of a prompt, and mean tokens to generate.
        floors: and their weights, see `floors`.
        seed: equal seeds give equal traces; the lengths and floors do not depend on the rate.
    """
    times, others = random.Random(seed), random.Random(seed + 1)
    prompt_tokens, max_tokens = sizes

    def length(mean: int) -> int:
        return max(round(mean * others.triangular(0.5, 2.0, 0.5)), 1)

    trace, now = [], 0.0
    for _ in range(requests):
        now += times.expovariate(1.0) / rate
        trace.append(Arrival(now, length(prompt_tokens), length(max_tokens), others.choices(*floors)[0]))
    return trace


def read_trace(path: Path) -> list[Arrival]:
    """A trace from a .jsonl file: objects with at, prompt_tokens, max_tokens, and k, priority, deadline where wanted.

    Raises:
        InputError: a line holds no request.
    """
    trace = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            trace.append(Arrival.parse(line))
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}, line {number}: is no request of a trace: {error}") from None
    if not trace:
        raise InputError(f"{path}: has no requests")
    return sorted(trace, key=lambda arrival: arrival.at)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99; empty without values."""
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 90, 99)} if values else {}


def summary(served: Sequence[Served], seconds: float, prompt_tokens: int, slo: Slo) -> dict[str, Any]:
    """What a load test prints.

    Args:
        served: every request.
        seconds: from the first request to the last token.
        prompt_tokens: of the requests that were done.
        slo: what counts as good.
    """
    done = [item for item in served if item.done is not None]
    errors: dict[str, int] = {}
    for item in served:
        if item.done is None:
            errors[item.error or "no answer"] = errors.get(item.error or "no answer", 0) + 1
    generated = sum(item.tokens for item in done)
    return {
        "requests": len(served),
        "done": len(done),
        "errors": errors,
        "seconds": seconds,
        "requests_per_second": len(done) / seconds,
        "generated_tokens_per_second": generated / seconds,
        "tokens_per_second": (generated + prompt_tokens) / seconds,
        "goodput_requests_per_second": sum(slo.met(item) for item in done) / seconds,
        "goodput_share": sum(slo.met(item) for item in done) / len(served) if served else 0.0,
        "ttft": percentiles([item.first for item in done if item.first is not None]),
        "tpot": percentiles([item.per_token for item in done if item.per_token is not None]),
        "e2e": percentiles([item.done for item in done if item.done is not None]),
        "mean_asked_k": float(np.mean([item.asked_k for item in done])) if done else None,
        "mean_served_k": float(np.average([item.served_k for item in done])) if done else None,
        "below_floor": sum(item.served_k < item.asked_k - 1e-9 for item in done),
    }
