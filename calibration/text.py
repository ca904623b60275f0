"""Text in, token rows out: local files and Hub datasets through `datasets`, packed to a fixed length."""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoTokenizer

from prism_refactor.errors import InputError, PrismError, UsageError, one_line

BUNDLED = Path(__file__).parent / "data"
CALIBRATION_TEXT = str(BUNDLED / "calibration.jsonl")
EVALUATION_TEXT = str(BUNDLED / "evaluation.jsonl")
FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
# Rows are drawn from this many times as many as asked for, so that a sample is not just the first few documents.
_OVERSAMPLING = 4
_SPEC = re.compile(r"(?P<name>[^\[\](){}]+?)(\[(?P<subset>[^\]]+)\])?(\((?P<split>[^)]+)\))?(:(?P<samples>\d+))?$")


@dataclass(frozen=True)
class Source:
    """One part of a calibration mix, written `name[subset](split):samples`; only the name is required."""

    name: str
    subset: str | None
    split: str
    samples: int | None

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Raises UsageError when the text is not such a specification."""
        if Path(text).exists():
            return cls(text, None, "train", None)
        match = _SPEC.fullmatch(text.strip())
        if match is None or not text.strip():
            raise UsageError(f"`datasets` {text}: not of the form name[subset](split):samples")
        samples = match["samples"]
        if samples and not int(samples):
            raise UsageError(f"`datasets` {text}: asks for no sample; write a number above 0")
        return cls(match["name"], match["subset"], match["split"] or "train", int(samples) if samples else None)

    def documents(self, column: str, seed: int) -> Iterator[str]:
        """The texts, shuffled with `seed`, read lazily. Raises as `records` does."""
        for record in self.records(column, seed):
            yield record[column] or ""

    def records(self, column: str, seed: int) -> Iterator[dict[str, Any]]:
        """The records, shuffled with `seed`, read lazily; their `column` holds text or nothing.

        Raises:
            InputError: the file or dataset cannot be read, or has no such column.
        """
        try:
            dataset = self._load().shuffle(seed=seed, buffer_size=1000)
            for record in dataset:
                if column not in record:
                    raise InputError(
                        f"`datasets` {self.name}: no column '{column}'; it has {', '.join(map(str, record))}; choose with `text_column`"
                    )
                text = record[column]
                if text is not None and not isinstance(text, str):
                    raise InputError(f"`datasets` {self.name}: column '{column}' holds {type(text).__name__}, not text")
                yield record
        except PrismError:
            raise
        except StopIteration:
            # An empty JSON file.
            return
        except Exception as error:
            raise InputError(f"`datasets` {self.name}: cannot be read: {one_line(error)}") from error

    def _load(self) -> Any:
        path = Path(self.name)
        if not path.exists():
            if path.suffix in FORMATS or path.is_absolute() or self.name.startswith("."):
                raise InputError(f"`datasets` {self.name}: no such file or folder")
            return load_dataset(self.name, self.subset, split=self.split, streaming=True)
        if self.subset or self.split != "train":
            raise UsageError(f"`datasets` {self.name}: a local file has no subset or split; write only its path and :samples")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        kinds = {FORMATS[file.suffix] for file in files if file.suffix in FORMATS}
        if len(kinds) != 1:
            raise InputError(f"`datasets` {self.name}: needs files of one kind out of {', '.join(FORMATS)}")
        kind = kinds.pop()
        chosen = [str(file) for file in files if FORMATS.get(file.suffix) == kind]
        options = {"sample_by": "document"} if kind == "text" else {}
        # Local files need no cache, and a batch job may have no home to keep one in.
        with tempfile.TemporaryDirectory() as cache:
            return load_dataset(kind, data_files=chosen, split="train", streaming=True, cache_dir=cache, **options)


def load_tokenizer(model_dir: Path) -> Any:
    """The checkpoint's own tokenizer. Raises InputError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, model_max_length=10**9)
    except Exception as error:
        raise InputError(f"{model_dir}: no usable tokenizer: {one_line(error)}") from error


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
    for document in source.documents(column, seed):
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        tokens += ids + separator if ids else []
        if len(tokens) >= wanted * length * _OVERSAMPLING:
            break
    if len(tokens) < 2:
        raise InputError(f"`datasets` {source.name}: holds no text")
    if len(tokens) < length:
        return torch.tensor([tokens])
    rows = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:wanted]
    return rows[np.sort(chosen)]
