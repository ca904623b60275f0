"""What the server takes and gives: OpenAI's completions and chat completions, with a `prism` object of ours."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MOST_PROMPTS = 16
MOST_LOGPROBS = 20
_INT32 = 2**31 - 1
Text = Annotated[str, StringConstraints(min_length=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, le=_INT32)]], Field(min_length=1)]
Nothing = Annotated[float, Field(ge=0, le=0)]


class Prism(BaseModel):
    """The quality floor and the urgency of a request. Unknown fields are refused: a misspelt floor must not become full quality."""

    model_config = ConfigDict(extra="forbid")

    k: int | None = Field(None, ge=1, le=_INT32, description="Least sub-experts per token.")
    quality: float | None = Field(None, gt=0, le=1, description="Least quality: perplexity of the full model over that at k.")
    priority: int = Field(0, ge=-10, le=10, description="Higher is sooner; a level is worth 10 seconds of waiting.")
    deadline: float | None = Field(None, gt=0, le=86400, description="Seconds in which the whole answer should be there.")


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Accepted, and not done.")


class Generation(BaseModel):
    """What both kinds of request share. Fields of OpenAI's that are not known here are ignored; those that would change the answer and
    are not done are refused."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field(max_length=256, description="The served model, or the model with a floor: name@k.")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    prism: Prism = Field(default_factory=lambda: Prism.model_validate({}))
    ignore_eos: bool = Field(False, description="Go on after the end of text, to max_tokens (as in vLLM; for load tests).")
    n: Literal[1] | None = 1
    presence_penalty: Nothing | None = 0.0
    frequency_penalty: Nothing | None = 0.0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: int | None = Field(16, ge=1, le=_INT32)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = False
    best_of: Literal[1] | None = None
    suffix: None = None


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: int | None = Field(None, ge=1, le=_INT32)
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT32)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None


class Served(BaseModel):
    """How a request was run: the floor that it asked for, the mean sub-experts per token it got, and those of the whole model."""

    k: int
    served_k: float
    full_k: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Error(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(BaseModel):
    """The body of every answer that is none."""

    error: Error


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Completion(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    prism: Served | None = None


class ChatChoice(BaseModel):
    """One chat completion, `message` when whole and `delta` in a stream."""

    index: int
    message: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    prism: Served | None = None


class Model(BaseModel):
    """A name under which the model can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "prism-refactor"
    k: int
    full_k: int
    quality: float | None = None


class Models(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The answer of the health checks."""

    status: str
