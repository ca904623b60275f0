"""What an unfinished run has done so far, on disk: enough to go on after its last finished layer with the same bytes."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prism_refactor.files import STATE, record_path, save_tensors, sync, write_json

PACKAGES = ("prism-refactor", "torch", "transformers", "safetensors", "numpy", "scipy", "deap", "numba", "scikit-learn", "pymetis")


class Progress:
    """The state folder inside an unfinished output folder.

    `layer-NNNNN.json` is written last and counts a layer as finished; beside it are tensors that the layer adds to files written at the
    end, and the state of the calibration text. Everything is on the disk before it counts, so a power cut loses at most the layer it
    falls into.

    Args:
        folder: the unfinished output folder.

    Attributes:
        layers: how many layers are finished.
    """

    def __init__(self, folder: Path):
        self.folder, self.layers = folder / STATE, 0
        self._text: str | None = None

    def restored(self) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        """The record and the tensors of every finished layer, in order; `layers` counts them."""
        while (path := record_path(self.folder, self.layers)).exists():
            record = json.loads(path.read_text())
            self._text = record["text"]
            self.layers += 1
            yield record, load_file(path.with_suffix(".safetensors"))

    def text(self) -> dict[str, torch.Tensor]:
        """The state of the calibration text after the last of them; empty if there is none."""
        return load_file(self.folder / self._text) if self._text else {}

    def finish_layer(
        self, record: dict[str, Any], text: dict[str, torch.Tensor], files: Iterable[Path], tensors: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Count one more layer as finished.

        Args:
            record: of this layer, JSON values.
            text: state of the calibration text.
            files: written for this layer, to have on the disk first.
            tensors: of this layer.
        """
        self.folder.mkdir(exist_ok=True)
        path = record_path(self.folder, self.layers)
        save_tensors(tensors or {}, path.with_suffix(".safetensors"))
        self._text = f"text-{self.layers:05d}.safetensors" if text else None
        if self._text:
            save_tensors(text, self.folder / self._text)
        sync([*files, *self.folder.iterdir(), self.folder.parent])
        write_json(path, record | {"text": self._text})
        sync([self.folder])
        for old in self.folder.glob("text-*.safetensors"):
            if old.name != self._text:
                old.unlink()
        self.layers += 1


def versions() -> dict[str, str]:
    """Of every package here that decides the bytes of a result."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
