"""Which requests take part in the next step of the engine, and at which k. Knows no models: the engine and the simulator both use it.

One step runs some tokens of some requests: one token of a request that is decoding, a piece of the prompt of one that is not. MoE-Prism
(arXiv 2510.19366) schedules whole batches; here every step is a batch, so a request never waits for another one's last token.
"""

import heapq
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import ClassVar

# Seconds within which a request without a deadline is due, and by which one level of priority brings it forward.
PATIENCE = 30.0
PRIORITY_SECONDS = 10.0

# Predicted seconds of a step: (tokens, k) -> seconds.
Cost = Callable[[int, float], float]


@dataclass
class Job:
    """A request as schedulers see it.

    Attributes:
        id: the request's name.
        floor: the least sub-experts per token it accepts.
        arrival: when it came, in seconds of the clock that `step` is called with.
        tokens: what it would run in the next step: 1 when decoding, else what is left of its prompt.
        decoding: its prompt has been run.
        priority: higher is sooner; a level is worth `PRIORITY_SECONDS` of waiting.
        deadline: when its answer should be there, on the same clock.
        last_run: when it last took part in a step, or its arrival.
    """

    id: str
    floor: int
    arrival: float
    tokens: int
    decoding: bool = False
    priority: int = 0
    deadline: float | None = None
    last_run: float = field(default=0.0)

    @property
    def due(self) -> float:
        """When it should be served: schedulers that are not first-come run the earliest first.

        It never moves, so whatever arrives more than `PATIENCE` later, at equal priority, stands behind it: nothing starves.
        """
        by_arrival = self.arrival + PATIENCE - self.priority * PRIORITY_SECONDS
        return by_arrival if self.deadline is None else min(by_arrival, self.deadline)


@dataclass(frozen=True)
class Limits:
    """Bounds of a step, and of the requests in the engine.

    Attributes:
        tokens: tokens of one step.
        requests: requests that hold a KV cache at a time.
        wait: seconds after which a request that was held back for a better batch is held back no longer (the paper's T_max).
        kv_tokens: tokens that the KV cache holds; None: as many as fit, but never more than all requests can use.
        waiting: requests that may wait for a KV cache; more are refused.
    """

    tokens: int = 512
    requests: int = 64
    wait: float = 0.05
    kv_tokens: int | None = None
    waiting: int = 1024


class Scheduler:
    """Chooses the jobs of a step. All of them run at the largest floor among them, or, where `exact`, each at its own.

    Args:
        limits: bounds of a step.
        cost: predicted seconds of a step; needed where `predicts`.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    predicts: ClassVar[bool] = False

    def __init__(self, limits: Limits, cost: Cost | None = None):
        if self.predicts and cost is None:
            raise ValueError(f"the scheduler {self.name} needs a performance model")
        self.limits = limits
        self.cost: Cost = cost or (lambda tokens, k: float(tokens))

    def step(self, active: Sequence[Job], waiting: Sequence[Job], now: float) -> list[Job]:
        """The jobs that may run in the next step, those that shall first have of its tokens first.

        Args:
            active: jobs with a KV cache.
            waiting: jobs without one, in order of arrival.
            now: the time in seconds.

        Returns:
            Some of them. The caller takes them in this order while tokens and memory last; empty: run nothing yet.
        """
        raise NotImplementedError

    def room(self, active: Sized) -> int:
        """How many more jobs may get a KV cache."""
        return max(self.limits.requests - len(active), 0)

    def fit(self, jobs: Sequence[Job]) -> int:
        """Tokens of a step that offers these jobs."""
        return min(sum(job.tokens for job in jobs), self.limits.tokens)


def _decoding_first(jobs: Sequence[Job], key: Callable[[Job], float]) -> list[Job]:
    return sorted(jobs, key=lambda job: (not job.decoding, key(job)))


class Fifo(Scheduler):
    """First come, first served, at the largest floor of the batch: what engines with one k do."""

    name = "fifo"

    def step(self, active: Sequence[Job], waiting: Sequence[Job], now: float) -> list[Job]:
        """Every active job, then the waiting ones in order of arrival."""
        return _decoding_first(active, lambda job: job.arrival) + list(waiting[: self.room(active)])


class FullBatch(Scheduler):
    """As `fifo`, but new jobs are let in only when they fill the batch or the oldest has waited `Limits.wait`."""

    name = "fullbatch"

    def step(self, active: Sequence[Job], waiting: Sequence[Job], now: float) -> list[Job]:
        """Every active job; the waiting ones when there are enough of them."""
        room = self.room(active)
        enough = len(waiting) >= room or sum(job.tokens for job in waiting) >= self.limits.tokens
        let_in = bool(waiting) and (enough or now - waiting[0].arrival >= self.limits.wait)
        return _decoding_first(active, lambda job: job.arrival) + (list(waiting[:room]) if let_in else [])


class _ByDue(Scheduler):
    """Schedulers that may let a job wait: jobs are taken by when they are due."""

    def candidates(self, active: Sequence[Job], waiting: Sequence[Job]) -> list[Job]:
        """Active jobs, decoding ones first, then as many waiting ones as there is room for; each by when they are due."""
        return _decoding_first(active, lambda job: job.due) + heapq.nsmallest(self.room(active), waiting, key=lambda job: job.due)


class VirtualQueues(_ByDue):
    """Version 1 of the paper: a virtual queue per k holds the jobs that accept it; the queue of most tokens per second runs.

    A job is in the queue of every k from its floor upwards, and leaves all of them when one of them runs. A job that was passed over for
    `Limits.wait` is a trigger: only queues that hold it may run then.
    """

    name = "virtual-queues"
    predicts = True

    def step(self, active: Sequence[Job], waiting: Sequence[Job], now: float) -> list[Job]:
        """The jobs of the queue m with the largest tokens(Q_m) / cost(tokens(Q_m), m)."""
        jobs = self.candidates(active, waiting)
        if not jobs:
            return []
        overdue = [job for job in jobs if now - job.last_run >= self.limits.wait]
        oldest = min(overdue, key=lambda job: job.last_run, default=None)
        queues = {}
        for k in sorted({job.floor for job in jobs}):
            if oldest is None or oldest.floor <= k:
                queues[k] = [job for job in jobs if job.floor <= k]
        k = max(queues, key=lambda k: self.fit(queues[k]) / self.cost(self.fit(queues[k]), k))
        chosen = queues[k]
        return chosen if oldest is None else [oldest, *(job for job in chosen if job is not oldest)]


class Tiers(_ByDue):
    """Version 2 of the paper: one tier of equal floors at a time; a batch that is not full takes the next tier along if that pays.

    The tier that has been passed over longest runs. While its batch has room, the tier above joins it, all at the higher k, if the
    predicted tokens per second of one step are more than those of two steps one after the other.
    """

    name = "tiers"
    predicts = True

    def step(self, active: Sequence[Job], waiting: Sequence[Job], now: float) -> list[Job]:
        """The jobs of the tier whose turn it is, and of those that joined it."""
        jobs = self.candidates(active, waiting)
        if not jobs:
            return []
        first = min(jobs, key=lambda job: job.last_run).floor
        tiers = {k: [job for job in jobs if job.floor == k] for k in sorted({job.floor for job in jobs})}
        batch, k = tiers[first], first
        for above, joining in tiers.items():
            if above <= k or self.fit(batch) >= self.limits.tokens:
                continue
            apart = self.cost(self.fit(batch), k) + self.cost(self.fit(joining), above)
            together = self.fit([*batch, *joining])
            if together / self.cost(together, above) <= (self.fit(batch) + self.fit(joining)) / apart:
                break
            batch, k = [*batch, *joining], above
        return _decoding_first(batch, lambda job: job.due)


class PerToken(_ByDue):
    """Every job in one batch, each token at exactly its job's k: nobody is upgraded, nobody waits for a tier."""

    name = "per-token"
    exact = True

    def step(self, active: Sequence[Job], waiting: Sequence[Job], now: float) -> list[Job]:
        """All candidates."""
        return self.candidates(active, waiting)


SCHEDULERS: dict[str, type[Scheduler]] = {kind.name: kind for kind in (Fifo, FullBatch, VirtualQueues, Tiers, PerToken)}


def take(jobs: Sequence[Job], limits: Limits) -> list[tuple[Job, int]]:
    """The jobs of one step with the tokens each of them gets, in their order, where memory is no limit."""
    taken: list[tuple[Job, int]] = []
    left = limits.tokens
    for job in jobs:
        if left == 0 or len(taken) == limits.requests:
            break
        taken.append((job, min(job.tokens, left)))
        left -= taken[-1][1]
    return taken


def step_k(taken: Sequence[tuple[Job, int]], exact: bool) -> dict[str, int]:
    """The k at which each of the jobs of a step runs."""
    most = max(job.floor for job, _ in taken)
    return {job.id: job.floor if exact else most for job, _ in taken}
