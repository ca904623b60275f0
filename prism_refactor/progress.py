"""What an unfinished run has done so far, on disk: enough to go on after its last finished layer with the same bytes."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prism_refactor.files import STATE, record_path, sync, write_json
from prism_refactor.tensors import save_tensors

PACKAGES = ("prism-refactor", "torch", "transformers", "safetensors", "numpy", "scipy", "deap", "numba", "scikit-learn", "pymetis")
Tensors = dict[str, torch.Tensor]


class Progress:
    """The state folder inside an unfinished output folder.

    `layer-NNNNN.json` is written last and counts a layer as finished; beside it are tensors that the layer adds to files written at the
    end, and the hidden states of the calibration text. Everything is on the disk before it counts, so a power cut loses at most the
    layer it falls into.

    Args:
        folder: the unfinished output folder.

    Attributes:
        layers: how many layers are finished.
    """

    def __init__(self, folder: Path):
        self.folder, self.layers = folder / STATE, 0
        self._hidden_states: str | None = None

    def restored(self) -> Iterator[tuple[dict[str, Any], dict[str, Tensors]]]:
        """Yield the record and the named groups of tensors of every finished layer, in order; `layers` counts them."""
        while (path := record_path(self.folder, self.layers)).exists():
            record = json.loads(path.read_text())
            self._hidden_states = record["hidden_states"]
            self.layers += 1
            yield record, {name: load_file(self._group(path, name)) for name in record["groups"]}

    @staticmethod
    def _group(path: Path, name: str) -> Path:
        return path.with_suffix(f".{name}.safetensors")

    def hidden_states(self) -> Tensors:
        """Return the hidden states of the calibration text that were kept last; empty where a run carries none."""
        return load_file(self.folder / self._hidden_states) if self._hidden_states else {}

    def finish_layer(
        self, record: dict[str, Any], hidden_states: Tensors | None, files: Iterable[Path], groups: dict[str, Tensors] | None = None
    ) -> None:
        """Count one more layer as finished.

        Args:
            record: of this layer, JSON values.
            hidden_states: of the calibration text; None where it is ahead of this layer: those of an earlier one stay.
            files: written for this layer, to have on the disk first.
            groups: tensors of this layer, by what they belong to.
        """
        self.folder.mkdir(exist_ok=True)
        path = record_path(self.folder, self.layers)
        for name, tensors in (groups or {}).items():
            save_tensors(tensors, self._group(path, name))
        if hidden_states is not None:
            self._hidden_states = f"hidden-{self.layers:05d}.safetensors" if hidden_states else None
        if hidden_states and self._hidden_states:
            save_tensors(hidden_states, self.folder / self._hidden_states)
        sync([*files, *self.folder.iterdir(), self.folder.parent])
        write_json(path, record | {"hidden_states": self._hidden_states, "groups": [*(groups or {})]})
        sync([self.folder])
        for old in self.folder.glob("hidden-*.safetensors"):
            if old.name != self._hidden_states:
                old.unlink()
        self.layers += 1


def versions() -> dict[str, str]:
    """Return the version of every installed package that decides the bytes of a result."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
