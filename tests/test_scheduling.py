"""The schedulers, the performance model and the simulator; nothing here runs a model."""

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prism_refactor.errors import InputError, UsageError
from prism_refactor.formats import Arrival, LatencyGrid
from prism_refactor.loadtest.simulator import simulate
from prism_refactor.loadtest.workload import Served, Slo, floors, percentiles, poisson, read_trace, summary
from prism_refactor.server.quality import QualityCurve
from prism_refactor.serving.performance import PerformanceModel, Sampling, fit, powers
from prism_refactor.serving.scheduling import PATIENCE, PRIORITY_SECONDS, SCHEDULERS, Job, Limits, step_k, take

FULL = 16
LIMITS = Limits(tokens=64, requests=8, wait=0.5)


def seconds(requests, tokens, context, k):
    """A machine on which a step costs something, and every token in proportion to its k and a little to its context."""
    return 0.01 + requests * tokens * (k * 1e-3 + context * 1e-6)


def performance(measure=seconds, **options):
    decode, prefill = LatencyGrid(powers(64), [4, 8, 12, 16], [0, 512]), LatencyGrid(powers(64, 16), [4, 8, 12, 16], [0, 512])
    about = {"device": "cpu", "dtype": "float32", "threads": 2}
    return fit(measure, FULL, {"decode": decode, "prefill": prefill}, Sampling(**{"repeats": 1} | options), about)


def cost(tokens, k):
    return seconds(tokens, 1, 0, k)


def job(name, floor, arrival=0.0, tokens=1, decoding=True, **rest):
    return Job(name, floor, arrival, tokens, decoding, **{"last_run": arrival} | rest)


def ids(jobs):
    return [item.id for item in jobs]


jobs_strategy = st.lists(
    st.builds(
        Job,
        id=st.uuids().map(str),
        floor=st.integers(1, FULL),
        arrival=st.floats(0, 10),
        tokens=st.integers(1, 100),
        decoding=st.booleans(),
        priority=st.integers(-2, 2),
        deadline=st.none() | st.floats(0, 20),
        last_run=st.floats(0, 10),
    ),
    max_size=20,
)


@pytest.mark.parametrize("name", SCHEDULERS)
@settings(max_examples=60, deadline=None)
@given(active=jobs_strategy, waiting=jobs_strategy, now=st.floats(10, 100))
@example(active=[], waiting=[job("just come", 1, 10.0, 1, False)], now=10.0)
@example(active=[], waiting=[job("long there", 1, 10.0, 1, False)], now=10.0 + LIMITS.wait)
def test_a_step_has_jobs_that_exist_once_and_in_bounds(name, active, waiting, now):
    active = active[: LIMITS.requests]
    for item in active:
        item.tokens = 1 if item.decoding else item.tokens
    for item in waiting:
        item.decoding = False
    policy = SCHEDULERS[name](LIMITS, cost)
    chosen = policy.step(active, sorted(waiting, key=lambda item: item.arrival), now)
    assert len(set(ids(chosen))) == len(chosen)
    assert set(ids(chosen)) <= set(ids(active)) | set(ids(waiting))
    assert len(set(ids(chosen)) - set(ids(active))) <= LIMITS.requests - len(active)
    # Only `fullbatch` may hold new jobs back, and not for longer than this.
    held = name == "fullbatch" and not active and all(now - item.arrival < LIMITS.wait for item in waiting)
    assert chosen or held or not (active or waiting)
    taken = take(chosen, LIMITS)
    assert sum(tokens for _, tokens in taken) <= LIMITS.tokens
    if taken:
        ks = step_k(taken, policy.exact)
        assert all(ks[item.id] >= item.floor for item, _ in taken)
        assert not policy.exact or all(ks[item.id] == item.floor for item, _ in taken)


def test_fifo_runs_in_order_of_arrival_at_the_largest_floor():
    active = [job("late", 4, 2.0), job("early", 16, 1.0)]
    chosen = SCHEDULERS["fifo"](LIMITS).step(active, [job("next", 2, 3.0, 9, False)], 5.0)
    assert ids(chosen) == ["early", "late", "next"]
    assert set(step_k(take(chosen, LIMITS), exact=False).values()) == {16}


def test_fullbatch_waits_for_a_full_batch_or_the_oldest():
    policy = SCHEDULERS["fullbatch"](LIMITS)
    few = [job("a", 4, 1.0, 10, False), job("b", 4, 1.1, 10, False)]
    assert policy.step([], few, 1.2) == []
    assert ids(policy.step([], few, 1.5)) == ["a", "b"]
    assert len(policy.step([], [job(str(number), 4, 1.0, 3, False) for number in range(8)], 1.1)) == 8
    assert len(policy.step([], [job("long", 4, 1.0, 64, False)], 1.1)) == 1


def test_virtual_queues_run_the_queue_of_most_tokens_per_second():
    many_low = [job(f"low{number}", 4, 1.0) for number in range(6)]
    chosen = SCHEDULERS["virtual-queues"](LIMITS, cost).step([*many_low, job("high", 16, 1.0)], [], 1.1)
    # 6 tokens in 10 + 24 ms are more per second than 7 in 10 + 112 ms.
    assert set(ids(chosen)) == {item.id for item in many_low}
    # On a machine where k costs nothing the larger queue is the better one, and nobody waits.
    flat = SCHEDULERS["virtual-queues"](LIMITS, lambda tokens, k: 0.01).step([*many_low, job("high", 16, 1.0)], [], 1.1)
    assert len(flat) == 7


def test_virtual_queues_do_not_pass_over_a_job_for_longer_than_the_wait():
    jobs = [*(job(f"low{number}", 4, 1.0, last_run=1.6) for number in range(6)), job("high", 16, 1.0, last_run=1.0)]
    chosen = SCHEDULERS["virtual-queues"](LIMITS, cost).step(jobs, [], 1.6)
    assert ids(chosen)[0] == "high"
    assert len(chosen) == 7


def test_tiers_take_the_next_tier_along_only_where_that_is_faster():
    jobs = [job("a", 4, 1.0), job("b", 4, 1.0), job("c", 8, 1.0, last_run=1.2)]
    # Apart 2 tokens in 10 + 8 ms and 1 in 10 + 8 ms; together 3 in 10 + 24 ms: faster.
    assert len(SCHEDULERS["tiers"](LIMITS, cost).step(jobs, [], 2.0)) == 3
    # Where a step costs little by itself, an upgrade does not pay.
    cheap = SCHEDULERS["tiers"](LIMITS, lambda tokens, k: tokens * k * 1e-3 + 1e-6)
    assert set(ids(cheap.step(jobs, [], 2.0))) == {"a", "b"}
    # The tier that was passed over runs next.
    assert set(ids(cheap.step([job("a", 4, 1.0, last_run=1.5), job("c", 8, 1.0, last_run=1.2)], [], 2.0))) == {"c"}


def test_urgent_jobs_are_let_in_first():
    waiting = [
        job("plain", 4, 1.0, 9, False),
        job("later", 4, 2.0, 9, False),
        job("deadline", 4, 3.0, 9, False, deadline=6.0),
        job("priority", 4, 3.0, 9, False, priority=2),
    ]
    policy = SCHEDULERS["per-token"](Limits(tokens=64, requests=3), cost)
    assert ids(policy.step([], waiting, 4.0)) == ["deadline", "priority", "plain"]


def test_a_low_priority_job_waits_a_bounded_time():
    """Jobs of the highest priority come faster than they can be served, for ever; one of the lowest is served all the same."""
    model = performance()
    limits = Limits(tokens=8, requests=1)
    urgent = [Arrival(number * 0.05, 4, 4, 8, priority=2) for number in range(2000)]
    trace = sorted([*urgent, Arrival(1.0, 4, 4, 8, priority=-1)], key=lambda item: item.at)
    low = next(number for number, arrival in enumerate(trace) if arrival.priority < 0)
    served, total = simulate(trace, "per-token", model, limits)
    assert total > 150
    # Those that come PRIORITY_SECONDS x 3 after it stand behind it; the machine is 1.9 times overloaded.
    assert served[low].done < 2.5 * (3 * PRIORITY_SECONDS) + 10
    assert max(item.done for item in served) > 60
    assert PATIENCE > 0


def test_a_scheduler_that_predicts_needs_a_performance_model():
    for name in ("virtual-queues", "tiers"):
        with pytest.raises(ValueError, match="performance model"):
            SCHEDULERS[name](LIMITS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_simulated_requests_are_all_served_at_their_floor_or_above(name):
    ks, weights = floors(FULL, None)
    trace = poisson(300, 20.0, (40, 10), (ks, weights), seed=3)
    served, total = simulate(trace, name, performance(), replace(LIMITS, kv_tokens=600))
    assert len(served) == 300
    assert all(item.tokens == arrival.max_tokens and item.done is not None for item, arrival in zip(served, trace, strict=True))
    assert all(item.served_k >= item.asked_k - 1e-9 for item in served)
    assert all(0 < item.first <= item.done for item in served)
    if SCHEDULERS[name].exact:
        assert all(math.isclose(item.served_k, item.asked_k) for item in served)
    again, same = simulate(trace, name, performance(), replace(LIMITS, kv_tokens=600))
    assert (served, total) == (again, same)


def test_serving_everyone_at_their_floor_is_faster_than_at_the_largest():
    ks, weights = floors(FULL, None)
    trace = poisson(300, 1000.0, (40, 10), (ks, weights), seed=3)
    model = performance()
    seconds_of = {name: simulate(trace, name, model, LIMITS)[1] for name in SCHEDULERS}
    assert seconds_of["per-token"] < 0.75 * seconds_of["fifo"]
    assert min(seconds_of["virtual-queues"], seconds_of["tiers"]) < seconds_of["fifo"]


def test_a_request_longer_than_the_cache_is_refused_by_the_simulator():
    with pytest.raises(UsageError, match="does not fit"):
        simulate([Arrival(0.0, 100, 10)], "fifo", performance(), replace(LIMITS, kv_tokens=100))


def test_predictions_hold_between_the_measured_points_and_beyond():
    model = performance()
    assert model.error(1.0) < 0.02
    assert math.isclose(model.predict(20, 10, 100).seconds, seconds(20, 1, 100, 10), rel_tol=0.02)
    assert math.isclose(model.predict(128, 16, 100).seconds, seconds(128, 1, 100, 16), rel_tol=0.02)
    assert math.isclose(model.predict(50, 6, 100, prefill=True).seconds, seconds(1, 50, 100, 6), rel_tol=0.02)
    # A mixed step: all tokens, and the context of those that decode.
    assert math.isclose(model.predict_step(30, 10, 8, 320), 0.01 + 40 * 8e-3 + 10 * 320e-6, rel_tol=0.05)


def test_error_bars_cover_what_the_machine_does():
    dice = random.Random(0)
    model = performance(lambda *step: seconds(*step) * dice.uniform(0.8, 1.25), repeats=9)
    inside = 0
    for _ in range(200):
        tokens, k, context = dice.randint(1, 64), dice.randint(4, 16), dice.randint(0, 512)
        bars = model.predict(tokens, k, context)
        inside += bars.low <= seconds(tokens, 1, context, k) <= bars.high
        assert bars.low <= bars.seconds <= bars.high
    assert inside > 180


def test_the_first_round_is_not_counted():
    calls = []

    def warming(*step):
        calls.append(step)
        return seconds(*step) * (100 if calls.count(step) == 1 else 1)

    assert performance(warming, held_out=0).predict(8, 8, 0).seconds < 0.1


def test_a_performance_model_is_written_and_read(tmp_path):
    model = performance()
    assert PerformanceModel.load(tmp_path) is None
    model.save(tmp_path)
    again = PerformanceModel.load(tmp_path)
    assert again == model
    assert json.loads((tmp_path / "performance.json").read_text())["median_error"] == model.error()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "decode": {}}'])
def test_a_broken_performance_file_is_named(tmp_path, text):
    (tmp_path / "performance.json").write_text(text)
    with pytest.raises(InputError, match=r"performance\.json.*prism-bench"):
        PerformanceModel.load(tmp_path)


def test_equal_seeds_make_equal_traces_at_any_rate():
    ks, weights = floors(FULL, "4:3,16:1")
    slow, fast = (poisson(200, rate, (100, 20), (ks, weights), 5) for rate in (1.0, 10.0))
    assert [(item.prompt_tokens, item.k) for item in slow] == [(item.prompt_tokens, item.k) for item in fast]
    assert math.isclose(slow[-1].at, 10 * fast[-1].at)
    assert 150 < slow[-1].at < 250
    assert {item.k for item in slow} == {4, 16}
    assert 0.6 < sum(item.k == 4 for item in slow) / 200 < 0.9


@pytest.mark.parametrize("mix", ["0:1", "17:1", "x", "4:-1", "4:0", ""])
def test_a_mix_that_makes_no_sense_is_refused(mix):
    with pytest.raises(ValueError):  # noqa: PT011  (the door adds the option's name)
        floors(FULL, mix)


def test_a_trace_is_read_and_its_errors_are_named(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 2, "prompt_tokens": 5, "max_tokens": 3, "k": 4}\n\n{"at": 1, "prompt_tokens": 6, "max_tokens": 2}\n')
    assert read_trace(path) == [Arrival(1.0, 6, 2), Arrival(2.0, 5, 3, 4)]
    for line in (
        "[]",
        "{",
        '{"at": 1}',
        '{"at": -1, "prompt_tokens": 5, "max_tokens": 3}',
        '{"at": 1, "prompt_tokens": 5, "max_tokens": 3, "q": 1}',
    ):
        path.write_text(line)
        with pytest.raises(InputError, match="line 1"):
            read_trace(path)
    path.write_text("")
    with pytest.raises(InputError, match="no requests"):
        read_trace(path)


def test_a_summary_counts_what_was_served():
    served = [Served(4, 4.0, 11, 1.0, 2.0), Served(8, 9.0, 11, 3.0, 13.0), Served(8, 8.0, 0, None, None, "status 429")]
    result = summary(served, 10.0, 78, Slo(first=2.0, per_token=0.5))
    assert (result["requests"], result["done"], result["errors"]) == (3, 2, {"status 429": 1})
    assert result["generated_tokens_per_second"] == 2.2
    assert result["tokens_per_second"] == 10.0
    assert result["ttft"] == percentiles([1.0, 3.0])
    assert result["tpot"]["p50"] == pytest.approx(0.55)
    assert result["goodput_requests_per_second"] == 0.1
    assert (result["mean_asked_k"], result["mean_served_k"], result["below_floor"]) == (6.0, 6.5, 0)


def test_quality_is_mapped_to_the_least_k_that_reaches_it():
    curve = QualityCurve({4: 20.0, 8: 12.5, 12: 10.5, 16: 10.0})
    assert curve.k_for(1.0) == 16
    assert curve.k_for(0.8) == 8
    assert 8 < curve.k_for(0.9) < 12
    assert curve.k_for(0.01) == 4
    assert curve.quality_of(8) == pytest.approx(0.8)
    assert curve.quality_of(2) is None
    # Noise: 12 measured better than full.
    assert QualityCurve({8: 12.5, 12: 9.9, 16: 10.0}).k_for(1.0) == 12
    for quality in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="quality"):
            curve.k_for(quality)
