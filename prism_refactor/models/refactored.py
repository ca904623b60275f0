"""Opening what prism-refactor wrote."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from prism_refactor.errors import InputError, one_line
from prism_refactor.formats import Manifest, PrismConfig
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.modeling_prism import ROUTER_FILE, router_tensors


class RefactoredCheckpoint(Checkpoint):
    """A checkpoint that `prism-refactor` wrote.

    Args:
        path: its folder.

    Attributes:
        prism: what config.json says about the original.
        manifest: what is in prism.json.
        has_thresholds: whether its two-level router can run within a budget.

    Raises:
        InputError: the folder is no refactored checkpoint, or a file of it cannot be read.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.prism = PrismConfig.required(self.config, path)
        self.manifest = Manifest.read(path)
        with router_file(path) as file:
            self.has_thresholds = all("threshold" in tensors for tensors in router_tensors(file).values())

    def check_source(self, source: Checkpoint) -> None:
        """Raise InputError unless this checkpoint was made from `source`."""
        if self.manifest.source.fingerprint != source.fingerprint():
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
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; copy it from the folder that prism-refactor wrote, or refactor again") from None
    except (OSError, LookupError, SafetensorError) as error:
        raise InputError(f"{path}: is missing or broken ({one_line(error)}); refactor again") from None
