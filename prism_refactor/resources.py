"""Memory and disk: how much there is, how much is needed."""

import re
import shutil
from pathlib import Path

import psutil

from prism_refactor.errors import ResourceError

# A letter alone is binary, as Docker and systemd read it.
_UNITS = {"": 1, "B": 1} | {
    unit: size ** (power + 1)
    for power, letter in enumerate("KMGT")
    for unit, size in ((letter, 2**10), (f"{letter}B", 10**3), (f"{letter}IB", 2**10))
}


def parse_size(text: str) -> int | None:
    """Return the bytes that a text such as '5GB' or '512MiB' names; None if it names none, or zero."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        return None
    return int(float(match[1]) * _UNITS[match[2].upper()]) or None


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


CONTROL_GROUPS = {"": Path("/sys/fs/cgroup"), "memory": Path("/sys/fs/cgroup/memory")}


# Files of limit and usage, and how the kinds of page cache begin that the kernel takes back when there is need.
_GROUP_FILES = {
    "": ("memory.max", "memory.current", ""),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def available_memory(own_groups: Path = Path("/proc/self/cgroup"), roots: dict[str, Path] = CONTROL_GROUPS) -> int:
    """Return the bytes that this process may still take: of the machine, or of its control groups (a container, a batch job).

    Args:
        own_groups: the kernel's list of the groups that the process is in.
        roots: where they are mounted, by controller; '' for version 2.
    """
    free = psutil.virtual_memory().available
    for line in own_groups.read_text().splitlines() if own_groups.exists() else []:
        _, controllers, name = line.split(":", 2)
        controller = "" if controllers == "" else "memory"
        if controller not in roots or controller not in controllers.split(","):
            continue
        root = roots[controller]
        limit, usage, prefix = _GROUP_FILES[controller]
        # The group's own limit and those of the groups it is in; in a container the root is its own.
        group = root / name.lstrip("/")
        for folder in [group, *(parent for parent in group.parents if root in (parent, *parent.parents))]:
            try:
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                statistics = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                # No such file, or no limit.
                continue
            cache = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            free = min(free, most - used + cache)
    return max(0, free)


def allowed_memory() -> int:
    """Return the bytes that this process may have in all, with those that it has."""
    return available_memory() + psutil.Process().memory_info().rss


def check_memory(needed: int) -> None:
    """Raises ResourceError when a run needs more bytes of memory than there are."""
    free = allowed_memory()
    if needed > free:
        raise ResourceError(
            f"needs about {gib(needed)} of memory, {gib(free)} is available; lower `num_samples`, `tokens_per_expert` or `workers`, use "
            "`dtype` bfloat16, or free some"
        )
