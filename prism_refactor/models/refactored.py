"""Opening what prism-refactor wrote."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from prism_refactor.errors import InputError, one_line
from prism_refactor.formats import MANIFEST
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.modeling_prism import ROUTER_FILE, router_tensors


def open_refactored(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """A refactored checkpoint and its manifest. Raises InputError when the folder is not one, or a file of it cannot be read."""
    checkpoint = Checkpoint(path)
    if not hasattr(checkpoint.config, "prism") or not (path / MANIFEST).exists():
        raise InputError(f"{path}: not a refactored checkpoint; write one with prism-refactor")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path / MANIFEST}: is broken ({one_line(error)}); refactor again") from None
    with router_file(path) as file:
        router_tensors(file)
    return checkpoint, manifest


@contextmanager
def router_file(folder: Path) -> Iterator[Path]:
    """Where a refactored checkpoint's sub-expert router is, while it is read.

    Raises:
        InputError: it is missing or broken.
    """
    path = folder / ROUTER_FILE
    try:
        yield path
    except (OSError, LookupError, StopIteration, SafetensorError) as error:
        raise InputError(f"{path}: is missing or broken ({one_line(error)}); refactor again") from None
