"""An OpenAI-compatible server of one refactored model, where every request has its own quality floor."""

import asyncio
import hmac
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerFast

from prism_refactor.errors import UsageError, one_line
from prism_refactor.serving import engine as engines
from prism_refactor.serving.answers import Answer, chat_logprobs, completion_logprobs
from prism_refactor.serving.engine import Chunk, Engine, Logprob, Rejected
from prism_refactor.serving.metrics import Metrics
from prism_refactor.serving.protocol import (
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Failure,
    Generation,
    Health,
    Model,
    Models,
    Served,
    Usage,
)
from prism_refactor.serving.quality import QualityCurve

MOST_BYTES = 1 << 20
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
_STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
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
        most_bytes: of a body.
    """

    name: str
    engine: Engine
    tokenizer: PreTrainedTokenizerFast
    metrics: Metrics
    curve: QualityCurve | None = None
    api_key: str | None = None
    most_bytes: int = MOST_BYTES
    started: int = field(default_factory=lambda: int(time.time()))
    stopping: bool = False

    def floor(self, request: Generation) -> int:
        """The k that a request asks for: by its `prism` object, or by the model's name; else all."""
        name, _, suffix = request.model.partition("@")
        if name != self.name:
            raise HTTPException(404, f"there is no model {request.model!r}; this server has {self.name!r}")
        wanted, full_k = request.prism, self.engine.full_k
        given = [k for k in (wanted.k, int(suffix) if suffix.isdecimal() and len(suffix) < 10 else None) if k is not None]
        if suffix and not suffix.isdecimal():
            raise HTTPException(404, f"there is no model {request.model!r}; write {self.name}@k with k from 1 to {full_k}")
        if wanted.quality is not None:
            if self.curve is None:
                raise UsageError("quality: the model's perplexity was not measured; run prism-eval --save, or ask for a k")
            given.append(self.curve.k_for(wanted.quality))
        # Several floors are one: the highest.
        floor = max(given, default=full_k)
        if not 1 <= floor <= full_k:
            raise UsageError(f"k = {floor}: choose 1 to {full_k}")
        return floor


@dataclass
class _Prepared:
    """One prompt of a request, in the engine's words, and where its news arrive."""

    request: engines.Request
    answer: Answer
    news: asyncio.Queue[Chunk] = field(default_factory=asyncio.Queue)
    start: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Part:
    """Some text of one prompt's answer."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[Logprob]
    finish: str | None
    served_k: float


class EngineFailed(Exception):
    """The engine ended a request that it should have served."""


def _prepare(
    state: ServerState, body: Generation, prompts: Sequence[list[int]], tokens: int | None, logprobs: int | None
) -> list[_Prepared]:
    floor = state.floor(body)
    vocabulary = state.engine.model.config.get_text_config().vocab_size
    most = min(state.engine.context, state.engine.kv_tokens)
    prepared = []
    for number, prompt in enumerate(prompts):
        if not prompt or max(prompt) >= vocabulary:
            raise UsageError(f"the prompt has a token {max(prompt)}; there are {vocabulary}" if prompt else "the prompt has no tokens")
        if len(prompt) >= most:
            raise UsageError(f"the prompt has {len(prompt)} tokens; with one to generate there may be {most}")
        request = engines.Request(
            prompt,
            floor,
            tokens or most - len(prompt),
            temperature=body.temperature,
            top_p=body.top_p,
            # Prompts of one request are different draws.
            seed=None if body.seed is None else (body.seed + number) % 2**63,
            logprobs=logprobs,
            priority=body.prism.priority,
            deadline=body.prism.deadline,
            stop_at_eos=not body.ignore_eos,
            id=uuid.uuid4().hex,
        )
        prepared.append(_Prepared(request, Answer(state.tokenizer, body.stops)))
    return prepared


def _submit(state: ServerState, prepared: Sequence[_Prepared]) -> None:
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


async def _parts(state: ServerState, prepared: Sequence[_Prepared]) -> AsyncIterator[_Part]:
    """The answers of all prompts as they grow. Whatever is not done when the reader leaves is cancelled."""
    arrived: asyncio.Queue[_Part | Exception] = asyncio.Queue()
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


async def _follow(state: ServerState, index: int, item: _Prepared, tell: Callable[[_Part | Exception], None]) -> None:
    """Tell the parts of one prompt's answer, or what went wrong; cancelled, cancel it in the engine too."""
    first, end = None, "cancelled"
    try:
        while True:
            chunk = await item.news.get()
            now = time.monotonic() - item.start
            first = now if first is None and chunk.tokens else first
            if chunk.finish in ("error", "deadline"):
                end = chunk.finish
                message = chunk.error or "the engine failed"
                tell(EngineFailed(message) if end == "error" else Rejected(message, 1.0))
                return
            known = len(item.answer.tokens)
            text = item.answer.add(chunk.tokens, chunk.finish is not None)
            finish = "stop" if item.answer.stopped else chunk.finish
            tokens = item.answer.tokens[known:]
            tell(_Part(index, text, tokens, chunk.logprobs[: len(tokens)], finish, chunk.served_k))
            if finish:
                end = finish
                state.metrics.served(item.request.k, first or now, now, len(item.answer.tokens))
                return
    finally:
        # A stop sequence ends it before the engine does.
        state.engine.cancel(item.request.id)
        state.metrics.finished.labels(end).inc()


def _usage(prepared: Sequence[_Prepared]) -> Usage:
    prompt = sum(len(item.request.prompt) for item in prepared)
    generated = sum(len(item.answer.tokens) for item in prepared)
    return Usage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)


class _Shape:
    """How parts become OpenAI's objects; one for each endpoint."""

    def __init__(self, state: ServerState, body: Generation, prepared: Sequence[_Prepared], chat: bool):
        self.state, self.body, self.prepared, self.chat = state, body, prepared, chat
        self.head: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }
        self.served = [float(item.request.k or 0) for item in prepared]
        self._offsets = [0] * len(prepared)

    def logprobs(self, part: _Part) -> dict[str, Any] | None:
        """Of a part; None where they were not asked for."""
        if not part.logprobs:
            return None
        if self.chat:
            return chat_logprobs(self.state.tokenizer, part.tokens, part.logprobs)
        result = completion_logprobs(self.state.tokenizer, part.tokens, part.logprobs, self._offsets[part.index])
        self._offsets[part.index] += sum(map(len, result["tokens"]))
        return result

    def prism(self) -> Served:
        """How the request was run, so far."""
        weights = [len(item.request.prompt) + len(item.answer.tokens) for item in self.prepared]
        mean = sum(k * weight for k, weight in zip(self.served, weights, strict=True)) / sum(weights)
        return Served(k=self.prepared[0].request.k or 0, served_k=mean, full_k=self.state.engine.full_k)

    def event(self, part: _Part, first: bool) -> Completion | ChatCompletion:
        """A part, as an event of a stream."""
        self.served[part.index] = part.served_k
        prism = self.prism() if part.finish else None
        if self.chat:
            delta = {"role": "assistant", "content": part.text} if first else {"content": part.text}
            choice = ChatChoice(index=part.index, delta=delta, logprobs=self.logprobs(part), finish_reason=part.finish)
            return ChatCompletion(**self.head, object="chat.completion.chunk", choices=[choice], prism=prism)
        text = CompletionChoice(index=part.index, text=part.text, logprobs=self.logprobs(part), finish_reason=part.finish)
        return Completion(**self.head, choices=[text], prism=prism)

    def usage_event(self) -> Completion | ChatCompletion:
        """The last event of a stream that asked for its usage."""
        usage, prism = _usage(self.prepared), self.prism()
        if self.chat:
            return ChatCompletion(**self.head, object="chat.completion.chunk", choices=[], usage=usage, prism=prism)
        return Completion(**self.head, choices=[], usage=usage, prism=prism)

    def whole(self, parts: Sequence[_Part]) -> Completion | ChatCompletion:
        """All parts, as one answer."""
        choices: list[Any] = []
        for index in range(len(self.prepared)):
            own = [part for part in parts if part.index == index]
            self.served[index] = own[-1].served_k
            joined = _Part(
                index,
                "".join(part.text for part in own),
                [token for part in own for token in part.tokens],
                [item for part in own for item in part.logprobs],
                own[-1].finish,
                own[-1].served_k,
            )
            logprobs = self.logprobs(joined)
            if self.chat:
                message = {"role": "assistant", "content": joined.text}
                choices.append(ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=joined.finish))
            else:
                choices.append(CompletionChoice(index=index, text=joined.text, logprobs=logprobs, finish_reason=joined.finish))
        kind: Any = ChatCompletion if self.chat else Completion
        return kind(**self.head, choices=choices, usage=_usage(self.prepared), prism=self.prism())


async def _events(shape: _Shape, parts: AsyncIterator[_Part], include_usage: bool) -> AsyncIterator[str]:
    seen: set[int] = set()
    try:
        async for part in parts:
            first = part.index not in seen
            seen.add(part.index)
            # A token may be half a character, or held back: nothing to tell.
            if part.text or part.finish or part.logprobs or first:
                yield f"data: {shape.event(part, first).model_dump_json(exclude_none=True)}\n\n"
        if include_usage:
            yield f"data: {shape.usage_event().model_dump_json(exclude_none=True)}\n\n"
        yield "data: [DONE]\n\n"
    except (EngineFailed, Rejected) as error:
        yield f"data: {json.dumps(_failure(500 if isinstance(error, EngineFailed) else 429, str(error)))}\n\n"
    finally:
        await parts.aclose()  # type: ignore[attr-defined]


async def _answer(http: Request, state: ServerState, body: Generation, prepared: list[_Prepared], chat: bool) -> Response:
    shape = _Shape(state, body, prepared, chat)
    _submit(state, prepared)
    parts = _parts(state, prepared)
    if body.stream:
        include = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_events(shape, parts, include), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def collect() -> list[_Part]:
        return [part async for part in parts]

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            # Nobody reads this.
            return Response(status_code=499)
        return JSONResponse(shape.whole(work.result()).model_dump(exclude_none=True))
    finally:
        for task in (work, left):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def _failure(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = _ERROR_KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _respond(status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_failure(status, message, param), status, headers)


class _Guard:
    """Refuses requests without the API key, and bodies that are too large, before anything reads them."""

    def __init__(self, app: ASGIApp, state: ServerState):
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.state.api_key is not None and scope["path"].startswith("/v1/"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.state.api_key.encode()):
                refused = _respond(401, "give the API key as Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
                return await refused(scope, receive, send)
        length = headers.get(b"content-length", b"0")
        message = f"a body may have {self.state.most_bytes} bytes"
        if not length.isdigit() or int(length) > self.state.most_bytes:
            await _skip(receive, 16 * self.state.most_bytes)
            return await _respond(413, message, headers={"Connection": "close"})(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            part = await receive()
            read += len(part.get("body", b""))
            if read > self.state.most_bytes:
                # A body without a length that goes on and on.
                raise HTTPException(413, message, headers={"Connection": "close"})
            return part

        await self.app(scope, counted, send)


async def _skip(receive: Receive, most: int) -> None:
    """Read a body and forget it: to close a connection that is still being written to would lose the answer. Not if it is very long."""
    while most > 0:
        part = await receive()
        most -= len(part.get("body", b""))
        if not part.get("more_body"):
            break


def create_app(state: ServerState, on_stopped: Callable[[], None] = lambda: None) -> FastAPI:
    """The server's application.

    Args:
        state: what it serves.
        on_stopped: called when the last connection is closed.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        on_stopped()

    app = FastAPI(title="prism-serve", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_Guard, state=state)
    _handle_errors(app, state)
    _add_health(app, state)

    @app.get("/v1/models", responses={401: _FAILURES[401]})
    async def models() -> Models:
        """The model, and the names that ask for a floor: those k whose quality was measured, or every quarter of full k."""
        full_k = state.engine.full_k
        ks = list(state.curve.measured) if state.curve else sorted({max(full_k * part // 4, 1) for part in (1, 2, 3, 4)})
        named = [(state.name, full_k), *((f"{state.name}@{k}", k) for k in ks)]
        quality = state.curve.quality_of if state.curve else lambda k: None
        return Models(data=[Model(id=name, created=state.started, k=k, full_k=full_k, quality=quality(k)) for name, k in named])

    @app.post("/v1/completions", response_model=Completion, responses={200: _STREAM, **_FAILURES})
    async def completions(http: Request, body: CompletionRequest) -> Response:
        """Text that goes on from a prompt."""
        given: list[Any] = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else list(body.prompt)
        prompts = [await asyncio.to_thread(state.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt for prompt in given]
        return await _answer(http, state, body, _prepare(state, body, prompts, body.max_tokens, body.logprobs), chat=False)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses={200: _STREAM, **_FAILURES})
    async def chat(http: Request, body: ChatRequest) -> Response:
        """The next message of a chat."""
        if not state.tokenizer.chat_template:
            raise UsageError("the tokenizer has no chat template; use /v1/completions, or start prism-serve with --chat-template")
        messages = [
            {"role": item.role, "content": item.content if isinstance(item.content, str) else "".join(part.text for part in item.content)}
            for item in body.messages
        ]
        try:
            prompt: Any = await asyncio.to_thread(
                state.tokenizer.apply_chat_template, messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:
            raise UsageError(f"the chat template refuses these messages: {one_line(error)}") from None
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        tokens = body.max_completion_tokens or body.max_tokens
        return await _answer(http, state, body, _prepare(state, body, [list(prompt)], tokens, logprobs), chat=True)

    return app


def _handle_errors(app: FastAPI, state: ServerState) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Of the alternatives of a union the first is what is told.
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _respond(400, f"{where}: {first['msg']}" if where else first["msg"], where or None)

    @app.exception_handler(UsageError)
    async def unusable(_: Request, error: UsageError) -> JSONResponse:
        return _respond(400, str(error))

    @app.exception_handler(Rejected)
    async def rejected(_: Request, error: Rejected) -> JSONResponse:
        return _respond(429, str(error), headers={"Retry-After": str(math.ceil(error.retry_after))})

    @app.exception_handler(EngineFailed)
    async def failed(_: Request, error: EngineFailed) -> JSONResponse:
        return _respond(503 if state.stopping else 500, str(error))

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return _respond(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _add_health(app: FastAPI, state: ServerState) -> None:
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
