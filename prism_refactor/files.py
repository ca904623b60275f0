"""Files and folders that appear only when they are complete."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prism_refactor.errors import InputError, ResourceError, UsageError, one_line

# Bytes of a file name; file systems take 255, and temporary names are longer.
LONGEST_NAME = 200
# In an unfinished folder: what run it belongs to, and what a run that can be resumed has done so far.
INCOMPLETE, STATE = ".incomplete", ".state"
_POINTER = b"version https://git-lfs"


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
            raise UsageError(f"{target}: exists; choose another output folder or add `overwrite`")
        if any(target.iterdir()) and not (target / marker).exists():
            raise UsageError(f"{target}: was not written by this command (no {marker}); remove it yourself if you mean it")
    if not resolved.parent.is_dir():
        raise UsageError(f"{target}: the folder {resolved.parent} does not exist; create it first")
    if not os.access(resolved.parent, os.W_OK | os.X_OK):
        raise ResourceError(f"{target}: cannot be written to {resolved.parent}; choose another folder")


def partial_folder(target: Path) -> Path:
    """Where a folder is while it is unfinished."""
    return target.resolve().with_name(target.resolve().name + ".partial")


def record_path(state: Path, index: int) -> Path:
    """The file in a state folder that counts the layer `index` as finished."""
    return state / f"layer-{index:05d}.json"


def can_resume(target: Path) -> bool:
    """Return whether an interrupted run has left something of the folder `target` to go on with."""
    return any((partial_folder(target) / STATE).glob("*.json"))


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
    `identity`: then the folder stays if its state holds a record, and a run of the same identity goes on with it.

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
    with _locked(lock_path, target):
        try:
            if partial.is_symlink() or (partial.exists() and not (partial / INCOMPLETE).exists()):
                raise UsageError(f"{partial}: is in the way and was not written by this command; remove it yourself if you mean it")
            if not (identity is not None and can_resume(target) and _may_go_on(partial, identity, resume)):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                (partial / INCOMPLETE).touch()
                write_json(partial / INCOMPLETE, identity)
            yield partial
            sync([*partial.rglob("*"), partial])
            _replace(partial, target)
        finally:
            if not partial.is_symlink() and (partial / INCOMPLETE).exists() and not (identity is not None and can_resume(target)):
                shutil.rmtree(partial)


@contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    """Hold a lock file; whatever is there is left as it is, and a link is not followed."""
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{target}: another run is writing to it; wait for it to end") from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        raise UsageError(f"{path}: is in the way; remove it") from None
    try:
        yield
    finally:
        # While it is held: who has opened it too finds out that it is gone, and opens another.
        path.unlink(missing_ok=True)
        lock.release()


def _may_go_on(partial: Path, identity: dict[str, Any], resume: bool) -> bool:
    """Raises UsageError when an interrupted run is there and this is not its continuation."""
    if not resume:
        raise UsageError(f"{partial}: holds an interrupted run; add `resume` to go on or remove it")
    before, now = (_flat(value) for value in (json.loads((partial / INCOMPLETE).read_text()), json.loads(json.dumps(identity))))
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        raise UsageError(
            f"`resume`: {partial} belongs to a run with {name} {before.get(name)}, not {now.get(name)}; use the same or remove it"
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


def save_figure(figure: Any, path: Path) -> None:
    """Save a matplotlib figure in the format of the path's ending; it appears only when complete."""
    with output_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150)


def check_no_pointer(path: Path) -> None:
    """Raise InputError where a file is what Git LFS leaves in the place of a large one."""
    if path.is_file() and os.access(path, os.R_OK):
        with path.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise InputError(f"{path}: is a pointer of Git LFS, not the file; run: git lfs pull")
