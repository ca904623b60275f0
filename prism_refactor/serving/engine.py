"""The engine: many requests at once, each with its own number of sub-experts per token, through transformers' continuous batching."""

import functools
import logging
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from prism_refactor.errors import InputError, PrismError, UsageError, one_line
from prism_refactor.formats import PrismConfig
from prism_refactor.models.loading import end_tokens
from prism_refactor.models.modeling_prism import set_active, set_token_active
from prism_refactor.offload.manager import OffloadManager
from prism_refactor.serving.performance import PerformanceModel
from prism_refactor.serving.sampling import sample
from prism_refactor.serving.scheduling import SCHEDULERS, Job, Limits, Scheduler
from prism_refactor.serving.transformers_batching import EXPIRED, Batching, Entry

# Colder than this, logits divided by the temperature are beyond float32, and the most likely token is all that is left.
LEAST_TEMPERATURE = 1e-5
# Budgets are told apart by so many steps from 0 to 1.
BUDGET_STEPS = 1000
_names = count()
_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Rejected(PrismError):
    """The engine does not take a request now: its queue is full, or the request's deadline cannot be met.

    Attributes:
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass
class GenerationRequest:
    """What to generate.

    Attributes:
        prompt: token ids.
        k: the least sub-experts per token to run it with, 1 to `Engine.full_k`; None: all.
        max_new_tokens: at most so many tokens.
        temperature: of sampling; below `LEAST_TEMPERATURE` the most likely token is taken.
        top_p: sampling is from the most likely tokens that together have this probability.
        seed: of sampling; the same request with the same seed gets the same tokens, whatever runs beside it; None: another each time.
        logprobs: None, or for how many of the most likely tokens the log probability is wanted beside the chosen one's.
        prompt_logprobs: whether it is wanted of the prompt's tokens, too; then the prompt shares no KV with others.
        priority: higher is sooner.
        deadline: seconds from now in which the whole answer should be there.
        stop_at_eos: end at the model's end-of-text tokens.
        id: a name, unique among live requests; made up where empty.
        budget: in the place of k, the least share of the sub-experts that tokens run on average, above 0 and at most 1, in steps of
            0.001; a token runs more or fewer, as it needs.
    """

    prompt: list[int]
    k: int | None = None
    max_new_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    priority: int = 0
    deadline: float | None = None
    stop_at_eos: bool = True
    id: str = ""
    budget: float | None = None


@dataclass(frozen=True)
class Logprob:
    """Log probabilities of one generated token: of itself, and of the most likely ones [(token, log probability)]."""

    chosen: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Chunk:
    """News of a request.

    Attributes:
        id: the request.
        tokens: token ids generated since the last chunk.
        logprobs: one for each, where asked for.
        finish: None while it goes on; then "stop" (end of text), "length", "deadline" or "error".
        error: what went wrong, where finish is "error" or "deadline".
        served_k: mean sub-experts per token that it ran with so far.
        prompt_logprobs: where asked for, with the first tokens: of each token of the prompt but the first.
    """

    id: str
    tokens: list[int]
    logprobs: list[Logprob]
    finish: str | None
    error: str | None
    served_k: float
    prompt_logprobs: list[Logprob] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """One step of the engine: seconds from the scheduler's start to the last logit, and what was in it.

    Attributes:
        seconds: measured.
        scheduling: seconds of these in which the scheduler chose.
        predicted: seconds by the performance model; None without one.
        prefill: prompt tokens.
        decode: requests that got their next token from one token.
        sub_experts: sub-experts computed per MoE layer, summed over tokens; a mean over the layers where tokens run within a budget.
        requests: {k: requests that ran at it}.
    """

    seconds: float
    scheduling: float
    predicted: float | None
    prefill: int
    decode: int
    sub_experts: float
    requests: dict[int, int]


@dataclass
class _Live:
    """A request inside the engine."""

    request: GenerationRequest
    # As schedulers see it: of a budget its sub-experts, rounded up.
    floor: int
    budget: float | None
    arrival: float
    deliver: Callable[[Chunk], None]
    # Of a request that samples; what it drew last and its logit.
    rng: random.Random | None
    last_run: float
    drawn: tuple[int, float] | None = None
    sent: int = 0
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    tokens: int = 0
    sub_experts: float = 0
    cancelled: bool = False

    @property
    def deadline(self) -> float | None:
        return None if self.request.deadline is None else self.arrival + self.request.deadline


def _logprob(scores: torch.Tensor, token: int, most: int) -> Logprob:
    """Log probabilities of a token and of the `most` most likely ones, from float32 logits [V]."""
    logprobs = scores.log_softmax(-1)
    top = logprobs.topk(min(most, len(logprobs)))
    return Logprob(float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def run_in_thread(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a thread that ends with it: what loads or measures a model before an engine starts should run like this.

    Every thread that computes keeps a team of OpenMP workers. Where these and the engine's are more than the cores, libgomp lets
    waiting workers sleep rather than spin, and a step takes a third longer (measured on 2 cores: 158 ms and 215 ms).
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


class Engine:
    """Generates for many requests at once, each with at least its own number of sub-experts per token.

    Args:
        model: a causal language model, see `load`; one that was not refactored has a single k.
        scheduler: one of `SCHEDULERS`.
        limits: bounds of a step and of requests. Where they do not size the KV cache, it gets a quarter of free memory on a CPU, and
            transformers' choice elsewhere.
        performance: of this model on this machine; some schedulers need it, and steps are compared with it.
        on_step: called with every `Step`, in the engine's thread.
        ends: tokens that end a text, beside those that the model's generation_config names: the tokenizer's.

    Raises:
        UsageError: the scheduler needs what the model or the performance model does not have.
        InputError: transformers' continuous batching does not run the architecture, as a first step shows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scheduler: str = "per-token",
        limits: Limits | None = None,
        performance: PerformanceModel | None = None,
        on_step: Callable[[Step], None] | None = None,
        ends: Sequence[int] = (),
    ):
        self.model, self.performance, self.on_step = model, performance, on_step
        self.limits = limits or Limits()
        prism = PrismConfig.of(model.config)
        self.full_k = prism.max_active if prism else 1
        self._elastic = prism is not None
        # Whether requests may ask for budgets.
        self.has_budgets = self._active is not None and self._active.has_thresholds
        # Where the experts are in slow memory.
        self.offload: OffloadManager | None = getattr(model, "offload", None)
        if self.offload is not None:
            self.offload.tolerant = True
        kind = SCHEDULERS[scheduler]
        if kind.exact and prism and not prism.has_router:
            raise UsageError(f"`scheduler` {scheduler} needs a sub-expert router, and this checkpoint has none; use `scheduler` fifo")
        if kind.predicts and performance is None:
            raise UsageError(f"`scheduler` {scheduler} needs a performance model; run prism-bench on the checkpoint first")
        self.policy: Scheduler = kind(self.limits, performance.cost if performance else None)
        self.eos_token_ids = end_tokens(model.generation_config.eos_token_id if model.generation_config else None, ends)
        self._live: dict[str, _Live] = {}
        self._lock = threading.Lock()
        self._step_start = self._scheduling = 0.0
        self._seconds_per_token = 0.0
        self._stopping = False
        # Requests that `stop` had to end.
        self.unfinished = 0
        self.batching = Batching(model, self.policy, self)
        try:
            self.measure(1, 2, 0, self.full_k)
        except Exception as error:
            self.close()
            raise InputError(f"transformers' continuous batching does not run {type(model).__name__}: {one_line(error)}") from error

    @property
    def context(self) -> int:
        """Most tokens of one request, prompt and answer together, that the model takes."""
        return self.batching.context

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.batching.kv_tokens

    @property
    def kv_in_use(self) -> int:
        """KV blocks that requests hold; 0 when there are none."""
        return self.batching.kv_in_use

    @property
    def waiting(self) -> list[int]:
        """The floors of the requests that wait for a KV cache."""
        active = self.batching.active
        with self._lock:
            return [live.floor for name, live in self._live.items() if name not in active]

    @property
    def running(self) -> int:
        """Requests with a KV cache."""
        return len(self.batching.active)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self.batching.alive

    def start(self) -> None:
        """Start the engine's thread."""
        self.batching.start()

    def measure(self, requests: int, tokens: int, context: int, k: int) -> float:
        """Return the seconds of one step as the engine runs it, without its scheduler; the engine must not have been started.

        Args:
            requests: in the step.
            tokens: of each.
            context: tokens of each that are in the KV cache already.
            k: sub-experts per token.

        Raises:
            UsageError: they do not fit the KV cache.
        """
        if self._elastic:
            set_active(self.model, k)
        return self.batching.measure(requests, tokens, context)

    def stop(self, drain: float = 0.0) -> None:
        """Take no more requests, let those in it go on for up to `drain` seconds, end the rest with "error", and stop the thread."""
        self._stopping = True
        until = time.monotonic() + drain
        while self._live and self.alive and time.monotonic() < until:
            time.sleep(0.01)
        with self._lock:
            self.unfinished += sum(not live.cancelled for live in self._live.values())
        self.batching.stop()
        # That has ended what it knew of.
        with self._lock:
            left = [live for live in self._live.values() if not live.cancelled]
            self._live.clear()
        for live in left:
            self._tell(live, Chunk(live.request.id, [], [], "error", "the engine stopped", self._served(live)))

    def close(self) -> None:
        """Stop, and leave the model as it was."""
        self.stop()
        if self._elastic:
            set_active(self.model, self.full_k)
        self.batching.close()

    def submit(self, request: GenerationRequest, deliver: Callable[[Chunk], None]) -> str:
        """Queue a request.

        Args:
            request: what to generate.
            deliver: called with every `Chunk`, in the engine's thread; the last one has `finish`. Not called after `cancel`. If it raises,
                the request is cancelled.

        Returns:
            The request's name.

        Raises:
            UsageError: it can never run: an empty prompt, a k out of range, more tokens than the context or the KV cache holds.
            Rejected: it cannot run now.
        """
        floor, budget = self.floor(request.k, request.budget)
        total = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1:
            raise UsageError("a request needs at least one prompt token and one token to generate")
        if total > (most := min(self.context, self.kv_tokens)):
            raise UsageError(f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} to generate: together at most {most}")
        now = time.monotonic()
        waiting = len(self.waiting)
        if self._stopping or not self.alive:
            raise Rejected("the engine is stopping", 1.0)
        if waiting >= self.limits.waiting:
            raise Rejected(f"{waiting} requests wait already", self._queue_seconds())
        if request.deadline is not None and (needed := self._least_seconds(request, floor)) > request.deadline:
            raise Rejected(f"a deadline of {request.deadline:g} s cannot be met: the prompt alone is done in {needed:.1f} s", needed)
        rng = random.Random(request.seed) if request.temperature >= LEAST_TEMPERATURE else None
        request.id = request.id or f"request-{next(_names)}"
        live = _Live(request, floor, budget, now, deliver, rng, last_run=now)
        with self._lock:
            if request.id in self._live:
                raise UsageError(f"a request {request.id} is running already")
            self._live[request.id] = live
        if not self.batching.add(request.id, request.prompt, request.max_new_tokens, self.eos_token_ids if request.stop_at_eos else []):
            self.forget(request.id)
            raise Rejected("the engine is stopping", 1.0)
        return request.id

    def floor(self, k: int | None, budget: float | None) -> tuple[int, float | None]:
        """Return the least k of a request as schedulers see it, and the budget that its tokens run within; None where they run k.

        Args:
            k, budget: that it asks for, see `GenerationRequest`.

        Raises:
            UsageError: they are out of range, both given, or not possible with this checkpoint.
        """
        if budget is None:
            floor = self.full_k if k is None else k
            if not 1 <= floor <= self.full_k:
                raise UsageError(f"k = {floor}: choose 1 to {self.full_k}")
            return floor, None
        if k is not None:
            raise UsageError("both a k and a budget are asked for; leave one of them out")
        if not 0 < budget <= 1:
            raise UsageError(f"budget {budget:g}: choose a share above 0 and at most 1")
        if not self.has_budgets:
            raise UsageError("a budget needs a sub-expert router with thresholds, and this checkpoint has none; ask for a k")
        steps = max(round(budget * BUDGET_STEPS), 1)
        return -(-steps * self.full_k // BUDGET_STEPS), None if steps == BUDGET_STEPS else steps / BUDGET_STEPS

    def cancel(self, name: str) -> None:
        """End a request and free its KV blocks before the next step. Nothing is delivered any more; unknown names are ignored."""
        with self._lock:
            live = self._live.get(name)
            if live is None:
                return
            live.cancelled = True
        self.batching.cancel(name)

    def generate(self, requests: Iterable[GenerationRequest]) -> list[Chunk]:
        """Run requests side by side to their ends: one chunk each, with all its tokens."""
        requests = list(requests)
        parts: list[list[Chunk]] = [[] for _ in requests]
        done = threading.Semaphore(0)

        def deliver(chunk: Chunk, own: list[Chunk]) -> None:
            own.append(chunk)
            if chunk.finish:
                done.release()

        for request, own in zip(requests, parts, strict=True):
            self.submit(request, functools.partial(deliver, own=own))
        for _ in requests:
            done.acquire()
        return [
            Chunk(
                own[-1].id,
                [token for chunk in own for token in chunk.tokens],
                [item for chunk in own for item in chunk.logprobs],
                own[-1].finish,
                own[-1].error,
                own[-1].served_k,
                own[0].prompt_logprobs,
            )
            for own in parts
        ]

    def _queue_seconds(self) -> float:
        """Seconds in which what waits now will have had its prompts run."""
        with self._lock:
            tokens = sum(len(live.request.prompt) for live in self._live.values() if not live.tokens)
        return max(tokens * self._seconds_per_token, 1.0)

    def _least_seconds(self, request: GenerationRequest, floor: int) -> float:
        """Seconds that the prompt needs if it runs at once; 0 where that is not known."""
        if self.performance is None:
            return 0.0
        return self.performance.cost(min(len(request.prompt), self.limits.tokens), floor) * math.ceil(
            len(request.prompt) / self.limits.tokens
        )

    def forget(self, name: str) -> _Live | None:
        """See `Requests.forget`."""
        with self._lock:
            live = self._live.pop(name, None)
        if live is not None and self.offload is not None:
            self.offload.end_request(name)
        return live

    @staticmethod
    def _served(live: _Live) -> float:
        return live.sub_experts / live.tokens if live.tokens else float(live.floor)

    def job(self, name: str, tokens: int, decoding: bool) -> Job:
        """See `Requests.job`."""
        live = self._live[name]
        return Job(name, live.floor, live.arrival, tokens, decoding, live.request.priority, live.deadline, live.last_run)

    def kv_key(self, name: str) -> int:
        """See `Requests.kv_key`."""
        live = self._live.get(name)
        if live is None:
            return 0
        return live.floor if live.budget is None else self.full_k + round(live.budget * BUDGET_STEPS)

    def reads_prompt(self, name: str) -> bool:
        """See `Requests.reads_prompt`."""
        live = self._live.get(name)
        return live is not None and live.request.prompt_logprobs and not live.sent

    def expired(self, name: str, now: float) -> bool:
        """See `Requests.expired`."""
        live = self._live.get(name)
        return live is not None and live.deadline is not None and live.deadline < now

    def deliver(self, name: str, tokens: list[int], finished: bool, error: str | None) -> None:
        """See `Requests.deliver`."""
        with self._lock:
            live = self._live.get(name)
        if finished:
            self.forget(name)
        if live is None or live.cancelled:
            return
        new, finish = tokens[live.sent :], None
        if finished:
            ended = bool(new) and new[-1] in self.eos_token_ids and live.request.stop_at_eos
            expired = live.deadline is not None and error == EXPIRED
            finish = ("deadline" if expired else "error") if error else "stop" if ended else "length"
        logprobs = live.logprobs[live.sent : live.sent + len(new)]
        prompt = [] if live.sent else [*live.prompt_logprobs]
        live.sent += len(new)
        self._tell(live, Chunk(name, new, logprobs, finish, error, self._served(live), prompt))

    def _tell(self, live: _Live, chunk: Chunk) -> None:
        """Deliver news. Whoever cannot take them loses their request; the others of the batch go on."""
        try:
            live.deliver(chunk)
        except Exception:
            _log.exception("request %s: its news could not be delivered", chunk.id)
            self.cancel(chunk.id)

    def on_schedule(self, start: float, seconds: float, names: list[str]) -> None:
        """See `Requests.on_schedule`."""
        self._step_start, self._scheduling = start, seconds
        for name in names:
            self._live[name].last_run = start

    def before_step(self, entries: list[Entry]) -> None:
        """Give every token of the step its k, and an offloading manager its request."""
        if self.offload is not None:
            self.offload.requests = [(entry.id, entry.tokens) for entry in entries]
        if not self._elastic:
            return
        budgets = [self._budget(entry) for entry in entries]
        points = {(entry.k, budget) for entry, budget in zip(entries, budgets, strict=True)}
        if len(points) == 1:
            k, budget = points.pop()
            set_active(self.model, **({"budget": budget} if budget else {"k": k}))
        else:
            every = [(entry.k, budget) for entry, budget in zip(entries, budgets, strict=True) for _ in range(entry.tokens)]
            set_token_active(self.model, *map(list, zip(*every, strict=True)))
        if any(budgets):
            self._active.ran = 0

    @property
    def _active(self) -> Any:
        """See `modeling_prism.ActiveK`; None where the model has no two-level routing."""
        return getattr(self.model, "prism_active", None)

    def _budget(self, entry: Entry) -> float:
        """The budget that a request runs a step within; 0: it runs the step's k."""
        live = self._live.get(entry.id)
        if live is None or live.budget is None:
            return 0.0
        if entry.k == live.floor:
            return live.budget
        # Raised to what others of the step need.
        return entry.k / self.full_k if entry.k < self.full_k else 0.0

    def after_step(self, entries: list[Entry], logits: torch.Tensor, positions: torch.Tensor) -> None:
        """Choose the tokens of sampling requests, note log probabilities, report the step."""
        batch = [(entry, self._live.get(entry.id)) for entry in entries]
        if self.offload is not None and self.offload.faults:
            self._fail(self.offload.faults, entries)
        sampling = [live for entry, live in batch if entry.samples]
        rows = [(position, live) for position, live in zip(positions[: len(sampling)], sampling, strict=True) if live is not None]
        if rows:
            new = [live for _, live in rows]
            chosen = torch.stack([position for position, _ in rows])
            self._sample(logits, chosen, new)
            self._note_logprobs(logits, chosen, new)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self._report(time.monotonic() - self._step_start, batch)

    def _fail(self, faults: list[tuple[list[int], PrismError]], entries: list[Entry]) -> None:
        """End the requests some of whose tokens did not get their sub-experts; the others of the batch go on.

        The KV blocks of a request that is forgotten are never found by another one, see `transformers_batching`.
        """
        owners = [entry.id for entry in entries for _ in range(entry.tokens)]
        reasons = {owners[token]: str(error) for tokens, error in faults for token in tokens}
        for name, reason in reasons.items():
            live = self.forget(name)
            self.batching.cancel(name)
            if live is not None and not live.cancelled:
                self._tell(live, Chunk(name, [], [], "error", reason, self._served(live)))

    @staticmethod
    def _sample(logits: torch.Tensor, positions: torch.Tensor, new: list[_Live]) -> None:
        """Make the token drawn for each sampling request the one that the manager will choose: it takes the largest logit."""
        rows = [row for row, live in enumerate(new) if live.rng is not None]
        if not rows:
            return
        settings = [(new[row].request.temperature, new[row].request.top_p, new[row].rng.random()) for row in rows]  # type: ignore[union-attr]
        chosen = positions[rows].to(logits.device)
        tokens = sample(logits[chosen].float(), *torch.tensor(settings, device=logits.device).unbind(1))
        # Log probabilities are of the logits as they were; what is largest stays to be read off.
        for row, token, value in zip(rows, tokens.tolist(), logits[chosen, tokens].tolist(), strict=True):
            new[row].drawn = token, value
        logits[chosen, tokens] = torch.inf

    def note_prompt(self, name: str, start: int, logits: torch.Tensor) -> None:
        """See `Requests.note_prompt`."""
        live = self._live.get(name)
        if live is None:
            return
        # A request that was evicted runs its prompt again, and then what it has generated.
        targets = live.request.prompt[start + 1 : start + 1 + len(logits)]
        del live.prompt_logprobs[start:]
        for row, token in zip(logits, targets, strict=False):
            live.prompt_logprobs.append(_logprob(row.float(), token, live.request.logprobs or 0))

    @staticmethod
    def _note_logprobs(logits: torch.Tensor, positions: torch.Tensor, new: list[_Live]) -> None:
        """Log probabilities of the tokens that were chosen and of the most likely ones, where they are wanted."""
        for row, live in enumerate(new):
            if live.request.logprobs is None:
                continue
            scores = logits[positions[row]].float().clone()
            if live.drawn is not None:
                scores[live.drawn[0]] = live.drawn[1]
            token = live.drawn[0] if live.drawn is not None else int(scores.argmax())
            live.logprobs.append(_logprob(scores, token, live.request.logprobs))

    def _report(self, seconds: float, batch: list[tuple[Entry, _Live | None]]) -> None:
        prefill = decode = 0
        sub_experts = 0.0
        ran = self._ran([entry for entry, _ in batch])
        requests: dict[int, int] = {}
        for (entry, live), own in zip(batch, ran, strict=True):
            prefill += 0 if entry.decoding else entry.tokens
            decode += entry.decoding
            sub_experts += own
            requests[entry.k] = requests.get(entry.k, 0) + 1
            if live is not None:
                live.tokens += entry.tokens
                live.sub_experts += own
        tokens = prefill + decode
        self._seconds_per_token += (0.1 if self._seconds_per_token else 1.0) * (seconds / tokens - self._seconds_per_token)
        if self.on_step is not None:
            predicted = None
            if self.performance is not None:
                context = statistics.fmean(entry.context for entry, _ in batch)
                predicted = self.performance.predict_step(prefill, decode, sub_experts / tokens, context)
            self.on_step(Step(seconds, self._scheduling, predicted, prefill, decode, sub_experts, requests))

    def _ran(self, entries: list[Entry]) -> list[float]:
        """Sub-experts that the tokens of each request ran in the step, summed over them, mean over MoE layers."""
        counted = getattr(self._active, "ran", None)
        if counted is None:
            return [float(entry.tokens * entry.k) for entry in entries]
        own = counted.split([entry.tokens for entry in entries])
        return (torch.stack([tokens.sum() for tokens in own]) / len(self._active.per_layer)).tolist()
