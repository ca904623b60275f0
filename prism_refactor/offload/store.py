"""Slow memory: where the sub-experts of a checkpoint lie on disk, and how one of them gets into fast memory.

A sub-expert is a few tensors on disk, most often side by side, so it takes one read. Which bytes are which rows is not written down here
for any family: transformers' own conversion, applied to numbered elements of two experts, tells.
"""

import json
import math
import mmap
import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from prism_refactor.errors import InputError, UsageError, one_line
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.layered import LayeredModel
from prism_refactor.models.writer import BLOCK
from prism_refactor.offload.options import DIRECT

# Tensors of a sub-expert with less than this between them are fetched by one read.
GAP = 65536
# Same-sized integers: numpy has no bfloat16, and copies need not know what they copy.
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Slot = dict[str, torch.Tensor]


class _File:
    """A file that is read, past the page cache (O_DIRECT) or through it."""

    def __init__(self, path: str, direct: bool):
        # What is read a block at a time cannot go on from inside one.
        self.whole_blocks = direct
        try:
            self._number = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if direct and os.path.exists(path):
                raise UsageError(
                    f"`read` direct: the file system of {path} does not do that ({error.strerror}); use `read` buffered"
                ) from None
            raise

    def readv(self, buffers: list[memoryview], offset: int) -> int:
        """Fill some buffers in turn; bytes read. Past the page cache offset, sizes and places of the buffers are whole blocks."""
        return os.preadv(self._number, buffers, offset)

    def close(self) -> None:
        os.close(self._number)


@dataclass(frozen=True)
class _Layout:
    """How a tensor on disk lies in one expert of the experts module: element i of it at start + strides . i of `target`."""

    # The name on disk; where every expert has a tensor of its own, of the first one, and the place of the number in it.
    name: str
    number_at: int | None
    target: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    def name_of(self, expert: int) -> str:
        if self.number_at is None:
            return self.name
        parts = self.name.split(".")
        parts[self.number_at] = str(expert)
        return ".".join(parts)


@dataclass(frozen=True)
class _Read:
    """One read: the bytes [start, end) of a file, and which layouts are at which offsets in it."""

    path: str
    start: int
    end: int
    parts: tuple[tuple[int, int, _Layout], ...]

    def whole(self, align: int) -> bool:
        """Whether its parts can be read to where they belong: side by side, in whole blocks, and one run of bytes each in the slot."""
        reached = self.start
        for start, end, layout in self.parts:
            if start != reached or start % align or end % align or layout.strides != _dense(layout.shape):
                return False
            reached = end
        return True


class Store(Protocol):
    """Where sub-experts come from.

    Attributes:
        shapes: tensor of the experts module -> shape of one sub-expert's part of it.
        dtype: of all of them.
        sub_expert_bytes: size of one.
        layers, experts: MoE layers, and sub-experts in each.
    """

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    sub_expert_bytes: int
    layers: int
    experts: int

    def read(self, layer: int, expert: int, slot: Slot, staging: memoryview | None) -> None:
        """Fill a slot. Raises InputError when the sub-expert cannot be read."""

    def staging(self) -> memoryview | None:
        """Memory for one reader to work in."""

    def close(self) -> None:
        """Let go of what is open."""


class DiskStore:
    """The refactored checkpoint's own safetensors.

    Args:
        checkpoint: any supported one; of an original the "sub-experts" are its whole experts.
        layered: its model.
        blocks: dotted names of its experts modules, a name per MoE layer.
        mode: DIRECT: past the page cache (O_DIRECT), so that fast memory is all the memory there is; BUFFERED: through it, so that what
            was read before may come from memory that nobody else needs; PINNED: the same, as everything is read once.

    Raises:
        InputError: an expert cannot be found on disk.
        UsageError: `mode` does not work here.
    """

    def __init__(self, checkpoint: Checkpoint, layered: LayeredModel, blocks: list[str], mode: str = DIRECT):
        self._checkpoint, self.layers = checkpoint, len(blocks)
        experts = layered.model.get_submodule(blocks[0])
        parameters = dict(experts.named_parameters(recurse=False))
        self.experts = experts.num_experts
        self.shapes = {name: tuple(value.shape[1:]) for name, value in parameters.items()}
        self.dtype = next(iter(parameters.values())).dtype
        self.sub_expert_bytes = sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize
        self._layouts = [_layouts(layered, block) for block in blocks]
        self._align = BLOCK if mode == DIRECT else 1
        self._offsets = {file: _offsets(checkpoint, file) for file in sorted(set(checkpoint.weight_map.values()))}
        self._reads = {(layer, expert): self._find(layer, expert) for layer in range(self.layers) for expert in range(self.experts)}
        self._longest = max(read.end - read.start for reads in self._reads.values() for read, _ in reads)
        self._files: dict[str, _File] = {}
        with ExitStack() as on_error:
            on_error.callback(self.close)
            for path in sorted({read.path for reads in self._reads.values() for read, _ in reads}):
                self._files[path] = _open(path, mode)
            on_error.pop_all()

    def _find(self, layer: int, expert: int) -> list[tuple[_Read, bool]]:
        """What to read for one sub-expert, and whether its parts are whole."""
        found = []
        for layout in self._layouts[layer]:
            name = layout.name_of(expert)
            if name not in self._checkpoint.weight_map:
                raise InputError(f"{self._checkpoint.path}: tensor {name} is missing; complete the checkpoint")
            if self._checkpoint.dtypes[name] != self.dtype:
                raise InputError(
                    f"{self._checkpoint.where(name)} is not of the type that config.json says; experts are read as they are stored"
                )
            held = layout.shape if layout.number_at is not None else (self.experts, *layout.shape)
            if self._checkpoint.shapes[name] != held:
                raise InputError(f"{self._checkpoint.where(name)} is stored as {list(self._checkpoint.shapes[name])}, not as {list(held)}")
            file = self._checkpoint.weight_map[name]
            size = math.prod(layout.shape) * self.dtype.itemsize
            start = self._offsets[file][name] + (0 if layout.number_at is not None else expert * size)
            found.append((file, start, start + size, layout))
        reads: list[_Read] = []
        for file, start, end, layout in sorted(found, key=lambda item: item[:2]):
            path = str(self._checkpoint.path / file)
            last = reads[-1] if reads else None
            if last is not None and last.path == path and start - last.end <= GAP:
                reads[-1] = _Read(path, last.start, end, (*last.parts, (start, end, layout)))
            else:
                reads.append(_Read(path, start, end, ((start, end, layout),)))
        return [(read, read.whole(self._align)) for read in reads]

    def staging(self) -> memoryview:
        """Page-aligned memory for the longest read."""
        return memoryview(mmap.mmap(-1, self._longest + 2 * BLOCK))

    def read(self, layer: int, expert: int, slot: Slot, staging: memoryview | None) -> None:
        """See `Store.read`; several threads may read, each with its own staging memory."""
        assert staging is not None
        for read, whole in self._reads[layer, expert]:
            views = [_view(slot[layout.target], layout) for *_, layout in read.parts]
            # Where blocks lie as the slot's do, nothing has to be copied.
            straight = whole and all(view.ctypes.data % self._align == 0 for view in views)
            first = read.start // self._align * self._align
            last = -(-read.end // self._align) * self._align
            buffers = [view.data.cast("B") for view in views] if straight else [staging[: last - first]]
            try:
                got = _read_fully(self._files[read.path], buffers, first, read.end - first)
            except OSError as error:
                raise InputError(
                    f"{read.path}: sub-expert {expert} of MoE layer {layer} cannot be read ({one_line(error)}); check the disk"
                ) from None
            if got < read.end - first:
                raise InputError(
                    f"{read.path}: ends before sub-expert {expert} of MoE layer {layer}; the file was truncated, download it again"
                )
            if not straight:
                for (start, end, layout), view in zip(read.parts, views, strict=True):
                    source = np.frombuffer(staging[start - first : end - first], np.uint8)
                    np.copyto(view, source.view(view.dtype).reshape(layout.shape))

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.popitem()[1].close()


class PinnedStore:
    """All sub-experts in page-locked host memory, for a GPU whose fast memory is its own.

    Args:
        disk: where they are read from, once.
    """

    def __init__(self, disk: DiskStore, pin: bool = True):
        self.shapes, self.dtype, self.sub_expert_bytes = disk.shapes, disk.dtype, disk.sub_expert_bytes
        self.layers, self.experts = disk.layers, disk.experts
        self._held: list[Slot] = []
        staging = disk.staging()
        for layer in range(self.layers):
            held = {name: torch.empty(self.experts, *shape, dtype=self.dtype, pin_memory=pin) for name, shape in self.shapes.items()}
            for expert in range(self.experts):
                disk.read(layer, expert, {name: value[expert] for name, value in held.items()}, staging)
            self._held.append(held)

    def staging(self) -> None:
        """None is needed."""

    def read(self, layer: int, expert: int, slot: Slot, staging: memoryview | None) -> None:
        """See `Store.read`."""
        for name, value in self._held[layer].items():
            slot[name].copy_(value[expert], non_blocking=True)

    def close(self) -> None:
        """Nothing is open."""


def _open(path: str, mode: str) -> _File:
    try:
        return _File(path, mode == DIRECT)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened ({one_line(error)}); download it again") from None


def _view(target: torch.Tensor, layout: _Layout) -> np.ndarray:
    """The elements of a slot's tensor that a tensor on disk fills, as integers of the same size."""
    flat = target.view(_INTEGER[target.dtype.itemsize])
    return torch.as_strided(flat, layout.shape, layout.strides, flat.storage_offset() + layout.start).numpy()


def _read_fully(file: _File, buffers: list[memoryview], offset: int, needed: int) -> int:
    """Read into some buffers in turn until they have what is needed or the file ends; bytes read."""
    got = 0
    while got < needed:
        now = file.readv(buffers, offset + got)
        # A short read that ends inside a block is the file's end.
        got += now
        if now == 0 or (file.whole_blocks and got % BLOCK):
            break
        while buffers and now >= len(buffers[0]):
            now -= len(buffers.pop(0))
        if now:
            buffers[0] = buffers[0][now:]
    return got


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of elements that lie one after the other; 0 for an axis of one, as in `_strided`."""
    return tuple(math.prod(shape[axis + 1 :]) if size > 1 else 0 for axis, size in enumerate(shape))


def _offsets(checkpoint: Checkpoint, file: str) -> dict[str, int]:
    """Where in a safetensors file each tensor starts, from its header: 8 bytes of length, JSON, then the data."""
    with open(checkpoint.path / file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _layouts(layered: LayeredModel, block: str) -> list[_Layout]:
    """How the experts of one module are stored, from what transformers makes of two experts whose elements are numbered."""
    module = layered.model.get_submodule(block)
    parameters = dict(module.named_parameters(recurse=False))
    numbered, starts, total = {}, {}, 0
    for name, value in parameters.items():
        size = value[0].numel()
        starts[name] = total
        numbered[f"{block}.{name}"] = torch.arange(total, total + 2 * size, dtype=torch.int32).view(2, *value.shape[1:])
        total += 2 * size
    own: dict[tuple[Any, ...], dict[int, str]] = {}
    try:
        # Some conversions look at the shapes in the model.
        module._parameters.update({name: nn.Parameter(value[:2], requires_grad=False) for name, value in parameters.items()})
        on_disk = layered.names_on_disk(layered.model, numbered)
    finally:
        module._parameters.update(parameters)
    for name, tensor in on_disk.items():
        target = max((known for known in parameters if starts[known] <= int(tensor.flatten()[0])), key=lambda known: starts[known])
        size = parameters[target][0].numel()
        places = tensor - starts[target]
        together = places.numel() > 1 and places.shape[0] == 2 and bool((places[1] - places[0] == size).all())
        for part in places if together else [places]:
            expert, first = divmod(int(part.flatten()[0]), size)
            found = _strided(part - expert * size, name)
            own.setdefault((target, together, *found, first), {})[expert] = name
    return [_layout(names, target, together, shape, strides, first) for (target, together, shape, strides, first), names in own.items()]


def _strided(places: torch.Tensor, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of numbered elements. Raises InputError when they follow no strides."""
    shape = tuple(places.shape)
    steps = [int(places.select(axis, 1).flatten()[0] - places.flatten()[0]) if size > 1 else 0 for axis, size in enumerate(shape)]
    expected = places.flatten()[0].clone()
    for axis, (size, step) in enumerate(zip(shape, steps, strict=True)):
        ramp = (torch.arange(size) * step).view([-1 if other == axis else 1 for other in range(len(shape))])
        expected = expected + ramp
    if not torch.equal(expected.to(places.dtype), places):
        raise InputError(f"tensor {name}: its elements lie in the model in an order that a sub-expert cannot be read by")
    return shape, tuple(steps)


def _layout(names: dict[int, str], target: str, together: bool, shape: tuple[int, ...], strides: tuple[int, ...], start: int) -> _Layout:
    if together:
        return _Layout(names[0], None, target, shape, strides, start)
    first, second = (names[expert].split(".") for expert in (0, 1))
    number_at = next(place for place, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    return _Layout(names[0], number_at, target, shape, strides, start)
