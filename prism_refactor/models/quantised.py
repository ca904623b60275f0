"""Quantised checkpoints, read as bfloat16: every tensor is dequantised when it is read.

Only offloading, which reads files past `Checkpoint.slices`, must know of it.

Three formats: FP8 with a scale for each block, row or tensor (quant_method 'fp8', and 'compressed-tensors' of 8-bit floats), whose weights
keep their names; MXFP4, whose experts are stored as `NAME_blocks` and `NAME_scales`; and integers of 4 or 8 bits in words of 32
('compressed-tensors', 'pack-quantized'), stored as `NAME_packed` and `NAME_scale`. transformers' own operation is not used for FP8:
it takes the size of a block from the grid of scales, which is wrong where the last block is not whole (in 5.23).
"""

import functools
import math
from typing import Any

import torch

from prism_refactor.errors import InputError
from prism_refactor.models.stored import Stored

# What they are read as.
DEQUANTISED = "BF16"
_FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Of compressed-tensors.
_FP8_FORMATS = ("float-quantized", "naive-quantized")
_SCALES = ("_scale_inv", "_scale")
# Of inputs, which stay as they are in bfloat16; and what other shapes say, too.
_UNUSED = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".weight_shape")
_PACKED_FORMAT, _PACKED, _WORD = "pack-quantized", "_packed", 32
# Of packed integers, what is not read: zero points, and an order of columns.
_NOT_READ = ("_zero_point", "_g_idx")
_BLOCKS, _BLOCK_SCALES = "_blocks", "_scales"
# The values of a 4-bit float (two bits of exponent, one of mantissa), negative ones from 8 on; and the bias of a scale's exponent.
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_EXPONENT_BIAS = 127
REMEDY = "dequantise it first (from_pretrained, model.dequantize(), save_pretrained), or start from the bf16 checkpoint"


# Tensors that only quantised checkpoints have, and where their formats are noted beside config.json.
_SIGNS = (".qweight", ".qzeros", ".scales", "_blocks", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB")
NOTES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def sign_of_quantisation(shapes: dict[str, tuple[int, ...]], types: dict[str, str]) -> str | None:
    """Return a tensor that only a quantised checkpoint has, if there is one; arguments: see `stored_tensors`."""
    return next((name for name in shapes if name.endswith(_SIGNS) or types[name] in _FP8), None)


def stored_tensors(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], types: dict[str, str]) -> tuple[dict[str, Stored], set[str]]:
    """Find what a quantised checkpoint stores in other tensors.

    Args:
        config: `quantization_config` of its config.json.
        shapes, types: of every tensor on disk; types as safetensors writes them.

    Returns:
        ({tensor: how it is stored}, names of tensors on disk that are not the model's).

    Raises:
        InputError: the format is not one that is read here, or a scale is missing.
    """
    method, floats = str(config.get("quant_method")), set(types.values()) & set(_FP8)
    if method == "mxfp4":
        found = _mxfp4(shapes)
    elif method == "fp8" or (method == "compressed-tensors" and config.get("format") in _FP8_FORMATS and floats):
        found = _fp8(_block_size(config), shapes, types)
    elif method == "compressed-tensors" and config.get("format") == _PACKED_FORMAT:
        found = _packed(config, shapes)
    else:
        raise InputError(f"quantised by '{method}', which is not read here (FP8, MXFP4 and packed integers are); {REMEDY}")
    parts = {part for stored in found.values() for part in stored.parts}
    return found, (parts | {name for name in shapes if name.endswith(_UNUSED)}) - found.keys()


def _group_weights(config: dict[str, Any]) -> list[dict[str, Any]]:
    """What compressed-tensors says of the weights of each group of modules."""
    groups = config.get("config_groups") or {}
    return [group.get("weights") or {} for group in groups.values() if isinstance(group, dict)]


def _block_size(config: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block that has one scale; None where scales are for rows or for the tensor."""
    structures = (found["block_structure"] for found in _group_weights(config) if found.get("block_structure"))
    size = config.get("weight_block_size") or next(structures, None)
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(value, int) and value > 0 for value in size)):
        raise InputError(f"its quantization_config has a block of size {size}; correct it")
    return size[0], size[1]


def _fp8(block: tuple[int, int] | None, shapes: dict[str, tuple[int, ...]], types: dict[str, str]) -> dict[str, Stored]:
    found = {}
    for name, stored_type in types.items():
        if stored_type not in _FP8:
            continue
        scales = next((name + end for end in _SCALES if name + end in shapes), None)
        if scales is None:
            raise InputError(f"tensor {name} is FP8 and has no {name}{_SCALES[0]}; complete the checkpoint")
        size = _size_of_scales(name, shapes[name], shapes[scales], block)
        found[name] = Stored((name, scales), shapes[name], DEQUANTISED, functools.partial(dequantise_fp8, size=size))
    return found


def _size_of_scales(name: str, shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a weight that share a scale."""
    rows, columns = shape[-2:] if len(shape) > 1 else (1, shape[0])
    if math.prod(scales) == 1:
        return rows, columns
    *_, down, across = scales if len(scales) > 1 else (1, *scales)
    size = block or (1, columns)
    if len(shape) < 2 or scales[:-2] != shape[:-2] or (down, across) != (-(-rows // size[0]), -(-columns // size[1])):
        raise InputError(f"tensor {name} of shape {list(shape)} has scales of shape {list(scales)}, not for blocks of {list(size)}")
    return size


def dequantise_fp8(values: torch.Tensor, scales: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return values x scales, bfloat16 [..., R, C].

    Args:
        values: FP8 [..., R, C].
        scales: [..., ceil(R / size[0]), ceil(C / size[1])], or a single one; the last block of a row or column need not be whole.
        size: rows and columns of a block.

    Example:
        >>> dequantise_fp8(torch.ones(3, 2).to(torch.float8_e4m3fn), torch.tensor([[2.0], [4.0]]), (2, 2))[2].tolist()
        [4.0, 4.0]
    """
    if scales.numel() == 1:
        return (values.float() * scales.float().flatten()[0]).bfloat16()
    if values.ndim > 2:
        # An expert at a time: float32 of all would be four times what is stored.
        return torch.stack([dequantise_fp8(one, scale, size) for one, scale in zip(values, scales, strict=True)])
    rows, columns = values.shape
    every = scales.float().repeat_interleave(size[0], 0)[:rows].repeat_interleave(size[1], 1)[:, :columns]
    return (values.float() * every).bfloat16()


def _packed(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    kinds = {(found.get("type"), found.get("num_bits"), found.get("group_size")) for found in _group_weights(config)}
    if len(kinds) != 1:
        raise InputError(f"its weights are quantised in {len(kinds)} ways, where one is read; {REMEDY}")
    ((kind, bits, group),) = kinds
    if kind != "int" or bits not in (4, 8):
        raise InputError(f"its weights are packed {bits}-bit numbers of type {kind}, where integers of 4 and 8 bits are read; {REMEDY}")
    found = {}
    for packed, shape in shapes.items():
        if not packed.endswith(_PACKED):
            continue
        name = packed.removesuffix(_PACKED)
        scales = f"{name}_scale"
        if any(name + end in shapes for end in _NOT_READ):
            raise InputError(f"tensor {name} has a zero point or an order of columns, which is not read here; {REMEDY}")
        # compressed-tensors writes -1, or nothing, for a whole row.
        columns = shape[-1] * _WORD // bits
        if isinstance(group, int) and group > 0 and scales in shapes:
            columns = shapes[scales][-1] * group
        if len(shape) != 2 or len(shapes.get(scales, ())) != 2 or -(-columns * bits // _WORD) != shape[1] or shapes[scales][0] != shape[0]:
            raise InputError(f"tensor {packed} of shape {list(shape)} has no {scales} of a shape that fits; complete the checkpoint")
        make = functools.partial(dequantise_packed, bits=bits, columns=columns)
        found[name] = Stored((packed, scales), (shape[0], columns), DEQUANTISED, make)
    return found


def dequantise_packed(words: torch.Tensor, scales: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return integers x scales, bfloat16 [R, C].

    Args:
        words: int32 [R, W]; each holds 32 / bits integers, the first in its lowest bits, to which half their range was added.
        scales: [R, G], of C / G columns each.
        bits: of an integer, 4 or 8.
        columns: C.

    Example:
        >>> dequantise_packed(torch.tensor([[0x0000_00F9]], dtype=torch.int32), torch.tensor([[0.5]]), 4, 2).tolist()
        [[0.5, 3.5]]
    """
    values = words.contiguous().view(torch.uint8)
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], -1).flatten(-2)
    values = values[:, :columns].float() - 2 ** (bits - 1)
    return (values * scales.float().repeat_interleave(columns // scales.shape[1], 1)).bfloat16()


def _mxfp4(shapes: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    found = {}
    for blocks, shape in shapes.items():
        if not blocks.endswith(_BLOCKS):
            continue
        name = blocks.removesuffix(_BLOCKS)
        scales = name + _BLOCK_SCALES
        if shapes.get(scales) != shape[:-1] or len(shape) != 4:
            raise InputError(f"tensor {blocks} of shape {list(shape)} has no {scales} of shape {list(shape[:-1])}; complete the checkpoint")
        experts, rows, groups, pairs = shape
        found[name] = Stored((blocks, scales), (experts, groups * pairs * 2, rows), DEQUANTISED, dequantise_mxfp4)
    return found


def dequantise_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the experts' matrices as transformers holds them, bfloat16 [E, inputs, outputs]; exact.

    Args:
        blocks: uint8 [E, outputs, G, B]: two 4-bit floats in a byte, the first in its lower half; inputs = G x B x 2.
        scales: uint8 [E, outputs, G], exponents of two with a bias of 127.
    """
    experts, rows, groups, pairs = blocks.shape
    result = torch.empty(experts, groups * pairs * 2, rows, dtype=torch.bfloat16)
    for expert in range(experts):
        both = torch.stack([blocks[expert] & 15, blocks[expert] >> 4], -1).long()
        values = torch.ldexp(_FP4[both].flatten(2), scales[expert].int()[..., None] - _EXPONENT_BIAS)
        result[expert] = values.flatten(1).T
    return result
