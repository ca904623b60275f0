"""What we use of transformers' continuous batching that it does not promise to keep: open this file when a new release comes.

Its manager owns the loop, the paged KV cache and the requests' states; ours are the choice of a step's requests (`serving.scheduling`),
the k of every token, and the attention of a step on a CPU. The other such file is models/transformers_models.py.
"""

import functools
import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

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

from prism_refactor.errors import InputError, UsageError, one_line
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.transformers_models import run_experts_with
from prism_refactor.offload.manager import OFFLOADED
from prism_refactor.resources import available_memory
from prism_refactor.serving.scheduling import Job, Scheduler, step_k

# Tokens of a KV page: small ones waste little on a CPU, where reads are by token; elsewhere kernels want transformers' own size.
CPU_PAGE, KV_PAGE = 32, 256
# Share of free memory that the KV cache may have on a CPU.
CPU_KV_SHARE = 0.25
# `Requests.kv_key` is mixed into what KV blocks are found by: token + key * KV_SALT, in the 32 bits that transformers hashes.
KV_SALT = 1 << 20
EXPIRED = "its deadline passed before it could start"
_ATTENTION = "prism_segments"
_names = count()


@dataclass(frozen=True)
class Entry:
    """A request's part of a step.

    Attributes:
        id: the request.
        tokens: that it runs.
        decoding: its prompt has been run.
        context: its tokens in the KV cache.
        samples: whether it gets a new token from this step.
        k: sub-experts per token that it runs with.
    """

    id: str
    tokens: int
    decoding: bool
    context: int
    samples: bool
    k: int


class Requests(Protocol):
    """Who knows the requests that are batched; called in the manager's thread."""

    def job(self, name: str, tokens: int, decoding: bool) -> Job:
        """Return a request as schedulers see it."""

    def kv_key(self, name: str) -> int:
        """Return a number, below 4096, that says at which k or budget a request's KV blocks are computed; 0 for unknown ones."""

    def expired(self, name: str, now: float) -> bool:
        """Return whether a request that has not started is too late already."""

    def forget(self, name: str) -> object:
        """Note that a request is over."""

    def deliver(self, name: str, tokens: list[int], finished: bool, error: str | None) -> None:
        """Take the tokens that a request has generated so far."""

    def before_step(self, entries: list[Entry]) -> None:
        """Prepare the model for a step."""

    def reads_prompt(self, name: str) -> bool:
        """Return whether the logits of a request's prompt are wanted."""

    def note_prompt(self, name: str, start: int, logits: torch.Tensor) -> None:
        """Take the logits [n, V] of some tokens of a request's prompt, from position `start` on."""

    def after_step(self, entries: list[Entry], logits: torch.Tensor, positions: torch.Tensor) -> None:
        """Look at a step's logits [T, V], of which `positions` are those of the entries that sample, before tokens are chosen."""

    def on_schedule(self, start: float, seconds: float, names: list[str]) -> None:
        """Note when a step began, the seconds in which it was scheduled, and who takes part."""


class Batching:
    """transformers' continuous batching of one model, with a scheduler of ours.

    Args:
        model: a causal language model.
        policy: chooses the requests of a step.
        requests: who knows them.

    Raises:
        InputError: transformers' continuous batching does not take the model.
    """

    def __init__(self, model: PreTrainedModel, policy: Scheduler, requests: Requests):
        self.model, self.policy, self.requests = model, policy, requests
        # The step that runs: what is scheduled, and its entries.
        self._scheduled: list[FutureRequestState] = []
        self._entries: list[Entry] = []
        # And those of them whose prompts' logits are wanted, with the place of their first token.
        self._prompts: list[tuple[Entry, int]] = []
        self._attention, self._experts = model.config._attn_implementation, model.config._experts_implementation
        self._manager = self._make_manager()
        # The manager forgets it when it stops; here it still tells whether blocks leaked.
        self._processor: Any = self._manager.batch_processor
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def _make_manager(self) -> ContinuousBatchingManager:
        model: Any = self.model
        limits, offloaded = self.policy.limits, getattr(model, "offload", None) is not None
        on_cpu = model.device.type == "cpu"
        config = ContinuousBatchingConfig(
            max_batch_tokens=limits.tokens,
            max_requests_per_batch=limits.requests,
            # A request that runs at whatever its batch runs at leaves KV that nobody else can use.
            allow_block_sharing=self.policy.exact,
            # Steps of one k each and of many are different programs: a graph would have to be captured for every mix.
            use_cuda_graph=False,
            use_async_batching=False,
        )
        if on_cpu:
            config.page_size = CPU_PAGE
            config.auto_switch_to_flash = False
        kv_tokens = limits.kv_tokens
        if kv_tokens is None and on_cpu:
            kv_tokens = self._kv_tokens_that_fit()
        if kv_tokens is not None:
            config.num_blocks = max(math.ceil(kv_tokens / config.page_size), 2)
        config.scheduler_type = f"prism-{next(_names)}"
        generation = GenerationConfig(do_sample=False, eos_token_id=-1)
        # transformers' name for: an index beyond the last expert is a slot that is not computed.
        self._skipping: list[Any] = [module for module in model.modules() if getattr(module, "_is_expert_parallel", True) is False]
        for module in self._skipping:
            module._is_expert_parallel = True
        # Neither computes dropped slots. Measured on a CPU (docs/serving.md): the loop over experts is as fast as the grouped product on
        # small batches, and up to twice as fast on large ones.
        run_experts_with(model, OFFLOADED if offloaded else EXPERTS if on_cpu else "grouped_mm")
        # Which the manager mixes with the model's own.
        own, model.generation_config = model.generation_config, generation
        mapping: dict[str, Any] = SCHEDULER_MAPPING
        mapping[config.scheduler_type] = functools.partial(_BatchScheduler, batching=self)
        try:
            manager: ContinuousBatchingManager = model.init_continuous_batching(generation, config)
            if on_cpu and model.config._attn_implementation == "sdpa":
                AttentionInterface.register(_ATTENTION, segment_attention)
                model.set_attn_implementation(_ATTENTION)
            manager.output_router = _Router(self.requests)
            # Creates the cache and the scheduler; compiles nothing.
            manager.warmup()
        except Exception as error:
            self._restore()
            raise InputError(f"transformers' continuous batching does not take {type(model).__name__}: {one_line(error)}") from error
        finally:
            model.generation_config = own
            del mapping[config.scheduler_type]
        return manager

    def _kv_tokens_that_fit(self) -> int:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * width * self.model.dtype.itemsize
        most = self.policy.limits.requests * self.context
        return min(int(CPU_KV_SHARE * available_memory() / token_bytes), most)

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
    def active(self) -> set[str]:
        """The requests with a KV cache."""
        return set(self._processor.scheduler.active_requests)

    @property
    def running(self) -> bool:
        """Whether the manager's thread runs."""
        return self._manager.is_running()

    @property
    def alive(self) -> bool:
        """Whether the manager's thread runs and has not failed."""
        return self.running and self._manager.background_thread_status.fatal_error is None

    def start(self) -> None:
        """Start the manager's thread."""
        self._manager.start()

    def stop(self) -> None:
        """End what runs, and the thread."""
        if self.running:
            self._manager.stop(block=True, hard_stop=True)

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._restore()

    def _restore(self) -> None:
        for module in self._skipping:
            module._is_expert_parallel = False
        self.model.set_attn_implementation(self._attention)
        run_experts_with(self.model, self._experts)

    def add(self, name: str, prompt: list[int], max_new_tokens: int, eos_token_ids: list[int]) -> bool:
        """Queue a request; returns whether the manager took it."""
        added = self._manager.add_request(prompt, name, max_new_tokens=max_new_tokens, streaming=True, eos_token_id=eos_token_ids or -1)
        return added is not None

    def cancel(self, name: str) -> None:
        """End a request and free its KV blocks before the next step."""
        self._manager.cancel_request(name)

    def _before_forward(self, model: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        if not self._scheduled:
            return None
        self.requests.before_step(self._entries)
        self._prompts = self._prompts_to_read()
        if not self._prompts or "logits_to_keep" not in options:
            return None
        # Behind those that the manager wants.
        more = torch.cat([torch.arange(start, start + entry.tokens) for entry, start in self._prompts])
        kept = options["logits_to_keep"]
        return arguments, options | {"logits_to_keep": torch.cat([kept, more.to(kept)])}

    def _prompts_to_read(self) -> list[tuple[Entry, int]]:
        """The entries of a step whose logits are wanted as a prompt's, and where their tokens begin in the step."""
        starts = itertools.accumulate((entry.tokens for entry in self._entries), initial=0)
        pairs = zip(self._entries, starts, strict=False)
        return [(entry, start) for entry, start in pairs if not entry.decoding and self.requests.reads_prompt(entry.id)]

    def _after_forward(self, model: nn.Module, arguments: Any, options: dict[str, Any], output: Any) -> None:
        if not self._scheduled:
            return
        few, kept = "logits_to_keep" in options, options["logits_indices"]
        place = len(kept)
        for entry, start in self._prompts:
            first = place if few else start
            self.requests.note_prompt(entry.id, entry.context, output.logits[0, first : first + entry.tokens])
            place += entry.tokens
        if few:
            output.logits = output.logits[:, : len(kept)]
        positions = torch.arange(sum(state.has_new_token for state in self._scheduled)) if few else kept
        self.requests.after_step(self._entries, output.logits[0], positions)
        self._scheduled, self._entries, self._prompts = [], [], []

    def _step(self, scheduled: list[FutureRequestState], jobs: dict[str, Job], start: float) -> None:
        """Note what the coming forward pass runs."""
        ks = step_k([(jobs[future.state.request_id], future.query_length) for future in scheduled], self.policy.exact)
        self._scheduled = scheduled
        self._entries = []
        for future in scheduled:
            name = future.state.request_id
            decoding, context = jobs[name].decoding, future.state.position_offset
            self._entries.append(Entry(name, future.query_length, decoding, context, future.has_new_token, ks[name]))
        self.requests.on_schedule(start, time.monotonic() - start, [entry.id for entry in self._entries])

    def measure(self, requests: int, tokens: int, context: int) -> float:
        """Return the seconds of one step as it is run, without the scheduler; the thread must not have been started.

        Args:
            requests: in the step.
            tokens: of each.
            context: tokens of each that are in the KV cache already.
        """
        processor = self._processor
        status = RequestStatus.DECODING if tokens == 1 else RequestStatus.PREFILLING
        states = create_warmup_future_states(requests, status, tokens, context, processor.cache)
        if len(states) < requests:
            raise UsageError(f"{requests} requests of {context + tokens} tokens do not fit a KV cache of {self.kv_tokens} tokens")
        for number, state in enumerate(states):
            # Any tokens, but different ones: equal ones would all be routed to the same experts.
            rng = random.Random(number)
            state.state.tokens_to_process = [rng.randrange(self.model.config.get_text_config().vocab_size) for _ in range(tokens)]
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


class _Router(OutputRouter):
    """Hands every output of the manager on."""

    def __init__(self, requests: Requests):
        super().__init__()
        self._requests = requests

    def deliver(self, output: GenerationOutput) -> None:
        self._requests.deliver(output.request_id, output.generated_tokens, output.is_finished(), output.error)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class _BatchScheduler(TransformersScheduler):
    """Lets a scheduler of ours choose, and transformers' base class take: budgets, blocks, prefix sharing."""

    def __init__(self, cache: Any, safety_margin: float | None, max_requests_per_batch: int, batching: Batching):
        # Blocks kept free for requests that decode, as transformers' own first-come scheduler does.
        super().__init__(cache, 0.15 if safety_margin is None else safety_margin, max_requests_per_batch)
        self.batching, self.requests = batching, batching.requests
        if cache.use_prefix_sharing:
            self._share_by_k(cache)

    def _share_by_k(self, cache: Any) -> None:
        """Make KV blocks findable only by requests of the k or budget that they were computed with."""

        def salted(name: str, tokens: list[int]) -> list[int]:
            salt = self.requests.kv_key(name) * KV_SALT
            return [token + salt for token in tokens]

        def search(name: str, tokens: list[int], original: Callable[..., int]) -> int:
            # What is found is not run, and has no logits.
            return 0 if self.requests.reads_prompt(name) else original(name, salted(name, tokens))

        def complete(name: str, tokens: list[int], blocks: int, original: Callable[..., None]) -> None:
            original(name, salted(name, tokens), blocks)

        cache.search_prefix_match = functools.partial(search, original=cache.search_prefix_match)
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = functools.partial(complete, original=allocator.mark_complete_blocks)

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled = super().clear_cancelled_requests()
        for state in cancelled:
            self.requests.forget(state.request_id)
        return cancelled

    def _expire(self, now: float) -> None:
        """Fail what waits for a KV cache and is too late already."""
        for name in list(self.waiting_requests_order):
            if self.requests.expired(name, now):
                state = self.waiting_requests.pop(name)
                self.waiting_requests_order.remove(name)
                self.batching._manager.output_router.fail_and_deliver(state, TimeoutError(EXPIRED))

    def _job(self, state: RequestState) -> Job:
        decoding = state.status == RequestStatus.DECODING
        return self.requests.job(state.request_id, 1 if decoding else len(state.remaining_prefill_tokens), decoding)

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        policy, now = self.batching.policy, time.monotonic()
        self._expire(now)
        active = [self._job(state) for state in self.active_requests.values()]
        closed = self.block_new_requests or not policy.room(active)
        waiting = [] if closed else [self._job(state) for state in self._get_waiting_candidates()]
        chosen = policy.step(active, waiting, now)
        states = {**self.waiting_requests, **self.active_requests}
        candidates = [states[job.id] for job in chosen]
        from_waiting: set[str] = set()
        scheduled, starved, fast, tokens, read = self._process_candidates(candidates, token_budget, cache_budget, from_waiting)
        self._cleanup_waiting_queue(from_waiting)
        if not scheduled:
            return (None, fast, 0, 0) if starved else ([], fast, 0, 0)
        self.batching._step(scheduled, {job.id: job for job in chosen}, now)
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

    Raises:
        InputError: the family's attention has sinks or a cap on its scores.
    """
    for name in ("s_aux", "softcap"):
        if kwargs.get(name) is not None:
            raise InputError(f"{type(module).__name__}: attention with {name} is not computed on a CPU here")
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
