"""Text in, token rows out: documents made tokens a piece at a time, packed to a fixed length."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from prism_refactor.calibration.sources import Source, TextFile
from prism_refactor.errors import InputError, one_line
from prism_refactor.models.chats import for_template
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.folder import check_folder, read_json

BUNDLED = Path(__file__).parent / "data"
CALIBRATION_TEXT = str(BUNDLED / "calibration.jsonl")
EVALUATION_TEXT = str(BUNDLED / "evaluation.jsonl")
_TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "vocab*", "*.model", "*.tiktoken")
_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Rows are drawn from this many times as many as asked for, so that a sample is not just the first few documents.
_OVERSAMPLING = 4
# Characters that are made tokens at a time: of a long document no more than what is needed is.
_PIECE = 1 << 16


def load_tokenizer(model_dir: Path) -> Any:
    """The checkpoint's own tokenizer. Raises InputError when there is none, or one that does not belong to the model."""
    check_folder(model_dir)
    there = any(any(model_dir.glob(name)) for name in _TOKENIZER_FILES)
    missing = InputError(f"{model_dir}: the tokenizer is missing; copy tokenizer.json and tokenizer_config.json of the model there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, model_max_length=10**9)
    except Exception as error:
        for name in _TOKENIZER_JSON:
            if (model_dir / name).exists():
                read_json(model_dir / name)
        raise InputError(f"{model_dir}: no usable tokenizer: {one_line(error)}") if there else missing from error
    # Where there are no files transformers makes one that knows nothing.
    if not there and not any((model_dir / name).exists() for name in tokenizer.vocab_files_names.values()):
        raise missing
    try:
        vocabulary = AutoConfig.from_pretrained(model_dir, trust_remote_code=False).get_text_config().vocab_size
    except Exception as error:
        raise InputError(f"{model_dir / 'config.json'}: transformers cannot read it: {one_line(error)}") from error
    # Special tokens, padding for one, may be in no text; but for those that we put there.
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    used = {*tokenizer.get_vocab().values()} - special | {tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    _check_tokens(model_dir, tokenizer, max(used, default=0), vocabulary)
    return tokenizer


def check_tokens(checkpoint: Checkpoint, tokenizer: Any, largest: int) -> None:
    """Raise InputError where the largest token of a text is none of the model's."""
    _check_tokens(checkpoint.path, tokenizer, largest, checkpoint.text_config.vocab_size)


def _check_tokens(model_dir: Path, tokenizer: Any, largest: int, vocabulary: int) -> None:
    if largest >= vocabulary:
        raise InputError(
            f"{model_dir}: the tokenizer has a token {largest}, '{tokenizer.convert_ids_to_tokens(largest)}', and the model (config.json) "
            f"{vocabulary} embeddings; use the model's own tokenizer, or resize its embeddings"
        )


def token_pieces(tokenizer: Any, document: str | list[dict[str, Any]] | TextFile | None) -> Iterator[list[int]]:
    """The tokens of a document, a piece at a time; of a chat, those that the tokenizer's chat template makes of it.

    Raises:
        InputError: a chat, and the tokenizer has no chat template, or one that refuses it.
    """
    for text in _pieces(_texts(tokenizer, document)):
        yield tokenizer(text, add_special_tokens=False)["input_ids"]


def _texts(tokenizer: Any, document: str | list[dict[str, Any]] | TextFile | None) -> Iterable[str]:
    if isinstance(document, TextFile):
        return document.chunks()
    if not isinstance(document, list):
        return [_whole(document or "")]
    if not tokenizer.chat_template:
        raise InputError("the text is chats, and the model's tokenizer has no chat template; choose a column of text with `text_column`")
    try:
        return [_whole(tokenizer.apply_chat_template([for_template(message) for message in document], tokenize=False))]
    except Exception as error:
        raise InputError(f"the model's chat template refuses a chat of the text: {one_line(error)}") from error


def _whole(text: str) -> str:
    """Text with U+FFFD in the place of half characters, which JSON may have as half a pair of surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Text in pieces of at most `_PIECE` characters, cut before a space where there is one."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > _PIECE:
            space = max(rest.rfind(" ", start + 1, start + _PIECE), rest.rfind("\n", start + 1, start + _PIECE))
            end = space if space > 0 else start + _PIECE
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def token_rows(datasets: list[str], tokenizer: Any, samples: int, length: int, seed: int, column: str = "text") -> torch.Tensor:
    """Pack documents, separated by the end-of-text token, into rows and draw a seeded sample of them.

    Packing leaves no padding, so every position is a real token. Where the text is too short for one row, the one row is shorter.

    Args:
        datasets: specifications (see `Source`); those without a number of samples share what the others leave of `samples`.
        tokenizer: a transformers tokenizer.
        samples: rows in all; fewer come back when there is not enough text.
        length: tokens per row.
        seed: of the document shuffle and of the draw.
        column: the text column.

    Returns:
        int64 [rows, length].

    Raises:
        InputError: unreadable, no such column, or no text at all.
        UsageError: a specification does not parse.
    """
    sources = [Source.parse(text) for text in datasets]
    open_sources = [source for source in sources if source.samples is None]
    left = samples - sum(source.samples or 0 for source in sources)
    rows = []
    for source in sources:
        wanted = source.samples
        if wanted is None:
            wanted = max(1, left // len(open_sources))
        rows.append(_rows_of(source, tokenizer, wanted, length, seed, column))
    if len(rows) > 1 and any(part.shape[1] != length for part in rows):
        raise InputError(f"`datasets`: every part of a mix needs at least {length} tokens; lower `max_seq_length`")
    return torch.cat(rows)


def _rows_of(source: Source, tokenizer: Any, wanted: int, length: int, seed: int, column: str) -> torch.Tensor:
    tokens: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    enough = wanted * length * _OVERSAMPLING
    for record in source.records(column, seed):
        before = len(tokens)
        for ids in token_pieces(tokenizer, record[column]):
            tokens += ids
            if len(tokens) >= enough:
                break
        if len(tokens) > before:
            tokens += separator
        if len(tokens) >= enough:
            break
    if len(tokens) < 2:
        raise InputError(f"`datasets` {source.name}: holds no text")
    if len(tokens) < length:
        return torch.tensor([tokens])
    rows = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:wanted]
    return rows[np.sort(chosen)]
