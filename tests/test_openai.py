"""What OpenAI's own client, its types, lm_eval and browsers see of the server."""

import gzip
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import openai
import pytest
import torch
from lm_tasks import CHOICE, write_task
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from serving import LIMITS, TEXT, fetch, idle, served

from prism_refactor.models.loading import load
from prism_refactor.server import application
from prism_refactor.server.answers import Answer
from prism_refactor.serving.engine import GenerationRequest

MESSAGES = [{"role": "user", "content": "Hello"}]
DROPPED, REFUSED = 200, 400
# Of every field of OpenAI's: what it is when it is left out, another value, and what becomes of a request with that.
BOTH = {
    "frequency_penalty": (0, 0.5, REFUSED),
    "logit_bias": ({}, {"5": 3}, REFUSED),
    "n": (1, 2, 200),
    "presence_penalty": (0, 0.5, REFUSED),
    "seed": (None, 5, 200),
    "stop": ([], ["x", "y"], 200),
    "stream_options": (None, {"include_usage": True}, 200),
    "temperature": (1, 0.5, 200),
    "top_p": (1, 0.5, 200),
    "user": (None, "me", DROPPED),
    "stream": (False, True, 200),
    "max_tokens": (None, 3, 200),
}
COMPLETION = BOTH | {
    "best_of": (1, 2, REFUSED),
    "echo": (False, True, 200),
    "logprobs": (None, 2, 200),
    "suffix": ("", "end", REFUSED),
}
CHAT = BOTH | {
    "audio": (None, {"format": "wav", "voice": "ash"}, REFUSED),
    "function_call": ("none", {"name": "f"}, REFUSED),
    "functions": ([], [{"name": "f"}], REFUSED),
    "logprobs": (False, True, 200),
    "max_completion_tokens": (None, 3, 200),
    "metadata": ({}, {"a": "b"}, DROPPED),
    "modalities": (["text"], ["text", "audio"], REFUSED),
    "moderation": (None, {"model": "m"}, REFUSED),
    "parallel_tool_calls": (True, False, DROPPED),
    "prediction": (None, {"type": "content", "content": "x"}, DROPPED),
    "prompt_cache_key": (None, "k", DROPPED),
    "prompt_cache_options": (None, {"mode": "explicit"}, DROPPED),
    "prompt_cache_retention": (None, "24h", DROPPED),
    "reasoning_effort": ("none", "high", REFUSED),
    "response_format": ({"type": "text"}, {"type": "json_object"}, REFUSED),
    "safety_identifier": (None, "s", DROPPED),
    "service_tier": ("auto", "flex", DROPPED),
    "store": (False, True, DROPPED),
    "tool_choice": ("auto", "required", REFUSED),
    "tools": ([], [{"type": "function", "function": {"name": "f"}}], REFUSED),
    "top_logprobs": (None, 2, REFUSED),
    "verbosity": ("medium", "low", REFUSED),
    "web_search_options": (None, {}, REFUSED),
}
KINDS = [("/v1/completions", {"prompt": TEXT}, COMPLETION), ("/v1/chat/completions", {"messages": MESSAGES}, CHAT)]
FIELDS = [(path, body, field, values) for path, body, known in KINDS for field, values in known.items()]


@pytest.fixture(scope="module")
def site_and_url(elastic):
    with served(elastic, origins=("https://page.example",)) as both:
        yield both


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def ask(url, path, body):
    status, content, _ = fetch(url + path, {"model": "tiny", "max_tokens": 2} | body, raw=True)
    return status, content.decode()


def test_the_tables_above_know_every_field():
    for module, (_, body, known) in zip((completion_create_params, chat_create_params), KINDS, strict=True):
        streaming = get_type_hints(module.CompletionCreateParamsStreaming)
        assert streaming.keys() - body.keys() - {"model"} == known.keys()


@pytest.mark.parametrize(("path", "body", "field", "values"), FIELDS, ids=[f"{path[4:]}-{field}" for path, _, field, _ in FIELDS])
def test_every_field_is_done_or_refused_by_its_name(url, path, body, field, values):
    default, other, outcome = values
    for neutral in (None, default):
        status, content = ask(url, path, body | {field: neutral})
        assert status == 200, content
    status, content = ask(url, path, body | {field: other})
    assert status == outcome, content
    if outcome == REFUSED:
        assert json.loads(content)["error"]["message"].startswith(field)


@pytest.mark.parametrize("field", ["top_k", "min_p", "repetition_penalty", "guided_json", "parts", "strings"])
def test_fields_of_other_servers_are_refused_by_their_names(url, field):
    for path, body, _ in KINDS:
        status, content = ask(url, path, body | {field: 1})
        assert (status, field in content) == (400, True)


@pytest.mark.parametrize(
    ("path", "field", "value", "says"),
    [
        ("/v1/completions", "stop", list("abcde"), "at most 4 items"),
        ("/v1/completions", "stop", ["a", ""], "at least 1 character"),
        ("/v1/completions", "prompt", "half \ud83d a pair", "unicode"),
        ("/v1/completions", "logprobs", False, "valid integer"),
        ("/v1/completions", "max_tokens", True, "valid integer"),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "half \ud83d a pair"}], "half a pair of surrogates"),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}], "half a pair"),
        ("/v1/completions", "stop", 5, "a string or a list of strings"),
        ("/v1/completions", "prompt", ["a"] * 17, "at most 16 items"),
        ("/v1/completions", "prompt", [[1]] * 17, "at most 16 items"),
        ("/v1/completions", "prompt", [""], "at least 1 character"),
        ("/v1/completions", "prompt", ["a", 5], "valid string"),
        ("/v1/completions", "prompt", [5, "a"], "valid integer"),
        ("/v1/completions", "prompt", [[5], [-1]], "greater than or equal to 0"),
        ("/v1/completions", "prompt", {"a": 1}, "a string, token ids, or a list of one of them"),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": [{"type": "image_url"}]}], "'text'"),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": 5}], "a string or a list of parts"),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": None}], "role user has no content"),
        ("/v1/chat/completions", "messages", [{"role": "robot", "content": "x"}], "'assistant'"),
        ("/v1/chat/completions", "messages", [], "at least 1 item"),
    ],
)
def test_an_error_is_about_the_type_that_was_meant(url, path, field, value, says):
    base = {"prompt": "x"} if path == "/v1/completions" else {}
    status, content = ask(url, path, base | {field: value})
    message = json.loads(content)["error"]["message"]
    assert (status, says in message, message.startswith(field)) == (400, True, True), message


def test_a_body_that_does_not_say_that_it_is_json(url):
    body = {"model": "tiny", "prompt": "x"}
    status, answer, _ = fetch(f"{url}/v1/completions", body, {"Content-Type": "application/x-www-form-urlencoded"})
    assert (status, "Content-Type: application/json" in answer["error"]["message"]) == (400, True)


def test_a_text_counts_the_same_however_it_is_written(url, site):
    for characters, expected in ((300_000, 400), (400_000, 413)):
        body = {"model": "tiny", "prompt": "\u6cb3" * characters, "max_tokens": 1}
        found = {fetch(f"{url}/v1/completions", json.dumps(body, ensure_ascii=escaped).encode())[0] for escaped in (True, False)}
        assert found == {expected}
    assert idle(site)


def test_the_client_completes(client):
    whole = client.completions.create(model="tiny", prompt=TEXT, max_tokens=5, temperature=0, logprobs=3)
    (choice,) = whole.choices
    assert (choice.finish_reason, whole.usage.completion_tokens) == ("length", 5)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(
        choice.text[start:].startswith(token) for token, start in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
    )
    assert [len(top) for top in choice.logprobs.top_logprobs] == [3] * 5
    # Greedy, so the chosen token is the most likely one.
    assert choice.logprobs.token_logprobs == [max(top.values()) for top in choice.logprobs.top_logprobs]
    parts = list(client.completions.create(model="tiny", prompt=TEXT, max_tokens=5, temperature=0, stream=True))
    assert "".join(part.choices[0].text for part in parts) == choice.text
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)


def test_the_client_chats(client):
    asked = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.refusal, choice.finish_reason) == ("assistant", None, "length")
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == choice.message.content
    *parts, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].delta.content for part in parts) == choice.message.content
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all("usage" in part.model_fields_set and part.usage is None for part in parts)


def test_required_keys_are_there_when_they_are_null(url):
    _, content = ask(url, "/v1/completions", {"prompt": TEXT})
    assert {"index", "text", "logprobs", "finish_reason"} == json.loads(content)["choices"][0].keys()
    _, content = ask(url, "/v1/chat/completions", {"messages": MESSAGES})
    (choice,) = json.loads(content)["choices"]
    assert {"index", "message", "logprobs", "finish_reason"} == choice.keys()
    assert {"role", "content", "refusal"} == choice["message"].keys()
    for path, body, _ in KINDS:
        _, content = ask(url, path, body | {"stream": True})
        events = [json.loads(line[6:]) for line in content.split("\n\n") if line.startswith("data: {")]
        assert events
        assert all({"logprobs", "finish_reason"} < event["choices"][0].keys() for event in events)


def test_the_client_sees_errors_as_its_own(client):
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="top_k"):
        client.completions.create(model="tiny", prompt="x", extra_body={"top_k": 1})
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert client.models.retrieve("tiny@8").id == "tiny@8"
    assert client.models.retrieve("tiny").id in {model.id for model in client.models.list()}


def test_several_answers_to_each_prompt(client, site):
    asked = {"model": "tiny", "prompt": ["The river", "import"], "max_tokens": 6, "seed": 7}
    several = client.completions.create(**asked, n=3)
    assert [choice.index for choice in several.choices] == list(range(6))
    # Each answer is another draw, and the same ones come again.
    assert len({choice.text for choice in several.choices[:3]}) > 1
    assert [choice.text for choice in several.choices] == [choice.text for choice in client.completions.create(**asked, n=3).choices]
    # A prompt counts once.
    assert several.usage.prompt_tokens == sum(len(site.tokenizer.encode(prompt)) for prompt in asked["prompt"])
    assert several.usage.completion_tokens == 36
    parts = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3, n=2, stream=True)
    assert {part.choices[0].index for part in parts} == {0, 1}
    assert idle(site)


@pytest.fixture(scope="module")
def model(elastic):
    return load(elastic, dtype=torch.float32)


@pytest.mark.parametrize("length", [5, 3 * LIMITS.tokens])
def test_echo_gives_the_log_probabilities_of_the_prompt(client, site, model, length):
    """As the model gives them, however many steps the prompt takes, and whether it was there before."""
    prompt = torch.randint(5, 4000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for most in (0, 1, 1):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=most, temperature=0, echo=True, logprobs=2)
        (choice,) = answer.choices
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == length + most == len(logprobs.token_logprobs)
        assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
        with torch.inference_mode():
            scores = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = scores[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs.token_logprobs[1:length]), expected, atol=1e-4, rtol=0)
        assert [max(top.values()) for top in logprobs.top_logprobs[1:length]] == pytest.approx(scores[:-1].amax(1).tolist(), abs=1e-4)
        assert choice.text == "".join(logprobs.tokens)
        assert (choice.finish_reason, answer.usage.completion_tokens) == ("length", most)
    assert idle(site)


def test_an_echo_with_the_names_of_special_tokens(client, site):
    prompt = f"The{site.tokenizer.eos_token} river"
    (choice,) = client.completions.create(model="tiny", prompt=prompt, max_tokens=2, echo=True, logprobs=0, temperature=0).choices
    assert choice.text.startswith(prompt)
    pairs = list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
    assert all(choice.text[offset:].startswith(token) for token, offset in pairs), pairs


def test_echo_without_log_probabilities_and_in_a_stream(client, site):
    whole = client.completions.create(model="tiny", prompt=TEXT, max_tokens=4, temperature=0, echo=True)
    assert whole.choices[0].text.startswith(TEXT)
    parts = list(client.completions.create(model="tiny", prompt=TEXT, max_tokens=4, temperature=0, echo=True, stream=True, logprobs=0))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    tokens = [token for part in parts for token in part.choices[0].logprobs.tokens]
    assert "".join(tokens) == whole.choices[0].text
    (without,) = client.completions.create(model="tiny", prompt=TEXT, max_tokens=4, temperature=0).choices
    assert TEXT + without.text == whole.choices[0].text
    # The prompt is not searched.
    (stopped,) = client.completions.create(model="tiny", prompt=TEXT, max_tokens=4, temperature=0, echo=True, stop="river").choices
    assert stopped.text.startswith(TEXT)
    assert idle(site)


def test_turns_of_tools_reach_the_chat_template(url, site, monkeypatch):
    monkeypatch.setattr(
        site.tokenizer,
        "chat_template",
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}"
        "{{ m.tool_call_id }};{% endfor %}",
    )
    seen = []
    apply = site.tokenizer.apply_chat_template
    monkeypatch.setattr(site.tokenizer, "apply_chat_template", lambda *given, **named: seen.append(given[0]) or apply(*given, **named))
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    messages = [
        {"role": "user", "content": "Weather in Ulm?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "passed on"},
        {"role": "tool", "content": [{"type": "text", "text": "4 "}, {"type": "text", "text": "degrees"}], "tool_call_id": "c1"},
    ]
    status, content = ask(url, "/v1/chat/completions", {"messages": messages})
    assert status == 200, content
    text = "user:Weather in Ulm?;assistant:weather(Ulm);tool:4 degreesc1;"
    assert json.loads(content)["usage"]["prompt_tokens"] == len(site.tokenizer.encode(text))
    assert seen[0][1]["reasoning"] == "passed on"


def test_browsers_of_a_page_may_ask(url):
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    status, _, answered = fetch(f"{url}/v1/completions", None, headers, raw=True, method="OPTIONS")
    assert (status, answered["access-control-allow-origin"]) == (200, "https://page.example")
    other = fetch(f"{url}/v1/models", None, {"Origin": "https://other.example"})[2]
    assert other["access-control-allow-origin"] is None
    # Errors, too.
    for body in ({"model": "tiny"}, b" " * (7 << 20)):
        _, _, answered = fetch(f"{url}/v1/completions", body, {"Origin": "https://page.example"})
        assert answered["access-control-allow-origin"] == "https://page.example"


def test_health_under_its_short_name(url):
    assert fetch(f"{url}/health")[:2] == (200, {"status": "live"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "place", [(Answer, "add"), (application, "completion_logprobs"), (application._Answers, "prism")], ids=lambda place: place[1]
)
def test_a_fault_while_an_answer_is_made_ends_the_request(url, site, monkeypatch, caplog, stream, place):
    """Wherever it is: the client is told, it is logged and counted, and nothing stays in the engine."""

    def broken(*_):
        raise ZeroDivisionError

    def ends():
        return {end: site.metrics.finished.labels(end)._value.get() for end in ("error", "length", "cancelled", "stop")}

    before = ends()
    monkeypatch.setattr(*place, broken)
    with caplog.at_level(logging.ERROR, "prism_refactor"):
        asked = {"prompt": [TEXT, TEXT], "stream": stream, "max_tokens": 200, "ignore_eos": True, "logprobs": 0}
        status, content = ask(url, "/v1/completions", asked)
    assert idle(site)
    if stream:
        *_, error, end = (line for line in content.split("\n\n") if line)
        assert (status, end) == (200, "data: [DONE]")
        content = error.removeprefix("data: ")
    assert stream or status == 500
    assert json.loads(content)["error"] == {
        "message": "unexpected ZeroDivisionError; the server's log says more",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert ends() == before | {"error": before["error"] + 2}
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


def test_calls_that_are_no_json_are_text_for_the_template(url, site, monkeypatch):
    monkeypatch.setattr(site.tokenizer, "chat_template", "{% for m in messages %}{{ (m.tool_calls or [1])[0] }}{% endfor %}")
    for arguments in ("not json", "[" * 100_000, ""):
        call = {"id": "c1", "function": {"name": "f", "arguments": arguments}}
        status, content = ask(url, "/v1/chat/completions", {"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [call]}]})
        # Too long for the model, at most.
        assert status in (200, 400), content


@pytest.mark.parametrize(
    ("body", "headers", "says"),
    [
        (b"[" * 100_000, {}, "no JSON"),
        (b'{"model": "tiny", "prompt": "x",}', {}, "the body is no JSON at character"),
        (b'{"model": "tiny", "prompt": "caf\xe9"}', {}, "no JSON in UTF-8"),
        (gzip.compress(b'{"model": "tiny", "prompt": "x"}', mtime=0), {"Content-Encoding": "gzip"}, "a body in gzip is not taken"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(url, body, headers, says):
    status, answer, _ = fetch(f"{url}/v1/completions", body, headers)
    assert (status, says in answer["error"]["message"], answer["error"]["param"]) == (400, True, None), answer


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": None, "tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}]},
        {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "function_call": None, "reasoning": "y"},
    ],
)
def test_messages_that_clients_send_back_are_taken(url, message):
    status, content = ask(url, "/v1/chat/completions", {"messages": [*MESSAGES, message, *MESSAGES]})
    assert status == 200, content


def test_logits_of_a_prompt_are_computed_once(site, monkeypatch):
    """Those of its own tokens, in the steps that run them; not of what runs beside it, nor while it decodes."""
    rows = []
    original = site.engine.after_step
    monkeypatch.setattr(site.engine, "after_step", lambda *given: rows.append(len(given[1])) or original(*given))
    noted = []
    note = site.engine.note_prompt
    monkeypatch.setattr(site.engine, "note_prompt", lambda *given: noted.append(len(given[2])) or note(*given))
    prompt = list(range(5, 5 + 3 * LIMITS.tokens))
    requests = [
        GenerationRequest(prompt, 8, 20, logprobs=0, prompt_logprobs=True, stop_at_eos=False),
        GenerationRequest(prompt[::-1], 4, 20, stop_at_eos=False),
    ]
    chunks = site.engine.generate(requests)
    assert [len(chunk.prompt_logprobs) for chunk in chunks] == [len(prompt) - 1, 0]
    assert sum(noted) == len(prompt)
    assert max(rows) <= LIMITS.requests


@pytest.mark.long
def test_lm_eval_scores_the_server_as_it_scores_the_checkpoint(url, elastic, tmp_path):
    documents = [
        {"question": "The Python standard", "choices": [" library", " zebra", " library of Congress"], "answer": 0},
        {"question": "import os\nimport", "choices": [" sys", " Debian"], "answer": 0},
        {"question": "The river runs through", "choices": [" the old town", " \u6cb3"], "answer": 0},
    ]
    generate = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    write_task(tmp_path, "prism_choice", documents, CHOICE)
    write_task(tmp_path, "prism_generate", documents, generate)
    ways = {
        "hf": f"pretrained={elastic},trust_remote_code=True,dtype=float32",
        "local-completions": f"model=tiny,base_url={url}/v1/completions,tokenizer={elastic},num_concurrent=2,max_retries=1",
    }
    found = {}
    for way, arguments in ways.items():
        tasks = ["--tasks", "prism_choice,prism_generate", "--include_path", tmp_path, "--device", "cpu", "--batch_size", "2"]
        output = ["--output_path", tmp_path / way, "--log_samples"]
        subprocess.run(
            [Path(sys.executable).parent / "lm_eval", "--model", way, "--model_args", arguments, *tasks, *output],
            check=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OPENAI_API_KEY": "none"},
        )
        files = sorted((tmp_path / way).rglob("samples_*.jsonl"))
        found[way] = [[sample["filtered_resps"] for sample in map(json.loads, file.read_text().splitlines())] for file in files]
    (choices, texts), (served_choices, served_texts) = found.values()
    assert texts == served_texts
    scores = [[(float(score), greedy) for score, greedy in responses] for responses in choices]
    for expected, responses in zip(scores, served_choices, strict=True):
        assert [greedy for _, greedy in responses] == [greedy for _, greedy in expected]
        assert [float(score) for score, _ in responses] == pytest.approx([score for score, _ in expected], abs=1e-4)
