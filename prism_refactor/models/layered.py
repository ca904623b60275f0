"""A transformers model that lives on the meta device and is filled from a checkpoint one part at a time."""

import ctypes
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from prism_refactor.errors import InputError, UsageError, one_line
from prism_refactor.models.architectures import dotted
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.modeling_prism import moe_block
from prism_refactor.models.transformers_models import Conversion, build_meta_model, layers_of, names_on_disk


def check_device(device: str) -> None:
    """Raises UsageError when CUDA is asked for and absent."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"`device` {device}: no CUDA device is available; use `device` cpu")


class LayeredModel:
    """A checkpoint's model with at most the parts you asked for in memory.

    Args:
        checkpoint: where the weights are.
        dtype: type to load them in; None keeps each tensor's type on disk.
        device: where loaded parts go.

    Raises:
        InputError: transformers cannot build the model, or a tensor of it is in no shard.

    Attributes:
        model: the transformers model; everything not loaded is on the meta device.
        layers: its decoder layers.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None, device: str = "cpu"):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        try:
            self.model = build_meta_model(checkpoint.config, dtype or torch.float32)
        except Exception as error:
            raise InputError(f"{checkpoint.path / 'config.json'}: transformers cannot build this model: {one_line(error)}") from error
        self._layers_name, self.layers = layers_of(self.model)
        self._conversion = Conversion(self.model)
        self._known = set(self.model.state_dict())
        self._prefix = self._missing_prefix()
        self._sources = self._match_tensors()

    def _missing_prefix(self) -> str:
        """What the names of the checkpoint's tensors lack before those that transformers gives them: 'model.', where it holds no more."""
        prefix, known = f"{self.model.base_model_prefix}.", self.checkpoint.weight_map
        layer = self.layer_name(0)
        names = names_on_disk(self.model, self.layers[0].state_dict(prefix=f"{layer}."))
        if all(prefix + name in known for name in names):
            # Twice, which transformers reads as well.
            for name in [name for name in known if name.startswith(prefix + prefix)]:
                self.checkpoint.rename(name, name.removeprefix(prefix))
        return prefix if all(name not in known and name.removeprefix(prefix) in known for name in names) else ""

    def names_on_disk(self, model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return some of a model's state in the names and layout of this checkpoint; the model is this one, or what becomes of it."""
        return {name.removeprefix(self._prefix): value for name, value in names_on_disk(model, state).items()}

    def layer_name(self, index: int) -> str:
        """The dotted name of a decoder layer, as in the state dict."""
        return f"{self._layers_name}.{index}"

    @cached_property
    def moe_blocks(self) -> dict[int, str]:
        """Of every decoder layer that has experts, the dotted name of its MoE block. Raises InputError when none has."""
        found = {index: found[0] for index, layer in enumerate(self.layers) if (found := moe_block(layer)) is not None}
        if not found:
            raise InputError(f"{self.checkpoint.path}: none of its layers has experts")
        return {index: dotted(self.layer_name(index), name) for index, name in found.items()}

    def _match_tensors(self) -> dict[str, list[str]]:
        """State-dict name -> the checkpoint tensors it is made of, by transformers' own conversion rules."""
        state = self.model.state_dict()
        sources = defaultdict(list)
        for name in self.checkpoint.weight_map:
            sources[self._conversion.target(name, state)].append(name)
        tied = self._conversion.tied()
        for copy, original in tied.items():
            if original not in sources and len(sources.get(copy, [])) == 1:
                # The other one of the two is stored.
                (name,) = self.names_on_disk(self.model, {original: state[original]})
                self.checkpoint.rename(sources.pop(copy)[0], name)
                sources[original] = [name]
        missing = sorted(name for name in state if name not in sources and tied.get(name) not in sources)
        # One tensor on disk may be several of the model's.
        expected, there = self.names_on_disk(self.model, state).keys(), self.checkpoint.weight_map.keys()
        if missing and expected - there:
            raise InputError(f"{self.checkpoint.path}: {_what_is_missing(missing[0], expected - there, there - expected)}")
        return dict(sources)

    def tensors_under(self, prefix: str) -> list[str]:
        """Names of the checkpoint tensors that make up the part of the model called `prefix`, a module or a buffer."""
        return [name for target, names in self._sources.items() if f"{target}.".startswith(f"{prefix}.") for name in names]

    @contextmanager
    def loaded(self, *parts: str) -> Iterator[None]:
        """Materialise parts of the model (dotted names of modules, parameters or buffers) for the duration of a `with` block.

        Raises:
            InputError: a tensor is missing or has another shape than the config says.
        """
        try:
            for part in parts:
                self.load(part)
            yield
        finally:
            for part in parts:
                owner, leaf = self._owner(part)
                if leaf in owner._buffers or leaf in owner._parameters:
                    _put(owner, leaf, getattr(owner, leaf).detach().to("meta"))
                else:
                    self.model.get_submodule(part).to("meta")
            _return_freed_memory()

    def _owner(self, name: str) -> tuple[Any, str]:
        """The module that holds what is called `name`, and what it calls it."""
        owner, _, leaf = name.rpartition(".")
        return self.model.get_submodule(owner), leaf

    def load(self, part: str) -> None:
        """Materialise a part of the model to stay; see `loaded`."""
        names = self.tensors_under(part)
        # To float32 after loading, a tensor at a time: transformers would convert all of a layer's experts before it stacks them.
        widened = self.dtype == torch.float32
        if self.dtype is None or widened:
            self._adopt_dtypes(part)
        with self.checkpoint.slices(names) as slices:
            wrong = self._conversion.load(slices, None if widened else self.dtype, self.device)
        owner, leaf = self._owner(part)
        if leaf in owner._buffers or leaf in owner._parameters:
            state = {part: getattr(owner, leaf)}
        else:
            state = self.model.get_submodule(part).state_dict(prefix=f"{part}.")
        wrong += [name for name, value in state.items() if value.is_meta]
        if wrong:
            raise InputError(f"{self.checkpoint.path}: {wrong[0]} is missing or does not have the shape that config.json says")
        if widened:
            for owner, leaf, _ in self._stored_under(part):
                value = getattr(owner, leaf).detach()
                _put(owner, leaf, value.float() if value.is_floating_point() else value)

    def _adopt_dtypes(self, part: str) -> None:
        """Give the meta parameters the types of the tensors on disk, so that loading does not convert."""
        for owner, leaf, names in self._stored_under(part):
            value = getattr(owner, leaf)
            if value.is_floating_point():
                _put(owner, leaf, torch.empty_like(value, dtype=self._stored_dtype(names)))

    def _stored_under(self, part: str) -> Iterator[tuple[Any, str, list[str]]]:
        """(module, leaf, names on disk) of every tensor of a part of the model that the checkpoint has."""
        for target, names in self._sources.items():
            # Not what transformers does not know: a rotary table that an older release stored, say.
            if target in self._known and f"{target}.".startswith(f"{part}."):
                yield *self._owner(target), names

    def _stored_dtype(self, names: list[str]) -> torch.dtype:
        """The type of the tensors that make up one of the model's. Raises InputError when they have several, or one not computed in."""
        dtypes = self.checkpoint.dtypes
        for name in names:
            if dtypes[name] is None:
                raise InputError(
                    f"{self.checkpoint.where(name)} is not stored as floating point numbers; use a bf16, fp16 or fp32 checkpoint"
                )
            if dtypes[name] != dtypes[names[0]]:
                raise InputError(
                    f"{self.checkpoint.where(name)} is stored in {dtype_name(dtypes[name])} and {names[0]}, of the same kind, in "
                    f"{dtype_name(dtypes[names[0]])}; convert the checkpoint to one type"
                )
        dtype = dtypes[names[0]]
        assert dtype is not None
        return dtype

    def check(self) -> None:
        """Compare the headers with the config, before anything is read.

        Raises:
            InputError: a tensor has another shape than config.json says, or a type that is not computed in, or one of several that make up
                a tensor of the model is not there.
        """
        state = self.model.state_dict()
        expected = self.names_on_disk(self.model, state)
        for name in sorted(expected.keys() - self.checkpoint.shapes.keys()):
            there = self._sources.get(self._conversion.target(name, state), [])
            if set(there) & expected.keys():
                raise InputError(f"{self.checkpoint.path}: tensor {name} is missing, {there[0]} is there; complete the checkpoint")
        for name, shape in self.checkpoint.shapes.items():
            turned = shape[:-2] + shape[:-3:-1]
            if (
                name in expected
                and tuple(expected[name].shape) != shape
                and not (tuple(expected[name].shape) == turned and self._conversion.turns(self._conversion.target(name, state)))
            ):
                raise InputError(
                    f"{self.checkpoint.where(name)} has shape {list(shape)}, config.json says {list(expected[name].shape)}; "
                    "one of them belongs to another model"
                )
        for target, names in self._sources.items():
            # What transformers does not know is passed through whatever it is.
            if target in self._known and state[target].is_floating_point():
                self._stored_dtype(names)


def _what_is_missing(name: str, lacking: Collection[str], there: Collection[str]) -> str:
    """What is wrong with the names of a checkpoint's tensors, and what to do.

    Args:
        name: a tensor of the model that is not there.
        lacking: names that are expected on disk and not there.
        there: names on disk that are not expected.
    """
    if any(".lora_" in other for other in there):
        return "holds an adapter's tensors; merge it into its model first (peft: merge_and_unload, save_pretrained)"
    if any(other.split(".")[-2:] == ["score", "weight"] for other in there):
        return "is a classifier or a reward model (it has a tensor score.weight), and no language model"
    for wanted in sorted(lacking)[:_LOOKED_FOR]:
        found = next((other for other in sorted(there) if _is_inside(wanted.split("."), other.split("."))), None)
        if found is not None:
            return (
                f"its tensors are called otherwise than transformers calls them ({found} for {wanted}), as wrappers and adapters leave "
                "them; save the model inside, unwrapped or merged, or take what is too much off the names"
            )
    return f"tensor {name} is missing; complete the checkpoint"


# Names that are looked for under others: one of them is told.
_LOOKED_FOR = 3


def _is_inside(wanted: list[str], parts: list[str]) -> bool:
    """Whether the parts of a name stand in another one in their order; the last of them may be called the original one."""
    rest = iter(parts)
    *first, last = wanted
    return all(part in rest for part in first) and any(part in (last, f"{last}_orig") for part in rest)


def _put(owner: Any, leaf: str, value: torch.Tensor) -> None:
    """Replace a module's parameter or buffer by one of another type."""
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def dtype_name(dtype: torch.dtype | None) -> str:
    """A type as people write it: 'float32'."""
    return str(dtype).removeprefix("torch.")


def _return_freed_memory() -> None:
    """Hand freed memory back to the system: glibc keeps that of small tensors, and the peak would creep up with the layers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
