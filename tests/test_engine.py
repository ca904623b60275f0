"""The engine against transformers' own generate, with small models."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from conftest import FAST, Models, build, mostly_long
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_refactor.errors import InputError, UsageError
from prism_refactor.formats import LatencyGrid
from prism_refactor.models.loading import load
from prism_refactor.models.modeling_prism import full_k, set_active
from prism_refactor.serving import transformers_batching
from prism_refactor.serving.engine import Engine, GenerationRequest, Logprob, Rejected
from prism_refactor.serving.performance import Sampling, fit
from prism_refactor.serving.sampling import sample
from prism_refactor.serving.scheduling import SCHEDULERS, Limits

SMALL = Limits(tokens=64, requests=8, wait=0.02)
KS = (1, 3, 4, 6, 8, 11, 16)


@pytest.fixture(scope="module")
def model(elastic):
    return load(elastic, dtype=torch.float32)


@pytest.fixture
def engine_of(model):
    """Started engines, closed after the test."""
    made = []

    def make(scheduler="per-token", limits=SMALL, on=None, start=True, **options):
        engine = Engine(on or model, scheduler, limits, performance=options.pop("performance", flat()), **options)
        made.append(engine)
        if start:
            engine.start()
        return engine

    yield make
    for engine in made:
        engine.close()


def flat():
    """A performance model that was not measured."""
    grid = [1, 64], [1, 16], [0, 256]
    return fit(
        lambda requests, tokens, context, k: 1e-3 + 1e-4 * requests * tokens * k,
        16,
        {"decode": LatencyGrid(*grid), "prefill": LatencyGrid(*grid)},
        Sampling(0, 1),
        {"device": "cpu", "dtype": "float32", "threads": 2},
    )


def prompt(length, seed):
    return torch.randint(2, 4096, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model, request, k=None):
    """Greedy tokens of a request run by itself through transformers."""
    if getattr(model.config.get_text_config(), "prism", None):
        set_active(model, **({"budget": request.budget} if request.budget else {"k": k or request.k or full_k(model.config)}))
    count = request.max_new_tokens
    ids = torch.tensor([request.prompt])
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return output[0, len(request.prompt) :].tolist()


def greedy(count=12, tokens=10, seed=0, longest=50):
    return [GenerationRequest(prompt(5 + (7 * n) % longest, seed + n), KS[n % len(KS)], tokens, stop_at_eos=False) for n in range(count)]


def test_log_probabilities_of_a_mixed_batch_are_those_of_each_request_alone(engine_of):
    """To rounding: products of more rows add up in another order."""
    engine = engine_of()
    requests = [replace(request, logprobs=0) for request in greedy(8)]
    together = engine.generate(requests)
    separately = [engine.generate([request])[0] for request in requests]
    again = [engine.generate([request])[0] for request in requests]
    engine.close()
    found, wanted, same = (
        torch.tensor([[token.chosen for token in answer.logprobs] for answer in answers]) for answers in (together, separately, again)
    )
    assert (found - wanted).abs().max() < 1e-4
    assert torch.equal(same, wanted)


def test_every_request_of_a_mixed_batch_gets_what_it_gets_alone(engine_of, model):
    steps = []
    engine = engine_of(on_step=steps.append)
    requests = greedy()
    answers = engine.generate(requests)
    assert max(len(step.requests) for step in steps) > 3, "no step mixed several k"
    engine.close()
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens == alone(model, request), request.k
        assert (answer.finish, answer.served_k) == ("length", request.k)
    assert engine.kv_in_use == 0


def mean_ran(model, request, answer):
    """Sub-experts per token and layer that a request and its answer run, of which the last token is not run."""
    set_active(model, budget=request.budget)
    model.prism_active.ran = 0
    with torch.no_grad():
        model(input_ids=torch.tensor([[*request.prompt, *answer.tokens[:-1]]]))
    return model.prism_active.ran.double().mean().item() / 4


def test_budgets_beside_numbers_get_what_they_get_alone_and_say_what_it_was(engine_of, model):
    steps = []
    engine = engine_of(on_step=steps.append)
    requests = greedy()
    shares = 0.05, 0.2, 0.25, 0.5, 0.77, 0.999
    budgets = [replace(request, k=None, budget=share) for request, share in zip(requests, shares, strict=False)]
    answers = engine.generate([*budgets, *requests])
    engine.close()
    assert engine.kv_in_use == 0
    for request, answer in zip([*budgets, *requests], answers, strict=True):
        assert answer.tokens == alone(model, request), request
    for request, answer in zip(requests, answers[len(budgets) :], strict=True):
        assert answer.served_k == request.k
    served = [answer.served_k for answer in answers[: len(budgets)]]
    assert served == pytest.approx([mean_ran(model, request, answer) for request, answer in zip(budgets, answers, strict=False)])
    assert 1 <= served[0] < served[2] < served[3] < served[4] < 16
    assert sum(step.sub_experts for step in steps) == pytest.approx(
        sum(answer.served_k * (len(request.prompt) + 9) for request, answer in zip([*budgets, *requests], answers, strict=True))
    )


def test_a_budget_in_a_step_of_a_larger_k_is_raised_to_it(engine_of, model):
    engine = engine_of("fifo")
    within = GenerationRequest(prompt(25, 1), max_new_tokens=10, budget=0.25, stop_at_eos=False)
    # The other one runs in all its steps.
    answers = {k / 16: engine.generate([GenerationRequest(prompt(30, 2), k, 20, stop_at_eos=False), within])[1] for k in (12, 15)}
    whole = engine.generate([GenerationRequest(prompt(30, 2), 16, 20, stop_at_eos=False), within])[1]
    answers[0.25] = engine.generate([within])[0]
    engine.close()
    for budget, answer in answers.items():
        raised = replace(within, budget=budget)
        assert answer.tokens == alone(model, raised)
        assert answer.served_k == pytest.approx(mean_ran(model, raised, answer))
    assert (whole.served_k, whole.tokens) == (16, alone(model, replace(within, budget=None)))


def test_a_budget_of_all_is_all(engine_of, model):
    engine = engine_of()
    answer = engine.generate([GenerationRequest(prompt(30, 1), max_new_tokens=8, budget=0.9999, stop_at_eos=False)])[0]
    engine.close()
    assert answer.served_k == 16
    assert answer.tokens == alone(model, GenerationRequest(prompt(30, 1), 16, 8))


@pytest.mark.parametrize("scheduler", mostly_long(SCHEDULERS, "per-token", "tiers"))
def test_no_scheduler_serves_below_a_floor_or_loses_a_request(engine_of, model, scheduler):
    engine = engine_of(scheduler)
    requests = greedy(20)
    answers = engine.generate(requests)
    assert all(len(answer.tokens) == 10 and answer.finish == "length" for answer in answers)
    assert all(answer.served_k >= request.k for request, answer in zip(requests, answers, strict=True))
    same = [GenerationRequest(request.prompt, 6, 10, stop_at_eos=False) for request in requests]
    answers = engine.generate(same)
    engine.close()
    # Where all floors are one, there is nothing to be upgraded to.
    assert [answer.tokens for answer in answers] == [alone(model, request) for request in same]


@pytest.mark.parametrize(
    "family",
    mostly_long(["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "gpt_oss", "granitemoe", "ernie4_5_moe"], "mixtral", "qwen2_moe"),
)
def test_other_families(engine_of, models, command, tmp_path, family):
    assert command("prism-refactor", models[family], tmp_path / "out", *FAST).code == 0
    model = load(tmp_path / "out", dtype=torch.float32)
    engine = engine_of(on=model)
    requests = [GenerationRequest(prompt(5 + 9 * n, n), 1 + n % engine.full_k, 8, stop_at_eos=False) for n in range(9)]
    answers = engine.generate(requests)
    engine.close()
    assert [answer.tokens for answer in answers] == [alone(model, request) for request in requests]


@pytest.mark.parametrize("family", ["lfm2_moe", "deepseek_v3", "llama4"])
def test_families_that_continuous_batching_does_not_run_are_refused(engine_of, models, command, tmp_path, family):
    assert command("prism-refactor", models[family], tmp_path / "out", *FAST).code == 0
    model = load(tmp_path / "out", dtype=torch.float32)
    before = model.config._experts_implementation
    with pytest.raises(InputError, match="continuous batching does not"):
        engine_of(on=model)
    assert not model._forward_hooks
    assert model.config._experts_implementation == before


def test_a_window_of_attention_is_kept(engine_of, command, tmp_path):
    build("mixtral", tmp_path / "in", sliding_window=24)
    assert command("prism-refactor", tmp_path / "in", tmp_path / "out", *FAST).code == 0
    model = load(tmp_path / "out", dtype=torch.float32)
    engine = engine_of(on=model)
    requests = [GenerationRequest(prompt(20 + 15 * n, n), 2 + n, 12, stop_at_eos=False) for n in range(5)]
    answers = engine.generate(requests)
    engine.close()
    assert [answer.tokens for answer in answers] == [alone(model, request) for request in requests]


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "hunyuan_v1_moe", "gemma4_text"])
def test_other_kinds_of_models_are_served(engine_of, models, command, tmp_path, family):
    """One of images and text, one whose experts are cut when it is loaded, and one whose router has other inputs than its experts."""
    assert command("prism-refactor", models[family], tmp_path / "out", *FAST).code == 0
    model = load(tmp_path / "out", dtype=torch.float32)
    engine = engine_of(on=model)
    # With seeds from 0 on Gemma's random model has two next tokens of the same logit.
    requests = [GenerationRequest(prompt(20, 10 + n), 2 + 3 * n, 12, stop_at_eos=False) for n in range(3)]
    answers = engine.generate(requests)
    engine.close()
    assert [answer.tokens for answer in answers] == [alone(model, request) for request in requests]


def test_prompts_longer_than_a_step_are_run_in_pieces(engine_of, model):
    steps = []
    engine = engine_of(limits=Limits(tokens=16, requests=4), on_step=steps.append)
    requests = [GenerationRequest(prompt(100, n), 5 + n, 6, stop_at_eos=False) for n in range(3)]
    answers = engine.generate(requests)
    assert max(step.prefill + step.decode for step in steps) <= 16
    engine.close()
    assert [answer.tokens for answer in answers] == [alone(model, request) for request in requests]


def test_requests_that_are_evicted_start_again_and_end_the_same(engine_of, model):
    """Twelve requests that grow to 60 tokens do not fit 8 pages of 32."""
    engine = engine_of(limits=replace(SMALL, kv_tokens=8 * transformers_batching.CPU_PAGE))
    evicted = []
    manager = engine.batching._processor.offloading_manager
    original = manager.offload_requests
    manager.offload_requests = lambda: evicted.append(1) or original()
    requests = [GenerationRequest(prompt(20, n), KS[n % len(KS)], 40, stop_at_eos=False) for n in range(12)]
    answers = engine.generate(requests)
    assert evicted, "the cache was large enough"
    assert engine.kv_in_use == 0
    engine.close()
    assert [answer.tokens for answer in answers] == [alone(model, request) for request in requests]


def prefilled(engine, steps, request):
    """Prompt tokens that were run for a request, and its answer."""
    del steps[:]
    answer = engine.generate([request])[0]
    return sum(step.prefill for step in steps) + sum(step.decode for step in steps) - (len(answer.tokens) - 1), answer.tokens


def shared_prefix(engine, steps):
    """Prompt tokens run by a request of k = 1, by another of k = 1, and by one of k = 16, with the same first 96 tokens; its answer."""
    start = prompt(96, 5)
    first, _ = prefilled(engine, steps, GenerationRequest([*start, *prompt(6, 6)], 1, 8, stop_at_eos=False))
    same, _ = prefilled(engine, steps, GenerationRequest([*start, *prompt(7, 7)], 1, 8, stop_at_eos=False))
    last = GenerationRequest([*start, *prompt(8, 8)], 16, 24, stop_at_eos=False)
    return first, same, *prefilled(engine, steps, last), last


def test_a_prefix_is_shared_with_requests_of_the_same_k_alone(engine_of, model, monkeypatch):
    steps = []
    engine = engine_of(on_step=steps.append)
    first, same, other, tokens, last = shared_prefix(engine, steps)
    engine.close()
    assert (first, same) == (102, 7), "the second request of the k did not reuse the pages"
    assert other == 104, "pages of another k were reused"
    assert tokens == alone(model, last)

    # Without k in the key they are, and the test above would say so.
    monkeypatch.setattr(transformers_batching, "KV_SALT", 0)
    engine = engine_of(on_step=steps.append)
    first, same, other, wrong, last = shared_prefix(engine, steps)
    engine.close()
    assert other == 8
    assert wrong != tokens


def test_a_prefix_is_shared_with_requests_of_the_same_budget_alone(engine_of):
    start, steps = prompt(96, 3), []
    engine = engine_of(on_step=steps.append)

    def run(seed, k=None, budget=None):
        request = GenerationRequest([*start, *prompt(6, seed)], k, 8, stop_at_eos=False, budget=budget)
        return prefilled(engine, steps, request)[0]

    found = [run(1, budget=0.25), run(2, budget=0.25), run(3, k=4), run(4, budget=0.251), run(5, budget=0.2502)]
    engine.close()
    assert found == [102, 6, 102, 102, 6]


def test_schedulers_that_raise_k_share_no_prefix(engine_of):
    steps = []
    first, same, other, _, _ = shared_prefix(engine_of("fifo", on_step=steps.append), steps)
    assert (first, same, other) == (102, 103, 104)


def test_a_seed_gives_the_same_tokens_whatever_runs_beside(engine_of):
    engine = engine_of()
    request = {"k": 6, "max_new_tokens": 12, "temperature": 1.0, "stop_at_eos": False}
    one, other = (engine.generate([GenerationRequest(prompt(9, 1), seed=seed, **request)])[0].tokens for seed in (1, 2))
    beside = engine.generate([*greedy(6), GenerationRequest(prompt(9, 1), seed=1, **request)])[-1].tokens
    assert one == beside
    assert one != other
    free = {tuple(engine.generate([GenerationRequest(prompt(9, 1), **request)])[0].tokens) for _ in range(3)}
    assert len(free) == 3


def test_little_top_p_or_temperature_is_greedy(engine_of, model):
    engine = engine_of()
    plain = GenerationRequest(prompt(9, 1), 6, 10, stop_at_eos=False)
    for change in ({"top_p": 1e-6, "temperature": 1.0}, {"temperature": 1e-3}):
        assert (
            engine.generate([GenerationRequest(prompt(9, 1), 6, 10, stop_at_eos=False, seed=3, **change)])[0].tokens
            == engine.generate([plain])[0].tokens
        )


def test_sampling_follows_the_softmax():
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0]).expand(4000, 4)
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    temperature = torch.full((4000,), 0.7)

    def shares(top_p):
        return torch.bincount(sample(logits, temperature, torch.full((4000,), top_p), draws), minlength=4) / 4000

    expected = (logits[0] / 0.7).softmax(-1)
    assert shares(1.0) == pytest.approx(expected, abs=0.03)
    assert expected[[1, 0]].sum() < 0.96 < expected[[1, 0, 2]].sum()
    # Two tokens do not reach 0.96, three do: the last is never drawn.
    assert shares(0.96) == pytest.approx(expected * torch.tensor([1, 1, 1, 0]) / (1 - expected[3]), abs=0.03)
    assert shares(0.96)[3] == 0
    assert shares(0.01).tolist() == [0, 1, 0, 0]


@given(rows=st.integers(1, 5), seed=st.integers(0, 100), edge=st.sampled_from([0.0, 0.5, 1 - 2**-24]))
@settings(deadline=None)
def test_a_draw_is_always_a_token_and_does_not_depend_on_the_other_rows(rows, seed, edge):
    dice = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, 50, generator=dice)
    temperature, top_p = (torch.rand(rows, generator=dice).clamp_min(0.01) for _ in range(2))
    top_p[0] = 1.0
    draw = torch.full((rows,), edge)
    tokens = sample(logits, temperature, top_p, draw)
    assert ((tokens >= 0) & (tokens < 50)).all()
    for row in range(rows):
        one = slice(row, row + 1)
        assert sample(logits[one], temperature[one], top_p[one], draw[one])[0] == tokens[row]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_log_probabilities_are_those_of_the_model(engine_of, model, temperature):
    engine = engine_of()
    request = GenerationRequest(prompt(9, 1), 6, 5, logprobs=3, stop_at_eos=False, temperature=temperature, seed=1)
    answer = engine.generate([request, *greedy(3)])[0]
    engine.close()
    set_active(model, 6)
    with torch.no_grad():
        expected = model(torch.tensor([request.prompt + answer.tokens])).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
    assert len(answer.logprobs) == 5
    for row, token, item in zip(expected, answer.tokens, answer.logprobs, strict=True):
        assert isinstance(item, Logprob)
        assert item.chosen == pytest.approx(float(row[token]), abs=1e-3)
        assert [value for _, value in item.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_generation_ends_at_the_end_of_text(engine_of, model):
    engine = engine_of()
    request = greedy(1, 10)[0]
    tokens = engine.generate([request])[0].tokens
    engine.eos_token_ids = [tokens[4]]
    answer = engine.generate([GenerationRequest(request.prompt, request.k, 10)])[0]
    assert (answer.tokens, answer.finish) == (tokens[: tokens.index(tokens[4]) + 1], "stop")


def test_what_is_cancelled_is_freed_and_silent(engine_of):
    engine = engine_of()
    heard, started = [], threading.Event()

    def listen(chunk):
        heard.append(chunk)
        started.set()

    name = engine.submit(GenerationRequest(prompt(40, 1), 8, 200, stop_at_eos=False), listen)
    assert started.wait(30)
    assert engine.running == 1
    assert engine.kv_in_use > 0
    engine.cancel(name)
    engine.cancel("unknown")
    count = len(heard)
    assert engine.generate([GenerationRequest(prompt(4, 2), 8, 3)])[0].finish
    assert len(heard) <= count + 1
    assert not any(chunk.finish for chunk in heard)
    assert (engine.running, engine.kv_in_use, engine.waiting) == (0, 0, [])


def test_whoever_cannot_take_news_loses_that_request_alone(engine_of, caplog):
    engine = engine_of()

    def broken(_):
        raise ZeroDivisionError

    engine.submit(GenerationRequest(prompt(40, 1), 8, 200, stop_at_eos=False), broken)
    (chunk,) = engine.generate([GenerationRequest(prompt(4, 2), 8, 30, stop_at_eos=False)])
    assert (chunk.finish, len(chunk.tokens)) == ("length", 30)
    assert engine.generate([GenerationRequest(prompt(4, 2), 8, 3)])[0].finish
    assert (engine.running, engine.kv_in_use, engine.waiting) == (0, 0, [])
    assert sum(record.exc_info is not None for record in caplog.records) == 1


def test_a_full_queue_is_refused_with_a_time_to_come_back(engine_of):
    engine = engine_of(limits=Limits(tokens=64, requests=1, waiting=2))
    begun, done = threading.Event(), threading.Semaphore(0)

    def listen(chunk):
        begun.set()
        if chunk.finish:
            done.release()

    # Long enough for the others to be there before it ends.
    engine.submit(GenerationRequest(prompt(30, 0), 4, 400, stop_at_eos=False), listen)
    assert begun.wait(60)
    for number in (1, 2):
        engine.submit(GenerationRequest(prompt(30, number), 4, 4, stop_at_eos=False), listen)
    with pytest.raises(Rejected, match="2 requests wait") as refused:
        engine.submit(GenerationRequest(prompt(30, 9), 4, 60), print)
    assert refused.value.retry_after >= 1
    for _ in range(3):
        assert done.acquire(timeout=60)
    assert engine.generate([GenerationRequest(prompt(30, 9), 4, 2)])[0].finish


def test_deadlines_that_cannot_be_met_are_refused_or_given_up(engine_of):
    engine = engine_of(limits=Limits(tokens=64, requests=1))
    with pytest.raises(Rejected, match="cannot be met"):
        engine.submit(GenerationRequest(prompt(200, 1), 16, 4, deadline=0.01), print)
    first = threading.Event()
    engine.submit(GenerationRequest(prompt(30, 1), 16, 200, stop_at_eos=False), lambda chunk: chunk.finish and first.set())
    time.sleep(0.1)
    late = engine.generate([GenerationRequest(prompt(30, 2), 4, 4, deadline=0.15)])[0]
    assert (late.finish, late.tokens) == ("deadline", [])
    assert not first.is_set()
    assert first.wait(60)
    assert engine.kv_in_use == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest([], 4), "at least one prompt token"),
        (GenerationRequest([5], 0), "choose 1 to 16"),
        (GenerationRequest([5], 17), "choose 1 to 16"),
        (GenerationRequest([5], 4, 0), "one token to generate"),
        (GenerationRequest([5], budget=0.0), "budget 0: choose a share"),
        (GenerationRequest([5], budget=1.01), "budget 1.01: choose a share"),
        (GenerationRequest([5], budget=float("nan")), "budget nan: choose a share"),
        (GenerationRequest([5], 4, budget=0.5), "leave one of them out"),
        (GenerationRequest([5] * 1000, 4, 100), "together at most 1024"),
    ],
)
def test_requests_that_can_never_run_are_refused(engine_of, request_, message):
    with pytest.raises(UsageError, match=message):
        engine_of().submit(request_, print)


def test_a_name_can_be_used_once_at_a_time(engine_of):
    engine = engine_of()
    done = threading.Event()
    engine.submit(GenerationRequest(prompt(9, 1), 4, 50, id="same", stop_at_eos=False), lambda chunk: chunk.finish and done.set())
    with pytest.raises(UsageError, match="running already"):
        engine.submit(GenerationRequest(prompt(9, 1), 4, 5, id="same"), print)
    assert done.wait(60)
    assert engine.generate([GenerationRequest(prompt(9, 1), 4, 5, id="same")])[0].finish


def test_stopping_drains_or_ends_what_runs(engine_of):
    engine = engine_of()
    ended: list[str] = []
    for number in range(3):
        engine.submit(
            GenerationRequest(prompt(9, number), 4, 20, stop_at_eos=False), lambda chunk: chunk.finish and ended.append(chunk.finish)
        )
    engine.stop(drain=60)
    assert ended == ["length"] * 3
    assert engine.unfinished == 0
    with pytest.raises(Rejected, match="stopping"):
        engine.submit(GenerationRequest(prompt(9, 1), 4, 5), print)
    engine.close()

    engine = engine_of()
    ended.clear()
    for number in range(3):
        engine.submit(
            GenerationRequest(prompt(9, number), 4, 900, stop_at_eos=False), lambda chunk: chunk.finish and ended.append(chunk.finish)
        )
    engine.stop()
    assert ended == ["error"] * 3
    assert engine.unfinished == 3
    assert engine.kv_in_use == 0


def test_a_checkpoint_without_a_router_has_one_k_at_a_time(engine_of, models, command, tmp_path):
    assert command("prism-refactor", models["olmoe"], tmp_path / "out", *FAST, "--router", "replicate").code == 0
    model = load(tmp_path / "out", dtype=torch.float32)
    with pytest.raises(UsageError, match="use `scheduler` fifo"):
        engine_of(on=model)
    engine = engine_of("fifo", on=model)
    requests = [GenerationRequest(prompt(9, n), 4, 8, stop_at_eos=False) for n in range(3)]
    answers = engine.generate(requests)
    engine.close()
    assert [answer.tokens for answer in answers] == [alone(model, request) for request in requests]


def test_schedulers_that_predict_ask_for_prism_bench(model):
    with pytest.raises(UsageError, match="prism-bench"):
        Engine(model, "tiers", SMALL)


def test_only_refactored_checkpoints_are_loaded(models, tmp_path):
    with pytest.raises(InputError, match="not a refactored checkpoint"):
        load(Models(tmp_path)["olmoe"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot load"):
        load(tmp_path / "empty")


def test_a_closed_engine_leaves_the_model_as_it_was(model, engine_of):
    before = model.config._attn_implementation, model.config._experts_implementation
    engine_of().close()
    assert (model.config._attn_implementation, model.config._experts_implementation) == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_measuring_a_step(engine_of):
    engine = engine_of(start=False)
    assert 0 < engine.measure(4, 1, 32, 8) < 5
    assert 0 < engine.measure(1, 64, 0, 8) < 5
    assert engine.kv_in_use == 0
    engine.close()
    with pytest.raises(UsageError, match="do not fit"):
        engine_of(start=False, limits=replace(SMALL, kv_tokens=128)).measure(8, 1, 64, 8)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_temperature_beyond_float32_is_greedy(engine_of, temperature):
    engine = engine_of()
    greedy = GenerationRequest(prompt(9, 1), 6, 6, stop_at_eos=False)
    cold = GenerationRequest(prompt(9, 1), 6, 6, temperature=temperature, seed=1, stop_at_eos=False)
    assert [answer.tokens for answer in engine.generate([cold])] == [answer.tokens for answer in engine.generate([greedy])]


def test_the_kv_cache_is_sized_by_the_memory_of_the_container(engine_of, monkeypatch):
    """Not by the host's."""
    sizes = []
    for memory in (2**20, 2**40):
        monkeypatch.setattr(transformers_batching, "available_memory", lambda memory=memory: memory)
        engine = engine_of(start=False, limits=Limits(tokens=64, requests=4))
        sizes.append(engine.kv_tokens)
        engine.close()
    assert sizes[0] < sizes[1]
