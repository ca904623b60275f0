"""The server and the load test, over HTTP."""

import asyncio
import http.client
import json
import logging
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import TEMPLATE, TEXT, fetch, idle, served
from transformers import AutoTokenizer

from prism_refactor.server.answers import Answer, TokenText
from prism_refactor.serving.engine import GenerationRequest

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def site_and_url(elastic):
    with served(elastic) as both:
        yield both


def complete(url, **body):
    status, answer, _ = fetch(f"{url}/v1/completions", {"model": "tiny", "prompt": TEXT, "temperature": 0, "max_tokens": 8} | body)
    assert status == 200, answer
    return answer


def events(url, path="/v1/completions", **body):
    """The events of a stream, without its end mark."""
    base = {"model": "tiny", "temperature": 0, "max_tokens": 8, "stream": True}
    _, content, headers = fetch(url + path, base | body, raw=True)
    assert headers["content-type"].startswith("text/event-stream")
    lines = [line for line in content.decode().split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_says_what_it_was_served_with(url, site):
    answer = complete(url, model="tiny@6")
    expected = site.engine.generate([_request(site, 6)])[0].tokens
    assert answer["choices"][0]["text"] == site.tokenizer.decode(expected)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["prism"] == {"k": 6, "budget": None, "served_k": 6.0, "full_k": 16}
    count = len(site.tokenizer.encode(TEXT))
    assert answer["usage"] == {"prompt_tokens": count, "completion_tokens": 8, "total_tokens": count + 8}


def _request(site, k, tokens=8):
    return GenerationRequest(site.tokenizer.encode(TEXT), k, tokens, stop_at_eos=False)


@pytest.mark.parametrize(
    ("body", "k"),
    [
        ({}, 16),
        ({"prism": {"k": 5}}, 5),
        ({"model": "tiny@5"}, 5),
        ({"prism": {"quality": 0.8}}, 8),
        ({"prism": {"quality": 1}}, 16),
        ({"model": "tiny@4", "prism": {"k": 7, "quality": 0.8}}, 8),
    ],
)
def test_the_floor_of_a_request(url, body, k):
    assert complete(url, max_tokens=2, **body)["prism"] == {"k": k, "budget": None, "served_k": float(k), "full_k": 16}


@pytest.mark.parametrize(
    ("body", "budget", "k"),
    [
        ({"prism": {"budget": 0.25}}, 0.25, 4),
        ({"model": "tiny@25%"}, 0.25, 4),
        ({"model": "tiny@12.5%"}, 0.125, 2),
        ({"model": "tiny@25%", "prism": {"budget": 0.3}}, 0.3, 5),
    ],
)
def test_the_budget_of_a_request(url, site, body, budget, k):
    request = GenerationRequest(site.tokenizer.encode(TEXT), None, 8, stop_at_eos=False, budget=budget)
    expected = site.engine.generate([request])[0]
    assert expected.served_k % 1, "every token ran the same"
    answer = complete(url, **body)
    assert answer["choices"][0]["text"] == site.tokenizer.decode(expected.tokens)
    assert answer["prism"] == {"k": k, "budget": budget, "served_k": pytest.approx(expected.served_k), "full_k": 16}
    parts = events(url, prompt=TEXT, max_tokens=8, **body)
    assert [part["prism"] for part in parts if part.get("prism")] == [answer["prism"]]


@pytest.mark.parametrize("body", [{"prism": {"budget": 1}}, {"model": "tiny@100%"}])
def test_a_budget_of_all_is_all(url, body):
    assert complete(url, max_tokens=2, **body)["prism"] == {"k": 16, "budget": None, "served_k": 16.0, "full_k": 16}


def test_a_stream_says_the_same_as_the_whole_answer(url):
    whole = complete(url, prism={"k": 6}, max_tokens=20, logprobs=2)
    parts = events(url, prompt=TEXT, prism={"k": 6}, max_tokens=20, logprobs=2, stream_options={"include_usage": True})
    choices = [part["choices"][0] for part in parts[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [choice.get("finish_reason") for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"] == whole["usage"]
    assert parts[-1]["prism"] == whole["prism"]
    joined = {name: [] for name in ("tokens", "token_logprobs", "text_offset")}
    for choice in choices:
        for name, values in joined.items():
            values.extend(choice["logprobs"][name])
    expected = whole["choices"][0]["logprobs"]
    assert (joined["tokens"], joined["text_offset"]) == (expected["tokens"], expected["text_offset"])
    assert joined["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-3)
    assert len({part["id"] for part in parts}) == 1


def test_a_chat(url, site):
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], "logprobs": True, "top_logprobs": 2}
    status, whole, _ = fetch(f"{url}/v1/chat/completions", {"model": "tiny", "temperature": 0, "max_completion_tokens": 6, **body})
    assert status == 200
    assert whole["usage"]["prompt_tokens"] == len(site.tokenizer.encode("user: Hello\nassistant:"))
    message = whole["choices"][0]["message"]
    parts = events(url, "/v1/chat/completions", max_tokens=6, **body)
    text = "".join(part["choices"][0]["delta"]["content"] for part in parts)
    assert message == {"role": "assistant", "content": text, "refusal": None}
    assert [part["choices"][0]["delta"].get("role") for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    # Greedy: the chosen token is the most likely one.
    assert all(item["logprob"] == pytest.approx(item["top_logprobs"][0]["logprob"]) for item in content)
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]


def test_several_prompts_are_answered_in_their_places(url, site):
    prompts = ["One", "Two and", TEXT]
    answer = complete(url, prompt=prompts, max_tokens=5)
    texts = [complete(url, prompt=prompt, max_tokens=5)["choices"][0]["text"] for prompt in prompts]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert answer["usage"]["completion_tokens"] == 15
    tokens = complete(url, prompt=[site.tokenizer.encode(prompt) for prompt in prompts], max_tokens=5)
    assert [choice["text"] for choice in tokens["choices"]] == texts
    streamed = ["", "", ""]
    for part in events(url, prompt=prompts, max_tokens=5):
        streamed[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert streamed == texts


def test_seeds(url):
    def text(**body):
        return complete(url, temperature=1.0, max_tokens=12, **body)["choices"][0]["text"]

    assert text(seed=7) == text(seed=7)
    assert len({text(seed=7), text(seed=8), text(), text()}) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences_end_the_text_and_are_not_in_it(url, site, stream):
    whole = complete(url, max_tokens=40)["choices"][0]["text"]
    stop = whole[10:14]
    body = {"stop": ["never in there", stop], "max_tokens": 40}
    if stream:
        parts = [part["choices"][0] for part in events(url, prompt=TEXT, **body)]
        text, finish = "".join(part["text"] for part in parts), parts[-1]["finish_reason"]
    else:
        choice = complete(url, **body)["choices"][0]
        text, finish = choice["text"], choice["finish_reason"]
    assert (text, finish) == (whole[: whole.index(stop)], "stop")
    assert idle(site)


def test_text_that_may_become_a_stop_sequence_is_held_back(site):
    tokens = site.tokenizer.encode("one two three four")
    for stop in ("two th", "e f", "zzz", "four"):
        answer = Answer(site.tokenizer, [stop])
        pieces = [answer.add([token], last=number == len(tokens) - 1) for number, token in enumerate(tokens)]
        text = site.tokenizer.decode(tokens)
        assert "".join(pieces) == text.partition(stop)[0]
        assert answer.stopped == (stop in text)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "other"}, 404, "no model 'other'"),
        ({"model": "tiny@x"}, 404, "tiny@k"),
        ({"model": "tiny@99"}, 400, "choose 1 to 16"),
        ({"model": "tiny@0%"}, 400, "budget 0: choose a share"),
        ({"model": "tiny@101%"}, 400, "budget 1.01: choose a share"),
        ({"model": "tiny@2.5"}, 404, "tiny@25%"),
        ({"model": "tiny@%"}, 404, "tiny@25%"),
        ({"prism": {"budget": 0}}, 400, "prism.budget"),
        ({"prism": {"budget": 1.5}}, 400, "prism.budget"),
        ({"prism": {"k": 4, "budget": 0.5}}, 400, "ask for one of them"),
        ({"model": "tiny@4", "prism": {"budget": 0.5}}, 400, "ask for one of them"),
        ({"prism": {"quality": 0.8, "budget": 0.5}}, 400, "ask for one of them"),
        ({"prism": {"k": 0}}, 400, "prism.k"),
        ({"prism": {"k": 17}}, 400, "choose 1 to 16"),
        ({"prism": {"kk": 3}}, 400, "prism.kk"),
        ({"prism": {"quality": 1.5}}, 400, "prism.quality"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [5000]}, 400, "there are 4096"),
        ({"prompt": [5] * 1024}, 400, "1024 tokens"),
        ({"prompt": ["x"] * 17}, 400, "prompt"),
        ({"max_tokens": 5000}, 400, "together at most 1024"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"n": 0}, 400, "n"),
        ({"n": 65, "prompt": [TEXT, TEXT]}, 400, "more than 128"),
        ({"presence_penalty": 1}, 400, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"prism": {"deadline": -1}}, 400, "prism.deadline"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(url, site, body, status, message):
    base = {"model": "tiny", "prompt": TEXT, "max_tokens": 4}
    code, answer, _ = fetch(f"{url}/v1/completions", base | body)
    assert code == status, answer
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert idle(site)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "tiny", "prompt": "\\ud800"}'])
def test_bodies_that_are_no_requests(url, body):
    code, answer, _ = fetch(f"{url}/v1/completions", body)
    assert code == 400, answer
    assert answer["error"]["message"]


def test_a_large_body_is_not_read(url):
    code, answer, _ = fetch(f"{url}/v1/completions", b" " * (7 << 20))
    assert (code, "bytes" in answer["error"]["message"]) == (413, True)

    # Without a length it is read, and given up when it has become too long.
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request(
        "POST", "/v1/completions", iter([b" " * (1 << 16)] * 97), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_every_request_is_logged_with_an_id_and_faults_with_a_traceback(url, site, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "prism_refactor")
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 3, "temperature": 0, "ignore_eos": True, "prism": {"k": 6}}
    _, _, headers = fetch(f"{url}/v1/completions", body, {"X-Request-Id": "mine-1"})
    assert headers["x-request-id"] == "mine-1"
    _, _, headers = fetch(f"{url}/v1/models", headers={"X-Request-Id": "not an id"})
    given = headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", given)

    def logged() -> dict[str, dict]:
        """The lines by id. A request of another test may still be written meanwhile."""
        return {record.fields["id"]: record.fields for record in caplog.records if "fields" in vars(record)}

    while not {"mine-1", given} <= set(logged()):
        time.sleep(0.01)
    first, second = logged()["mine-1"], logged()[given]
    assert {key: first[key] for key in ("method", "path", "status", "k", "tokens", "id")} == {
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "k": 6,
        "tokens": 3,
        "id": "mine-1",
    }
    assert first["ms"] > 0
    assert (second["path"], second["status"], second["k"]) == ("/v1/models", 200, None)
    monkeypatch.setattr(site.engine, "submit", lambda *_: 1 / 0)
    code, answer, _ = fetch(f"{url}/v1/completions", body)
    assert (code, answer["error"]["type"]) == (500, "server_error")
    assert answer["error"]["message"] == "unexpected ZeroDivisionError; the server's log says more"
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


def test_what_a_token_stands_for(elastic):
    """Half a character has bytes and a name, and counts as none until the other half comes."""
    tokenizer = AutoTokenizer.from_pretrained(elastic)
    tokens = tokenizer("a\U0001f600 b").input_ids
    text = TokenText(tokenizer)
    assert b"".join(map(text.of, tokens)).decode() == "a\U0001f600 b"
    halves = [token for token in tokens if text.name(token).startswith("bytes:")]
    assert halves
    assert all(text.name(token) == "bytes:" + "".join(f"\\x{byte:02x}" for byte in text.of(token)) for token in halves)
    assert len({text.name(token) for token in halves}) == len(set(halves))
    assert "".join(map(text.add, tokens)) == "a\U0001f600 b"
    assert text.characters == 4


def test_models_health_and_metrics(url):
    _, models, _ = fetch(f"{url}/v1/models")
    named = [("tiny", 16), *((f"tiny@{k}", k) for k in (4, 8, 12, 16)), ("tiny@25%", 4), ("tiny@50%", 8), ("tiny@75%", 12)]
    assert [(entry["id"], entry["k"]) for entry in models["data"]] == named
    assert [entry["budget"] for entry in models["data"] if "%" in entry["id"]] == [0.25, 0.5, 0.75]
    assert fetch(f"{url}/v1/models/tiny@25%25")[1] == models["data"][5]
    assert models["data"][2]["quality"] == pytest.approx(0.8)
    assert fetch(f"{url}/health/live")[:2] == (200, {"status": "live"})
    assert fetch(f"{url}/health/ready")[:2] == (200, {"status": "ready"})

    def metrics():
        lines = fetch(f"{url}/metrics", raw=True)[1].decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = metrics()
    complete(url, prism={"k": 3}, max_tokens=5)
    after = metrics()
    prompt = len(AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "examples" / "olmoe-tiny").encode(TEXT))
    # The last token is not run: nothing comes after it.
    assert after["prism_sub_experts_total"] - before.get("prism_sub_experts_total", 0) == 3 * (prompt + 4)
    assert after['prism_tokens_total{kind="decode"}'] - before.get('prism_tokens_total{kind="decode"}', 0) == 4
    assert after['prism_requests_total{end="length"}'] - before.get('prism_requests_total{end="length"}', 0) == 1
    assert after['prism_ttft_seconds_count{k="3"}'] >= 1
    assert after['prism_tpot_seconds_count{k="3"}'] >= 1
    assert after["prism_step_seconds_count"] > before["prism_step_seconds_count"]
    assert after["prism_kv_blocks_in_use"] == after["prism_requests_running"] == after["prism_requests_waiting"] == 0


def test_an_api_key_is_asked_for(elastic):
    with served(elastic, api_key="secret") as (_, url):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            code, answer, _ = fetch(f"{url}/v1/models", headers=headers)
            assert (code, answer["error"]["type"]) == (401, "authentication_error")
        assert fetch(f"{url}/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200
        assert fetch(f"{url}/health/ready")[0] == 200


def test_a_full_queue_answers_429(url, site, monkeypatch):
    monkeypatch.setattr(site.engine, "limits", replace(site.engine.limits, waiting=0))
    code, answer, headers = fetch(f"{url}/v1/completions", {"model": "tiny", "prompt": TEXT})
    assert (code, answer["error"]["type"]) == (429, "rate_limit_error")
    assert int(headers["retry-after"]) >= 1
    assert fetch(f"{url}/health/ready")[0] == 503


def test_an_engine_that_died_is_not_live(elastic):
    with served(elastic) as (site, url):

        def fail(*_):
            raise RuntimeError("out of cheese")

        site.engine.batching._processor._generation_step = fail
        code, answer, _ = fetch(f"{url}/v1/completions", {"model": "tiny", "prompt": TEXT})
        assert (code, answer["error"]["type"]) == (500, "server_error")
        assert "out of cheese" in answer["error"]["message"]
        assert fetch(f"{url}/health/live")[0] == 503
        assert fetch(f"{url}/health/ready")[0] == 503


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_forgotten(url, site, stream):
    async def leave():
        body = {"model": "tiny", "prompt": TEXT, "max_tokens": 900, "stream": stream, "ignore_eos": True}
        async with aiohttp.ClientSession() as session:
            with pytest.raises((TimeoutError, aiohttp.ClientError)):
                async with session.post(f"{url}/v1/completions", json=body, timeout=aiohttp.ClientTimeout(total=0.4)) as response:
                    await response.read()

    started = time.monotonic()
    asyncio.run(leave())
    assert idle(site)
    assert time.monotonic() - started < 5


@pytest.mark.long
def test_five_hundred_clients_of_which_many_leave(url, site):
    """Every answer is the one that the request gets alone; nothing is lost, given twice or kept."""
    dice = random.Random(0)
    kinds = [(prompt, k) for prompt in ("One", "Two and", TEXT) for k in (2, 6, 11, 16)]
    expected = {kind: complete(url, prompt=kind[0], prism={"k": kind[1]}, max_tokens=6)["choices"][0]["text"] for kind in kinds}
    plan = [(dice.choice(kinds), dice.random() < 0.3) for _ in range(500)]
    outcomes = []

    async def client(session, kind, leaves):
        body = {"model": "tiny", "prompt": kind[0], "max_tokens": 6, "temperature": 0, "stream": True, "prism": {"k": kind[1]}}
        body |= {"max_tokens": 300, "ignore_eos": True} if leaves else {}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            assert response.status == 200
            text = ""
            async for line in response.content:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if leaves:
                        response.close()
                        break
        outcomes.append((kind, leaves, text))

    async def crowd():
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=240)) as session:
            await asyncio.gather(*(client(session, *item) for item in plan))

    asyncio.run(crowd())
    stayed = [(kind, text) for kind, leaves, text in outcomes if not leaves]
    assert len(outcomes) == 500
    assert len(stayed) == sum(not leaves for _, leaves in plan)
    assert [text for _, text in stayed] == [expected[kind] for kind, _ in stayed]
    assert idle(site)


@pytest.mark.long
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_what_schemathesis_makes_up(url, site, mode):
    """Bodies that the OpenAPI schema allows, and bodies that it does not: every answer is one that the schema has, none is a fault."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses = Counter()
    for operation in (found.ok() for found in schema.get_all_operations()):
        if operation.method.lower() == "post" or mode is GenerationMode.POSITIVE:

            @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
            @given(case=operation.as_strategy(generation_mode=mode))
            def call(case):
                if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                    case.body |= {"model": "tiny", "max_tokens": 4, "n": 1}
                    # It needs another field, which a schema cannot say.
                    case.body.pop("top_logprobs", None)
                response = case.call(timeout=60)
                statuses[response.status_code] += 1
                # What the schema allows may still be too long or have a k that this model does not have: no field is at fault then.
                case.validate_response(response, excluded_checks=[positive_data_acceptance])
                if mode is GenerationMode.POSITIVE and response.status_code == 400:
                    assert response.json()["error"]["param"] is None, response.text

            call()
    assert sum(statuses.values()) > 60, statuses
    assert mode is GenerationMode.NEGATIVE or statuses[200] > 20, statuses
    assert not any(status >= 500 for status in statuses), statuses
    assert idle(site)


@pytest.fixture
def process(elastic, tmp_path):
    """prism-serve as a process: it and its URL."""
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    arguments = [BIN / "prism-serve", elastic, "--port", "0", "--log-json", "--chat-template", template, "--served-model-name", "tiny"]
    running = subprocess.Popen([*arguments, "--dtype", "float32"], stderr=subprocess.PIPE, text=True)
    try:
        for line in running.stderr:
            if "port" in (event := json.loads(line)):
                break
        yield running, f"http://127.0.0.1:{event['port']}"
    finally:
        running.kill()
        running.communicate()


def test_sigterm_lets_running_requests_end(process):
    running, url = process
    texts = []

    def ask(number):
        parts = events(url, prompt=TEXT, max_tokens=150, ignore_eos=True, prism={"k": number + 1})
        texts.append((parts[-1]["choices"][0]["finish_reason"], len(parts)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    running.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    with pytest.raises(OSError):  # noqa: PT011  (refused or reset)
        fetch(f"{url}/health/ready")
    for thread in threads:
        thread.join(60)
    assert [finish for finish, _ in texts] == ["length"] * 8
    rest = running.stderr.read().splitlines()
    assert running.wait(30) == 0
    assert json.loads(rest[-1])["unfinished"] == 0


def test_loadtest_against_a_server(url, site, command, tmp_path):
    outcome = command("prism-loadtest", url, "--requests", 12, "--rate", 50, "--prompt-tokens", 20, "--max-tokens", 6, "--json", "-q")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)["server"]
    assert (result["done"], result["errors"], result["below_floor"]) == (12, {}, 0)
    assert result["mean_served_k"] == result["mean_asked_k"]
    assert 0 < result["ttft"]["p50"] <= result["e2e"]["p50"]
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"at": 0, "prompt_tokens": 5, "max_tokens": 3, "k": 4}\n{"at": 0.1, "prompt_tokens": 2000, "max_tokens": 3}\n')
    outcome = command("prism-loadtest", url, "--trace", trace, "--quiet")
    assert outcome.code == 0
    assert "1/2" in outcome.out
    assert "status 400" in outcome.out
    assert idle(site)


def test_loadtest_sends_floors_as_vllm_takes_them(command, tmp_path):
    bodies = []

    class Answers(BaseHTTPRequestHandler):
        def respond(self, text):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            self.respond('{"data": [{"id": "m"}]}')

        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.respond('data: {"usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n')

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        trace = tmp_path / "trace.jsonl"
        trace.write_text('{"at": 0, "prompt_tokens": 5, "max_tokens": 2, "k": 4}\n{"at": 0.3, "prompt_tokens": 5, "max_tokens": 2}\n')
        assert command("prism-loadtest", url, "--api", "vllm", "--trace", trace, "--json").code == 0
        assert command("prism-loadtest", url, "--api", "vllm", "--mix", "7:1", "--requests", 2, "--rate", 100, "--json").code == 0
        outcome = command("prism-loadtest", url, "--api", "vllm")
        server.shutdown()
    assert [body.get("vllm_xargs") for body in bodies] == [{"prism_k": 4}, None, {"prism_k": 7}, {"prism_k": 7}]
    assert not any("prism" in body for body in bodies)
    assert (outcome.code, "write K:WEIGHT" in outcome.err) == (2, True)


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_loadtest_leaves_no_request_and_no_traceback(url, site, number, code):
    command = [Path(sys.executable).with_name("prism-loadtest"), url, "--rate", "50", "--max-tokens", "400", "--log-json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while site.engine.running < 4:
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (code, "")
    said = [json.loads(line) for line in err.splitlines() if line]
    assert said == ([{"error": "interrupted; nothing was written", "exit_code": code}] if number == signal.SIGINT else [])
    assert idle(site)


def test_loadtest_and_bench_on_a_folder(elastic, command, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in elastic.iterdir():
        (folder / file.name).symlink_to(file)
    outcome = command("prism-loadtest", folder, "--simulate")
    assert (outcome.code, "run prism-bench first" in outcome.err) == (3, True)
    small = ["--max-requests", 4, "--max-batch-tokens", 32]
    outcome = command(
        "prism-bench", folder, *small, "--context", 64, "--repeats", 1, "--held-out", 2, "--plot", tmp_path / "plot.svg", "-q"
    )
    assert outcome.code == 0, outcome.err
    assert "predictions were off by" in outcome.out
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    outcome = command("prism-loadtest", folder, "--simulate", "--requests", 200, "--rate", 1000, *small, "--json")
    assert outcome.code == 0, outcome.err
    results = json.loads(outcome.out)
    assert list(results) == ["fifo", "fullbatch", "virtual-queues", "tiers", "per-token"]
    assert all(result["done"] == 200 and result["below_floor"] == 0 for result in results.values())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["http://127.0.0.1:9"], 3, "cannot be read"),
        (["not-a-url"], 2, "--simulate"),
        (["http://127.0.0.1:9", "--scheduler", "fifo"], 2, "--simulate"),
    ],
)
def test_loadtest_errors(command, arguments, code, message):
    outcome = command("prism-loadtest", *arguments)
    assert (outcome.code, message in outcome.err) == (code, True)


def test_serve_errors(elastic, command, tmp_path, models):
    taken = socket.create_server(("127.0.0.1", 0))
    for arguments, code, message in (
        ([elastic, "--port", taken.getsockname()[1]], 2, "cannot listen"),
        ([elastic, "--served-model-name", "a@b"], 2, "--served-model-name"),
        ([elastic, "--chat-template", tmp_path / "none"], 2, "--chat-template"),
        ([elastic, "--port", 0, "--scheduler", "tiers"], 2, "prism-bench"),
        ([models["olmoe"], "--port", 0], 3, "not a refactored checkpoint"),
        ([tmp_path, "--port", 0], 3, "tokenizer"),
    ):
        outcome = command("prism-serve", *arguments)
        assert outcome.code == code, outcome.err
        assert message in outcome.err
        assert outcome.err.count("error:") == 1
    taken.close()
