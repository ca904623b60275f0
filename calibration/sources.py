"""Documents from local files and folders, and from the Hub through `datasets`; read lazily, shuffled through a buffer."""

import csv
import io
import json
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow.parquet
from datasets import Dataset, load_dataset, load_from_disk

from prism_refactor.errors import InputError, PrismError, UsageError, one_line
from prism_refactor.files import check_no_pointer

Record = dict[str, Any]
_log = logging.getLogger(__name__)
# What is drawn from while more is read: at most so many documents, or so many characters of them.
_BUFFER, _BUFFER_CHARACTERS = 1000, 1 << 24
_CHUNK = 1 << 20
# Column of the kind of text, where there is one.
DOMAIN = "domain"
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
# What datasets hold beside their data.
_BESIDE = ("dataset_info*.json", "metadata.json", "license*.txt", "licence*.txt", "readme*.txt", "notice*.txt", "requirements*.txt")
# And the suffixes of what are no data.
_NO_DATA = {"", ".md", ".rst", ".py", ".sh", ".ipynb", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".lock", ".sha256", ".md5", ".log"}
_NO_DATA |= {".bib", ".cff", ".png", ".jpg", ".jpeg", ".gif", ".svg"}
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_LOCAL = re.compile(r"(?P<name>.*?)(\((?P<split>[^()]+)\))?(?P<count>:(?P<samples>\d+))?", re.DOTALL)
_SPEC = re.compile(r"(?P<name>[^\[\](){}]+?)(\[(?P<subset>[^\]]+)\])?(\((?P<split>[^)]+)\))?(:(?P<samples>\d+))?$")


@dataclass(frozen=True)
class Source:
    """One part of a mix of text, written `name[subset](split):samples`; only the name is required."""

    name: str
    subset: str | None
    split: str
    samples: int | None

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Raises UsageError when the text is not such a specification. What exists as a path is one, whatever characters it has."""
        local = _LOCAL.fullmatch(text)
        ways: list[tuple[str, str | None, str | None]] = [(text, None, None)]
        if local is not None:
            ways += [(text.removesuffix(local["count"] or ""), None, local["samples"]), (local["name"], local["split"], local["samples"])]
        found = next((way for way in ways if way[0] and _exists(way[0])), None)
        subset = None
        if found is not None:
            name, split, samples = found
        else:
            match = _SPEC.fullmatch(text.strip())
            if match is None or not text.strip():
                raise UsageError(f"`datasets` {text}: not of the form name[subset](split):samples")
            name, subset, split, samples = match["name"], match["subset"], match["split"], match["samples"]
        if samples and not int(samples):
            raise UsageError(f"`datasets` {text}: asks for no sample; write a number above 0")
        return cls(name, subset, split or "train", int(samples) if samples else None)

    def records(self, column: str, seed: int) -> Iterator[Record]:
        """The records, shuffled with `seed`, read lazily. Their `column` holds text, a chat or nothing.

        A record without that column may have a chat in `messages`, which is then in `column`.

        Raises:
            InputError: a file or dataset cannot be read, or has no such column.
        """
        try:
            yield from self._read(column, seed)
        except PrismError:
            raise
        except Exception as error:
            raise InputError(f"`datasets` {self.name}: cannot be read: {one_line(error)}") from error

    def _read(self, column: str, seed: int) -> Iterator[Record]:
        path = Path(self.name)
        if _exists(self.name):
            return self._read_local(path, column, seed)
        if _kind(path) is not None or path.is_absolute() or self.name.startswith("."):
            raise InputError(f"`datasets` {self.name}: no such file or folder")
        found = load_dataset(self.name, self.subset, split=self.split, streaming=True)
        return (self._checked(record, column) for record in found.shuffle(seed=seed, buffer_size=_BUFFER))

    def _read_local(self, path: Path, column: str, seed: int) -> Iterator[Record]:
        if self.subset:
            raise UsageError(f"`datasets` {self.name}: a local file or folder has no subset; write its path, (split) and :samples")
        rng = np.random.default_rng(seed)
        if path.is_file() and self.split != "train":
            raise UsageError(f"`datasets` {self.name}: a file has no split; write its path and :samples")
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return self._shuffled(self._saved(path), column, rng)
        files = self._files(path) if path.is_dir() else [path]
        kinds = {_kind(file) for file in files}
        if kinds == {None} or len(kinds) != 1:
            found = sorted({"".join(file.suffixes[-2:]) or file.name for file in files})
            had = f"; it has {', '.join(found[:5])}" if found else ""
            known = ", ".join(READERS)
            raise InputError(
                f"`datasets` {self.name}: needs files of one kind out of {known} (or these with {', '.join(_COMPRESSED)}){had}"
            )
        if len(files) > 1:
            rng.shuffle(files)
        return self._shuffled((record for file in files for record in _records(file, column)), column, rng)

    def _files(self, folder: Path) -> list[Path]:
        """The data files of a folder: nothing hidden, nothing that says what the data are, of one split."""
        found = []
        for path in _walk(folder):
            if not any(fnmatch(path.name.lower(), pattern) for pattern in _BESIDE):
                found.append(path)
                if _kind(path) is None and path.suffix.lower() not in _NO_DATA:
                    raise InputError(f"`datasets` {path}: is of a kind that is not read; convert it, or name the other files")
                if not path.is_file():
                    raise InputError(f"`datasets` {path}: the file it links to is missing; mend it or remove it")
        data = [path for path in found if _kind(path) is not None] or found
        splits = {path: _split_of(path.relative_to(folder)) for path in data}
        named = sorted({split for split in splits.values() if split})
        # Files that name no split are the training's.
        chosen = [path for path in data if splits[path] == self.split or (splits[path] is None and self.split == "train")]
        if not chosen and (self.split != "train" or len(named) > 1):
            has = ", ".join(f"{self.name}({split})" for split in named) or "none"
            raise InputError(f"`datasets` {self.name}: no split {self.split}; it has {has}")
        if chosen and len(chosen) < len(data):
            _log.info("of %s the split %s is read: %d of %d files", self.name, self.split, len(chosen), len(data))
        return chosen or data

    def _saved(self, path: Path) -> Iterator[Record]:
        """The rows of what `save_to_disk` has written."""
        saved = load_from_disk(str(path))
        splits = {"train": saved} if isinstance(saved, Dataset) else saved
        if self.split not in splits:
            raise InputError(f"`datasets` {self.name}: no split {self.split}; it has {', '.join(splits)}")
        yield from splits[self.split]

    def _shuffled(self, records: Iterator[Any], column: str, rng: np.random.Generator) -> Iterator[Record]:
        """Records in random order, drawn from a buffer, as `datasets` does; it holds few where they are large."""
        buffer: list[Record] = []
        characters = 0
        for record in records:
            checked = self._checked(record, column)
            size = _characters(checked[column])
            while buffer and (len(buffer) >= _BUFFER or characters + size > _BUFFER_CHARACTERS):
                drawn = int(rng.integers(len(buffer)))
                buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
                told = buffer.pop()
                characters -= _characters(told[column])
                yield told
            buffer.append(checked)
            characters += size
        rng.shuffle(buffer)
        yield from buffer

    def _checked(self, record: Any, column: str) -> Record:
        if not isinstance(record, dict):
            raise InputError(f"`datasets` {self.name}: a record is {type(record).__name__}, not an object with columns")
        if column not in record and "messages" in record and (not record["messages"] or is_chat(record["messages"])):
            record = record | {column: record["messages"]}
        if column not in record:
            raise InputError(
                f"`datasets` {self.name}: no column '{column}'; it has {', '.join(map(str, record))}; choose with `text_column`"
            )
        value = record[column] = record[column] or None
        if value is not None and not isinstance(value, str | TextFile) and not is_chat(value):
            raise InputError(f"`datasets` {self.name}: column '{column}' holds {type(value).__name__}, not text")
        # What else there is may be large.
        return {name: record[name] for name in (column, DOMAIN) if name in record}


def _characters(value: object) -> int:
    return len(value) if isinstance(value, str) else len(str(value))


def _walk(folder: Path) -> Iterator[Path]:
    """All files in a folder and in those in it, linked ones too, that are not hidden."""
    seen: set[Path] = set()
    for inside, folders, files in os.walk(folder, followlinks=True):
        real = Path(inside).resolve()
        if real in seen:
            # A link to a folder above.
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        yield from (Path(inside) / name for name in sorted(files) if not name.startswith("."))


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:
        # Longer than a name can be, for one.
        return False


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages: objects with a role, and a content or calls."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and _is_message(item) for item in value)


def _is_message(value: Record) -> bool:
    return "role" in value and bool({"content", "tool_calls"} & value.keys())


@dataclass(frozen=True)
class TextFile:
    """A text file, which is one document and may be long."""

    path: Path

    def chunks(self) -> Iterator[str]:
        """Its text, a piece at a time. Raises InputError when it cannot be read."""
        try:
            with _opened(self.path) as stream:
                while text := stream.read(_CHUNK):
                    yield text
        except PrismError:
            raise
        except Exception as error:
            raise InputError(f"`datasets` {self.path}: cannot be read: {one_line(error)}") from error


def _split_of(path: Path) -> str | None:
    """Which split the name of a file or of a folder it is in says, the file's first: train-00001-of-00002, squad_dev, test/x."""
    for part in reversed(path.parts):
        words = [word for word in re.split(r"[^a-z]+", part.lower().partition(".")[0]) if word not in ("", "of", "part", "shard")]
        # The last of two at most: a text may be about tests, or how to train.
        found = [split for split, names in _SPLITS.items() if len(words) in (1, 2) and words[-1] in names]
        if found:
            return found[0]
    return None


def _kind(path: Path) -> str | None:
    """The suffix by which a file is read, compressed or not; None: it is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def _opened(path: Path) -> IO[str]:
    # A file's name is taken as it is: no pattern, no address.
    raw = path.open("rb")
    compression = fsspec.utils.infer_compression(path.name.lower())
    if compression is None:
        return io.TextIOWrapper(raw, "utf-8-sig", newline="")
    if compression == "zip":
        archive = zipfile.ZipFile(raw)
        names = [item.filename for item in archive.infolist() if not item.is_dir()]
        if len(names) != 1:
            raise InputError(f"`datasets` {path}: holds {len(names)} files; unpack it and name the folder")
        return io.TextIOWrapper(archive.open(names[0]), "utf-8-sig", newline="")
    return io.TextIOWrapper(fsspec.compression.compr[compression](raw, mode="r"), "utf-8-sig", newline="")


def _records(path: Path, column: str) -> Iterator[Record]:
    check_no_pointer(path)
    try:
        yield from READERS[str(_kind(path))](path, column)
    except PrismError:
        raise
    except Exception as error:
        raise InputError(f"`datasets` {path}: cannot be read: {one_line(error)}") from error


class _JsonText:
    """JSON values in a stream, read as far as they are asked for."""

    def __init__(self, stream: IO[str]):
        self._stream, self._text, self._at, self._line = stream, "", 0, 1

    def peek(self) -> str:
        """Return the next character that is no space; nothing at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._read(_CHUNK):
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Pass over that character."""
        self._at += 1

    def value(self) -> Any:
        """Return the value that begins there."""
        size = _CHUNK
        while True:
            try:
                found, self._at = _DECODER.raw_decode(self._text, self._at)
                return found
            except json.JSONDecodeError as error:
                unfinished = error.pos > len(self._text) - _LONGEST_LITERAL or error.msg.startswith("Unterminated string")
                # A value that does not end is read on in larger and larger steps.
                if not (unfinished and self._read(size)):
                    raise self.error(f"no JSON: {error.msg}") from None
                size *= 2

    def error(self, what: str) -> ValueError:
        """What is wrong here."""
        line = self._line + self._text.count("\n", 0, self._at)
        return ValueError(f"line {line}: {what}")

    def _read(self, size: int) -> bool:
        self._line += self._text.count("\n", 0, self._at)
        read = self._stream.read(size)
        self._text, self._at = self._text[self._at :] + read, 0
        return bool(read)


_DECODER, _SPACE = json.JSONDecoder(), re.compile(r"\s*")
# The longest thing that may be cut at the end of what was read: \\u1234, twice.
_LONGEST_LITERAL = 12


def _json_records(path: Path, _: str) -> Iterator[Record]:
    """The values of a JSON file: one after the other, a line each for one, or the items of one list."""
    with _opened(path) as stream:
        file = _JsonText(stream)
        if file.peek() != "[":
            while file.peek():
                yield file.value()
            return
        file.skip()
        while (mark := file.peek()) != "]":
            if not mark:
                raise file.error("the list does not end")
            yield file.value()
            if file.peek() == ",":
                file.skip()
            elif file.peek() not in ("]", ""):
                raise file.error("no comma between two items of the list")
        file.skip()
        if file.peek():
            raise file.error("something stands behind the list")


def _table_records(path: Path, _: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as stream:
        reader = csv.DictReader(stream, strict=True, delimiter="\t" if _kind(path) == ".tsv" else ",")
        for record in reader:
            if None in record or None in record.values():
                raise ValueError(f"line {reader.line_num}: has not as many fields as the first line")
            yield record


def _text_records(path: Path, column: str) -> Iterator[Record]:
    yield {column: TextFile(path)}


def _parquet_records(path: Path, column: str) -> Iterator[Record]:
    with pyarrow.parquet.ParquetFile(path) as file:
        known = file.schema_arrow.names
        # Only what is read is needed to fit.
        wanted = [name for name in known if name in {column, "messages", DOMAIN}]
        if not {column, "messages"} & set(wanted):
            wanted = known
        for batch in file.iter_batches(16, columns=wanted):
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson", ".jsonlines"), _json_records),
    ".txt": _text_records,
    ".parquet": _parquet_records,
    ".csv": _table_records,
    ".tsv": _table_records,
}
