"""Offloading: the same bits from a cache as from memory, whatever the policy; faults, budgets, traces."""

import json
import math
import mmap
import os
import shutil
import threading
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import psutil
import pytest
import safetensors
import torch
from conftest import FAMILIES, FAST, mostly_long
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prism_refactor.calibration.text import load_tokenizer
from prism_refactor.errors import InputError, ResourceError, UsageError
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.experts import EXPERTS
from prism_refactor.models.layered import LayeredModel
from prism_refactor.models.loading import load
from prism_refactor.models.modeling_prism import full_k, set_active
from prism_refactor.models.transformers_models import adopt_experts, run_experts_with
from prism_refactor.models.writer import BLOCK
from prism_refactor.offload import cache as caches
from prism_refactor.offload.cache import Cache, Pool
from prism_refactor.offload.manager import load_offloaded
from prism_refactor.offload.options import PINNED, PREFETCHES, CacheBudget, LatencyTarget
from prism_refactor.offload.policies import POLICIES, Belady
from prism_refactor.offload.replay import Trace, belady, hit_rate
from prism_refactor.offload.store import DiskStore, PinnedStore
from prism_refactor.server.metrics import Metrics
from prism_refactor.serving.engine import Engine, GenerationRequest
from prism_refactor.serving.scheduling import Limits

PROMPT = "The river runs through the old town and"


def resident(folder):
    if (folder / "prism.json").exists():
        model = load(folder)
    else:
        model = adopt_experts(conftest.load(folder))
        for parameter in model.parameters():
            # As `serving.engine.load` does: where a tensor lies in memory is in the last bit of its products.
            parameter.data = parameter.data.clone()
    run_experts_with(model, EXPERTS)
    return model


@pytest.fixture
def offloaded():
    """Offloaded models, closed after the test."""
    made = []

    def make(folder, memory="25%", **options):
        made.append(load_offloaded(folder, CacheBudget(memory), **options))
        return made[-1]

    yield make
    for model in made:
        model.offload.close()


@torch.inference_mode()
def answer(model, ids, tokens=12):
    ids = torch.as_tensor(ids)[None]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return output[0, ids.shape[1] :].tolist()


@torch.inference_mode()
def same_bits(model, other, ids):
    return torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize("family", mostly_long(FAMILIES, "olmoe", "gpt_oss", "lfm2_moe"))
def test_every_family_gives_the_bits_of_the_resident_model(family, models, command, tmp_path, token_ids, offloaded):
    options = [*FAST, "--solver", "contiguous"]
    assert command("prism-refactor", models[family], tmp_path / "out", *options).code == 0
    # What one token needs is enough; a prompt then passes through the cache in turns.
    with pytest.raises(UsageError, match="the least that works is") as error:
        offloaded(tmp_path / "out", "1B")
    least = str(error.value).split("the least that works is ")[1].split("(")[1].removesuffix(")")
    wanted, model = resident(tmp_path / "out"), offloaded(tmp_path / "out", f"{float(least[:-1]) + 0.1:.1f}%")
    assert model.offload.cache.slots == full_k(model.config)
    for k in (full_k(model.config), 3):
        set_active(wanted, k)
        set_active(model, k)
        assert same_bits(model, wanted, token_ids[:2])
        assert same_bits(model, wanted, token_ids[:1, :1])
    assert same_bits(offloaded(models[family], "60%"), resident(models[family]), token_ids)


def test_gate_neurons_of_offloaded_experts(command, tmp_path, models, token_ids, offloaded):
    assert command("prism-refactor", models["olmoe"], tmp_path / "out", *FAST, "--router", "proxy").code == 0
    wanted, model = resident(tmp_path / "out"), offloaded(tmp_path / "out", "50%")
    set_active(wanted, 3)
    set_active(model, 3)
    assert same_bits(model, wanted, token_ids)


@pytest.mark.parametrize(("policy", "prefetch"), mostly_long([*product(POLICIES, PREFETCHES)], ("activation", "both"), ("lru", "none")))
def test_no_policy_and_no_prefetch_changes_the_text(policy, prefetch, elastic, offloaded):
    wanted, model = (
        resident(elastic),
        offloaded(elastic, policy=policy, prefetch=prefetch, read="buffered" if policy == "lfu" else "direct"),
    )
    total = model.offload.cache.store.layers * model.offload.cache.store.experts
    for k in (16, 10):
        set_active(wanted, k)
        set_active(model, k)
        assert answer(model, range(20, 60)) == answer(wanted, range(20, 60))
        model.offload.end_request()
    counters = model.offload.counters
    assert counters.hits > 0
    assert counters.misses > 0
    assert (counters.prefetched > 0) == (prefetch != "none")
    assert counters.prefetched_used <= counters.prefetched
    assert counters.loaded_bytes == counters.loads * model.offload.cache.store.sub_expert_bytes
    assert counters.wasted_bytes <= (counters.prefetched - counters.prefetched_used) * model.offload.cache.store.sub_expert_bytes
    assert model.offload.cache.slots == total // 4
    assert len(model.offload.cache._slot_of) <= total // 4


def test_everything_but_the_experts_is_in_memory_and_they_are_not(elastic, offloaded):
    model = offloaded(elastic)
    held = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    absent = {name for name, value in model.state_dict().items() if value.is_meta}
    assert absent == {name for name in model.state_dict() if ".experts." in name}
    wanted = load(elastic).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in held.items())
    pool = model.offload.cache.pool
    assert (
        sum(getattr(pool.experts, name).nbytes for name in pool.names)
        == model.offload.cache.slots * model.offload.cache.store.sub_expert_bytes
    )


def test_the_checkpoint_is_open_as_long_as_the_model(elastic, copied, monkeypatch):
    def is_open():
        return [file.path for file in psutil.Process().open_files() if file.path.startswith((str(elastic), str(copied)))]

    threads = threading.active_count()

    with pytest.raises(UsageError, match="the least that works"):
        load_offloaded(elastic, CacheBudget("1KiB"))
    assert not is_open()
    with monkeypatch.context() as patch:
        patch.setattr("prism_refactor.offload.manager.end_of_text", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_offloaded(elastic, CacheBudget("25%"))
    assert not is_open()
    # The last of several files.
    shard = max(copied.glob("model-*.safetensors"))
    opened = os.open

    def fails(path, *rest, **options):
        if str(path) == str(shard):
            raise OSError(5, "Input/output error")
        return opened(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        with pytest.raises(InputError, match="Input/output error"):
            load_offloaded(copied, CacheBudget("25%"), read="buffered")
    assert not is_open()
    assert threading.active_count() == threads
    model = load_offloaded(elastic, CacheBudget("25%"))
    assert is_open()
    for _ in range(2):
        model.offload.close()
        assert not is_open()


def test_pinned_memory_gives_what_the_disk_gives(elastic, offloaded):
    model = offloaded(elastic)
    disk: DiskStore = model.offload.cache.store
    checkpoint = Checkpoint(elastic)
    layered = LayeredModel(checkpoint, disk.dtype, "cpu")
    cached = DiskStore(checkpoint, layered, [f"{block}.experts" for block in layered.moe_blocks.values()], PINNED)
    pinned = PinnedStore(cached, pin=False)
    cached.close()
    slots = [{name: torch.zeros(shape, dtype=disk.dtype) for name, shape in disk.shapes.items()} for _ in range(2)]
    disk.read(2, 17, slots[0], disk.staging())
    pinned.read(2, 17, slots[1], pinned.staging())
    assert all(slots[0][name].abs().sum() > 0 and torch.equal(slots[0][name], slots[1][name]) for name in disk.shapes)
    with pytest.raises(UsageError, match="`read` pinned is for `device` cuda"):
        offloaded(elastic, read="pinned")


def test_sub_experts_are_read_straight_into_slots_of_whole_blocks(elastic, offloaded, monkeypatch):
    store: DiskStore = offloaded(elastic).offload.cache.store
    preadv, lengths = os.preadv, []

    def short(file, buffers, offset):
        """As much as a disk that is asked for a lot may give: two blocks."""
        whole = b"".join(bytes(buffer) for buffer in buffers)
        page = memoryview(mmap.mmap(-1, len(whole)))
        lengths.append(min(preadv(file, [page], offset), 2 * BLOCK))
        rest = page[: lengths[-1]]
        for buffer in buffers:
            buffer[: len(rest[: len(buffer)])] = rest[: len(buffer)]
            rest = rest[len(buffer) :]
        return lengths[-1]

    def read(shift):
        """A sub-expert in slots that begin so many elements after a block, and whether it was copied there."""
        slot = {}
        for name, shape in store.shapes.items():
            memory = torch.frombuffer(mmap.mmap(-1, math.prod(shape) * 2 + BLOCK), dtype=store.dtype)
            slot[name] = memory[shift:][: math.prod(shape)].view(shape)
        staging = store.staging()
        store.read(1, 5, slot, staging)
        return slot, any(bytes(staging))

    (straight, untouched), (copied, touched) = read(0), read(1)
    assert (untouched, touched) == (False, True)
    monkeypatch.setattr(os, "preadv", short)
    again, touched = read(0)
    assert not touched
    assert len(lengths) > 4
    with safetensors.safe_open(next(elastic.glob("model-*05-of*")), "pt") as file:
        name = "model.layers.1.mlp.experts.5"
        gate, up, down = (file.get_tensor(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down"))
    for slot in (straight, copied, again):
        assert torch.equal(slot["gate_up_proj"], torch.cat([gate, up]))
        assert torch.equal(slot["down_proj"], down)


class FakeStore:
    """Sub-experts of one number that tells which they are; `gate` holds reads back, `order` notes them."""

    shapes, dtype, sub_expert_bytes = {"number": (1,)}, torch.float32, 4

    def __init__(self, layers=3, experts=8):
        self.layers, self.experts, self.order = layers, experts, []
        self.gate, self.broken = threading.Event(), set()
        self.gate.set()

    def staging(self):
        return None

    def read(self, layer, expert, slot, staging):
        self.order.append((layer, expert))
        self.gate.wait(20)
        if (layer, expert) in self.broken:
            raise InputError(f"{layer} {expert} is broken")
        slot["number"].fill_(100 * layer + expert)


@pytest.fixture
def cache_of(monkeypatch):
    made = []

    def make(store, slots, policy="lru", readers=1):
        monkeypatch.setattr(caches, "READERS", readers)
        experts = SimpleNamespace(has_bias=False, is_transposed=False, act_fn=None)
        made.append(Cache(store, Pool(store, experts, slots, "cpu"), slots, POLICIES[policy](store.layers, store.experts)))
        return made[-1]

    yield make
    for cache in made:
        cache.store.gate.set()
        cache.close()


def use(*experts, total=8):
    counts = np.zeros(total)
    counts[list(experts)] = 1
    return {"": counts}


def run_layer(cache, layer, *experts):
    uses = use(*experts)
    cache.demand(layer, uses)
    return {expert: float(cache.pool.experts.number[slot]) for expert, slot in cache.arrivals(layer)}


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_what_is_needed_overtakes_what_is_expected_and_the_useless_is_dropped(cache_of):
    store = FakeStore()
    cache = cache_of(store, 8)
    store.gate.clear()
    cache.prefetch(range(3), [(1, 0), (1, 1), (1, 2), (2, 5)])
    until(lambda: store.order)
    cache.demand(0, use(3, 4))
    # Layer 1 comes: what was expected of it and is not needed is not read any more, what is needed is read first.
    store.gate.set()
    assert sorted(expert for expert, _ in cache.arrivals(0)) == [3, 4]
    until(lambda: (2, 5) in store.order)
    assert store.order[:3] == [(1, 0), (0, 3), (0, 4)]
    store.gate.clear()
    cache.prefetch(range(3), [(2, 0), (1, 6), (1, 7)])
    until(lambda: (2, 0) in store.order)
    cache.demand(1, use(0, 7))
    store.gate.set()
    assert {expert for expert, _ in cache.arrivals(1)} == {0, 7}
    assert (1, 6) not in store.order
    counters = cache.counters
    assert (counters.hits, counters.late_hits, counters.misses) == (1, 0, 3)
    assert counters.prefetches_dropped >= 1


def test_a_load_that_is_under_way_is_waited_for_and_not_repeated(cache_of):
    store = FakeStore()
    cache = cache_of(store, 4)
    store.gate.clear()
    cache.prefetch(range(3), [(1, 2)])
    until(lambda: store.order)
    cache.demand(1, use(2))
    store.gate.set()
    assert [expert for expert, _ in cache.arrivals(1)] == [2]
    assert store.order == [(1, 2)]
    assert (cache.counters.late_hits, cache.counters.prefetched_used) == (1, 1)


def test_a_prefetch_that_was_for_nothing_is_counted(cache_of):
    store = FakeStore()
    cache = cache_of(store, 2)
    cache.prefetch(range(3), [(1, 2)])
    until(lambda: (1, 2) in cache._slot_of)
    run_layer(cache, 1, 0)
    run_layer(cache, 2, 0, 1)
    assert cache.counters.wasted_bytes == store.sub_expert_bytes


def test_a_failed_load_is_told_and_tried_again(cache_of):
    store = FakeStore()
    cache = cache_of(store, 2)
    store.broken = {(0, 1)}
    uses = use(0, 1, 2)
    cache.demand(0, uses)
    found = dict(cache.arrivals(0))
    assert isinstance(found[1], InputError)
    assert isinstance(found[0], int)
    assert isinstance(found[2], int)
    store.broken = set()
    assert run_layer(cache, 0, 1) == {1: 1.0}
    store.read = lambda *_: 1 / 0
    cache.demand(1, use(5))
    assert isinstance(dict(cache.arrivals(1))[5], ResourceError)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_use_finds_its_own_sub_expert_whatever_was_before(data):
    store = FakeStore()
    slots, policy = data.draw(st.integers(1, 12)), data.draw(st.sampled_from(sorted(POLICIES)))
    experts = SimpleNamespace(has_bias=False, is_transposed=False, act_fn=None)
    cache = Cache(store, Pool(store, experts, slots, "cpu"), slots, POLICIES[policy](3, 8))
    try:
        for _ in range(data.draw(st.integers(1, 4))):
            for layer in range(3):
                chosen = data.draw(st.sets(st.integers(0, 7), min_size=1))
                keys = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), unique=True, max_size=10))
                uses = use(*chosen)
                cache.demand(layer, uses)
                cache.prefetch(range(3), keys)
                got = {}
                for expert, slot in cache.arrivals(layer):
                    got[expert] = float(cache.pool.experts.number[slot])
                    assert len(cache._slot_of) <= slots
                assert got == {expert: 100.0 * layer + expert for expert in chosen}
        cache.end("")
        counters = cache.counters
        assert counters.wasted_bytes <= counters.loaded_bytes
        assert counters.prefetched_used <= counters.prefetched
    finally:
        cache.close()
    assert not any(thread.is_alive() for thread in cache._threads)


def made_trace(used, layers, experts):
    """A trace of one request: `used` holds the sub-experts of each layer of each pass."""
    rows = [[np.unique(layer) for layer in passed] for passed in used]
    return Trace(layers, experts, 1, [SimpleNamespace(request="0", used=[(row, np.ones(len(row))) for row in passed]) for passed in rows])


def least_misses(accesses, slots):
    """By trying everything."""
    states = {frozenset(): 0}
    for access in accesses:
        following = {}
        for state, misses in states.items():
            if access in state:
                following[state] = min(following.get(state, 10**9), misses)
                continue
            kept = [state] if len(state) < slots else [state - {out} for out in state]
            for rest in kept:
                now = rest | {access}
                following[now] = min(following.get(now, 10**9), misses + 1)
        states = following
    return min(states.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.integers(1, 4))
def test_belady_is_the_least_that_is_possible(accesses, slots):
    trace = made_trace([[[access]] for access in accesses], 1, 6)
    assert hit_rate(trace, belady(trace), slots) == pytest.approx(1 - least_misses(accesses, slots) / len(accesses))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sets(st.integers(0, 7), min_size=2, max_size=3), min_size=3, max_size=3), min_size=1, max_size=12),
    st.integers(3, 12),
)
def test_no_policy_beats_belady(used, slots):
    trace = made_trace([[sorted(layer) for layer in passed] for passed in used], 3, 8)
    bound = hit_rate(trace, belady(trace), slots)
    for name, policy in POLICIES.items():
        assert hit_rate(trace, policy(3, 8), slots) <= bound + 1e-9, name


def test_what_each_policy_evicts():
    def leaves(name, *passes):
        policy = POLICIES[name](2, 4)
        for passed in passes:
            for layer, experts in enumerate(passed):
                policy.use(layer, use(*experts, total=4))
        held = sorted({(layer, expert) for passed in passes for layer, experts in enumerate(passed) for expert in experts})
        return min(held, key=lambda key: policy.keep()[key])

    # Expert 0 of layer 0 was used longest ago, expert 2 of layer 1 least often.
    history = ([0], [1]), ([0], [1]), ([1], [2]), ([1], [1])
    assert leaves("lru", *history) == (0, 0)
    assert leaves("lfu", *history) == (1, 2)
    # Layer 1 has just passed and expert 2 of it is rare.
    assert leaves("activation", *history) == (1, 2)


def test_activations_of_a_past_request_speak_for_a_new_one_like_it():
    policy = POLICIES["activation"](2, 8)
    for request, experts in (("a", (0, 1)), ("b", (4, 5))):
        for _ in range(20):
            for layer in range(2):
                policy.use(layer, {request: use(*experts)[""]})
        policy.end(request)
    # Only the first layer of the first token is known, and it looks like b.
    policy.use(0, {"c": use(5)[""]})
    expected = policy.predict()[1]
    assert set(np.argsort(-expected)[:2].tolist()) == {4, 5}
    assert expected[4] > 10 * max(expected[0], 1e-6)


def test_a_full_collection_stays_as_different_as_it_can_be(monkeypatch):
    monkeypatch.setattr("prism_refactor.offload.policies.COLLECTION", 2)
    policy = POLICIES["activation"](1, 8)
    for request, expert in (("a", 0), ("b", 1), ("c", 1), ("d", 1)):
        policy.use(0, {request: use(expert)[""]})
        policy.end(request)
    assert sorted(policy._collection.argmax(-1).ravel().tolist()) == [0, 1]


def test_a_latency_target_skips_the_least_of_the_misses_down_to_the_floor(elastic, offloaded, tmp_path):
    model = offloaded(elastic, "25%", policy="lru", prefetch="none")
    ids = torch.arange(20, 40)[None]
    with torch.inference_mode():
        wanted = resident(elastic)(input_ids=ids).logits
        model.offload.set_latency(LatencyTarget(1000.0, 4))
        assert torch.equal(model(input_ids=ids).logits, wanted)
        answer(model, range(20, 40))
        assert model.offload.counters.skipped == 0
        # Nothing can be loaded in no time: what is absent is skipped, but not below four.
        model.offload.set_latency(LatencyTarget(1e-9, 4))
        with open(tmp_path / "trace.jsonl", "w") as file:
            model.offload.record(file)
            answer(model, range(20, 40))
            model.offload.record(None)
    counters = model.offload.counters
    assert counters.skipped > 0
    trace = Trace.load(tmp_path / "trace.jsonl")
    sizes = [len(chosen) for passed in trace.passes[1:] for chosen, _ in passed.used]
    assert min(sizes) >= 4
    assert max(sizes) <= 16
    assert sum(16 - size for size in sizes) == counters.skipped
    model.offload.set_latency(None)
    assert same_bits(model, resident(elastic), ids)


def test_a_latency_target_skips_within_a_budget(elastic, offloaded):
    model = offloaded(elastic, "25%", policy="lru", prefetch="none")
    set_active(model, budget=0.5)
    model.offload.set_latency(LatencyTarget(1e-9, 3))
    ran = []
    with torch.inference_mode():
        for token in range(20, 40):
            model.prism_active.ran = 0
            assert torch.isfinite(model(input_ids=torch.tensor([[token]])).logits).all()
            ran.append(model.prism_active.ran.item() / 4)
    assert model.offload.counters.skipped > 0
    # A token may need fewer than three itself.
    assert 1 <= min(ran) < max(ran) < 16
    assert np.mean(ran) < 8


def test_what_is_skipped_is_absent_and_ranks_last(elastic, offloaded):
    model = offloaded(elastic, "25%", policy="lru", prefetch="none")
    with torch.inference_mode():
        model(input_ids=torch.arange(20, 24)[None])
        model.offload.set_latency(LatencyTarget(1e-9, 10))
        offload = model.offload
        ranked = torch.arange(16)[None]
        offload._before(model, None)
        absent = set(offload.cache.absent(3, range(16)))
        wanted = {rank for rank in absent if rank >= 10}
        assert 0 < len(wanted) < len(absent)
        positions, k = offload.choose(3, ranked, torch.tensor([16]))
    assert k.tolist() == [16 - len(wanted)]
    assert set(positions[0, k[0] :].tolist()) == wanted
    assert positions[0, : k[0]].tolist() == sorted(set(range(16)) - wanted)


def test_elastic_needs_a_router_and_a_possible_floor(command, models, tmp_path, elastic, offloaded):
    with pytest.raises(UsageError, match="`k_min` 17: choose 1 to 16"):
        offloaded(elastic).offload.set_latency(LatencyTarget(1.0, 17))
    assert command("prism-refactor", models["olmoe"], tmp_path / "out", *FAST, "--router", "replicate").code == 0
    with pytest.raises(UsageError, match="needs a sub-expert router"):
        offloaded(tmp_path / "out", "90%").offload.set_latency(LatencyTarget(1.0, 2))


@pytest.fixture
def copied(elastic, tmp_path):
    return shutil.copytree(elastic, tmp_path / "copy")


@pytest.mark.parametrize("read", ["direct", "buffered"])
def test_a_truncated_file_fails_the_request_and_nothing_else(copied, offloaded, read):
    model = offloaded(copied, read=read)
    before = answer(model, range(20, 30))
    shard = max(copied.glob("model-*.safetensors"))
    content = shard.read_bytes()
    os.truncate(shard, len(content) // 2)
    with pytest.raises(InputError, match=rf"{shard.name}: ends before sub-expert \d+ of MoE layer 3; the file was truncated"):
        answer(model, range(300, 400))
    shard.write_bytes(content)
    assert answer(model, range(20, 30)) == before


def test_a_read_error_fails_the_request_and_nothing_else(elastic, offloaded, monkeypatch):
    model = offloaded(elastic)
    before = answer(model, range(20, 30))

    def broken(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        with pytest.raises(InputError, match=r"cannot be read .*Input/output error.*check the disk"):
            answer(model, range(300, 400))
    assert answer(model, range(20, 30)) == before


def test_prism_run_ends_at_any_of_several_end_tokens(copied, command, offloaded):
    model = offloaded(copied)
    tokens = answer(model, load_tokenizer(copied)(PROMPT).input_ids)
    path = copied / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [4000, tokens[2]]}))
    result = command("prism-run", copied, "--prompt", PROMPT, "--max-new-tokens", "12", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["answers"][0]["tokens"] == tokens.index(tokens[2]) + 1


def test_prism_run_goes_on_with_the_next_prompt(copied, command):
    arguments = [
        "prism-run",
        copied,
        "--prompt",
        PROMPT,
        "--prompt",
        "import os",
        "--max-new-tokens",
        "8",
        "--fast-memory",
        "10%",
        "--json",
    ]
    good = command(*arguments)
    assert good.code == 0
    store = DiskStore.read
    calls = []

    def read(self, layer, expert, slot, staging):
        calls.append(layer)
        if len(calls) == 3:
            raise InputError("the third read is broken")
        return store(self, layer, expert, slot, staging)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiskStore, "read", read)
        bad = command(*arguments)
    assert bad.code == 3
    assert "error: the third read is broken" in bad.err
    answers = json.loads(bad.out)["answers"]
    assert answers[0] == {"prompt": PROMPT, "error": "the third read is broken"}
    assert answers[1]["text"] == json.loads(good.out)["answers"][1]["text"]


def test_one_broken_sub_expert_fails_only_the_requests_that_need_it(elastic, offloaded, monkeypatch):
    """Through the serving engine, many requests in a batch."""
    model = offloaded(elastic, "25%", prefetch="both")
    engine = Engine(model, "per-token", Limits(tokens=64, requests=8, wait=0.02))
    engine.start()
    points = [{"k": 1}, {"budget": 0.2}, {"k": 3}, {"budget": 0.3}, {"k": 5}, {"k": 6}, {"budget": 0.5}, {"k": 8}]
    requests = [
        GenerationRequest(list(range(30 * n + 20, 30 * n + 32)), max_new_tokens=8, stop_at_eos=False, **point)
        for n, point in enumerate(points)
    ]
    try:
        whole = engine.generate(requests)
        wanted = resident(elastic)
        for request, point, chunk in zip(requests, points, whole, strict=True):
            set_active(wanted, **point)
            assert chunk.tokens == answer(wanted, request.prompt, 8)
        read = DiskStore.read
        broken = (2, int(np.argmax(model.offload.cache.policy.worth[2]))) if hasattr(model.offload.cache.policy, "_now") else (2, 5)

        def sometimes(self, layer, expert, slot, staging):
            if (layer, expert) == broken:
                raise InputError("sub-expert 5 is broken")
            return read(self, layer, expert, slot, staging)

        monkeypatch.setattr(DiskStore, "read", sometimes)
        with model.offload.cache._lock:
            slot = model.offload.cache._slot_of.pop(broken, None)
            model.offload.cache._resident[broken] = False
            if slot is not None:
                model.offload.cache._free.append(slot)
        answers = engine.generate([replace(request, id="") for request in requests])
        failed = [chunk.finish == "error" for chunk in answers]
        assert 0 < sum(failed) < len(failed)
        for chunk, before, bad in zip(answers, whole, failed, strict=True):
            if bad:
                assert chunk.error == "sub-expert 5 is broken"
                assert chunk.tokens == before.tokens[: len(chunk.tokens)]
            else:
                assert chunk.tokens == before.tokens
        monkeypatch.setattr(DiskStore, "read", read)
        # Nothing of the failed requests is left, in particular no KV that a later one could find.
        again = engine.generate([replace(request, id="") for request in requests])
        assert [chunk.tokens for chunk in again] == [chunk.tokens for chunk in whole]
        assert [chunk.served_k for chunk in again] == pytest.approx([chunk.served_k for chunk in whole])
        until(lambda: engine.kv_in_use == 0)
    finally:
        engine.close()


def test_a_server_says_what_its_cache_does(elastic, offloaded):
    engine, metrics = Engine(offloaded(elastic), "per-token", Limits(tokens=64, requests=8, wait=0.02)), Metrics()
    metrics.watch(engine)
    engine.start()
    try:
        engine.generate([GenerationRequest(list(range(20, 40)), 8, 8, stop_at_eos=False)])
        shown = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if line.startswith("prism_offload"))
    finally:
        engine.close()
    counted = engine.offload.counters
    assert float(shown["prism_offload_misses_total"]) == counted.misses > 0
    assert float(shown["prism_offload_hits_total"]) == counted.hits > 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--fast-memory", "1KiB"], 2, "the least that works is 1.5MiB"),
        (["--fast-memory", "50%", "--dtype", "float32"], 2, "--dtype: with --fast-memory sub-experts are used as they are stored"),
    ],
)
def test_serve_errors(elastic, command, options, code, message):
    outcome = command("prism-serve", elastic, "--port", "0", *options)
    assert outcome.code == code
    assert message in outcome.err.splitlines()[-1]


def test_more_memory_than_there_is(elastic, offloaded, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(ResourceError, match=r"`fast_memory` 50%: takes .* of memory is available; give less"):
        offloaded(elastic, "50%")


def test_a_trace_replays_to_what_was_counted(elastic, command, tmp_path):
    trace = tmp_path / "trace.jsonl"
    options = ["--fast-memory", "60%", "--policy", "lru", "--prefetch", "none", "--max-new-tokens", "24", "--k", "10"]
    ran = command("prism-run", elastic, "--prompt", PROMPT, "--prompt", "import os", *options, "--trace", trace, "--json")
    assert ran.code == 0, ran.err
    answers = json.loads(ran.out)["answers"]
    hits, uses = sum(a["hits"] for a in answers), sum(a["hits"] + a["misses"] + a["late_hits"] for a in answers)
    assert [a["mean_k"] for a in answers] == [10, 10]
    replayed = command("prism-replay", trace, "--fast-memory", "60%", "--fast-memory", "25%", "--json", "--plot", tmp_path / "p.png")
    assert replayed.code == 0, replayed.err
    result = json.loads(replayed.out)
    assert result["slots"] == [153, 64]
    assert result["hit_rates"]["lru"][0] == pytest.approx(hits / uses)
    assert set(result["hit_rates"]) == {*POLICIES, "belady"}
    assert all(rates[0] >= rates[1] for rates in result["hit_rates"].values())
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "belady" in command("prism-replay", trace).out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no trace"),
        ('{"trace": "other"}\n', "is no trace"),
        ('{"trace": "prism-run 1", "layers": 1, "experts": 4, "sub_expert_bytes": 8}\n', "holds no forward pass"),
        ('{"trace": "prism-run 1", "layers": 1, "experts": 4, "sub_expert_bytes": 8}\n{"request": "1", "used": [[[4], [1]]]}\n', "line 2"),
        (
            '{"trace": "prism-run 1", "layers": 2, "experts": 4, "sub_expert_bytes": 8}\n{"request": "1", "used": [[[1], [1]]]}\n',
            "1 layers of 2",
        ),
        ('{"trace": "prism-run 1", "layers": 1, "experts": 4, "sub_expert_bytes": 8}\n{"used": 5\n', "line 2"),
        ('{"trace": "prism-run 1", "layers": -1, "experts": 4, "sub_expert_bytes": 8}\n', "line 1"),
        ('{"trace": "prism-run 1", "layers": 9, "experts": 99999999999, "sub_expert_bytes": 8}\n', "line 1"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_what_is_no_trace(command, tmp_path, content, message):
    (tmp_path / "trace.jsonl").write_text(content)
    outcome = command("prism-replay", tmp_path / "trace.jsonl")
    assert (outcome.code, outcome.out) == (3, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--fast-memory", "1KiB"], 2, "the least that works is 1.5MiB (6.2%)"),
        (["--fast-memory", "many"], 2, "--fast-memory many: give bytes with a unit"),
        (["--fast-memory", "0%"], 2, "--fast-memory 0%"),
        (["--fast-memory", "101%"], 2, "--fast-memory 101%"),
        (["--k", "17"], 2, "--k 17: choose 1 to 16"),
        (["--k-min", "4"], 2, "--k-min: belongs to --latency-target"),
        (["--k-min", "17", "--latency-target", "5"], 2, "--k-min 17: is more than the 16 sub-experts of a token; choose 1 to 16"),
        (["--k-min", "5", "--k", "4", "--latency-target", "5"], 2, "choose 1 to 4"),
        (["--budget", "25%", "--k", "4"], 2, "--budget: takes the place of --k"),
        (["--budget", "0"], 2, "'0' is no share above 0 and at most 1; write 25% or 0.25"),
        (["--budget", "101%"], 2, "'101%' is no share above 0"),
        (["--budget", "a quarter"], 2, "'a quarter' is no share above 0"),
        (["--budget", "nan"], 2, "'nan' is no share above 0"),
        (["--latency-target", "nan"], 2, "nan is not a finite number"),
        (["--latency-target", "inf"], 2, "inf is not a finite number"),
        (["--prompt", "\udcff"], 2, "--prompt: is not UTF-8"),
        (["--trace", ""], 2, "--trace"),
        (["--trace", "/dev/null"], 2, "--trace /dev/null: is no regular file"),
        (["--trace", "/proc/trace"], 2, "--trace /proc/trace: cannot be written"),
        (["--max-new-tokens", "5000"], 2, "more than the model's 1024"),
        (["--prompt", ""], 2, "--prompt: is empty"),
        (["--trace", "/nowhere/trace.jsonl"], 2, "--trace /nowhere/trace.jsonl: the folder does not exist"),
        (["--read", "pinned"], 2, "--read pinned is for --device cuda"),
    ],
)
def test_run_errors(elastic, command, options, code, message):
    outcome = command("prism-run", elastic, "--prompt", PROMPT, *options)
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.err.splitlines()[-1]


def test_a_budget_runs_what_the_whole_model_in_memory_runs(elastic, command, tmp_path):
    trace = tmp_path / "trace.jsonl"
    options = ["--budget", "30%", "--fast-memory", "40%", "--max-new-tokens", "20", "--trace", trace, "--json"]
    ran = command("prism-run", elastic, "--prompt", PROMPT, *options)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    model, tokenizer = resident(elastic), load_tokenizer(elastic)
    set_active(model, budget=0.3)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert found["answers"][0]["text"] == tokenizer.decode(text, skip_special_tokens=True)
    assert (found["budget"], found["k"]) == (0.3, 5)
    # The prompt is one pass, and every token but the last another one.
    passes = Trace.load(trace).passes[1:]
    assert len(passes) == 19
    sizes = [len(chosen) for passed in passes for chosen, _ in passed.used]
    assert found["answers"][0]["mean_k"] == pytest.approx(np.mean(sizes))
    assert min(sizes) < 5 < max(sizes)
    assert "sub-experts per token and layer on average" in ran.err


def test_a_budget_needs_thresholds(copied, command):
    path = copied / "sub_expert_router.safetensors"
    save_file({name: value for name, value in load_file(path).items() if not name.endswith(".threshold")}, path)
    outcome = command("prism-run", copied, "--prompt", PROMPT, "--budget", "25%")
    assert (outcome.code, outcome.out) == (2, "")
    assert "was written before there were budgets" in outcome.err.splitlines()[-1]


def test_a_budget_needs_a_sub_expert_router(models, command, tmp_path):
    assert command("prism-refactor", models["olmoe"], tmp_path / "out", *FAST, "--router", "replicate").code == 0
    outcome = command("prism-run", tmp_path / "out", "--prompt", PROMPT, "--budget", "25%")
    assert (outcome.code, outcome.out) == (2, "")
    assert "has no sub-expert router; use --k" in outcome.err.splitlines()[-1]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x" * 100)])
def test_a_broken_router_is_named(copied, command, offloaded, damage):
    damage(copied / "sub_expert_router.safetensors")
    outcome = command("prism-run", copied, "--prompt", PROMPT)
    assert (outcome.code, outcome.out) == (3, "")
    assert "sub_expert_router.safetensors: is missing" in outcome.err.splitlines()[-1]
    with pytest.raises(InputError, match=r"router\.safetensors: is missing"):
        load(copied)


def test_no_file_of_the_checkpoint_is_overwritten_by_a_trace(copied, command):
    before = (copied / "config.json").read_bytes()
    outcome = command("prism-run", copied, "--prompt", PROMPT, "--trace", copied / "config.json")
    assert (outcome.code, outcome.out) == (2, "")
    assert "is in the checkpoint's folder" in outcome.err
    assert (copied / "config.json").read_bytes() == before


@pytest.mark.parametrize(("name", "message"), [("p.xyz", "must end in .png, .svg or .pdf"), ("p", "must end in")])
def test_a_picture_that_cannot_be_drawn_is_refused_first(command, tmp_path, name, message):
    outcome = command("prism-replay", __file__, "--plot", tmp_path / name)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_a_link_to_a_file_is_written_through(elastic, command, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert command("prism-run", elastic, "--prompt", PROMPT, "--max-new-tokens", "1", "--trace", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink()
    assert len(Trace.load(tmp_path / "file").passes) == 1


def test_run_refuses_what_is_no_refactored_checkpoint(command, models, tmp_path):
    assert command("prism-run", models["olmoe"], "--prompt", PROMPT).code == 2
    assert command("prism-run", tmp_path, "--prompt", PROMPT).code == 3


def test_a_budget_that_is_said_to_work_works(elastic, command):
    assert command("prism-run", elastic, "--prompt", PROMPT, "--fast-memory", "1.5MiB", "--max-new-tokens", "4").code == 0


def test_a_file_system_without_direct_reads_is_named(elastic, offloaded, monkeypatch):
    real = os.open

    def refuses(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuses)
    with pytest.raises(UsageError, match="use `read` buffered"):
        offloaded(elastic)
    assert answer(offloaded(elastic, read="buffered"), range(20, 30))


def test_memory_is_that_of_the_container(elastic, offloaded, monkeypatch):
    """A container's limit counts, not the host's memory."""
    monkeypatch.setattr("prism_refactor.offload.manager.available_memory", lambda: 2**20)
    with pytest.raises(ResourceError, match=r"`fast_memory` 50%: takes .*, and 1.0 MiB of memory is available; give less"):
        offloaded(elastic, "50%")


def test_what_is_worth_keeping_is_computed_once_for_a_layer(monkeypatch):
    """The cache asks at every eviction, under its lock."""
    policy, asked = POLICIES["activation"](4, 8), []
    monkeypatch.setattr(policy, "predict", lambda: asked.append(True) or np.zeros((4, 8)))
    policy.use(0, use(1, total=8))
    assert policy.keep() is policy.keep()
    assert len(asked) == 1
    policy.use(1, use(2, total=8))
    policy.keep()
    assert len(asked) == 2


def test_an_activation_matrix_is_compared_as_it_grows():
    """What is kept layer by layer is what comparing everything at once gives."""
    rng, policy = np.random.default_rng(0), POLICIES["activation"](3, 8)
    for request in ("a", "b", "c", "d"):
        for _ in range(4):
            for layer in range(3):
                policy.use(layer, {request: rng.integers(0, 3, 8).astype(float)})
        if request != "d":
            policy.end(request)
    live = policy._requests["d"]
    windows = live.windows()
    assert np.allclose(live.probability, windows.mean(0))
    assert np.allclose(live.counts, windows[-1])
    norm = np.linalg.norm(windows[-1], axis=-1) * np.linalg.norm(policy._collection, axis=-1)
    assert np.allclose(live.alike, (policy._collection * windows[-1]).sum(-1) / norm)


def test_memory_units():
    assert CacheBudget("2GiB").bytes(0) == 2**31
    assert CacheBudget("1.5 mib").bytes(0) == 3 * 2**19
    assert CacheBudget("100MB").bytes(0) == 10**8
    assert CacheBudget("25%").bytes(1000) == 250
    assert CacheBudget("12345").bytes(0) == 12345
    # Exact where a float is not.
    assert CacheBudget("0.1%").bytes(10**21) == 10**18


def test_belady_of_two_layers():
    future = [np.array(row) for row in ([0], [1], [1], [1], [0], [2])]
    policy = Belady(2, 3, future)
    for number, row in enumerate(future[:3]):
        policy.use(number % 2, use(*row, total=3))
    # At layer 0 of the second pass: expert 1 of layer 1 is next, then 0 of layer 0; 1 of layer 0 never comes again.
    keep = policy.keep()
    assert keep[1, 1] > keep[0, 0] > keep[0, 1]
