"""Write a checkpoint shard by shard into a folder that appears only when it is complete."""

import json
import struct
from pathlib import Path
from typing import Any

import torch

from prism_refactor.files import output_file, write_json
from prism_refactor.models.checkpoint import DTYPES, INDEX_FILE
from prism_refactor.tensors import save_tensors

# What a file must be read in where the page cache is passed by (O_DIRECT); offloading does.
BLOCK = 4096
# torch dtype -> its name in a safetensors file.
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
