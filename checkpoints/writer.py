"""Write a checkpoint shard by shard into a folder that appears only when it is complete."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoints.reader import INDEX_FILE
from prism_errors import InputError, ResourceError, UsageError

MANIFEST = "prism.json"
INCOMPLETE = ".incomplete"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


class ShardWriter:
    """Collects tensors and saves them in shards of at most `max_bytes`.

    Call `close_shard` after each decoder layer: a shard never spans two layers, so memory stays one layer however large `max_bytes` is.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self.bytes_written = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor; a full shard is saved first."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_bytes:
            self.close_shard()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes

    def close_shard(self) -> None:
        """Save what is queued."""
        if self._pending:
            self._shards.append(list(self._pending))
            save_tensors(self._pending, self.folder / f"shard-{len(self._shards):05d}.safetensors")
            self.bytes_written += self._pending_bytes
            self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Save the rest, give the shards their final names and write the index."""
        self.close_shard()
        weight_map = {}
        for number, names in enumerate(self._shards, 1):
            file = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            (self.folder / f"shard-{number:05d}.safetensors").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        write_json(
            self.folder / INDEX_FILE, {"metadata": {"total_size": self.bytes_written}, "weight_map": dict(sorted(weight_map.items()))}
        )


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Save a safetensors file that is as readable to others as any file (safetensors itself makes it private)."""
    save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextmanager
def output_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place if the block ends well and is removed if it does not."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
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


def check_target(target: Path, source: Path, overwrite: bool, marker: str) -> None:
    """Refuse an output folder that would lose something: an existing one, one that is not ours, one inside or around the source.

    Raises:
        UsageError: with the remedy.
    """
    resolved, origin = target.resolve(), source.resolve()
    if resolved == origin or resolved in origin.parents or origin in resolved.parents:
        raise UsageError(f"{target}: must be outside {source}; choose another output folder")
    if target.exists():
        if not target.is_dir():
            raise UsageError(f"{target}: is a file; choose another output folder")
        if any(target.iterdir()) and not overwrite:
            raise UsageError(f"{target}: exists; choose another output folder or add --overwrite")
        if any(target.iterdir()) and not (target / marker).exists():
            raise UsageError(f"{target}: was not written by this command (no {marker}); remove it yourself if you mean it")
    if not target.resolve().parent.is_dir():
        raise UsageError(f"{target}: the folder {target.resolve().parent} does not exist; create it first")


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


@contextmanager
def output_folder(target: Path) -> Iterator[Path]:
    """A temporary folder `TARGET.partial` that becomes TARGET if the block ends well and is removed if it does not.

    A folder of that name left by a killed run is replaced; one in use by a live run is refused.

    Raises:
        InputError: another run is writing to the same target.
        UsageError: a folder of that name is not ours.
    """
    target = target.resolve()
    partial = target.with_name(target.name + ".partial")
    lock_path = target.with_name(f".{target.name}.lock")
    with open(lock_path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{target}: another run is writing to it; wait for it to end") from None
        try:
            if partial.exists() and not (partial / INCOMPLETE).exists():
                raise UsageError(f"{partial}: is in the way and was not written by this command; remove it yourself if you mean it")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / INCOMPLETE).touch()
            yield partial
            _sync(partial)
            _replace(partial, target)
        finally:
            if (partial / INCOMPLETE).exists():
                shutil.rmtree(partial)
            lock_path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(partial: Path, target: Path) -> None:
    """Put the finished folder in the place of what is there; whatever interrupts this, one of the two is at `target`."""
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if target.exists():
            target.rename(old / target.name)
        (partial / INCOMPLETE).unlink()
        partial.rename(target)
    except BaseException:
        if not target.exists() and (old / target.name).exists():
            (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old)
