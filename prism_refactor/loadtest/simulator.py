"""The engine on paper: the same schedulers, with a performance model in the place of the model."""

from collections.abc import Sequence
from dataclasses import dataclass

from prism_refactor.errors import UsageError
from prism_refactor.formats import Arrival
from prism_refactor.loadtest.workload import Served
from prism_refactor.serving.performance import PerformanceModel
from prism_refactor.serving.scheduling import SCHEDULERS, Job, Limits, step_k, take


@dataclass
class _Simulated:
    """A request in the simulation."""

    arrival: Arrival
    generated: int = 0
    context: int = 0
    sub_experts: int = 0
    first: float | None = None
    done: float | None = None

    def ran_tokens(self, job: Job, tokens: int, now: float) -> bool:
        """Note that some tokens ran; whether that was the last step of the request."""
        self.context += tokens
        if job.decoding or tokens == job.tokens:
            self.generated += 1
            self.first = now if self.first is None else self.first
            job.decoding, job.tokens = True, 1
        else:
            job.tokens -= tokens
        if self.generated < self.arrival.max_tokens:
            return False
        self.done = now
        return True

    def served(self, floor: int) -> Served:
        start = self.arrival.at
        first, done = self.first or 0.0, self.done or 0.0
        return Served(floor, self.sub_experts / self.context, self.generated, first - start, done - start)


def simulate(trace: Sequence[Arrival], scheduler: str, performance: PerformanceModel, limits: Limits) -> tuple[list[Served], float]:
    """Serve a trace in simulated time.

    Memory is simpler than the engine's: a request gets its whole KV cache when it starts, or waits for it; nothing is evicted, and no
    prefixes are shared.

    Args:
        trace: requests, by time.
        scheduler: one of `SCHEDULERS`.
        performance: gives the seconds of a step.
        limits: bounds of a step; `kv_tokens` None: no bound.

    Raises:
        UsageError: a request is longer than the KV cache.

    Returns:
        (how each request was served, in the order of the trace; seconds from the first request to the last token).
    """
    kv_tokens = limits.kv_tokens
    longest = max(arrival.prompt_tokens + arrival.max_tokens for arrival in trace)
    if kv_tokens is not None and longest > kv_tokens:
        raise UsageError(f"a request of {longest} tokens does not fit a KV cache of {kv_tokens} tokens")
    policy = SCHEDULERS[scheduler](limits, performance.cost)
    items = {str(number): _Simulated(arrival) for number, arrival in enumerate(trace)}
    jobs = {name: _job(name, item.arrival, performance.full_k) for name, item in items.items()}
    coming = list(reversed(jobs.values()))
    running: dict[str, Job] = {}
    waiting: list[Job] = []
    now, held = 0.0, 0
    while coming or waiting or running:
        while coming and coming[-1].arrival <= now:
            waiting.append(coming.pop())
        chosen = policy.step(list(running.values()), waiting if policy.room(running) else [], now)
        allowed = []
        for job in chosen:
            needed = items[job.id].arrival.prompt_tokens + items[job.id].arrival.max_tokens
            if job.id not in running:
                if kv_tokens is not None and held + needed > kv_tokens:
                    continue
                held += needed
                running[job.id] = job
            allowed.append(job)
        if running and waiting:
            waiting = [job for job in waiting if job.id not in running]
        taken = take(allowed, limits)
        if not taken:
            # Held back for a better batch, or nothing is here.
            now = max(now + limits.wait / 10, coming[-1].arrival if coming and not waiting else 0.0)
            continue
        now += _seconds(taken, items, policy.exact, performance)
        for job, tokens in taken:
            job.last_run = now
            if items[job.id].ran_tokens(job, tokens, now):
                del running[job.id]
                held -= items[job.id].arrival.prompt_tokens + items[job.id].arrival.max_tokens
    return [item.served(jobs[name].floor) for name, item in items.items()], now - trace[0].at


def _job(name: str, arrival: Arrival, full_k: int) -> Job:
    deadline = None if arrival.deadline is None else arrival.at + arrival.deadline
    k = arrival.k or full_k
    return Job(name, k, arrival.at, arrival.prompt_tokens, priority=arrival.priority, deadline=deadline, last_run=arrival.at)


def _seconds(taken: list[tuple[Job, int]], items: dict[str, _Simulated], exact: bool, performance: PerformanceModel) -> float:
    """Seconds of a step, whose sub-experts are noted."""
    ks = step_k(taken, exact)
    prefill = decode = sub_experts = context = 0
    for job, tokens in taken:
        items[job.id].sub_experts += tokens * ks[job.id]
        sub_experts += tokens * ks[job.id]
        prefill += 0 if job.decoding else tokens
        decode += job.decoding
        context += items[job.id].context
    return performance.predict_step(prefill, decode, sub_experts / (prefill + decode), context / len(taken))
