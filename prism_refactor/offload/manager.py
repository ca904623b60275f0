"""The offloading manager: a model whose sub-experts live in slow memory and run from a cache.

`load_offloaded` gives a transformers model of which everything but the experts is in memory. Its experts run through an implementation
registered with transformers, `OFFLOADED`: it asks the cache for what the router chose, lets the next layer's sub-experts be fetched ahead,
and computes in the order of arrival but adds up in the order of the resident implementation, so that the output is the same to the bit.
"""

import functools
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from prism_refactor.errors import InputError, PrismError, ResourceError, UsageError
from prism_refactor.formats import PrismConfig, RoutingHeader, RoutingPass
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.experts import RowSums, by_expert, expert_activations, weighted_output
from prism_refactor.models.folder import end_of_text
from prism_refactor.models.layered import LayeredModel, check_device
from prism_refactor.models.loading import copy_out_of_files
from prism_refactor.models.modeling_prism import ActiveK, activation_of, full_k, install, router_tensors, two_level_router
from prism_refactor.models.refactored import router_file
from prism_refactor.models.transformers_models import register_experts, run_experts_with
from prism_refactor.offload.cache import Cache, Counters, Pool
from prism_refactor.offload.options import DIRECT, PINNED, CacheBudget, LatencyTarget
from prism_refactor.offload.policies import POLICIES, ActivationAware
from prism_refactor.offload.store import DiskStore, PinnedStore
from prism_refactor.resources import available_memory, gib
from prism_refactor.routing.sample import route

OFFLOADED = "prism_offloaded"
# What is less likely to be used is not fetched ahead: it would cost the time of a load, and what it replaces.
LIKELY = 0.7
# Tokens of a pass up to which a forecast is compared with what came, and the weight of the last comparison.
CHECKED, MEMORY = 16, 0.05


class OffloadManager:
    """What the experts of a model run through.

    Args:
        model: the model; its blocks have been given this manager by `load_offloaded`.
        blocks: its MoE blocks in order.
        cache: fast memory.
        prefetch: one of `options.PREFETCHES`.

    Attributes:
        requests: which requests the tokens of the next forward pass belong to, [(request, tokens)] in the order of the batch; whoever
            batches sets it. Otherwise every pass belongs to one request, until `end_request`.
        faults: tokens of the last pass (positions in the batch) whose sub-experts could not be loaded, with the reason. Where
            `tolerant` is set they get nothing from them; otherwise the forward pass raises the first reason.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[Any], cache: Cache, prefetch: str):
        self.model, self.cache, self.tolerant = model, cache, False
        self.requests: list[tuple[str, int]] = []
        self.faults: list[tuple[list[int], PrismError]] = []
        self._blocks = blocks
        self._slots: Any = cache.pool.experts
        self._by_router, self._by_activation = prefetch in ("router", "both"), prefetch in ("activation", "both")
        self._activations: Any = None
        if self._by_activation:
            same = isinstance(cache.policy, ActivationAware)
            self._activations = cache.policy if same else ActivationAware(cache.store.layers, cache.store.experts)
        self._forecast = _Forecast(len(blocks), cache.store.experts)
        self._request = 0
        self._predicting = False
        self._latency: LatencyTarget | None = None
        self._pace = _Pace(len(blocks))
        self._trace: IO[str] | None = None
        self._passed: list[dict[int, int]] = []
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    @property
    def counters(self) -> Counters:
        """A copy of what the cache counted so far."""
        return replace(self.cache.counters)

    def end_request(self, request: str | None = None) -> None:
        """A request is over: its activations become a past one's. Without a name: the one that all passes belong to."""
        request = request if request is not None else self._own()
        self.cache.end(request)
        if self._activations not in (None, self.cache.policy):
            self._activations.end(request)
        self._request += 1

    def _own(self) -> str:
        return f"request {self._request}"

    def set_latency(self, target: LatencyTarget | None) -> None:
        """Skip sub-experts for a latency target from now on, or no more; only in passes of one token.

        Raises:
            UsageError: the model has no sub-expert router to tell what each contributes, or k_min is out of range.
        """
        routers = [getattr(block.experts, "two_level", None) for block in self._blocks]
        if target is not None:
            if None in routers:
                raise UsageError("a latency target needs a sub-expert router, and this checkpoint has none; refactor with `router` linear")
            if not 1 <= target.k_min <= full_k(self.model.config):
                raise UsageError(f"`k_min` {target.k_min}: choose 1 to {full_k(self.model.config)}")
        self._latency = target
        for layer, router in enumerate(routers):
            if router is not None:
                router.choose = None if target is None else functools.partial(self.choose, layer)

    def record(self, trace: IO[str] | None) -> None:
        """Write what each forward pass uses to a file of JSON lines from now on; see docs/file-formats.md."""
        self._trace = trace
        if trace is not None:
            store = self.cache.store
            trace.write(RoutingHeader(store.layers, store.experts, store.sub_expert_bytes).line())

    def close(self) -> None:
        """End the threads and close the files; the model cannot run any more."""
        self.cache.close()
        self.cache.store.close()

    def _before(self, model: nn.Module, arguments: Any) -> None:
        self.faults = []
        self._passed = []
        self._pace.begin(self.cache.counters)

    def _after(self, model: nn.Module, arguments: Any, output: Any) -> None:
        self._pace.end(self.cache.counters)
        if self._trace is not None:
            used: list[tuple[list[int], list[float]]] = [([*layer], [*layer.values()]) for layer in self._passed]
            self._trace.write(RoutingPass(self._own(), used).line())

    def _uses(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """How many tokens of each request use each sub-expert, for an index int64 [T, k]."""
        experts, start = self.cache.store.experts, 0
        found: dict[str, np.ndarray] = {}
        for request, tokens in self.requests or [(self._own(), len(rows))]:
            counts = np.bincount(rows[start : start + tokens].ravel(), minlength=experts + 1)[:experts].astype(float)
            found[request] = found[request] + counts if request in found else counts
            start += tokens
        return found

    def run(self, layer: int, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts' forward, see `models.experts.experts_forward`: [T, H] from [T, H], int64 [T, k] and [T, k]."""
        rows = index.cpu().numpy()
        uses = self._uses(rows)
        self.cache.demand(layer, uses)
        if self._trace is not None:
            counts = np.sum([*uses.values()], axis=0)
            self._passed.append({int(expert): int(counts[expert]) for expert in np.flatnonzero(counts)})
        if self._by_router:
            self._forecast.check(layer, rows)
        if self._by_router or self._by_activation:
            self._look_ahead(layer, hidden_states, uses)
        groups = {expert: (tokens, shares) for expert, tokens, shares in by_expert(index, weights, self.cache.store.experts)}
        sums = RowSums(torch.zeros_like(hidden_states))
        # Layers may differ in it (Step-3.7), while their sub-experts lie in the same slots.
        activate = activation_of(self._blocks[layer].experts)
        # What arrived before its turn: sums of floats depend on their order.
        early: dict[int, torch.Tensor | None] = {}
        order = iter(groups)
        turn = next(order, None)
        for expert, slot in self.cache.arrivals(layer):
            tokens, shares = groups[expert]
            if isinstance(slot, PrismError):
                if not self.tolerant:
                    raise slot
                self.faults.append((tokens.tolist(), slot))
                early[expert] = None
            else:
                activations = expert_activations(self._slots, slot, hidden_states[tokens], activate)
                early[expert] = weighted_output(self._slots, slot, activations, shares)
            while turn is not None and turn in early:
                part = early.pop(turn)
                if part is not None:
                    own = groups[turn][0]
                    sums.add(own, part, sums.last_were(own))
                turn = next(order, None)
        return sums.finish()

    def _look_ahead(self, layer: int, hidden_states: torch.Tensor, uses: dict[str, np.ndarray]) -> None:
        """Queue what the coming layers are likely to use, the most likely and the nearest first."""
        layers = len(self._blocks)
        probability = np.zeros((layers, self.cache.store.experts))
        if self._by_activation:
            if self._activations is not self.cache.policy:
                self._activations.use(layer, uses)
            probability = self._activations.predict()
            probability[layer] = 0
        if self._by_router and layer + 1 < layers:
            self._predicting = True
            try:
                index = self._routed(layer + 1, hidden_states)
            finally:
                self._predicting = False
            probability[layer + 1] = np.maximum(probability[layer + 1], self._forecast.probability(layer + 1, index.cpu().numpy()))
        # The further away a layer, the less its prediction is worth.
        near = 1 - ((np.arange(layers) - layer - 1) % layers)[:, None] / layers
        likely = np.argwhere(probability > LIKELY)
        order = (-probability * near)[tuple(likely.T)].argsort(kind="stable")
        self.cache.prefetch(range(layers), [(row, expert) for row, expert in likely[order].tolist()])

    def _routed(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what a layer's router would choose for some inputs [T, H]: int64 [T, k]."""
        block = self._blocks[layer]
        weights, experts = route(block, hidden_states)
        two_level = getattr(block.experts, "two_level", None)
        if two_level is None:
            return experts
        active: Any = self.model.prism_active
        return two_level(hidden_states, weights, experts, *active.of_layer(layer))[1]

    def choose(self, layer: int, indices: torch.Tensor, asked: torch.Tensor) -> Any:
        """Which sub-experts of a token to skip, see `TwoLevelRouter.choose`."""
        if self._latency is None or self._predicting or len(indices) != 1:
            return None
        k = int(asked[0])
        ranked = indices[0, :k].tolist()
        absent = set(self.cache.absent(layer, ranked))
        affordable = self._pace.loads(self._latency.seconds, layer, self.cache.counters)
        misses = [rank for rank, expert in enumerate(ranked) if expert in absent]
        # The first k_min are computed whatever it takes: with them the token is at least as good as at that k.
        skipped = [rank for rank in misses[affordable:] if rank >= self._latency.k_min]
        if not skipped:
            return None
        self.cache.counters.skipped += len(skipped)
        out = set(skipped)
        order = [rank for rank in range(indices.shape[1]) if rank not in out] + skipped
        # The kept ones of the first k come first, then those beyond k, then the skipped ones.
        return torch.tensor([order], device=indices.device), torch.tensor([k - len(skipped)], device=indices.device)


class _Pace:
    """How long a pass takes apart from waiting for loads, and how many loads fit what is left of a target."""

    def __init__(self, layers: int):
        self.layers = layers
        self._start = self._stalled = 0.0
        # Seconds of a whole pass without stalls: mean over the last passes.
        self._computing = 0.0

    def begin(self, counters: Counters) -> None:
        self._start, self._stalled = time.perf_counter(), counters.stall_seconds

    def end(self, counters: Counters) -> None:
        computing = time.perf_counter() - self._start - (counters.stall_seconds - self._stalled)
        self._computing += (0.2 if self._computing else 1.0) * (computing - self._computing)

    def loads(self, target: float, layer: int, counters: Counters) -> int:
        """Loads that the layer may wait for: its part of the time left once the coming computation is taken off."""
        if not counters.loads:
            return 2**30
        coming = self.layers - layer
        left = target - (time.perf_counter() - self._start) - self._computing * coming / self.layers
        return max(int(left / coming / (counters.load_seconds / counters.loads)), 0)


class _Forecast:
    """How far the next layer's router can be believed when it is given this layer's input: its first choices more than its last."""

    def __init__(self, layers: int, experts: int):
        self.experts = experts
        # Of the choices of each rank, how many were used; believed at first.
        self._right: list[np.ndarray | None] = [None] * layers
        self._guess: tuple[int, np.ndarray] | None = None

    def probability(self, layer: int, index: np.ndarray) -> np.ndarray:
        """That a coming layer's sub-experts will be used by some token, [E], from what its router says now, int [T, k], best first."""
        self._guess = layer, index
        right = self._right[layer]
        each = np.full(index.shape[1], 1.0) if right is None or len(right) < index.shape[1] else right[: index.shape[1]]
        unused = np.ones(self.experts + 1)
        np.multiply.at(unused, index, 1 - np.broadcast_to(each, index.shape))
        return 1 - unused[: self.experts]

    def check(self, layer: int, index: np.ndarray) -> None:
        """Compare what was said of a layer with what it uses, int [T, k]."""
        if self._guess is None or self._guess[0] != layer or len(self._guess[1]) != len(index):
            return
        guess, self._guess = self._guess[1], None
        if len(index) > CHECKED:
            return
        # Tokens of fewer sub-experts than others of the batch leave slots empty.
        chosen = guess < self.experts
        found = ((guess[:, :, None] == index[:, None, :]).any(2) & chosen).sum(0) / np.maximum(chosen.sum(0), 1)
        right = self._right[layer]
        if right is None:
            self._right[layer] = found
            return
        # Within a budget there are more slots now and fewer then.
        width = min(len(right), len(found))
        seen = chosen[:, :width].any(0)
        learned = np.where(seen, right[:width] + MEMORY * (found[:width] - right[:width]), right[:width])
        self._right[layer] = np.concatenate([learned, right[width:], found[width:]])


def offloaded_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The implementation of experts registered with transformers as `OFFLOADED`."""
    return self.offload.run(self.offload_layer, hidden_states, top_k_index, top_k_weights)


register_experts(OFFLOADED, offloaded_experts_forward)


def load_offloaded(
    folder: Path,
    fast_memory: CacheBudget,
    policy: str = "activation",
    prefetch: str = "none",
    read: str = DIRECT,
    device: str = "cpu",
) -> Any:
    """The model of a checkpoint, refactored or not, whose (sub-)experts run from a cache; `model.offload` is its `OffloadManager`.

    Args:
        folder: the checkpoint. Of an original the cached things are whole experts.
        fast_memory: what the cache may take.
        policy: one of `POLICIES`.
        prefetch: one of `options.PREFETCHES`.
        read: DIRECT or BUFFERED (see `DiskStore`), or PINNED (see `PinnedStore`, needs a GPU).
        device: where the model computes, and where fast memory is.

    Raises:
        InputError: the checkpoint cannot be used.
        UsageError: fast memory is too small for what one token needs in a layer; a `read` or a device that is not possible here.
        ResourceError: fast memory is more than there is.
    """
    if read == PINNED and device == "cpu":
        raise UsageError("`read` pinned is for `device` cuda: on a CPU fast memory is host memory already")
    check_device(device)
    checkpoint = Checkpoint(folder)
    if checkpoint.quantised:
        raise InputError(
            f"{folder}: is quantised ({checkpoint.quantised}), and experts are read as they are stored; offload a bf16 checkpoint"
        )
    prism = PrismConfig.of(checkpoint.config)
    if prism and not prism.stock:
        raise InputError(
            f"{folder}: holds its experts whole, and offloading reads sub-experts where they are stored; use prism-serve or "
            "prism_refactor.load"
        )
    if prefetch in ("router", "both") and not checkpoint.architecture.plain_router:
        raise UsageError(f"`prefetch` {prefetch}: the router of {folder} reads more than what its experts read; use activation or none")
    if checkpoint.dense:
        raise InputError(f"{folder}: is a dense {checkpoint.dense}; refactor it first")
    layered = LayeredModel(checkpoint, checkpoint.dtype or torch.float32, device)
    layered.check()
    model: Any = layered.model
    blocks: dict[str, Any] = {name: model.get_submodule(name) for name in layered.moe_blocks.values()}
    modules = [f"{name}.experts" for name in blocks]
    disk = DiskStore(checkpoint, layered, modules, read)
    with ExitStack() as unneeded:
        unneeded.callback(disk.close)
        slots = _slots(disk, fast_memory, _most(checkpoint))
        _check_memory(disk, slots, fast_memory, read, device)
        _load_resident(layered, set(modules))
        if prism and prism.has_router:
            _attach(layered, blocks, folder)
        copy_out_of_files(model, device)
        store = PinnedStore(disk) if read == PINNED else disk
        pool = Pool(store, next(iter(blocks.values())).experts, slots, device)
        cache = Cache(store, pool, slots, POLICIES[policy](store.layers, store.experts))
        unneeded.callback(cache.close)
        model.offload = OffloadManager(model, [*blocks.values()], cache, prefetch)
        for number, block in enumerate(blocks.values()):
            block.experts.offload, block.experts.offload_layer = model.offload, number
        run_experts_with(model, OFFLOADED)
        # How to search and sample is asked nowhere else.
        model.generation_config = GenerationConfig(eos_token_id=end_of_text(folder) or model.generation_config.eos_token_id)
        # All is there now, and needed; but for the files, where everything has been read.
        unneeded.pop_all()
        if store is not disk:
            disk.close()
    return model


def _most(checkpoint: Checkpoint) -> int:
    """(Sub-)experts that one token uses at most."""
    prism = PrismConfig.of(checkpoint.config)
    if prism:
        return prism.max_active
    return checkpoint.architecture.sizes(checkpoint.config)[checkpoint.architecture.top_k]


def _slots(store: DiskStore, fast_memory: CacheBudget, most: int) -> int:
    total = store.layers * store.experts
    budget = fast_memory.bytes(total * store.sub_expert_bytes)
    slots = min(budget // store.sub_expert_bytes, total)
    if slots < most:
        size = store.sub_expert_bytes
        raise UsageError(
            f"`fast_memory` {fast_memory.text}: holds {slots} sub-experts of {size:,} bytes, and one token needs {most} of a layer; "
            f"the least that works is {most * size / 2**20:.1f}MiB ({100 * most / total:.1f}%)"
        )
    return slots


def _load_resident(layered: LayeredModel, offloaded: set[str]) -> None:
    """Load everything but some modules, and let go of these."""
    model = layered.model

    def visit(name: str, module: nn.Module) -> None:
        if name in offloaded:
            return
        if not any(f"{other}.".startswith(f"{name}." if name else "") for other in offloaded):
            if layered.tensors_under(name):
                layered.load(name)
            return
        for leaf in [*module._parameters, *module._buffers]:
            own = f"{name}.{leaf}"
            if layered.tensors_under(own):
                layered.load(own)
        for leaf, child in module.named_children():
            visit(f"{name}.{leaf}" if name else leaf, child)

    visit("", model)
    model.tie_weights()
    left = [name for name, value in model.state_dict().items() if value.is_meta and name.rpartition(".")[0] not in offloaded]
    if left:
        raise InputError(f"{layered.checkpoint.path}: tensor {left[0]} is missing; complete the checkpoint")


def _check_memory(store: DiskStore, slots: int, fast_memory: CacheBudget, read: str, device: str) -> None:
    """Raise ResourceError when the slots, or page-locked host memory for all sub-experts, are more than there is."""
    needed = slots * store.sub_expert_bytes
    free = available_memory() if device == "cpu" else torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else needed
    if needed > free:
        raise ResourceError(f"`fast_memory` {fast_memory.text}: takes {gib(needed)}, and {gib(free)} of memory is available; give less")
    everything, host = store.layers * store.experts * store.sub_expert_bytes, available_memory()
    if read == PINNED and everything > host:
        raise ResourceError(f"`read` pinned: takes {gib(everything)} of host memory, and {gib(host)} is available; use `read` direct")


def _attach(layered: LayeredModel, blocks: dict[str, Any], folder: Path) -> None:
    """Install two-level routing, a layer at a time: gate neurons are rows of experts, which are read for it and let go."""
    model = layered.model
    model.prism_active = ActiveK([full_k(model.config)] * len(blocks))
    with router_file(folder) as path:
        routers = router_tensors(path)
        for layer, (name, block) in enumerate(blocks.items()):
            with layered.loaded(*([f"{name}.experts"] if "gate_neurons" in routers[name] else [])):
                two_level = two_level_router(block, model.config, routers[name])
            install(block, two_level, model.prism_active, layer)
