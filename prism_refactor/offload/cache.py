"""Fast memory: a fixed number of slots for sub-experts, filled by threads of their own.

What a layer needs now is loaded before anything that is only expected. A sub-expert in use is pinned; of the others the policy says which
leaves. One lock guards all bookkeeping; reading happens outside of it.
"""

import math
import mmap
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from prism_refactor.errors import PrismError, ResourceError, one_line
from prism_refactor.models.transformers_models import ExpertSlots, ExpertsModule
from prism_refactor.offload.policies import Policy, Uses
from prism_refactor.offload.store import Slot, Store

# Threads that load. A second one has the disk work while the first notes what it has read; more do not read faster (docs/offloading.md).
READERS = 2
# Prefetches that may wait; what is less likely than these is forgotten.
QUEUE = 64

Key = tuple[int, int]


@dataclass
class Counters:
    """What the cache did so far.

    Attributes:
        hits: sub-experts that were in fast memory when a layer asked for them.
        late_hits: those on their way, because of a prefetch.
        misses: those whose load began only then.
        prefetched: loads begun ahead of need; `prefetched_used` of them were used, `prefetches_dropped` never began because they had become
            useless or did not fit the queue.
        skipped: sub-experts that were not computed because loading them would have taken too long (elastic offloading).
        loaded_bytes: read from slow memory; `wasted_bytes` of them were prefetched and evicted unused.
        load_seconds: sum over loads; stall_seconds: that the computation waited.
    """

    hits: int = 0
    late_hits: int = 0
    misses: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    prefetches_dropped: int = 0
    skipped: int = 0
    loaded_bytes: int = 0
    wasted_bytes: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    stall_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of uses that found their sub-expert in fast memory; 1 where nothing was used."""
        uses = self.hits + self.late_hits + self.misses
        return self.hits / uses if uses else 1.0

    def since(self, before: "Counters") -> "Counters":
        """What was done after an earlier copy."""
        return Counters(**{name: value - getattr(before, name) for name, value in asdict(self).items()})


class Pool:
    """The slots.

    Args:
        store: whose sub-experts the slots hold.
        experts: a module whose activation and layout they have.
        slots: how many.
        device: where.
    """

    def __init__(self, store: Store, experts: ExpertsModule, slots: int, device: str):
        self.names = list(store.shapes)
        self.experts = ExpertSlots(experts, {name: _pages((slots, *shape), store.dtype, device) for name, shape in store.shapes.items()})

    def slot(self, number: int) -> Slot:
        """The tensors of one slot."""
        return {name: getattr(self.experts, name)[number] for name in self.names}


def _pages(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Memory that is taken now and not when a request needs it; on a CPU it begins at a page, so that O_DIRECT can read into it."""
    if device != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Not every kernel has huge pages.
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    # Writing takes it.
    return torch.frombuffer(memory, dtype=dtype).view(shape).zero_()


class Cache:
    """Sub-experts in a bounded number of slots.

    Args:
        store: slow memory.
        pool: the slots.
        slots: how many there are.
        policy: which one leaves.
    """

    def __init__(self, store: Store, pool: Pool, slots: int, policy: Policy):
        self.store, self.pool, self.slots, self.policy, self.counters = store, pool, slots, policy, Counters()
        shape = store.layers, store.experts
        self._lock = threading.Lock()
        # Something to load, or room to load it into; something loaded.
        self._work_there, self._arrived = threading.Condition(self._lock), threading.Condition(self._lock)
        self._slot_of: dict[Key, int] = {}
        self._free = list(range(slots))
        self._resident, self._pinned = np.zeros(shape, bool), np.zeros(shape, bool)
        # Expected by a prediction whose layer has not come yet; loaded ahead and not used yet.
        self._expected, self._unused = np.zeros(shape, bool), np.zeros(shape, bool)
        # In flight: whether it began as a prefetch.
        self._loading: dict[Key, bool] = {}
        self._demanded: deque[Key] = deque()
        self._wanted: deque[Key] = deque()
        # Of the layer that runs: what was there when it asked, and what it still waits for.
        self._there: list[int] = []
        self._awaited: set[Key] = set()
        # Computed, but still pinned: taking the lock for every one would cost more than it computes. Unless a thread waits for a slot.
        self._done: list[Key] = []
        self._full = False
        self._failed: dict[Key, PrismError] = {}
        self._closed = False
        # What ended a thread that should not have ended.
        self._crash: Exception | None = None
        device = getattr(pool.experts, pool.names[0]).device
        self._cuda, self._apart = device if device.type == "cuda" else None, device.type != "cpu"
        # When the last computation that reads a slot is done, on a GPU.
        self._read: dict[int, Any] = {}
        self._threads = [threading.Thread(target=self._work, name=f"prism-reader-{number}", daemon=True) for number in range(READERS)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads."""
        with self._lock:
            self._closed = True
            self._work_there.notify_all()
        for thread in self._threads:
            thread.join()

    def absent(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those of a layer's sub-experts that are neither in fast memory nor on their way."""
        with self._lock:
            return [expert for expert in experts if not self._resident[layer, expert] and (layer, expert) not in self._loading]

    def end(self, request: str) -> None:
        """A request is over."""
        with self._lock:
            self.policy.end(request)

    def demand(self, layer: int, uses: Uses) -> None:
        """A layer needs the sub-experts that `uses` counts: what is absent is queued before every prefetch."""
        counters = self.counters
        with self._lock:
            self.policy.use(layer, uses)
            queued = len(self._wanted)
            self._wanted = deque(key for key in self._wanted if key[0] != layer)
            self._expected[layer] = False
            self._there = []
            for expert in np.flatnonzero(sum(uses.values())).tolist():
                key = layer, expert
                if self._resident[key]:
                    counters.hits += 1
                    self._there.append(expert)
                    self._pinned[key] = True
                    self._note_use(key)
                else:
                    self._awaited.add(key)
                    if key in self._loading:
                        counters.late_hits += 1
                    else:
                        counters.misses += 1
                        self._demanded.append(key)
            counters.prefetches_dropped += queued - len(self._wanted)
            if self._demanded:
                self._work_there.notify_all()

    def arrivals(self, layer: int) -> Iterator[tuple[int, int | PrismError]]:
        """What `demand` asked for, (sub-expert, its slot or why it could not be loaded), as it is there; free to be evicted afterwards."""
        try:
            for expert in self._there:
                yield expert, self._slot_of[layer, expert]
                self._release((layer, expert))
            while self._awaited:
                key = self._wait()
                if key in self._failed:
                    yield key[1], self._failed.pop(key)
                else:
                    yield key[1], self._slot_of[key]
                    self._release(key)
        finally:
            with self._lock:
                self._awaited.clear()
                self._demanded.clear()
                self._failed.clear()
                self._unpin()
                # Where the caller stopped half way.
                self._pinned[layer] = False

    def _wait(self) -> Key:
        """The next awaited sub-expert that is there, pinned, or failed."""
        start = time.perf_counter()
        with self._lock:
            self._unpin()
            while True:
                if self._crash is not None:
                    raise RuntimeError("a loading thread ended") from self._crash
                for key in self._awaited:
                    if self._resident[key] or key in self._failed:
                        self._awaited.discard(key)
                        self.counters.stall_seconds += time.perf_counter() - start
                        return key
                self._arrived.wait()

    def _note_use(self, key: Key) -> None:
        if self._unused[key]:
            self._unused[key] = False
            self.counters.prefetched_used += 1

    def _release(self, key: Key) -> None:
        if self._cuda is not None:
            event = torch.cuda.Event()
            event.record()
            self._read[self._slot_of[key]] = event
        self._done.append(key)
        if self._full:
            with self._lock:
                self._unpin()

    def _unpin(self) -> None:
        """Let go of what has been computed."""
        for key in self._done:
            self._pinned[key] = False
        if self._done and (self._demanded or self._wanted):
            self._work_there.notify_all()
        self._done.clear()

    def prefetch(self, layers: Iterable[int], expected: list[Key]) -> None:
        """Replace what is expected of some layers: keys, the most likely first. What is absent is loaded when nothing is needed at once."""
        with self._lock:
            for layer in layers:
                self._expected[layer] = False
            before = {*self._wanted}
            wanted = []
            for key in expected:
                self._expected[key] = True
                if not self._resident[key] and key not in self._loading and key not in self._awaited:
                    wanted.append(key)
            self._wanted = deque(wanted[:QUEUE])
            self.counters.prefetches_dropped += len(before - {*self._wanted} - {*self._loading})
            if self._wanted:
                self._work_there.notify_all()

    def _room(self, ahead: bool) -> int | None:
        """A slot to load into, emptied if need be; None when everything is in use."""
        if self._free:
            return self._free.pop()
        leaving = self._resident & ~self._pinned
        unexpected = leaving & ~self._expected
        if unexpected.any():
            leaving = unexpected
        elif ahead or not leaving.any():
            return None
        victim = np.unravel_index(np.where(leaving, self.policy.keep(), np.inf).argmin(), leaving.shape)
        key = int(victim[0]), int(victim[1])
        self._resident[key] = False
        if self._unused[key]:
            self._unused[key] = False
            self.counters.wasted_bytes += self.store.sub_expert_bytes
        return self._slot_of.pop(key)

    def _next(self) -> tuple[Key, int] | None:
        """What to load now and where to; None when there is nothing to do."""
        if self._demanded:
            slot = self._room(ahead=False)
            self._full = slot is None
            if slot is None:
                return None
            key = self._demanded.popleft()
            self._loading[key] = False
            return key, slot
        if self._wanted:
            slot = self._room(ahead=True)
            if slot is None:
                self.counters.prefetches_dropped += len(self._wanted)
                self._wanted.clear()
                return None
            key = self._wanted.popleft()
            self._loading[key] = True
            self.counters.prefetched += 1
            return key, slot
        return None

    def _work(self) -> None:
        """A loading thread."""
        try:
            self._load_on()
        except Exception as error:
            with self._lock:
                self._crash = error
                self._arrived.notify_all()

    def _load_on(self) -> None:
        """Load what is needed and expected, until the cache is closed."""
        staging = self.store.staging()
        stream = torch.cuda.Stream(self._cuda) if self._cuda is not None else None
        host = None
        if self._apart and staging is not None:
            pin = stream is not None
            host = {name: torch.empty(shape, dtype=self.store.dtype, pin_memory=pin) for name, shape in self.store.shapes.items()}
        while True:
            with self._lock:
                while (found := self._next()) is None and not self._closed:
                    self._work_there.wait()
                if found is None or self._closed:
                    return
            key, slot = found
            start = time.perf_counter()
            error: PrismError | None = None
            try:
                self._load(key, slot, staging, stream, host)
            except PrismError as problem:
                error = problem
            except Exception as problem:
                # Whatever it is, whoever waits must be told.
                error = ResourceError(f"sub-expert {key[1]} of MoE layer {key[0]} could not be loaded: {one_line(problem)}")
            self._loaded(key, slot, time.perf_counter() - start, error)

    def _load(self, key: Key, slot: int, staging: memoryview | None, stream: Any, host: Slot | None) -> None:
        """Fill a slot: from the store, or through a slot's worth of host memory where the store reads into that and slots are elsewhere."""
        target = self.pool.slot(slot)
        if host is not None:
            self.store.read(*key, host, staging)
        with torch.cuda.stream(stream):
            if stream is not None and slot in self._read:
                stream.wait_event(self._read[slot])
            if host is None:
                self.store.read(*key, target, staging)
            else:
                for name, value in host.items():
                    target[name].copy_(value, non_blocking=True)
        if stream is not None:
            stream.synchronize()

    def _loaded(self, key: Key, slot: int, seconds: float, error: PrismError | None) -> None:
        """Note the end of a load."""
        with self._lock:
            ahead = self._loading.pop(key)
            if error is not None:
                self._free.append(slot)
                if key in self._awaited:
                    self._failed[key] = error
            else:
                self._slot_of[key] = slot
                self._resident[key] = True
                self.counters.loads += 1
                self.counters.loaded_bytes += self.store.sub_expert_bytes
                self.counters.load_seconds += seconds
                self._unused[key] = ahead
                if key in self._awaited:
                    self._pinned[key] = True
                    self._note_use(key)
                elif ahead:
                    self.policy.load(*key)
            if key in self._awaited:
                self._arrived.notify_all()
