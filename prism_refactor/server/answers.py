"""From token ids to what clients read: text as it grows, stop sequences, log probabilities in OpenAI's two shapes."""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from prism_refactor.models.transformers_models import byte_of_character
from prism_refactor.serving.engine import Logprob

# How byte-level tokenizers write bytes.
_BYTES = byte_of_character()


@dataclass
class Answer:
    """The text of one request as its tokens arrive.

    Attributes:
        tokenizer: of the model.
        stops: sequences that end the text and are not part of it.
        tokens: generated so far.
        stopped: a stop sequence has come.
    """

    tokenizer: PreTrainedTokenizerFast
    stops: Sequence[str] = ()
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False

    def __post_init__(self) -> None:
        self._decoder = DecodeStream([], skip_special_tokens=True)
        self._held = ""

    def add(self, tokens: Sequence[int], last: bool) -> str:
        """Text that is sure now: what could become a stop sequence is held back until it is clear, or until the last tokens.

        Tokens after the one that completes a stop sequence are dropped; those before it stay in `tokens`.
        """
        for token in tokens:
            if self.stopped:
                break
            self.tokens.append(token)
            self._held += self._decoder.step(self.tokenizer.backend_tokenizer, token) or ""
            found = [position for stop in self.stops if (position := self._held.find(stop)) >= 0]
            if found:
                self._held, self.stopped = self._held[: min(found)], True
        keep = 0 if last or self.stopped else self._undecided()
        sure, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sure

    def _undecided(self) -> int:
        """Characters at the end that a stop sequence may begin with."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stops):
                return length
        return 0


class TokenText:
    """What tokens stand for: bytes, which need not be whole characters.

    Args:
        tokenizer: of the model.

    Attributes:
        characters: whole characters in the tokens that were counted so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer, self.characters = tokenizer, 0
        self._special = set(tokenizer.all_special_ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)

    def of(self, token: int) -> bytes:
        """Return the bytes of a token."""
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if token in self._special:
            return piece.encode()
        if self._byte_level:
            return b"".join(bytes([_BYTES[character]]) if character in _BYTES else character.encode() for character in piece)
        hexadecimal = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        return bytes.fromhex(hexadecimal[1]) if hexadecimal else piece.replace("\u2581", " ").encode()

    def name(self, token: int) -> str:
        """Return how OpenAI writes a token: its text, or its bytes where they are no whole characters."""
        raw = self.of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def count(self, token: int) -> int:
        """Count a token of the text; returns the characters before it."""
        before = self.characters
        self.characters += len(self._decoder.decode(self.of(token)))
        return before


def chat_logprobs(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], logprobs: Sequence[Logprob]) -> dict[str, Any]:
    """Log probabilities as chat completions give them."""
    text = TokenText(tokenizer)

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": text.name(token), "logprob": _finite(logprob), "bytes": list(text.of(token))}

    pairs = zip(tokens, logprobs, strict=True)
    return {"content": [{**entry(token, item.chosen), "top_logprobs": [entry(*top) for top in item.top]} for token, item in pairs]}


def completion_logprobs(text: TokenText, tokens: Sequence[int], logprobs: Sequence[Logprob]) -> dict[str, Any]:
    """Log probabilities as completions give them; `text` counts the characters from one part of an answer to the next."""
    return {
        "tokens": [text.name(token) for token in tokens],
        "token_logprobs": [_finite(item.chosen) for item in logprobs],
        "top_logprobs": [{text.name(token): _finite(value) for token, value in item.top} for item in logprobs],
        "text_offset": [text.count(token) for token in tokens],
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token of no probability."""
    return max(logprob, -9999.0)
