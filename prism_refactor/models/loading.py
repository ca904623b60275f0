"""Load a refactored checkpoint whole, as a transformers model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from prism_refactor.errors import InputError, one_line
from prism_refactor.formats import PrismConfig
from prism_refactor.models.folder import check_folder
from prism_refactor.models.layered import check_device
from prism_refactor.models.modeling_prism import attach, auto_class, run_plainly
from prism_refactor.models.refactored import router_file
from prism_refactor.models.transformers_models import adopt_experts


def load(folder: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a refactored checkpoint, with two-level routing where it has a sub-expert router, whole in memory.

    Raises:
        InputError: the folder is no refactored checkpoint that transformers can load.
        UsageError: there is no such device.
    """
    check_device(device)
    check_folder(folder)
    try:
        config = run_plainly(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        family = auto_class(config)
        model: Any = family.from_pretrained(folder, config=config, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: transformers cannot load it: {one_line(error)}") from None
    prism = PrismConfig.required(model.config, folder)
    model = adopt_experts(model.to(device).eval())
    if prism.has_router:
        with router_file(folder):
            model = attach(model, str(folder))
    copy_out_of_files(model, device)
    return model


def end_tokens(*given: int | Sequence[int] | None) -> list[int]:
    """Tokens that end a text, from what configs and tokenizers say: one, several or none."""
    return sorted({token for each in given if each is not None for token in ([each] if isinstance(each, int) else each)})


def copy_out_of_files(model: Any, device: str) -> None:
    """Give every tensor that is in memory memory of its own.

    transformers leaves some where they lie in the file's map: a file that is truncated while the model runs would end the process, and
    products of unaligned tensors differ in the last bit. Buffers that are in no checkpoint, rotary tables, may still be on the CPU.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            # On a GPU it is a copy already.
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device, copy=True)
