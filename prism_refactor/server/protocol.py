"""What the server takes and gives: OpenAI's completions and chat completions, with a `prism` object of ours."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    WithJsonSchema,
    model_validator,
)

from prism_refactor.errors import UsageError
from prism_refactor.models.chats import for_template

MOST_PROMPTS = 16
MOST_CHOICES = 128
MOST_LOGPROBS = 20
_INT32 = 2**31 - 1
# Of what is one of several types, the type is told by looking, so that an error is about the one that was meant. Names of types, as errors
# have them between names of fields.
_STRING, _STRINGS, _TOKENS, _TOKEN_LISTS, _PARTS = KINDS = ("<string>", "<strings>", "<token ids>", "<lists of token ids>", "<parts>")


def _one_of(wanted: str, empty: str = _STRINGS) -> Discriminator:
    """How the type of a value is told; `empty`: that of an empty list."""

    def kind(value: Any) -> str | None:
        if isinstance(value, str):
            return _STRING
        if not isinstance(value, list):
            return None
        return {str: _STRINGS, int: _TOKENS, float: _TOKENS, list: _TOKEN_LISTS, dict: _PARTS}.get(type(value[0])) if value else empty

    return Discriminator(kind, custom_error_type="kind", custom_error_message=f"Input should be {wanted}")


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        # Python takes true for 1.
        raise ValueError("Input should be a valid integer, not true or false")
    return value


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not Unicode: it has half a pair of surrogates") from None
    return text


def _only(*values: Any) -> Any:
    """The type of a field that is known and not done: only what changes nothing is taken."""

    def check(value: Any) -> Any:
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values):
            raise ValueError(f"is not served; leave it out{''.join(f', or give {known!r}' for known in values)}")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": list(values)})]


Text = Annotated[str, StringConstraints(min_length=1)]
# Integers, behind the bounds of each: pydantic has them in the schema then.
_NUMBER = BeforeValidator(_no_boolean)
Count = Annotated[int, Field(ge=1, le=_INT32), _NUMBER]
Tokens = Annotated[list[Annotated[int, Field(ge=0, le=_INT32), _NUMBER]], Field(min_length=1)]
Unicode = Annotated[str, AfterValidator(_unicode)]
# What changes nothing here, whatever it holds.
Anything = Annotated[Any, WithJsonSchema({})]


class Given(BaseModel):
    """What a client gives. A field that is null is as good as left out; one that is not known is refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Prism(Given):
    """The quality floor and the urgency of a request."""

    k: Count | None = Field(None, description="Least sub-experts per token.")
    budget: float | None = Field(None, gt=0, le=1, description="In place of k: least share of the sub-experts that tokens run on average.")
    quality: float | None = Field(None, gt=0, le=1, description="Least quality: perplexity of the full model over that at k.")
    priority: Annotated[int, Field(ge=-10, le=10), _NUMBER] = Field(
        0, description="Higher is sooner; a level is worth 10 seconds of waiting."
    )
    deadline: float | None = Field(None, gt=0, le=86400, description="Seconds in which the whole answer should be there.")


class StreamOptions(Given):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="Accepted, and not done.")


class Generation(Given):
    """What both kinds of request share: OpenAI's fields, of which those that would change the answer and are not done are refused."""

    model: str = Field(max_length=256, description="The served model, or the model with a floor: name@k or name@25%.")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), _NUMBER] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), _NUMBER] = Field(1, description="Answers to each prompt.")
    stop: Annotated[
        Annotated[Text, Tag(_STRING)] | Annotated[list[Text], Field(max_length=4), Tag(_STRINGS)], _one_of("a string or a list of strings")
    ] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    prism: Prism = Field(default_factory=Prism)
    ignore_eos: bool = Field(False, description="Go on after the end of text, to max_tokens (as in vLLM; for load tests).")
    user: Anything = None
    presence_penalty: _only(0) = 0  # type: ignore[valid-type]
    frequency_penalty: _only(0) = 0  # type: ignore[valid-type]
    logit_bias: _only({}) = Field(default_factory=dict)  # type: ignore[valid-type]

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[Text, Tag(_STRING)]
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS), Tag(_STRINGS)]
        | Annotated[Tokens, Tag(_TOKENS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS), Tag(_TOKEN_LISTS)],
        _one_of("a string, token ids, or a list of one of them"),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=_INT32), _NUMBER] = 16
    logprobs: Annotated[int, Field(ge=0, le=5), _NUMBER] | None = None
    echo: bool = Field(False, description="Begin the text with the prompt, and the log probabilities with its tokens'.")
    best_of: _only(1) = 1  # type: ignore[valid-type]
    suffix: _only("") = ""  # type: ignore[valid-type]


class TextPart(Given):
    """A part of a message. What else it has, cache_control for one, changes nothing."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "refusal"]
    text: Unicode = ""
    refusal: Unicode = ""


class FunctionCall(BaseModel):
    """What a message calls."""

    model_config = ConfigDict(extra="allow")

    name: str
    arguments: Unicode


class ToolCall(BaseModel):
    """A call in a message of the assistant's. What else it has is given to the chat template."""

    model_config = ConfigDict(extra="allow")

    function: FunctionCall | None = None


class Message(Given):
    """A message of a chat. What else it has is given to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: (
        Annotated[Annotated[Unicode, Tag(_STRING)] | Annotated[list[TextPart], Tag(_PARTS)], _one_of("a string or a list of parts", _PARTS)]
        | None
    ) = None
    tool_calls: list[ToolCall] | None = None
    audio: _only() = None  # type: ignore[valid-type]

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates read it; see `models.chats`.

        Raises:
            UsageError: it has no content, which only the assistant's need not have.
        """
        if self.content is None and self.role != "assistant":
            raise UsageError(f"messages: one of role {self.role} has no content")
        content = self.content if isinstance(self.content, str) else [part.model_dump() for part in self.content or ()]
        return for_template(self.model_dump(exclude_none=True, exclude={"content"}) | {"content": content})


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), _NUMBER] | None = None
    metadata: Anything = None
    moderation: _only() = None  # type: ignore[valid-type]
    parallel_tool_calls: Anything = None
    prediction: Anything = None
    prompt_cache_key: Anything = None
    prompt_cache_options: Anything = None
    prompt_cache_retention: Anything = None
    safety_identifier: Anything = None
    service_tier: Anything = None
    store: Anything = None
    tools: _only([]) = Field(default_factory=list)  # type: ignore[valid-type]
    functions: _only([]) = Field(default_factory=list)  # type: ignore[valid-type]
    tool_choice: _only("none", "auto") = "none"  # type: ignore[valid-type]
    function_call: _only("none", "auto") = "none"  # type: ignore[valid-type]
    response_format: _only({"type": "text"}) = None  # type: ignore[valid-type]
    modalities: _only(["text"]) = None  # type: ignore[valid-type]
    audio: _only() = None  # type: ignore[valid-type]
    reasoning_effort: _only("none") = None  # type: ignore[valid-type]
    verbosity: _only("medium") = None  # type: ignore[valid-type]
    web_search_options: _only() = None  # type: ignore[valid-type]


class Served(BaseModel):
    """How a request was run.

    Attributes:
        k: the floor that it asked for; of a budget in sub-experts, rounded up.
        budget: what it asked for in place of k.
        served_k: mean sub-experts per token and layer that it got.
        full_k: those of the whole model.
    """

    k: int
    budget: float | None = None
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


class ChatMessage(BaseModel):
    """The message of a chat completion."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One chat completion."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class ChatDelta(BaseModel):
    """A piece of one chat completion, in a stream."""

    index: int
    delta: dict[str, str]
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    prism: Served | None = None


class ChatChunk(BaseModel):
    """An event of a chat completion's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None
    prism: Served | None = None


class Model(BaseModel):
    """A name under which the model can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "prism-refactor"
    k: int
    budget: float | None = None
    full_k: int
    quality: float | None = None


class Models(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The answer of the health checks."""

    status: str
