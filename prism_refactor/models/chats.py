"""Messages of chats as chat templates read them."""

import json
from contextlib import suppress
from typing import Any

# Parts of a content that are text, and where they have it.
TEXT_PARTS = {"text": "text", "refusal": "refusal"}


def for_template(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as chat templates read it: its content one text, and arguments of calls objects, as in OpenAI's they are not.

    Args:
        message: with a `role` and, of the assistant perhaps only calls, a `content`: a text or a list of parts.

    Raises:
        ValueError: a part of its content is no text.

    Example:
        >>> for_template({"role": "user", "content": [{"type": "text", "text": "Hello"}]})
        {'role': 'user', 'content': 'Hello'}
    """
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(_text_of(part) for part in content)
    # Tables have a null for every key that another message has.
    found = {name: value for name, value in message.items() if value is not None} | {"content": content}
    if found.get("tool_calls"):
        found["tool_calls"] = [_with_arguments(call) for call in found["tool_calls"]]
    return found


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in TEXT_PARTS or not isinstance(part.get(TEXT_PARTS[kind]), str):
        raise ValueError(f"a part of a message is {kind or type(part).__name__}, not text")
    return str(part[TEXT_PARTS[kind]])


def _with_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    # Whatever is no JSON is text for the template.
    with suppress(ValueError, RecursionError):
        return call | {"function": function | {"arguments": json.loads(function["arguments"])}}
    return call
