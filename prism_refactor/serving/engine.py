"""The engine: transformers' continuous batching, with a scheduler of ours and a number of sub-experts per request.

Everything that depends on how transformers 5.23 batches is in this file. Its manager owns the loop, the paged KV cache and the requests'
states; ours are the choice of a step's requests (`serving.scheduling`), the k of every token, the attention of a step on a CPU, and
sampling with a seed per request.
"""

import functools
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
    RequestStatus,
    create_warmup_future_states,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING
from transformers.generation.continuous_batching.scheduler import Scheduler as TransformersScheduler

from prism_refactor.errors import InputError, PrismError, UsageError, one_line
from prism_refactor.formats import PrismConfig
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.modeling_prism import set_active, set_token_active
from prism_refactor.offload.manager import OFFLOADED, OffloadManager
from prism_refactor.resources import free_memory
from prism_refactor.serving.performance import PerformanceModel
from prism_refactor.serving.sampling import sample
from prism_refactor.serving.scheduling import SCHEDULERS, Job, Limits, Scheduler, step_k

# Tokens of a KV page: small ones waste little on a CPU, where reads are by token; elsewhere kernels want transformers' own size.
CPU_PAGE, KV_PAGE = 32, 256
# Share of free memory that the KV cache may have on a CPU.
CPU_KV_SHARE = 0.25
# k is mixed into what KV blocks are found by: token + k * _SALT, in the 32 bits that transformers hashes.
_SALT = 1 << 20
_ATTENTION = "prism_segments"
_names = count()
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
class Request:
    """What to generate.

    Attributes:
        prompt: token ids.
        k: the least sub-experts per token to run it with, 1 to `Engine.full_k`; None: all.
        max_new_tokens: at most so many tokens.
        temperature: 0: the most likely token; else sampling.
        top_p: sampling is from the most likely tokens that together have this probability.
        seed: of sampling; the same request with the same seed gets the same tokens, whatever runs beside it; None: another each time.
        logprobs: None, or for how many of the most likely tokens the log probability is wanted beside the chosen one's.
        priority: higher is sooner.
        deadline: seconds from now in which the whole answer should be there.
        stop_at_eos: end at the model's end-of-text tokens.
        id: a name, unique among live requests; made up where empty.
    """

    prompt: list[int]
    k: int | None = None
    max_new_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    priority: int = 0
    deadline: float | None = None
    stop_at_eos: bool = True
    id: str = ""


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
    """

    id: str
    tokens: list[int]
    logprobs: list[Logprob]
    finish: str | None
    error: str | None
    served_k: float


@dataclass(frozen=True)
class Step:
    """One step of the engine: seconds from the scheduler's start to the last logit, and what was in it.

    Attributes:
        seconds: measured.
        scheduling: seconds of these in which the scheduler chose.
        predicted: seconds by the performance model; None without one.
        prefill: prompt tokens.
        decode: requests that got their next token from one token.
        sub_experts: sub-experts computed per MoE layer, summed over tokens.
        requests: {k: requests that ran at it}.
    """

    seconds: float
    scheduling: float
    predicted: float | None
    prefill: int
    decode: int
    sub_experts: int
    requests: dict[int, int]


@dataclass
class _Live:
    """A request inside the engine."""

    request: Request
    floor: int
    arrival: float
    deliver: Callable[[Chunk], None]
    # Of a request that samples; what it drew last and its logit.
    dice: random.Random | None
    last_run: float
    drawn: tuple[int, float] | None = None
    sent: int = 0
    logprobs: list[Logprob] = field(default_factory=list)
    tokens: int = 0
    sub_experts: int = 0
    cancelled: bool = False

    @property
    def deadline(self) -> float | None:
        return None if self.request.deadline is None else self.arrival + self.request.deadline


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
    ):
        self.model, self.performance, self.on_step = model, performance, on_step
        self.limits = limits or Limits()
        prism = PrismConfig.of(model.config)
        self.full_k = prism.max_active if prism else 1
        self._elastic = prism is not None
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
        self._live: dict[str, _Live] = {}
        self._lock = threading.Lock()
        # (state, its request, its k) of the step that runs.
        self._batch: list[tuple[FutureRequestState, _Live, int]] = []
        self._step_start = self._scheduling = 0.0
        self._seconds_per_token = 0.0
        self._stopping = False
        # Requests that `stop` had to end.
        self.unfinished = 0
        self._attention, self._experts = model.config._attn_implementation, model.config._experts_implementation
        self._manager = self._make_manager()
        # The manager forgets it when it stops; here it still tells whether blocks leaked.
        self._processor: Any = self._manager.batch_processor
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]
        try:
            self.measure(1, 2, 0, self.full_k)
        except Exception as error:
            self.close()
            raise InputError(f"transformers' continuous batching does not run {type(model).__name__}: {one_line(error)}") from error

    def _make_manager(self) -> ContinuousBatchingManager:
        model: Any = self.model
        on_cpu = model.device.type == "cpu"
        config = ContinuousBatchingConfig(
            max_batch_tokens=self.limits.tokens,
            max_requests_per_batch=self.limits.requests,
            # A request that runs at whatever its batch runs at leaves KV that nobody else can use.
            allow_block_sharing=self.policy.exact,
            # Steps of one k each and of many are different programs: a graph would have to be captured for every mix.
            use_cuda_graph=False,
            use_async_batching=False,
        )
        if on_cpu:
            config.page_size = CPU_PAGE
            config.auto_switch_to_flash = False
        kv_tokens = self.limits.kv_tokens
        if kv_tokens is None and on_cpu:
            kv_tokens = self._kv_tokens_that_fit()
        if kv_tokens is not None:
            config.num_blocks = max(math.ceil(kv_tokens / config.page_size), 2)
        config.scheduler_type = f"prism-{next(_names)}"
        eos = model.generation_config.eos_token_id if model.generation_config else None
        self.eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)
        # transformers' name for: an index beyond the last expert is a slot that is not computed.
        self._slots: list[Any] = [module for module in model.modules() if getattr(module, "_is_expert_parallel", True) is False]
        for module in self._slots:
            module._is_expert_parallel = True
        # Neither computes dropped slots. Measured on a CPU (docs/serving.md): the loop over experts is as fast as the grouped product on
        # small batches, and up to twice as fast on large ones.
        model.set_experts_implementation(OFFLOADED if self.offload is not None else EXPERTS if on_cpu else "grouped_mm")
        mapping: dict[str, Any] = SCHEDULER_MAPPING
        mapping[config.scheduler_type] = functools.partial(_BatchScheduler, engine=self)
        try:
            manager: ContinuousBatchingManager = model.init_continuous_batching(generation, config)
            if on_cpu and model.config._attn_implementation == "sdpa":
                AttentionInterface.register(_ATTENTION, segment_attention)
                model.set_attn_implementation(_ATTENTION)
            manager.output_router = _Router(self._deliver)
            # Creates the cache and the scheduler; compiles nothing.
            manager.warmup()
        except Exception as error:
            self._restore()
            raise InputError(f"transformers' continuous batching does not take {type(model).__name__}: {one_line(error)}") from error
        finally:
            del mapping[config.scheduler_type]
        return manager

    def _kv_tokens_that_fit(self) -> int:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * width * self.model.dtype.itemsize
        most = self.limits.requests * self.context
        return min(int(CPU_KV_SHARE * free_memory() / token_bytes), most)

    @property
    def context(self) -> int:
        """Most tokens of one request, prompt and answer together, that the model takes."""
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self._processor.cache.max_tokens_read

    @property
    def kv_in_use(self) -> int:
        """KV blocks that requests hold; 0 when there are none."""
        allocators = self._processor.cache.cache_allocators.values()
        return sum(len(blocks) for allocator in allocators for blocks in list(allocator.block_table.values()))

    @property
    def waiting(self) -> list[int]:
        """The floors of the requests that wait for a KV cache."""
        active = self._processor.scheduler.active_requests
        with self._lock:
            return [live.floor for name, live in self._live.items() if name not in active]

    @property
    def running(self) -> int:
        """Requests with a KV cache."""
        return len(self._processor.scheduler.active_requests)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._manager.is_running() and self._manager.background_thread_status.fatal_error is None

    def start(self) -> None:
        """Start the engine's thread."""
        self._manager.start()

    def stop(self, drain: float = 0.0) -> None:
        """Take no more requests, let those in it go on for up to `drain` seconds, end the rest with "error", and stop the thread."""
        self._stopping = True
        until = time.monotonic() + drain
        while self._live and self.alive and time.monotonic() < until:
            time.sleep(0.01)
        with self._lock:
            self.unfinished += sum(not live.cancelled for live in self._live.values())
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)
        # The manager has ended what it knew of.
        with self._lock:
            left = [live for live in self._live.values() if not live.cancelled]
            self._live.clear()
        for live in left:
            live.deliver(Chunk(live.request.id, [], [], "error", "the engine stopped", self._served(live)))

    def close(self) -> None:
        """Stop, and leave the model as it was."""
        self.stop()
        for hook in self._hooks:
            hook.remove()
        if self._elastic:
            set_active(self.model, self.full_k)
        self._restore()

    def _restore(self) -> None:
        for module in self._slots:
            module._is_expert_parallel = False
        self.model.set_attn_implementation(self._attention)
        self.model.set_experts_implementation(self._experts)

    def submit(self, request: Request, deliver: Callable[[Chunk], None]) -> str:
        """Queue a request.

        Args:
            request: what to generate.
            deliver: called with every `Chunk`, in the engine's thread; the last one has `finish`. Not called after `cancel`.

        Returns:
            The request's name.

        Raises:
            UsageError: it can never run: an empty prompt, a k out of range, more tokens than the context or the KV cache holds.
            Rejected: it cannot run now.
        """
        floor = self.full_k if request.k is None else request.k
        total = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1:
            raise UsageError("a request needs at least one prompt token and one token to generate")
        if not 1 <= floor <= self.full_k:
            raise UsageError(f"k = {floor}: choose 1 to {self.full_k}")
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
        dice = random.Random(request.seed) if request.temperature > 0 else None
        request.id = request.id or f"request-{next(_names)}"
        live = _Live(request, floor, now, deliver, dice, last_run=now)
        with self._lock:
            if request.id in self._live:
                raise UsageError(f"a request {request.id} is running already")
            self._live[request.id] = live
        eos = self.eos_token_ids if request.stop_at_eos and self.eos_token_ids else -1
        self._manager.add_request(request.prompt, request.id, max_new_tokens=request.max_new_tokens, streaming=True, eos_token_id=eos)
        return request.id

    def cancel(self, name: str) -> None:
        """End a request and free its KV blocks before the next step. Nothing is delivered any more; unknown names are ignored."""
        with self._lock:
            live = self._live.get(name)
            if live is None:
                return
            live.cancelled = True
        self._manager.cancel_request(name)

    def generate(self, requests: Iterable[Request]) -> list[Chunk]:
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
            )
            for own in parts
        ]

    def _queue_seconds(self) -> float:
        """Seconds in which what waits now will have had its prompts run."""
        with self._lock:
            tokens = sum(len(live.request.prompt) for live in self._live.values() if not live.tokens)
        return max(tokens * self._seconds_per_token, 1.0)

    def _least_seconds(self, request: Request, floor: int) -> float:
        """Seconds that the prompt needs if it runs at once; 0 where that is not known."""
        if self.performance is None:
            return 0.0
        return self.performance.cost(min(len(request.prompt), self.limits.tokens), floor) * math.ceil(
            len(request.prompt) / self.limits.tokens
        )

    def _forget(self, name: str) -> _Live | None:
        with self._lock:
            live = self._live.pop(name, None)
        if live is not None and self.offload is not None:
            self.offload.end_request(name)
        return live

    @staticmethod
    def _served(live: _Live) -> float:
        return live.sub_experts / live.tokens if live.tokens else float(live.floor)

    def _deliver(self, output: GenerationOutput) -> None:
        """An output of transformers' manager, in its thread."""
        with self._lock:
            live = self._live.get(output.request_id)
        if live is None or live.cancelled:
            if output.is_finished():
                self._forget(output.request_id)
            return
        tokens = output.generated_tokens[live.sent :]
        finish = None
        if output.is_finished():
            self._forget(output.request_id)
            ended = bool(tokens) and tokens[-1] in self.eos_token_ids and live.request.stop_at_eos
            expired = live.deadline is not None and output.error == _EXPIRED
            finish = ("deadline" if expired else "error") if output.error else "stop" if ended else "length"
        logprobs = live.logprobs[live.sent : live.sent + len(tokens)]
        live.sent += len(tokens)
        live.deliver(Chunk(output.request_id, tokens, logprobs, finish, output.error, self._served(live)))

    def _before_forward(self, model: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        """Give every token of the step its k, and an offloading manager its request."""
        if self.offload is not None:
            self.offload.requests = [(live.request.id, state.query_length) for state, live, _ in self._batch]
        if self._elastic and self._batch:
            ks = {k for _, _, k in self._batch}
            if len(ks) == 1:
                set_active(self.model, ks.pop())
            else:
                set_token_active(self.model, [k for state, _, k in self._batch for _ in range(state.query_length)])

    def _after_forward(self, model: nn.Module, arguments: Any, options: dict[str, Any], output: Any) -> None:
        """Choose the tokens of sampling requests, note log probabilities, report the step."""
        if not self._batch:
            return
        if self.offload is not None and self.offload.faults:
            self._fail(self.offload.faults)
        new = [live for state, live, _ in self._batch if state.has_new_token]
        positions = torch.arange(len(new)) if "logits_to_keep" in options else options["logits_indices"]
        self._sample(output.logits[0], positions, new)
        self._note_logprobs(output.logits[0], positions, new)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self._report(time.monotonic() - self._step_start)

    def _fail(self, faults: list[tuple[list[int], PrismError]]) -> None:
        """End the requests some of whose tokens did not get their sub-experts; the others of the batch go on.

        The KV blocks of a request that is forgotten are never found by another one, see `_share_by_k`.
        """
        owners = [live for state, live, _ in self._batch for _ in range(state.query_length)]
        reasons = {owners[token].request.id: str(error) for tokens, error in faults for token in tokens}
        for name, reason in reasons.items():
            live = self._forget(name)
            self._manager.cancel_request(name)
            if live is not None and not live.cancelled:
                live.deliver(Chunk(name, [], [], "error", reason, self._served(live)))

    @staticmethod
    def _sample(logits: torch.Tensor, positions: torch.Tensor, new: list[_Live]) -> None:
        """Make the token drawn for each sampling request the one that the manager will choose: it takes the largest logit."""
        rows = [row for row, live in enumerate(new) if live.dice is not None]
        if not rows:
            return
        settings = [(new[row].request.temperature, new[row].request.top_p, new[row].dice.random()) for row in rows]  # type: ignore[union-attr]
        chosen = positions[rows].to(logits.device)
        tokens = sample(logits[chosen].float(), *torch.tensor(settings, device=logits.device).unbind(1))
        # Log probabilities are of the logits as they were; what is largest stays to be read off.
        for row, token, value in zip(rows, tokens.tolist(), logits[chosen, tokens].tolist(), strict=True):
            new[row].drawn = token, value
        logits[chosen, tokens] = torch.inf

    @staticmethod
    def _note_logprobs(logits: torch.Tensor, positions: torch.Tensor, new: list[_Live]) -> None:
        """Log probabilities of the tokens that were chosen and of the most likely ones, where they are wanted."""
        for row, live in enumerate(new):
            if live.request.logprobs is None:
                continue
            scores = logits[positions[row]].float().clone()
            if live.drawn is not None:
                scores[live.drawn[0]] = live.drawn[1]
            logprobs = scores.log_softmax(-1)
            token = live.drawn[0] if live.drawn is not None else int(logprobs.argmax())
            top = logprobs.topk(live.request.logprobs)
            live.logprobs.append(Logprob(float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))))

    def _report(self, seconds: float) -> None:
        prefill = decode = sub_experts = 0
        requests: dict[int, int] = {}
        for state, live, k in self._batch:
            prefill += state.query_length if state.query_length > 1 else 0
            decode += state.query_length == 1
            sub_experts += state.query_length * k
            live.tokens += state.query_length
            live.sub_experts += state.query_length * k
            requests[k] = requests.get(k, 0) + 1
        tokens = prefill + decode
        self._seconds_per_token += 0.1 * (seconds / tokens - self._seconds_per_token)
        if self.on_step is not None:
            predicted = None
            if self.performance is not None:
                context = statistics.fmean(state.state.position_offset for state, _, _ in self._batch)
                predicted = self.performance.predict_step(prefill, decode, sub_experts / tokens, context)
            self.on_step(Step(seconds, self._scheduling, predicted, prefill, decode, sub_experts, requests))
        self._batch = []

    def measure(self, requests: int, tokens: int, context: int, k: int) -> float:
        """Seconds of one step as the engine runs it, without its scheduler; the engine must not have been started.

        Args:
            requests: in the step.
            tokens: of each.
            context: tokens of each that are in the KV cache already.
            k: sub-experts per token.
        """
        processor = self._processor
        status = RequestStatus.DECODING if tokens == 1 else RequestStatus.PREFILLING
        states = create_warmup_future_states(requests, status, tokens, context, processor.cache)
        if len(states) < requests:
            raise UsageError(f"{requests} requests of {context + tokens} tokens do not fit a KV cache of {self.kv_tokens} tokens")
        for number, state in enumerate(states):
            # Any tokens, but different ones: equal ones would all be routed to the same experts.
            dice = random.Random(number)
            state.state.tokens_to_process = [dice.randrange(self.model.config.get_text_config().vocab_size) for _ in range(tokens)]
        if self._elastic:
            set_active(self.model, k)
        start = time.perf_counter()
        try:
            processor.inputs_and_outputs.prepare_batch_tensors(
                states, processor.logit_processor, False, requests * tokens, requests * context, False
            )
            processor._generation_step(self.model)
            processor.inputs_and_outputs.prepare_batch_update()
            return time.perf_counter() - start
        finally:
            for state in states:
                processor.cache.free_blocks(state.state.request_id)


_EXPIRED = "its deadline passed before it could start"


class _Router(OutputRouter):
    """Hands every output of the manager to the engine."""

    def __init__(self, deliver: Callable[[GenerationOutput], None]):
        super().__init__()
        self._to = deliver

    def deliver(self, output: GenerationOutput) -> None:
        self._to(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self._to(output)


class _BatchScheduler(TransformersScheduler):
    """Lets a scheduler of ours choose, and transformers' base class take: budgets, blocks, prefix sharing."""

    def __init__(self, cache: Any, safety_margin: float | None, max_requests_per_batch: int, engine: Engine):
        # Blocks kept free for requests that decode, as transformers' own first-come scheduler does.
        super().__init__(cache, 0.15 if safety_margin is None else safety_margin, max_requests_per_batch)
        self.engine = engine
        if cache.use_prefix_sharing:
            self._share_by_k(cache)

    def _share_by_k(self, cache: Any) -> None:
        """Make KV blocks findable only by requests of the k that they were computed with."""

        def salted(name: str, tokens: list[int]) -> list[int]:
            live = self.engine._live.get(name)
            salt = (live.floor if live else 0) * _SALT
            return [token + salt for token in tokens]

        def search(name: str, tokens: list[int], original: Callable[..., int]) -> int:
            return original(name, salted(name, tokens))

        def complete(name: str, tokens: list[int], blocks: int, original: Callable[..., None]) -> None:
            original(name, salted(name, tokens), blocks)

        cache.search_prefix_match = functools.partial(search, original=cache.search_prefix_match)
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = functools.partial(complete, original=allocator.mark_complete_blocks)

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled = super().clear_cancelled_requests()
        for state in cancelled:
            self.engine._forget(state.request_id)
        return cancelled

    def _expire(self, now: float) -> None:
        """Fail what waits for a KV cache and is too late already."""
        for name in list(self.waiting_requests_order):
            live = self.engine._live.get(name)
            if live is not None and live.deadline is not None and live.deadline < now:
                state = self.waiting_requests.pop(name)
                self.waiting_requests_order.remove(name)
                self.engine._manager.output_router.fail_and_deliver(state, TimeoutError(_EXPIRED))

    def _job(self, state: RequestState) -> Job:
        live = self.engine._live[state.request_id]
        decoding = state.status == RequestStatus.DECODING
        return Job(
            state.request_id,
            live.floor,
            live.arrival,
            1 if decoding else len(state.remaining_prefill_tokens),
            decoding,
            live.request.priority,
            live.deadline,
            live.last_run,
        )

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        engine, now = self.engine, time.monotonic()
        self._expire(now)
        active = [self._job(state) for state in self.active_requests.values()]
        closed = self.block_new_requests or not engine.policy.room(active)
        waiting = [] if closed else [self._job(state) for state in self._get_waiting_candidates()]
        chosen = engine.policy.step(active, waiting, now)
        states = {**self.waiting_requests, **self.active_requests}
        candidates = [states[job.id] for job in chosen]
        from_waiting: set[str] = set()
        scheduled, starved, fast, tokens, read = self._process_candidates(candidates, token_budget, cache_budget, from_waiting)
        self._cleanup_waiting_queue(from_waiting)
        if not scheduled:
            return (None, fast, 0, 0) if starved else ([], fast, 0, 0)
        jobs = {job.id: job for job in chosen}
        ks = step_k([(jobs[future.state.request_id], future.query_length) for future in scheduled], engine.policy.exact)
        engine._batch = [(future, engine._live[future.state.request_id], ks[future.state.request_id]) for future in scheduled]
        for _, live, _ in engine._batch:
            live.last_run = now
        engine._step_start, engine._scheduling = now, time.monotonic() - now
        return scheduled, fast, tokens, read


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one step on a CPU, a request at a time, through torch's scaled_dot_product_attention.

    transformers' own would lay all requests side by side under one mask, whose cost grows with the square of their number.

    Args:
        module: the attention layer.
        query: [1, heads, tokens of the step, width].
        key: [1, KV heads, tokens of the step, width]; the cache adds what is in it.
        value: as `key`.
        attention_mask: not used: every request sees itself, causally.
        scaling: of the products.
        sliding_window: tokens that a token sees; None: all before it.
        cache: transformers' paged cache.
        kwargs: the step's `cu_seq_lens_q` and `cu_seq_lens_k`, where each request starts.

    Returns:
        ([1, tokens, heads, width], None).
    """
    if cache is not None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    starts, key_starts = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    output = torch.empty_like(query)
    grouped = query.shape[1] != key.shape[1]
    for start, end, key_start, key_end in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        length, seen = end - start, key_end - key_start
        mask, causal = None, length == seen and length > 1
        if sliding_window is not None or 1 < length < seen:
            back = torch.arange(seen - length, seen)[:, None] - torch.arange(seen)
            mask, causal = back >= 0, False
            if sliding_window is not None:
                mask &= back < sliding_window
        output[:, :, start:end] = F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, key_start:key_end],
            value[:, :, key_start:key_end],
            attn_mask=mask,
            scale=scaling,
            is_causal=causal,
            enable_gqa=grouped,
        )
    return output.transpose(1, 2).contiguous(), None
