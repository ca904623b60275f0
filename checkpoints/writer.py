"""Write a checkpoint shard by shard into a folder that appears only when it is complete."""

import errno
import fcntl
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoints.reader import DTYPES, INDEX_FILE, LONGEST_NAME
from prism_errors import InputError, ResourceError, UsageError, one_line

MANIFEST = "prism.json"
# What prism-eval --save adds to a refactored checkpoint.
EVALUATION = "evaluation.json"
# In an unfinished folder: what run it belongs to, and what a run that can be resumed has done so far.
INCOMPLETE, STATE = ".incomplete", ".state"
# What a file must be read in where the page cache is passed by (O_DIRECT); offloading does.
BLOCK = 4096
# torch dtype -> its name in a safetensors file.
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


class ShardWriter:
    """Collects tensors and saves them in shards of at most `max_bytes`.

    Call `close_shard` after each decoder layer: a shard never spans two layers, so memory stays one layer however large `max_bytes` is.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        # Of each shard so far: its tensors' names and sizes in bytes.
        self.shards: list[dict[str, int]] = []
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._synced = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor; a full shard is saved first."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_bytes:
            self.close_shard()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes

    def close_shard(self) -> None:
        """Save what is queued."""
        if self._pending:
            self.shards.append({name: tensor.nbytes for name, tensor in self._pending.items()})
            _save_shard(self._pending, self._path(len(self.shards)))
            self._pending, self._pending_bytes = {}, 0

    def restore(self, shards: list[dict[str, int]]) -> None:
        """Go on after shards that an earlier run saved."""
        self.shards, self._synced = shards, len(shards)

    def unsynced(self) -> list[Path]:
        """The shards saved since this was last asked."""
        first, self._synced = self._synced, len(self.shards)
        return [self._path(number) for number in range(first + 1, len(self.shards) + 1)]

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def finish(self) -> None:
        """Save the rest, give the shards their final names and write the index."""
        self.close_shard()
        weight_map = {}
        for number, names in enumerate(self.shards, 1):
            file = f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            # Not there if an earlier run was stopped in this loop.
            if self._path(number).exists():
                self._path(number).rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        total = sum(sum(sizes.values()) for sizes in self.shards)
        write_json(self.folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Save a safetensors file that is as readable to others as any file (safetensors itself makes it private)."""
    save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _save_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Save a safetensors file whose data begin at a block, where its types are those we compute with.

    safetensors cannot do that: it pads the header, which is 8 bytes of length and JSON, to 8 bytes. Spaces after the JSON are part of the
    format.
    """
    if not all(tensor.dtype in _NAMES for tensor in tensors.values()):
        save_tensors(tensors, path)
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # As safetensors orders them: every tensor lies at a multiple of its type's size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    for name, tensor in ordered.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    with output_file(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def output_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place if the block ends well and is removed if it does not."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync([partial])
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Indented, key order as given, newline at the end; appears only when complete."""
    with output_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def side_files(source: Path) -> list[Path]:
    """Files of a model folder that are not weights, config.json or hidden, relative to it: tokenizer, templates, custom code, ..."""
    found = []
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            relative = (Path(folder) / name).relative_to(source)
            is_weight = relative.suffix in WEIGHT_SUFFIXES or name.endswith((".safetensors.index.json", ".bin.index.json"))
            if not is_weight and not name.startswith(".") and relative != Path("config.json"):
                found.append(relative)
    return found


def check_side_files(source: Path, written: Iterable[str]) -> int:
    """Check what will be copied beside the weights, before any work.

    Args:
        source: the model folder.
        written: names of the files that the output gets in any case.

    Returns:
        Bytes.

    Raises:
        InputError: something that cannot be read or copied as a file, or a link that leads out of the folder. Links into the store of
            the Hugging Face cache, which is full of them, are followed.
    """
    root = source.resolve()
    for path in [source / name for name in written]:
        if path.is_dir():
            raise InputError(f"{path}: is a folder where the output has a file; rename it")
    for folder, subfolders, _ in os.walk(source):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for path in (Path(folder) / name for name in subfolders):
            if path.is_symlink() or not os.access(path, os.R_OK | os.X_OK):
                raise InputError(f"{path}: a link, or not readable, so its files would be left out; copy it or remove it")
    total = 0
    for relative in side_files(source):
        path = source / relative
        if not path.is_file() or not os.access(path, os.R_OK):
            raise InputError(f"{path}: cannot be copied, it is missing, not readable or no regular file; mend it or remove it")
        real = path.resolve()
        if root not in real.parents and real.parent.name != "blobs":
            raise InputError(f"{path}: links to {real}, outside the model folder; copy the file or remove the link")
        total += real.stat().st_size
    return total


def check_target(target: Path, source: Path, overwrite: bool, marker: str) -> None:
    """Refuse an output folder that would lose something: an existing one, one that is not ours, one inside or around the source.

    Raises:
        UsageError: with the remedy.
    """
    try:
        resolved, origin = target.resolve(), source.resolve()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{target}: {one_line(error)}; choose another output folder") from None
    if len(resolved.name.encode()) > LONGEST_NAME:
        raise UsageError(f"{target}: its name is longer than {LONGEST_NAME} bytes; choose a shorter one")
    if resolved == origin or resolved in origin.parents or origin in resolved.parents:
        raise UsageError(f"{target}: must be outside {source}; choose another output folder")
    if target.exists():
        if not target.is_dir():
            raise UsageError(f"{target}: is a file; choose another output folder")
        if any(target.iterdir()) and not overwrite:
            raise UsageError(f"{target}: exists; choose another output folder or add --overwrite")
        if any(target.iterdir()) and not (target / marker).exists():
            raise UsageError(f"{target}: was not written by this command (no {marker}); remove it yourself if you mean it")
    if not resolved.parent.is_dir():
        raise UsageError(f"{target}: the folder {resolved.parent} does not exist; create it first")
    if not os.access(resolved.parent, os.W_OK | os.X_OK):
        raise ResourceError(f"{target}: cannot be written to {resolved.parent}; choose another folder")


def gib(size: int) -> str:
    """A number of bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1024:.1f} KiB"


def check_disk(target: Path, needed: int) -> None:
    """Raises ResourceError when the disk of `target` has less than `needed` bytes free."""
    free = free_disk(target)
    if needed > free:
        raise ResourceError(f"{target}: needs {gib(needed)} of disk, {gib(free)} is free; choose a folder on another disk")


def free_disk(target: Path) -> int:
    """Bytes free where `target` will be."""
    return shutil.disk_usage(target.resolve().parent).free


def partial_folder(target: Path) -> Path:
    """Where a folder is while it is unfinished."""
    return target.resolve().with_name(target.resolve().name + ".partial")


def record_path(state: Path, index: int) -> Path:
    """The file in a state folder that counts the layer `index` as finished."""
    return state / f"layer-{index:05d}.json"


def finished_layers(target: Path) -> int:
    """How many layers an interrupted run that can be resumed has finished of the folder `target`."""
    return len(list((partial_folder(target) / STATE).glob("layer-*.json")))


def unfinished_bytes(target: Path) -> int:
    """Size of what an interrupted run has left for the folder `target`."""
    return sum(path.stat().st_size for path in partial_folder(target).rglob("*") if path.is_file())


@contextmanager
def output_folder(target: Path, identity: dict[str, Any] | None = None, resume: bool = False) -> Iterator[Path]:
    """A temporary folder `TARGET.partial` that becomes TARGET if the block ends well and is removed if it does not.

    A folder of that name left by a killed run is replaced; one in use by a live run is refused. A run that can be resumed gives its
    `identity`: then the folder stays if layers are finished, and a run of the same identity goes on with it.

    Args:
        target: the folder to be.
        identity: everything that decides the bytes of the result, as JSON values.
        resume: go on with what an interrupted run left, if it left something.

    Raises:
        InputError: another run is writing to the same target.
        UsageError: a folder of that name is not ours, or belongs to a run of another identity, or to an interrupted run that was not
            asked for.
    """
    target, partial = target.resolve(), partial_folder(target)
    lock_path = target.with_name(f".{target.name}.lock")
    with _opened(lock_path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{target}: another run is writing to it; wait for it to end") from None
        try:
            if partial.is_symlink() or (partial.exists() and not (partial / INCOMPLETE).exists()):
                raise UsageError(f"{partial}: is in the way and was not written by this command; remove it yourself if you mean it")
            if not (identity is not None and finished_layers(target) and _may_go_on(partial, identity, resume)):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                (partial / INCOMPLETE).touch()
                write_json(partial / INCOMPLETE, identity)
            yield partial
            sync([*partial.rglob("*"), partial])
            _replace(partial, target)
        finally:
            if not partial.is_symlink() and (partial / INCOMPLETE).exists() and not (identity is not None and finished_layers(target)):
                shutil.rmtree(partial)
            lock_path.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The lock file; whatever is there is left as it is, and a link is not followed."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        raise UsageError(f"{path}: is in the way; remove it") from None
    try:
        yield lock
    finally:
        os.close(lock)


def _may_go_on(partial: Path, identity: dict[str, Any], resume: bool) -> bool:
    """Raises UsageError when an interrupted run is there and this is not its continuation."""
    if not resume:
        raise UsageError(f"{partial}: holds an interrupted run; add --resume to go on or remove it")
    before, now = (_flat(value) for value in (json.loads((partial / INCOMPLETE).read_text()), json.loads(json.dumps(identity))))
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        raise UsageError(
            f"--resume: {partial} belongs to a run with {name} {before.get(name)}, not {now.get(name)}; use the same or remove it"
        )
    # What a killed run was about to give its name: our files end in .partial, those of safetensors begin with .tmp.
    for leftover in partial.rglob(".*"):
        if leftover.is_file() and leftover.name != INCOMPLETE:
            leftover.unlink()
    return True


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested JSON objects by their dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for inner, part in value.items() for key, leaf in _flat(part, f"{name}.{inner}".lstrip(".")).items()}


def sync(paths: Iterable[Path]) -> None:
    """Have files and folders on the disk, not on their way there."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(partial: Path, target: Path) -> None:
    """Put the finished folder in the place of what is there, without its state; an error leaves what was there, and the state."""
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if target.exists():
            target.rename(old / target.name)
        for name in (STATE, INCOMPLETE):
            if (partial / name).exists():
                (partial / name).rename(old / name)
        partial.rename(target)
    except BaseException:
        if not target.exists() and (old / target.name).exists():
            (old / target.name).rename(target)
        for name in (INCOMPLETE, STATE):
            if partial.exists() and (old / name).exists():
                (old / name).rename(partial / name)
        raise
    finally:
        shutil.rmtree(old)
