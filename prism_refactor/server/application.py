"""An OpenAI-compatible server of one refactored model, where every request has its own quality floor."""

import asyncio
import hmac
import json
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerFast

from prism_refactor.errors import UsageError, one_line
from prism_refactor.server.answers import CONTEXT, Answer, chat_logprobs, completion_logprobs
from prism_refactor.server.metrics import Metrics
from prism_refactor.server.protocol import (
    KINDS,
    MOST_CHOICES,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Failure,
    Generation,
    Health,
    Model,
    Models,
    Prism,
    Served,
    Usage,
)
from prism_refactor.server.quality import QualityCurve
from prism_refactor.serving.engine import Chunk, Engine, GenerationRequest, Logprob, Rejected

MOST_BYTES = 4 << 20
# A character of one byte may be written as six.
_ESCAPED = 6
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger(__name__)
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": description}
    for status, description in (
        (400, "The request cannot be served; the message says why."),
        (401, "The API key is missing or wrong."),
        (404, "There is no such model."),
        (413, "The body is too large."),
        (429, "The queue is full, or the deadline cannot be met; Retry-After says when to try again."),
        (500, "The engine failed."),
        (503, "The server is stopping."),
    )
}
# Its events are those of the same answer in JSON; OpenAPI 3.1 has no way to say so.
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}
# What a model's name may end in: name@12, name@25%.
_FLOOR = re.compile(r"([0-9]{1,9})|([0-9]{1,3}(?:\.[0-9]{1,3})?)%")
_ERROR_KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


@dataclass
class ServerState:
    """What a server serves.

    Attributes:
        name: of the model.
        engine: runs it; started.
        tokenizer: of the model.
        metrics: counters; the engine's `on_step` should be theirs.
        curve: of quality against k; None: requests cannot ask for a quality.
        api_key: that requests must show; None: none.
        most_bytes: of the text of a request.
        origins: whose pages browsers let ask this server; '*': all.
    """

    name: str
    engine: Engine
    tokenizer: PreTrainedTokenizerFast
    metrics: Metrics
    curve: QualityCurve | None = None
    api_key: str | None = None
    most_bytes: int = MOST_BYTES
    origins: Sequence[str] = ()
    started: int = field(default_factory=lambda: int(time.time()))
    stopping: bool = False

    def model(self, name: str) -> Model:
        """The model under a name that asks for a floor."""
        k, budget = self.floor(name, Prism())
        quality = self.curve.quality_of(k) if self.curve and budget is None else None
        return Model(id=name, created=self.started, k=k, budget=budget, full_k=self.engine.full_k, quality=quality)

    def names(self) -> list[str]:
        """The model's name, and it with floors: those k whose quality was measured, or every quarter of full k; quarters as budgets."""
        full_k = self.engine.full_k
        ks = list(self.curve.measured) if self.curve else sorted({max(full_k * part // 4, 1) for part in (1, 2, 3, 4)})
        budgets = ["25%", "50%", "75%"] if self.engine.has_budgets else []
        return [self.name, *(f"{self.name}@{floor}" for floor in [*ks, *budgets])]

    def floor(self, model: str, wanted: Prism) -> tuple[int, float | None]:
        """See `Engine.floor`, of what is asked for by a `prism` object or by the model's name.

        Several floors of a kind are one: the highest.
        """
        name, _, suffix = model.partition("@")
        if name != self.name:
            raise HTTPException(404, f"there is no model {model!r}; this server has {self.name!r}")
        named = _FLOOR.fullmatch(suffix)
        if suffix and named is None:
            full_k = self.engine.full_k
            raise HTTPException(404, f"there is no model {model!r}; write {self.name}@k with k from 1 to {full_k}, or {self.name}@25%")
        number, percent = named.groups() if named else (None, None)
        ks = [k for k in (wanted.k, int(number) if number else None) if k is not None]
        budgets = [budget for budget in (wanted.budget, float(percent) / 100 if percent else None) if budget is not None]
        if wanted.quality is not None:
            if self.curve is None:
                raise UsageError("quality: the model's perplexity was not measured; run prism-eval --save, or ask for a k")
            ks.append(self.curve.k_for(wanted.quality))
        if ks and budgets:
            raise UsageError("a k or a quality, and a budget: ask for one of them")
        return self.engine.floor(max(ks, default=None), max(budgets, default=None))


@dataclass
class _Prompt:
    """A prompt of a request.

    Attributes:
        tokens: its token ids.
        text: what the answer begins with; None where it does not begin with the prompt.
    """

    tokens: list[int]
    text: str | None = None


@dataclass
class _PendingPrompt:
    """One answer to a prompt, in the engine's words, and where its news arrive."""

    request: GenerationRequest
    answer: Answer
    prompt: _Prompt
    # The least k, as schedulers see it.
    floor: int
    # Only what the prompt is, and nothing after it.
    empty: bool
    end: str = "cancelled"
    news: asyncio.Queue[Chunk] = field(default_factory=asyncio.Queue)
    start: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Delta:
    """Some text of one answer.

    Attributes:
        index: of the answer.
        text: that is sure now.
        tokens: new ones; their text may be sure only later.
        logprobs: of each, where asked for; None for the first token of a text.
        start: tokens of the prompt and the answer before them.
        offset: characters before them.
        finish: why the answer ends, where it does.
        served_k: see `Chunk`.
    """

    index: int
    text: str
    tokens: list[int]
    logprobs: Sequence[Logprob | None]
    start: int
    offset: int
    finish: str | None
    served_k: float


class EngineFailed(Exception):
    """The engine ended a request that it should have served."""


def _prepare(
    state: ServerState, body: Generation, prompts: Sequence[_Prompt], tokens: int | None, logprobs: int | None
) -> list[_PendingPrompt]:
    """What the engine is asked, `n` answers to each prompt; `tokens`: None for as many as fit."""
    floor, budget = state.floor(body.model, body.prism)
    vocabulary = state.engine.model.config.get_text_config().vocab_size
    most = min(state.engine.context, state.engine.kv_tokens)
    if len(prompts) * body.n > MOST_CHOICES:
        raise UsageError(f"n: {len(prompts)} prompts and {body.n} answers to each are more than {MOST_CHOICES}")
    prepared = []
    for number, prompt in enumerate(prompt for prompt in prompts for _ in range(body.n)):
        given = prompt.tokens
        if not given or max(given) >= vocabulary:
            raise UsageError(f"the prompt has a token {max(given)}; there are {vocabulary}" if given else "the prompt has no tokens")
        if len(given) >= most:
            raise UsageError(f"the prompt has {len(given)} tokens; with one to generate there may be {most}")
        request = GenerationRequest(
            given,
            floor if budget is None else None,
            most - len(given) if tokens is None else max(tokens, 1),
            temperature=body.temperature,
            top_p=body.top_p,
            # Answers of one request are different draws.
            seed=None if body.seed is None else (body.seed + number) % 2**63,
            logprobs=logprobs,
            prompt_logprobs=prompt.text is not None and logprobs is not None,
            priority=body.prism.priority,
            deadline=body.prism.deadline,
            stop_at_eos=not body.ignore_eos,
            id=uuid.uuid4().hex,
            budget=budget,
        )
        prepared.append(_PendingPrompt(request, Answer(state.tokenizer, body.stops, given), prompt, floor, empty=tokens == 0))
    return prepared


def _submit(state: ServerState, prepared: Sequence[_PendingPrompt]) -> None:
    """Queue all prompts of a request, or none."""
    if state.stopping:
        raise HTTPException(503, "the server is stopping")
    loop = asyncio.get_running_loop()

    def deliver_to(news: asyncio.Queue[Chunk]) -> Callable[[Chunk], None]:
        def deliver(chunk: Chunk) -> None:
            loop.call_soon_threadsafe(news.put_nowait, chunk)

        return deliver

    for number, item in enumerate(prepared):
        try:
            state.engine.submit(item.request, deliver_to(item.news))
        except Exception as error:
            for earlier in prepared[:number]:
                state.engine.cancel(earlier.request.id)
            state.metrics.finished.labels("refused").inc()
            if isinstance(error, Rejected) and state.stopping:
                raise HTTPException(503, str(error)) from None
            raise


async def _parts(state: ServerState, prepared: Sequence[_PendingPrompt]) -> AsyncIterator[_Delta]:
    """The answers of all prompts as they grow. Whatever is not done when the reader leaves is cancelled."""
    arrived: asyncio.Queue[_Delta | Exception] = asyncio.Queue()
    tasks = [asyncio.create_task(_follow(state, index, item, arrived.put_nowait)) for index, item in enumerate(prepared)]
    try:
        left = len(prepared)
        while left:
            part = await arrived.get()
            if isinstance(part, Exception):
                raise part
            left -= part.finish is not None
            yield part
    finally:
        for task in tasks:
            task.cancel()


async def _follow(state: ServerState, index: int, item: _PendingPrompt, tell: Callable[[_Delta | Exception], None]) -> None:
    """Tell the parts of one answer, or what went wrong; cancelled, cancel it in the engine too."""
    first = None
    echoed = item.prompt.text
    offset = len(echoed or "")
    try:
        while True:
            chunk = await item.news.get()
            now = time.monotonic() - item.start
            if chunk.finish in ("error", "deadline"):
                item.end = chunk.finish
                message = chunk.error or "the engine failed"
                tell(EngineFailed(message) if chunk.finish == "error" else Rejected(message, 1.0))
                return
            if first is None and (chunk.tokens or chunk.finish):
                first = now
                if echoed is not None:
                    logprobs = [None, *chunk.prompt_logprobs] if item.request.prompt_logprobs else []
                    tell(_Delta(index, echoed, item.prompt.tokens, logprobs, 0, 0, None, chunk.served_k))
            known, characters = len(item.answer.tokens), item.answer.characters
            text = item.answer.add([] if item.empty else chunk.tokens, chunk.finish is not None)
            finish = "stop" if item.answer.stopped else "length" if item.empty and chunk.finish else chunk.finish
            tokens, start = item.answer.tokens[known:], len(item.prompt.tokens) + known
            tell(_Delta(index, text, tokens, chunk.logprobs[: len(tokens)], start, offset + characters, finish, chunk.served_k))
            if finish:
                item.end = finish
                state.metrics.served(item.floor, first or now, now, len(item.answer.tokens))
                return
    except Exception as error:
        item.end = "error"
        tell(error)
    finally:
        # A stop sequence ends it before the engine does.
        state.engine.cancel(item.request.id)


def _usage(prepared: Sequence[_PendingPrompt]) -> Usage:
    # A prompt counts once, however many answers it has.
    prompt = sum(map(len, {id(item.prompt): item.prompt.tokens for item in prepared}.values()))
    generated = sum(len(item.answer.tokens) for item in prepared)
    return Usage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)


class _Answers:
    """How the answers of one request become OpenAI's objects.

    Args:
        state: of the server.
        body: the request.
        prepared: its prompts.
    """

    prefix: ClassVar[str]
    streamed: ClassVar[type[Completion] | type[ChatChunk]]
    joined: ClassVar[type[Completion] | type[ChatCompletion]]

    def __init__(self, state: ServerState, body: Generation, prepared: Sequence[_PendingPrompt]):
        self.state, self.prepared = state, prepared
        self.include_usage = body.stream_options.include_usage
        self.head: dict[str, Any] = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        self._served = [float(item.floor) for item in prepared]
        self._begun: set[int] = set()

    def piece(self, delta: _Delta, first: bool) -> Any:
        """A choice of a stream's event."""
        raise NotImplementedError

    def choice(self, deltas: Sequence[_Delta]) -> Any:
        """A choice of a whole answer."""
        raise NotImplementedError

    def prism(self) -> Served:
        """How the request was run, so far."""
        weights = [len(item.request.prompt) + len(item.answer.tokens) for item in self.prepared]
        mean = sum(k * weight for k, weight in zip(self._served, weights, strict=True)) / sum(weights)
        first = self.prepared[0]
        return Served(k=first.floor, budget=first.request.budget, served_k=mean, full_k=self.state.engine.full_k)

    def event(self, delta: _Delta) -> dict[str, Any] | None:
        """Some text, as an event of a stream; None where there is nothing to tell: half a character, or text that is held back."""
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        self._served[delta.index] = delta.served_k
        if not (delta.text or delta.finish or delta.logprobs or first):
            return None
        event = _without_nulls(self.streamed(**self.head, choices=[self.piece(delta, first)], prism=self.prism() if delta.finish else None))
        return event | {"usage": None} if self.include_usage else event

    def before(self, delta: _Delta) -> list[int]:
        """The last token ids before those of a part, as many as decide how these are read."""
        item = self.prepared[delta.index]
        known = delta.start - len(item.prompt.tokens)
        if known < 0:
            return item.prompt.tokens[: delta.start][-CONTEXT:]
        return [*item.prompt.tokens[-CONTEXT:], *item.answer.tokens[max(known - CONTEXT, 0) : known]][-CONTEXT:]

    def ended(self, failed: bool) -> None:
        """Count the answers by how they ended; `failed`: the request as a whole did."""
        for item in self.prepared:
            self.state.metrics.finished.labels("error" if failed else item.end).inc()

    def usage_event(self) -> dict[str, Any]:
        """The last event of a stream that asked for its usage."""
        return _without_nulls(self.streamed(**self.head, choices=[], usage=_usage(self.prepared), prism=self.prism()))

    def whole(self, deltas: Sequence[_Delta]) -> dict[str, Any]:
        """All text, as one answer."""
        own = [[delta for delta in deltas if delta.index == index] for index in range(len(self.prepared))]
        self._served = [parts[-1].served_k for parts in own]
        return _without_nulls(
            self.joined(**self.head, choices=[self.choice(parts) for parts in own], usage=_usage(self.prepared), prism=self.prism())
        )


def _without_nulls(answer: BaseModel) -> dict[str, Any]:
    """An answer as JSON values. OpenAI's choices have keys that may be null; what is optional beside them is left out."""
    return {name: value for name, value in answer.model_dump().items() if value is not None}


def _joined(deltas: Sequence[_Delta]) -> tuple[list[int], list[Logprob | None]]:
    """The tokens of parts of an answer, and what is known of each."""
    return [token for delta in deltas for token in delta.tokens], [item for delta in deltas for item in delta.logprobs]


class _CompletionAnswers(_Answers):
    """Of /v1/completions."""

    prefix, streamed, joined = "cmpl", Completion, Completion

    def piece(self, delta: _Delta, first: bool) -> CompletionChoice:
        return self.choice([delta])

    def choice(self, deltas: Sequence[_Delta]) -> CompletionChoice:
        first, last, (tokens, logprobs) = deltas[0], deltas[-1], _joined(deltas)
        text, found = "".join(delta.text for delta in deltas), None
        if logprobs:
            context, ended = self.before(first), last.finish is not None
            found = completion_logprobs(self.state.tokenizer, tokens, logprobs, context, first.offset, ended, text)
        return CompletionChoice(index=last.index, text=text, logprobs=found, finish_reason=last.finish)


class _ChatAnswers(_Answers):
    """Of /v1/chat/completions."""

    prefix, streamed, joined = "chatcmpl", ChatChunk, ChatCompletion

    def _logprobs(self, deltas: Sequence[_Delta]) -> dict[str, Any] | None:
        tokens, logprobs = _joined(deltas)
        known = [item for item in logprobs if item is not None]
        return chat_logprobs(self.state.tokenizer, tokens, known, self.before(deltas[0])) if known else None

    def piece(self, delta: _Delta, first: bool) -> ChatDelta:
        message = {"role": "assistant", "content": delta.text} if first else {"content": delta.text}
        return ChatDelta(index=delta.index, delta=message, logprobs=self._logprobs([delta]), finish_reason=delta.finish)

    def choice(self, deltas: Sequence[_Delta]) -> ChatChoice:
        message, last = ChatMessage(content="".join(delta.text for delta in deltas)), deltas[-1]
        return ChatChoice(index=last.index, message=message, logprobs=self._logprobs(deltas), finish_reason=last.finish)


async def _events(answers: _Answers, parts: AsyncIterator[_Delta]) -> AsyncIterator[str]:
    failed = False
    try:
        async for part in parts:
            event = answers.event(part)
            if event is not None:
                yield _sent(event)
        if answers.include_usage:
            yield _sent(answers.usage_event())
    except Exception as error:
        failed = not isinstance(error, Rejected)
        status, message = _what_failed(error)
        if status == 500 and not answers.state.stopping:
            _log.error("a stream failed", exc_info=error)
        yield _sent(_failure(status, message))
    finally:
        await parts.aclose()  # type: ignore[attr-defined]
        answers.ended(failed)
    yield "data: [DONE]\n\n"


def _sent(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


def _what_failed(error: Exception) -> tuple[int, str]:
    """HTTP's status and what is told of an error in the middle of an answer."""
    if isinstance(error, Rejected):
        return 429, str(error)
    return 500, str(error) if isinstance(error, EngineFailed) else _unexpected(error)


def _unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__}; the server's log says more"


async def _answer(http: Request, state: ServerState, body: Generation, prepared: list[_PendingPrompt], answers: _Answers) -> Response:
    http.state.k = prepared[0].floor
    http.state.tokens = lambda: sum(len(item.answer.tokens) for item in prepared)
    _submit(state, prepared)
    parts = _parts(state, prepared)
    if body.stream:
        return StreamingResponse(_events(answers, parts), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def collect() -> list[_Delta]:
        return [part async for part in parts]

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.create_task(collect()), asyncio.create_task(gone())
    failed = False
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            # Nobody reads this.
            return Response(status_code=499)
        return JSONResponse(answers.whole(work.result()))
    except Exception as error:
        failed = not isinstance(error, Rejected)
        raise
    finally:
        for task in (work, left):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
        answers.ended(failed)


def _failure(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = _ERROR_KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _respond(status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_failure(status, message, param), status, headers)


class _AccessLog:
    """Gives every request an id, answers with it, and logs the request when its response has been sent."""

    def __init__(self, app: ASGIApp, most_bytes: int):
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        start, status, left = time.monotonic(), 0, True

        async def read() -> Message:
            nonlocal left
            message = await receive()
            left = bool(message.get("more_body"))
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name.encode())]}
            # FastAPI's own answer to a body that is too large is no JSON.
            if status != 413:
                await send(message)

        try:
            await self.app(scope, read, noted)
            if status == 413:
                dropped = 0
                # To close a connection that is still being written to would lose the answer.
                while left and dropped < 16 * self.most_bytes:
                    dropped += len((await read()).get("body", b""))
                headers = {"Connection": "close", "X-Request-Id": name}
                await _respond(413, _too_large(self.most_bytes), headers=headers)(scope, receive, send)
        except Exception:
            # What was answered has been logged, and is raised again for whoever runs the application.
            if not status:
                raise
        finally:
            known = scope.get("state", {})
            k, tokens = known.get("k"), known["tokens"]() if "tokens" in known else None
            fields = {
                "method": scope["method"],
                "path": scope["raw_path"].decode("latin-1"),
                "status": status or 500,
                "k": k,
                "tokens": tokens,
            }
            fields |= {"ms": round(1e3 * (time.monotonic() - start), 1), "id": name}
            text = "%(method)s %(path)s %(status)s" + (" k=%(k)s tokens=%(tokens)s" if k else "") + " %(ms)s ms %(id)s"
            _log.info(text, fields, extra={"fields": fields})


def _too_large(most: int) -> str:
    return f"the text of a request may have {most} bytes; prism-serve has --max-body-bytes"


def _key_check(api_key: str) -> Callable[..., Awaitable[None]]:
    """A dependency that refuses requests without the API key."""

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> None:
        key = given.credentials if given else ""
        if not hmac.compare_digest(key.encode("latin-1"), api_key.encode()):
            raise HTTPException(401, "give the API key as Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})

    return check


def create_app(state: ServerState, on_stopped: Callable[[], None] = lambda: None) -> ASGIApp:
    """The server's application.

    Args:
        state: what it serves.
        on_stopped: called when the last connection is closed.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        on_stopped()

    app = FastAPI(
        title="prism-serve", version="1", lifespan=lifespan, docs_url=None, redoc_url=None, max_body_size=_ESCAPED * state.most_bytes
    )
    for_clients = [] if state.api_key is None else [Depends(_key_check(state.api_key))]
    _handle_errors(app, state)
    _add_health(app, state)

    @app.get("/v1/models", dependencies=for_clients, responses={401: _FAILURES[401]})
    async def models() -> Models:
        """The model, and the names that ask for a floor."""
        return Models(data=[state.model(name) for name in state.names()])

    @app.get("/v1/models/{name:path}", dependencies=for_clients, responses={400: _FAILURES[400], 401: _FAILURES[401], 404: _FAILURES[404]})
    async def model(name: str) -> Model:
        """The model under one of its names."""
        return state.model(name)

    @app.post("/v1/completions", dependencies=for_clients, response_model=Completion, responses={200: _STREAM, **_FAILURES})
    async def completions(http: Request, body: CompletionRequest) -> Response:
        """Text that goes on from a prompt."""
        given: list[Any] = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else list(body.prompt)
        _check_size(state, [prompt for prompt in given if isinstance(prompt, str)])
        prompts = [await asyncio.to_thread(_read_prompt, state, prompt, body.echo) for prompt in given]
        prepared = _prepare(state, body, prompts, body.max_tokens, body.logprobs)
        return await _answer(http, state, body, prepared, _CompletionAnswers(state, body, prepared))

    @app.post("/v1/chat/completions", dependencies=for_clients, response_model=ChatCompletion, responses={200: _STREAM, **_FAILURES})
    async def chat(http: Request, body: ChatRequest) -> Response:
        """The next message of a chat."""
        if not state.tokenizer.chat_template:
            raise UsageError("the tokenizer has no chat template; use /v1/completions, or start prism-serve with --chat-template")
        messages = [message.for_template() for message in body.messages]
        _check_size(state, [message["content"] for message in messages])
        try:
            prompt: Any = await asyncio.to_thread(
                state.tokenizer.apply_chat_template, messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:
            raise UsageError(f"the chat template refuses these messages: {one_line(error)}") from None
        if body.top_logprobs is not None and not body.logprobs:
            raise UsageError("top_logprobs: needs logprobs true")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        tokens = body.max_completion_tokens or body.max_tokens
        prepared = _prepare(state, body, [_Prompt(list(prompt))], tokens, logprobs)
        return await _answer(http, state, body, prepared, _ChatAnswers(state, body, prepared))

    # Outside of everything else: it also sees what FastAPI itself answers.
    logged = _AccessLog(app, state.most_bytes)
    if not state.origins:
        return logged
    # Pages may read errors, too.
    return CORSMiddleware(logged, allow_origins=state.origins, allow_methods=["*"], allow_headers=["*"])


def _check_size(state: ServerState, texts: Sequence[str]) -> None:
    """As a body is counted, but whichever way its characters are written."""
    if sum(len(text.encode()) for text in texts) > state.most_bytes:
        raise HTTPException(413, _too_large(state.most_bytes))


def _read_prompt(state: ServerState, given: str | list[int], echo: bool) -> _Prompt:
    tokens = state.tokenizer.encode(given) if isinstance(given, str) else given
    if not echo:
        return _Prompt(tokens)
    return _Prompt(tokens, given if isinstance(given, str) else str(state.tokenizer.decode(tokens, skip_special_tokens=True)))


def _handle_errors(app: FastAPI, state: ServerState) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if part not in KINDS)
        message = {
            "extra_forbidden": "is not known here; leave it out",
            "value_error": str(first.get("ctx", {}).get("error", "")),
        }.get(first["type"], first["msg"])
        if first["type"] == "json_invalid":
            # Its place is a number of characters.
            place, where = where, ""
            message = f"the body is no JSON at character {place}: {first.get('ctx', {}).get('error', first['msg'])}"
        if first["loc"] == ("body",) and "json" not in request.headers.get("content-type", ""):
            message = "the request needs a JSON body, and the header Content-Type: application/json"
        return _respond(400, f"{where}: {message}" if where else message, where or None)

    @app.exception_handler(UsageError)
    async def unusable(_: Request, error: UsageError) -> JSONResponse:
        return _respond(400, str(error))

    @app.exception_handler(Rejected)
    async def rejected(_: Request, error: Rejected) -> JSONResponse:
        return _respond(429, str(error), headers={"Retry-After": str(math.ceil(error.retry_after))})

    @app.exception_handler(EngineFailed)
    async def failed(_: Request, error: EngineFailed) -> JSONResponse:
        if not state.stopping:
            _log.error("a request failed", exc_info=error)
        return _respond(503 if state.stopping else 500, str(error))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        detail = str(error.detail)
        if error.status_code == 400:
            # Ours have 404 and above: FastAPI could not read the body.
            coding = request.headers.get("content-encoding", "identity")
            detail = "the body is no JSON in UTF-8" if coding == "identity" else f"a body in {coding} is not taken; send it as it is"
        return _respond(error.status_code, detail, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return _respond(500, _unexpected(error))


def _add_health(app: FastAPI, state: ServerState) -> None:
    @app.get("/health", include_in_schema=False)
    @app.get("/health/live", responses={503: {"model": Health, "description": "The engine's thread has died."}})
    async def live() -> Response:
        """Whether the process should go on."""
        alive = state.engine.alive or state.stopping
        return JSONResponse({"status": "live" if alive else "the engine has failed"}, 200 if alive else 503)

    @app.get("/health/ready", responses={503: {"model": Health, "description": "It takes no requests now."}})
    async def ready() -> Response:
        """Whether it takes requests."""
        if state.stopping or not state.engine.alive:
            return JSONResponse({"status": "stopping"}, 503)
        full = len(state.engine.waiting) >= state.engine.limits.waiting
        return JSONResponse({"status": "the queue is full" if full else "ready"}, 503 if full else 200)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters, in Prometheus' format."""
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class UvicornServer(uvicorn.Server):
    """The HTTP server of one application. It says that it is stopping as soon as it is asked to.

    Args:
        state: what it serves; its engine is stopped when the last connection is closed.
        drain_seconds: what running requests get once it is asked to stop.
    """

    def __init__(self, state: ServerState, drain_seconds: int):
        app = create_app(state, state.engine.stop)
        super().__init__(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=drain_seconds))
        self.state = state

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop on a signal."""
        self.state.stopping = True
        super().handle_exit(sig, frame)
