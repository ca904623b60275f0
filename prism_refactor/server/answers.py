"""From token ids to what clients read: text as it grows, stop sequences, log probabilities in OpenAI's two shapes."""

import codecs
import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from prism_refactor.models.transformers_models import byte_of_character
from prism_refactor.serving.engine import Logprob

# How byte-level tokenizers write bytes.
_BYTES = byte_of_character()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# Byte tokens that follow each other are read together, at most so many: one byte that belongs to no character spoils all of them.
_LONGEST_RUN = 32
# Tokens before a text that decide what its first ones stand for: a run, and a piece before it.
CONTEXT = _LONGEST_RUN + 8


class TokenText:
    """The text of tokens that come one by one: together what `tokenizer.decode` gives, special tokens left out.

    A token has no text of its own. Metaspace decoders leave out the space before the first word of a text; characters may be several
    tokens, each some of their bytes.

    Args:
        tokenizer: of the model.
        before: token ids before the text, the prompt; None: some text, whichever.

    Attributes:
        characters: of the text so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, before: Sequence[int] | None = ()):
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        self._special = {token for token, added in self._backend.get_added_tokens_decoder().items() if added.special}
        self._byte_level = "ByteLevel" in str(self._backend.decoder)
        # Half a character, of a byte-level tokenizer.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # The last token, or run of byte tokens; and the run whose text is not told yet, but for what is before the text.
        self._context: list[int] = []
        self._run: list[int] = []
        self._before = self._told = 0
        context = self._backend.encode("a", add_special_tokens=False).ids if before is None else list(before[-CONTEXT:])
        while context and self._is_byte(context[0]) and 0x80 <= self.of(context[0])[0] < 0xC0:
            # The rest of a character that begins before.
            del context[0]
        for token in context:
            self.add(token)
        self._before, self._told = len(self._whole()), 0

    @property
    def characters(self) -> int:
        """Of the text so far."""
        return self._told + len(self._whole()) - self._before

    def of(self, token: int) -> bytes:
        """Return the bytes that a token would add to the text, if it came next; those of its name if it is special."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            # The model has more embeddings than the tokenizer has tokens.
            return b""
        if token in self._special:
            return str(piece).encode()
        if self._byte_level:
            known = all(character in _BYTES for character in piece)
            return bytes(_BYTES[character] for character in piece) if known else str(piece).encode()
        if self._is_byte(token):
            return bytes.fromhex(str(piece)[3:5])
        context = self._run or self._context
        return self._decode([*context, token])[len(self._decode(context)) :].encode()

    def is_special(self, token: int) -> bool:
        """Whether a token has no text."""
        return token in self._special

    def name(self, token: int) -> str:
        """Return how OpenAI writes a token: its text, or its bytes where they are no whole characters."""
        raw = self.of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def names(self, tokens: Sequence[int]) -> list[str]:
        """Return the names of tokens one of which may come next; where two are equal, the later one's has its number."""
        found: list[str] = []
        for token in tokens:
            name = self.name(token)
            found.append(f"{name} (token {token})" if name in found else name)
        return found

    def add(self, token: int) -> str:
        """Add a token; returns the text that is sure now."""
        if not self._has_text(token):
            return ""
        if self._is_byte(token):
            text = self._end_run(whole=True) if len(self._run) == _LONGEST_RUN else ""
            self._run.append(token)
            return text
        own = self._decoder.decode(self.of(token)) if self._byte_level else self.of(token).decode()
        text = self._end_run() + own
        self._context = [token]
        self._told += len(own)
        return text

    def pieces(self, tokens: Sequence[int], last: bool) -> list[str]:
        """Add tokens; returns the part of the text of each: a character is its last token's. Special tokens have their names.

        Args:
            tokens: that come next.
            last: none will follow, so half a character is all there is of it.
        """
        found: list[str] = []
        # The places of those of the run.
        run: list[int] = []
        for place, token in enumerate(tokens):
            if not self._has_text(token):
                found.append(self.name(token))
                continue
            rest = ""
            if not self._is_byte(token):
                rest, run = self._share(found, run, self._lengths(), self._end_run()), []
            elif len(self._run) == _LONGEST_RUN:
                rest = self._share(found, run, self._lengths(), self._end_run(whole=True))
                run = run[-len(self._run) :] if self._run else []
            found.append(rest + self.add(token))
            if self._is_byte(token):
                run.append(place)
        if not last:
            self._share(found, run, self._lengths(), self._whole()[self._before :])
            return found
        rest = self._share(found, run, self._lengths(), self._end_run()) + self.end()
        text = [place for place, token in enumerate(tokens) if self._has_text(token)]
        if text:
            found[text[-1]] += rest
        return found

    def _lengths(self) -> list[int]:
        """Characters that end with each token of the run."""
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        return [len(decoder.decode(self.of(token))) for token in self._run]

    @staticmethod
    def _share(found: list[str], places: list[int], lengths: list[int], text: str) -> str:
        """Give a run's text to its tokens, the last of which are at some places of what is found; returns it where there are none."""
        if not places:
            return text
        lengths = lengths[-len(places) :]
        if sum(lengths) != len(text):
            # U+FFFD for every byte; what was before the text is the first one's.
            lengths = [len(text) - len(lengths) + 1, *[1] * (len(lengths) - 1)]
        start = 0
        for place, length in zip(places[-len(lengths) :], lengths, strict=True):
            found[place] += text[start : start + length]
            start += length
        return ""

    def end(self) -> str:
        """Return the text that was not sure yet: U+FFFD for half a character."""
        text = self._decoder.decode(b"", final=True)
        self._told += len(text)
        return text + self._end_run()

    def _end_run(self, whole: bool = False) -> str:
        """Tell the run, all of it or its whole characters; as tokenizers do, U+FFFD for every byte where one belongs to no character."""
        text = self._whole()
        rest = self._run[len(text.encode()) :]
        if rest and not (whole and len(rest) < 4):
            text, rest = "\ufffd" * len(self._run), []
        if self._run:
            self._context, self._run = self._run[: len(self._run) - len(rest)], rest
        text, self._before = text[self._before :], 0
        self._told += len(text)
        return text

    def _whole(self) -> str:
        """The whole characters that the run begins with."""
        raw = b"".join(map(self.of, self._run))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            return raw[: error.start].decode()

    def _has_text(self, token: int) -> bool:
        """Special tokens have none, nor has what the tokenizer does not know."""
        return token not in self._special and self._tokenizer.convert_ids_to_tokens(token) is not None

    def _is_byte(self, token: int) -> bool:
        return not self._byte_level and _BYTE_TOKEN.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))) is not None

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=True)


@dataclass
class Answer:
    """The text of one request as its tokens arrive.

    Attributes:
        tokenizer: of the model.
        stops: sequences that end the text and are not part of it.
        before: token ids before the text, the prompt; None: some text, whichever.
        tokens: generated so far.
        stopped: a stop sequence has come.
    """

    tokenizer: InitVar[PreTrainedTokenizerFast]
    stops: Sequence[str] = ()
    before: InitVar[Sequence[int] | None] = None
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False

    def __post_init__(self, tokenizer: PreTrainedTokenizerFast, before: Sequence[int] | None) -> None:
        self._text = TokenText(tokenizer, before)
        self._held = ""

    @property
    def characters(self) -> int:
        """Of the text so far, those included that are held back."""
        return self._text.characters

    def add(self, tokens: Sequence[int], last: bool) -> str:
        """Text that is sure now: what could become a stop sequence is held back until it is clear, or until the last tokens.

        Tokens after the one that completes a stop sequence are dropped; those before it stay in `tokens`.
        """
        for token in tokens:
            if self.stopped:
                break
            self.tokens.append(token)
            self._hold(self._text.add(token))
        if last and not self.stopped:
            self._hold(self._text.end())
        keep = 0 if last or self.stopped else self._undecided()
        sure, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sure

    def _hold(self, text: str) -> None:
        self._held += text
        found = [position for stop in self.stops if (position := self._held.find(stop)) >= 0]
        if found:
            self._held, self.stopped = self._held[: min(found)], True

    def _undecided(self) -> int:
        """Characters at the end that a stop sequence may begin with."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stops):
                return length
        return 0


def chat_logprobs(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], logprobs: Sequence[Logprob], before: Sequence[int] = ()
) -> dict[str, Any]:
    """Log probabilities as chat completions give them; `before`: all token ids before these."""
    text = TokenText(tokenizer, before)

    def entry(token: int, name: str, logprob: float) -> dict[str, Any]:
        return {"token": name, "logprob": _finite(logprob), "bytes": list(text.of(token))}

    content = []
    for token, item in zip(tokens, logprobs, strict=True):
        names = text.names([candidate for candidate, _ in item.top])
        top = [entry(candidate, name, value) for (candidate, value), name in zip(item.top, names, strict=True)]
        content.append({**entry(token, text.name(token), item.chosen), "top_logprobs": top})
        text.add(token)
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: PreTrainedTokenizerFast,
    tokens: Sequence[int],
    logprobs: Sequence[Logprob | None],
    before: Sequence[int] = (),
    offset: int = 0,
    last: bool = True,
    text: str = "",
) -> dict[str, Any]:
    """Log probabilities as completions give them.

    Args:
        tokenizer: of the model.
        tokens: of a part of an answer.
        logprobs: one for each; None for the first token of a text.
        before: all token ids before these.
        offset: characters of the text before these tokens.
        last: whether the answer ends with them.
        text: of these tokens, where it may have names of special ones: that of a prompt.
    """
    candidates = TokenText(tokenizer, before)
    top: list[dict[str, float] | None] = []
    for token, item in zip(tokens, logprobs, strict=True):
        names = candidates.names([candidate for candidate, _ in item.top]) if item else []
        top.append({name: _finite(value) for name, (_, value) in zip(names, item.top, strict=True)} if item else None)
        candidates.add(token)
    reader = TokenText(tokenizer, before)
    pieces, offsets, start = reader.pieces(tokens, last), [], 0
    for token, piece in zip(tokens, pieces, strict=True):
        offsets.append(offset + start)
        start += len(piece) if not reader.is_special(token) or (piece and text.startswith(piece, start)) else 0
    return {
        "tokens": pieces,
        "token_logprobs": [_finite(item.chosen) if item else None for item in logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token of no probability."""
    return max(logprob, -9999.0)
