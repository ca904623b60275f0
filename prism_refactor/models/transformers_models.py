"""What we use of transformers' models that it does not promise to keep: open this file when a new release of transformers comes.

Building a model without weights, its conversion of checkpoints, the layout of its fused experts, its registry of experts
implementations. The other such file is serving/transformers_batching.py.
"""

import copy
import functools
import importlib
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging
from transformers.utils.chat_template_utils import _compile_jinja_template

from prism_refactor.errors import InputError
from prism_refactor.models.modeling_prism import activation_of, adopt_llama4, auto_class, cut_tensor, decoder_layers, inner_projection

_ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]
_LOAD_IN_STEP = "HF_DEACTIVATE_ASYNC_LOAD"


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the decoder layers of a language model, perhaps inside a model of images and text, and their dotted name.

    Raises:
        InputError: they are not in one list.
    """
    found = decoder_layers(model)
    if not isinstance(found, nn.ModuleList):
        raise InputError(f"the decoder layers of {type(model).__name__} are not in one list")
    return next((name, module) for name, module in model.named_modules() if module is found)


def named_arguments(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return what a decoder layer is given beside hidden states, by the names of its arguments.

    Args:
        layer: of the class that is called, whatever stands in for its forward.
        given: positional arguments after the hidden states.
        named: the others.
    """
    names = list(inspect.signature(type(layer).forward).parameters)[2:]
    return dict(zip(names, given, strict=False)) | named


def build_model(config: Any, dtype: torch.dtype, text_only: bool = False) -> Any:
    """Return the model of a config, with random weights, in evaluation mode.

    Args:
        config: of the model; it is left as it is.
        dtype: of its parameters.
        text_only: the config is the text part of another; then the model has a head only where transformers has one for the text alone.
    """
    # A copy: the model writes its dtype and experts implementation into its config. Which attention kernel the source was saved with, a
    # package that is not here or one from the Hub, is not ours to run: transformers takes the best it has itself.
    config = copy.deepcopy(config)
    config._attn_implementation = None
    with warnings.catch_warnings():
        # A shared expert of no neurons.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return adopt_experts(_build(config, dtype, text_only))


def _build(config: Any, dtype: torch.dtype, text_only: bool) -> Any:
    if not text_only:
        return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False).eval()
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    if type(config) in MODEL_MAPPING:
        return AutoModel.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    return _unregistered_class(config)._from_config(config, dtype=dtype).eval()


def _unregistered_class(config: Any) -> Any:
    """The class of a text model that transformers builds only as a part of another: in its family's module, for this config."""
    modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    classes = [found for _, found in inspect.getmembers(modeling, inspect.isclass) if issubclass(found, PreTrainedModel)]
    fitting = [found for found in classes if found.config_class is type(config) and hasattr(found, "forward") and "Text" in found.__name__]
    models = [found for found in fitting if found.__name__.endswith("Model") and not found.__name__.endswith("PreTrainedModel")]
    if not models:
        raise InputError(f"transformers has no text model for {type(config).__name__}")
    return models[0]


def build_meta_model(config: Any, dtype: torch.dtype, text_only: bool = False) -> Any:
    """Return the language model of a config with every parameter on the meta device; rotary tables are real.

    Rotary tables are not in checkpoints; they are computed by transformers' own initialisation. Arguments: see `build_model`.
    """
    with torch.device("meta"):
        model = build_model(config, dtype, text_only)
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if buffers and set(buffers) <= module._non_persistent_buffers_set:
            # Not its parameters: an embedding may have a buffer.
            module._buffers.update({name: torch.empty_like(value, device="cpu") for name, value in buffers.items()})
            model._init_weights(module)
    return model


class Conversion:
    """How the tensors of a checkpoint become those of a model.

    Args:
        model: on the meta device, perhaps in part.
    """

    def __init__(self, model: Any):
        self.model = model
        self._mapping: Any = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]

    def target(self, name: str, state: dict[str, torch.Tensor]) -> str:
        """Return the name in the model's state of what a tensor on disk is a part of; its own where transformers does not know it."""
        prefix = self.model.base_model_prefix
        found = str(rename_source_key(name, self._renamings, self._converters, prefix, state)[0])
        # As transformers does: a rule may fit a name that is right already.
        return name if found not in state and name in state else found

    def turns(self, name: str) -> bool:
        """Whether loading transposes the tensor called `name` in the model if its shape is the other way round."""
        return any(
            getattr(operation, "check_dims", False) and any(re.search(pattern, name) for pattern in entry.target_patterns)
            for entry in self._converters
            for operation in entry.operations
        )

    def tied(self) -> dict[str, str]:
        """Return the names of tensors that are other tensors of the model, by name."""
        return self.model.get_expanded_tied_weights_keys(all_submodels=True)

    def load(self, slices: dict[str, Any], dtype: torch.dtype | None, device: str) -> list[str]:
        """Give some tensors of the model their values; returns the names of those that did not fit.

        Args:
            slices: safetensors slices by their names on disk.
            dtype: to convert to, but for what the family computes in float32; None keeps the types of the model's tensors.
            device: where they go.
        """
        config = LoadStateDictConfig(
            dtype=dtype or torch.float32,
            dtype_plan=self.model._get_dtype_plan(dtype) if dtype else {},
            weight_mapping=self._mapping,
            device_map={"": device},
        )
        with _lean_loading():
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, config)
        return sorted(info.conversion_errors) + sorted(name for name, *_ in info.mismatched_keys)


@contextmanager
def _lean_loading() -> Iterator[None]:
    """transformers' loading without its bar, and without reading a layer's tensors ahead, which would double the peak."""
    had_bar = logging.is_progress_bar_enabled()
    ahead = os.environ.get(_LOAD_IN_STEP)
    logging.disable_progress_bar()
    os.environ[_LOAD_IN_STEP] = "1"
    try:
        yield
    finally:
        if had_bar:
            logging.enable_progress_bar()
        if ahead is None:
            del os.environ[_LOAD_IN_STEP]
        else:
            os.environ[_LOAD_IN_STEP] = ahead


def names_on_disk(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return some of a model's state in the names and layout its family has on disk (transformers' inverse conversion)."""
    return revert_weight_conversion(model, state)


def check_chat_template(template: str) -> None:
    """Raise an error of jinja's where a chat template cannot be read, or ValueError where it is empty."""
    if not template.strip():
        raise ValueError("it is empty")
    _compile_jinja_template(template)


def byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level tokenizer's vocabulary stands for."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def register_experts(name: str, forward: Callable[..., torch.Tensor]) -> None:
    """Register an experts implementation for `run_experts_with`.

    Args:
        name: of the implementation.
        forward: (experts module, hidden_states [T, H], top_k_index int64 [T, k], top_k_weights [T, k]) -> [T, H].
    """
    ALL_EXPERTS_FUNCTIONS.register(name, forward)


def adopt_experts(model: Any) -> Any:
    """Let a model's experts run through the registry where transformers has not marked their class for it; returns the model.

    They are known by their arguments and tensors; the proof compares what the registry gives with what they give themselves. Call it
    before a router is attached.
    """
    adopt_llama4(model)
    for module in model.modules():
        known = all(hasattr(module, name) for name in ("num_experts", "gate_up_proj", "down_proj", "_apply_gate"))
        if known and not hasattr(module, "is_concatenated") and [*inspect.signature(module.forward).parameters] == _ARGUMENTS:
            # As its decorator does.
            module.has_gate, module.has_bias, module.has_post_expert_norm = True, False, False
            module.is_transposed = getattr(module, "is_transposed", False)
            module.is_concatenated, module._is_expert_parallel = True, False
            module.config, module.prism_implementation = model.config.get_text_config(), "eager"
            module.forward = functools.partial(_run_adopted, module, module.forward)
    return model


def _run_adopted(experts: Any, own: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> torch.Tensor:
    """The forward of experts that `adopt_experts` has found; `own`: the one they had."""
    if experts.prism_implementation == "eager":
        return own(*arguments)
    run = ALL_EXPERTS_FUNCTIONS.get_interface(experts.prism_implementation, own)
    return run(experts, *arguments)


def run_experts_with(model: Any, name: str) -> None:
    """Let all of a model's experts run through an implementation of the registry from now on; 'eager' is their own."""
    model.set_experts_implementation(name)
    for module in model.modules():
        if hasattr(module, "prism_implementation"):
            module.prism_implementation = name


class ExpertsModule(Protocol):
    """A fused experts module of transformers, which is an nn.Module.

    Attributes:
        num_experts: E.
        down_proj: weights of all experts, see `FusedExperts`; beside it `gate_up_proj`, or `up_proj` where there is no gate.
        has_bias, is_transposed, is_concatenated: how they are stored.
        config: of the model.
    """

    num_experts: int
    down_proj: torch.Tensor
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    config: Any

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """See nn.Module."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """See nn.Module."""


class MoeBlock(Protocol):
    """A MoE block of transformers, which is an nn.Module: a router, called 'gate' or 'router' (see `router_of`), and experts."""

    experts: Any

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """See nn.Module."""

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """See nn.Module."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """See nn.Module."""

    def buffers(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """See nn.Module."""

    def get_submodule(self, target: str) -> Any:
        """See nn.Module."""

    def register_forward_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """See nn.Module."""


class FusedExperts:
    """The experts of one MoE layer in the tensors that transformers fuses them into, whichever way round a family stores them.

    Args:
        module: with `gate_up_proj` [E, 2C, H], or `up_proj` [E, C, H] where there is no gate, and `down_proj` [E, H, C]; matrices perhaps
            transposed, gate and up rows one after the other or in turns, perhaps with biases.

    Attributes:
        inner: name of the first of the two.
    """

    def __init__(self, module: ExpertsModule):
        self.module: Any = module
        self.inner = inner_projection(module)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts E, hidden size H, neurons C)."""
        total, first, second = self.module.down_proj.shape
        return (total, second, first) if self.module.is_transposed else (total, first, second)

    def projection(self, name: str, chosen: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the tensor called `inner` or `down_proj` of some experts, [..., outputs, inputs], and its bias [..., outputs] or None."""
        weight = getattr(self.module, name)[chosen].to(dtype)
        bias = getattr(self.module, f"{name}_bias")[chosen].to(dtype) if self.module.has_bias else None
        return weight.transpose(-1, -2) if self.module.is_transposed else weight, bias

    def activate(self, both: torch.Tensor) -> torch.Tensor:
        """Return the neurons' activations [..., C] from the products of their gate and up rows [..., 2C]; without a gate [..., C]."""
        return activation_of(self.module)(both)

    def column_norms(self) -> torch.Tensor:
        """Return the norm of each neuron's column of `down_proj`, float32 [E, C]."""
        output_axis = 1 if self.module.is_transposed else 0
        return torch.stack([matrix.float().norm(dim=output_axis) for matrix in self.module.down_proj.data])

    def split(self, order: torch.Tensor, held: torch.Tensor, factor: int) -> dict[str, torch.Tensor]:
        """Reorder each expert's neurons and cut it into equal sub-experts.

        Args:
            order: int64 [E, C], each expert's neurons sorted by sub-expert.
            held: int64 [E, N], which expert of the refactored module each sub-expert becomes; N is a power of two.
            factor: what `down_proj` is multiplied with, N or 1, see `Architecture.factor`; exact in binary floating point.

        Returns:
            The tensors of the refactored experts module by their names, E * N sub-experts, in the source's types.

        Raises:
            InputError: scaling overflows the dtype (only fp16 can).
        """
        result: dict[str, torch.Tensor] = {}
        total, sub_experts = held.shape
        for expert in range(total):
            for name, whole in self._reordered(expert, order[expert], factor):
                parts = cut_tensor(self.module, name, whole, sub_experts)
                if name not in result:
                    result[name] = parts.new_empty(total * sub_experts, *parts.shape[1:])
                result[name][held[expert]] = parts
        return result

    def reordered(self, order: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of the module with each expert's neurons in another order, int64 [E, C], and the same outputs."""
        result: dict[str, torch.Tensor] = {}
        for expert in range(len(order)):
            for name, whole in self._reordered(expert, order[expert], 1):
                result.setdefault(name, torch.empty_like(getattr(self.module, name)))[expert] = whole
        return result

    def _reordered(self, expert: int, order: torch.Tensor, factor: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of one expert, its neurons in another order and its output multiplied with a factor."""
        for name, value in self.module.named_parameters(recurse=False):
            whole = value.data[expert]
            if name == "down_proj_bias":
                yield name, whole * factor
                continue
            turned = self.module.is_transposed and whole.ndim == 2
            rows = whole.T if turned else whole
            if name == "down_proj":
                rows = rows[:, order] * factor
                if not torch.isfinite(rows).all():
                    raise InputError(
                        f"expert {expert}: down_proj times {factor} overflows {rows.dtype}; convert the checkpoint to bf16 first"
                    )
            elif self.module.is_concatenated:
                rows = rows.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
            else:
                rows = rows.unflatten(0, (len(order), -1))[order].flatten(0, 1)
            yield name, rows.T if turned else rows


class ExpertSlots(nn.Module):
    """Memory in the shape of a fused experts module: what is an expert there is a slot here.

    Args:
        like: a fused experts module whose layout the slots have.
        tensors: of the slots, by the names of that module's tensors, [slots, ...].
    """

    def __init__(self, like: Any, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.has_bias, self.is_transposed = like.has_bias, like.is_transposed
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
