"""Tensors of a model that a checkpoint stores as other tensors: made when they are read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Stored:
    """A tensor that is stored as others.

    Attributes:
        parts: their names; they may be stored as others themselves.
        shape: of the tensor.
        dtype: its type, as safetensors writes it: 'BF16'.
        make: (parts) -> the tensor.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    make: Callable[..., torch.Tensor]


class StoredSlice:
    """What a safetensors slice is, of a tensor that is made when it is read.

    Args:
        stored: how it is stored.
        parts: slices of its parts.
    """

    def __init__(self, stored: Stored, *parts: Any):
        self.stored, self.parts = stored, parts

    def get_shape(self) -> list[int]:
        """The shape of the tensor."""
        return list(self.stored.shape)

    def get_dtype(self) -> str:
        """Its type, as safetensors writes it."""
        return self.stored.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.stored.make(*(part[...] for part in self.parts))[index]
