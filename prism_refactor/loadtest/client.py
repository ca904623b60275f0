"""Replays a trace against a server."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from prism_refactor.errors import InputError, one_line
from prism_refactor.events import Events
from prism_refactor.formats import Arrival
from prism_refactor.loadtest.workload import Served

_MODELS, _COMPLETIONS = "/v1/models", "/v1/completions"


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        url: without /v1.
        model: name to ask for.
        full_k: sub-experts per token at which the model is the original; None: the server does not say, and takes no floors.
        headers: of every request.
        api: how floors are sent: 'prism', as prism-serve takes them, or 'vllm', as vLLM with the plugin prism-vllm does.
    """

    url: str
    model: str
    full_k: int | None
    headers: dict[str, str]
    api: str = "prism"


async def discover(url: str, model: str | None, api_key: str | None, api: str = "prism") -> Target:
    """The first model of a server, or the one of a name; see `Target` for `api`.

    Raises:
        InputError: the server does not answer as OpenAI's do, or has no such model.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with aiohttp.ClientSession(headers=headers) as session, session.get(url + _MODELS) as response:
            if response.status != 200:
                raise InputError(f"{url}{_MODELS}: answers {response.status}: {(await response.text())[:200]}")
            models = {str(entry["id"]): entry.get("full_k") for entry in (await response.json())["data"]}
    except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{url}{_MODELS}: cannot be read: {one_line(error)}") from None
    name = next(iter(models), None) if model is None else model
    if name not in models:
        raise InputError(f"{url}: has no model {model!r}, but {', '.join(models) or 'none'}")
    return Target(url, name, models[name], headers, api)


async def run_load(
    target: Target, trace: Sequence[Arrival], seed: int, timeout: float, events: Events | None = None
) -> tuple[list[Served], float]:
    """Send every request of a trace when it is due, read its stream to the end.

    Prompts are token ids that are made up from the seed, so that their lengths are exactly those of the trace, and answers go on to
    max_tokens.

    Args:
        target: the server.
        trace: requests, by time.
        seed: of the prompts.
        timeout: seconds after which an answer counts as lost.
        events: told of the requests that are answered.

    Returns:
        (how each request was served, in the order of the trace; seconds from the first request to the last answer).
    """
    events, dice = events or Events(), random.Random(seed)
    # Ids that any vocabulary has and that are rarely special.
    prompts = [[dice.randrange(100, 1000) for _ in range(arrival.prompt_tokens)] for arrival in trace]
    done = 0
    start = time.monotonic()

    async def one(session: aiohttp.ClientSession, arrival: Arrival, prompt: list[int]) -> Served:
        nonlocal done
        await asyncio.sleep(max(start + arrival.at - time.monotonic(), 0))
        served = await _ask(session, target, arrival, prompt)
        done += 1
        events.progress("requests answered", done, len(trace))
        return served

    connector = aiohttp.TCPConnector(limit=0)
    limits = aiohttp.ClientTimeout(total=timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=limits, headers=target.headers) as session:
        served = await asyncio.gather(*(one(session, *pair) for pair in zip(trace, prompts, strict=True)))
    return served, time.monotonic() - start - trace[0].at


async def _ask(session: aiohttp.ClientSession, target: Target, arrival: Arrival, prompt: list[int]) -> Served:
    body: dict[str, object] = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": arrival.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    if target.api == "vllm":
        if arrival.k is not None:
            body["vllm_xargs"] = {"prism_k": arrival.k}
    elif target.full_k is not None:
        given = {"k": arrival.k, "priority": arrival.priority or None, "deadline": arrival.deadline}
        body["prism"] = {name: value for name, value in given.items() if value is not None}
    floor = arrival.k or target.full_k or 0
    first = None
    tokens, k = 0, float(floor)
    start = time.monotonic()
    error = "the stream ended early"
    try:
        async with session.post(target.url + _COMPLETIONS, json=body) as response:
            if response.status != 200:
                return Served(floor, k, 0, None, None, f"status {response.status}")
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                first = time.monotonic() - start if first is None else first
                if line.strip() == b"data: [DONE]":
                    return Served(floor, k, tokens, first, time.monotonic() - start)
                event = json.loads(line[6:])
                if "error" in event:
                    error = event["error"]["message"]
                    break
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                k = (event.get("prism") or {}).get("served_k", k)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as failure:
        error = one_line(failure)
    return Served(floor, k, tokens, first, None, error)
