"""From token ids to what clients read: text as it grows, stop sequences, log probabilities in OpenAI's two shapes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from prism_refactor.serving.engine import Logprob


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


def _name(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    return str(tokenizer.decode([token]))


def chat_logprobs(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], logprobs: Sequence[Logprob]) -> dict[str, Any]:
    """Log probabilities as chat completions give them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = _name(tokenizer, token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    pairs = zip(tokens, logprobs, strict=True)
    return {"content": [{**entry(token, item.chosen), "top_logprobs": [entry(*top) for top in item.top]} for token, item in pairs]}


def completion_logprobs(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], logprobs: Sequence[Logprob], offset: int
) -> dict[str, Any]:
    """Log probabilities as completions give them; `offset` characters of the text came before these tokens."""
    names = [_name(tokenizer, token) for token in tokens]
    offsets = [offset + sum(map(len, names[:number])) for number in range(len(names))]
    return {
        "tokens": names,
        "token_logprobs": [_finite(item.chosen) for item in logprobs],
        "top_logprobs": [{_name(tokenizer, token): _finite(value) for token, value in item.top} for item in logprobs],
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token of no probability."""
    return max(logprob, -9999.0)
