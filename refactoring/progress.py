"""What an unfinished refactoring has done so far, on disk: enough to go on after its last finished layer with the same bytes."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from checkpoints import STATE, ShardWriter, save_tensors, sync, write_json


@dataclass
class Done:
    """The finished layers' share of the result.

    Attributes:
        layers: how many decoder layers are finished.
        router, pictures: tensors of the two files that are written last.
        reports: of the MoE layers, for the manifest.
    """

    layers: int = 0
    router: dict[str, torch.Tensor] = field(default_factory=dict)
    pictures: dict[str, torch.Tensor] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)


class Progress:
    """The state folder inside an unfinished output folder.

    `layer-NNNNN.json` is written last and counts a layer as finished; beside it are the layer's tensors for the two files that are
    written at the end, and the state of the calibration text. Everything is on the disk before it counts, so a power cut loses at most the
    layer it falls into.

    Args:
        folder: the unfinished output folder.
        writer: of its shards.
    """

    def __init__(self, folder: Path, writer: ShardWriter):
        self.folder, self.writer = folder / STATE, writer

    def restore(self) -> tuple[Done, dict[str, torch.Tensor]]:
        """What is finished, and the state of the calibration text after it; the shard writer goes on from there."""
        done, text = Done(), None
        while (path := self._path(done.layers, "json")).exists():
            record = json.loads(path.read_text())
            self._take(done, load_file(self._path(done.layers, "safetensors")), record["report"])
            self.writer.restore(record["shards"])
            text = record["text"]
            done.layers += 1
        return done, load_file(self.folder / text) if text else {}

    def finish_layer(
        self, done: Done, tensors: dict[str, torch.Tensor], report: dict[str, Any] | None, text: dict[str, torch.Tensor]
    ) -> None:
        """Count one more layer as finished.

        Args:
            done: so far; this layer is added.
            tensors: of this layer, as 'router.<name>' and 'pictures.<name>'.
            report: of this layer, None for a dense one.
            text: state of the calibration text.
        """
        self.folder.mkdir(exist_ok=True)
        index = done.layers
        save_tensors(tensors, self._path(index, "safetensors"))
        file = f"text-{index:05d}.safetensors"
        if text:
            save_tensors(text, self.folder / file)
        sync([*self.writer.unsynced(), *self.folder.iterdir(), self.folder.parent])
        write_json(self._path(index, "json"), {"shards": self.writer.shards, "report": report, "text": file if text else None})
        sync([self.folder])
        for old in self.folder.glob("text-*.safetensors"):
            if old.name != file:
                old.unlink()
        self._take(done, tensors, report)
        done.layers += 1

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / f"layer-{index:05d}.{suffix}"

    @staticmethod
    def _take(done: Done, tensors: dict[str, torch.Tensor], report: dict[str, Any] | None) -> None:
        for name, value in tensors.items():
            kind, _, key = name.partition(".")
            (done.router if kind == "router" else done.pictures)[key] = value
        if report is not None:
            done.reports.append(report)
