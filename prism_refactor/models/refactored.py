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


class RefactoredCheckpoint(Checkpoint):
    """A checkpoint that `prism-refactor` wrote.

    Args:
        path: its folder.

    Attributes:
        manifest: what is in its prism.json.

    Raises:
        InputError: the folder is no refactored checkpoint, or a file of it cannot be read.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        if not hasattr(self.config, "prism") or not (path / MANIFEST).exists():
            raise InputError(f"{path}: not a refactored checkpoint; write one with prism-refactor")
        try:
            self.manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path / MANIFEST}: is broken ({one_line(error)}); refactor again") from None
        with router_file(path) as file:
            router_tensors(file)

    def check_source(self, source: Checkpoint) -> None:
        """Raise InputError unless this checkpoint was made from `source`."""
        if self.manifest["source"]["fingerprint"] != source.fingerprint():
            raise InputError(f"{self.path}: was made from another checkpoint than {source.path}")


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
