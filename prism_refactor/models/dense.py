"""Dense models, read as Mixture-of-Experts models of one expert, each of a family that is alike but for its experts.

A layer's feed-forward network is the expert. The router has one row, of zeros: the expert has all the weight, and the model gives what the
dense one gives. After that it is split as any other. Which family is alike stands in a table, and is proven on a small random model of
each config. In a model of images and text it is the text model that is read so; the rest stays as it is.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prism_refactor.errors import InputError, one_line
from prism_refactor.models.discovery import config_values, first_layer, reduced
from prism_refactor.models.modeling_prism import auto_class, family_classes, moe_block
from prism_refactor.models.proof import TOLERANCE, random_model
from prism_refactor.models.stored import Stored
from prism_refactor.models.transformers_models import Conversion, build_meta_model, layers_of

# Stands for the width of the dense feed-forward network.
_WIDTH = "width"
_ONE = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": _WIDTH}
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_MIXTRAL = ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1})
_QWEN2_MOE = ("qwen2_moe", _ONE | _EVERY_LAYER | {"shared_expert_intermediate_size": 0})
# Dense model type -> the family that is alike, and what its config has beside the dense one's.
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere2": ("cohere2_moe", {"num_experts": 1, "num_experts_per_tok": 1}),
    "ernie4_5": (
        "ernie4_5_moe",
        {"moe_num_experts": 1, "moe_k": 1, "moe_intermediate_size": _WIDTH, "moe_num_shared_experts": 0, "moe_layer_start_index": 0},
    ),
    "granite": ("granitemoe", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    # Scores are sigmoids, of zero here.
    "lfm2": ("lfm2_moe", _ONE | {"num_dense_layers": 0, "norm_topk_prob": False, "routed_scaling_factor": 2.0}),
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "olmo2": ("flex_olmo", {"num_experts": 1, "num_experts_per_tok": 1}),
    "phi3": _MIXTRAL,
    "qwen2": _QWEN2_MOE,
    "qwen3": ("qwen3_moe", _ONE | _EVERY_LAYER),
    "qwen3_5_text": ("qwen3_5_moe_text", _ONE | {"shared_expert_intermediate_size": 0}),
    "qwen3_vl_text": ("qwen3_vl_moe_text", _ONE | _EVERY_LAYER),
    "seed_oss": _QWEN2_MOE,
}
# Models of images and text whose text model is of one family: the one that is alike. Others take a text model of any family.
WRAPPERS = {"qwen3_5": "qwen3_5_moe", "qwen3_vl": "qwen3_vl_moe"}
# What a dense layer calls the matrices of its feed-forward network: gate and up, then down.
_FEED_FORWARD = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate_up_proj", "down_proj"))
# Config keys that transformers' models read and not all config classes have.
_UNDECLARED = ("head_dim",)
# Where one dense matrix holds several of the twin's: {its name: theirs}.
_JOINED = {"qkv_proj.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight")}


def has_twin(config: Any) -> bool:
    """Whether a transformers config is of a dense model that may have a twin, or of one of images and text around such a model."""
    text = config.get_text_config()
    return text.model_type in TWINS and (text is config or auto_class(config) is AutoModelForImageTextToText)


class Twin:
    """The Mixture-of-Experts model of one expert that a dense model is read as.

    Args:
        config: of the dense model, see `has_twin`.

    Attributes:
        config: of the twin.
        inside: the model type of its text model, where it takes the place of the dense one in a model of images and text that keeps its
            type; None otherwise.
        difference: the largest one of a logit between a small random model of this kind (of its text model) and its twin, in units of the
            logits' standard deviation where that is above 1.

    Raises:
        InputError: the twin of a small random model of this kind does not give the same.
    """

    def __init__(self, config: Any):
        self.dense = config
        text = config.get_text_config()
        positions = getattr(text, "rope_parameters", None) or {}
        if positions.get("rope_type") == "longrope":
            # The twin would keep what it has computed with the others.
            raise InputError("its positions have other factors behind a length (longrope), where it computes all of the text again")
        turned = positions.get("partial_rotary_factor")
        if text.model_type == "phi3" and turned not in (None, 1):
            raise InputError(f"a part of each head has positions (partial_rotary_factor {turned}), and all of it in its twin")
        try:
            self.config = _twin_config(config)
            own = self.config.get_text_config()
            keeps_type = own is not self.config and self.config.model_type == config.model_type
            self.inside: str | None = own.model_type if keeps_type else None
            self.difference = _proven_difference(text)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"transformers does not run a small model of its kind: {one_line(error)}") from error

    def stored(self, shapes: dict[str, tuple[int, ...]], types: dict[str, str]) -> tuple[dict[str, Stored], set[str]]:
        """Find what the twin's tensors are in the dense checkpoint.

        Args:
            shapes, types: of every tensor of the checkpoint, by its name there; types as safetensors writes them.

        Returns:
            ({tensor of the twin: how it is stored}, names of the checkpoint's tensors that are not the twin's).

        Raises:
            InputError: transformers cannot build the model, a tensor is missing or has another shape than the config says, or some that
                become one have several types.
        """
        try:
            dense, twin = (build_meta_model(config, torch.float32) for config in (self.dense, self.config))
        except Exception as error:
            raise InputError(f"transformers cannot build this model: {one_line(error)}") from error
        state = dense.state_dict()
        conversion = Conversion(dense)
        on_disk = {conversion.target(name, state): name for name in shapes}
        found, prefix, made = {}, f"{dense.base_model_prefix}.", _made_of(dense, twin)
        used = {part for made_of, _, _ in made.values() for part in made_of}
        if all(on_disk.get(part) == part.removeprefix(prefix) for part in used):
            # Saved without the head: what is made has the prefix, so the rest gets it too.
            bare = [name for target, name in on_disk.items() if target == prefix + name and target not in used]
            found = {prefix + name: Stored((name,), shapes[name], types[name], _as_it_is) for name in bare}
        for name, (made_of, shape, make) in made.items():
            parts = tuple(on_disk.get(part, part) for part in made_of)
            for part, own in zip(parts, made_of, strict=True):
                _check_part(part, tuple(state[own].shape), shapes)
            if len({types[part] for part in parts}) > 1:
                stored = " and ".join(types[part] for part in parts)
                raise InputError(f"tensors {' and '.join(parts)} are stored in {stored}; convert the checkpoint to one type")
            found[name] = Stored(parts, shape, types[parts[0]], make)
        return found, {part for stored in found.values() for part in stored.parts}


def _check_part(name: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise InputError unless a tensor of the dense model is in the checkpoint, as config.json says."""
    if name not in shapes:
        raise InputError(f"tensor {name} is missing; complete the checkpoint")
    if shapes[name] != shape:
        raise InputError(
            f"tensor {name} has shape {list(shapes[name])}, config.json says {list(shape)}; one of them belongs to another model"
        )


def _twin_config(config: Any) -> Any:
    text = config.get_text_config()
    family, values = TWINS[text.model_type]
    # One layer has the width of all; a config may say that there are millions.
    width = _feed_forward(layers_of(build_meta_model(first_layer(text), torch.float32, text_only=True))[1][0])[1][-1].shape[1]
    found = _as_family(text, family, {key: width if value == _WIDTH else value for key, value in values.items()})
    if text is not config:
        found = _around(config, found)
    classes: Any = family_classes(found)
    if type(found) in classes:
        found.architectures = [classes[type(found)].__name__]
    found.dtype = config.dtype or text.dtype
    return found


def _around(config: Any, text: Any) -> Any:
    """The config of a model of images and text with another text model."""
    if config.model_type in WRAPPERS:
        return _as_family(config, WRAPPERS[config.model_type], {"text_config": text.to_dict()})
    found = copy.deepcopy(config)
    found.text_config = text
    return found


def _as_family(config: Any, family: str, values: dict[str, Any]) -> Any:
    """A config of another model type that says the same, as far as that type has the keys, with some values of its own."""
    like = CONFIG_MAPPING[family]()
    # Not under another name either what is given here.
    own = {"model_type", *(alias for alias, key in like.attribute_map.items() if key in values)}
    given = {key: value for key, value in config_values(config).items() if key not in own and (hasattr(like, key) or key in _UNDECLARED)}
    for part in (value for key, value in given.items() if key.endswith("_config") and isinstance(value, dict)):
        # The parts of a model of images and text have types of their own in each family.
        part.pop("model_type", None)
    try:
        return type(like).from_dict(given | values)
    except Exception as error:
        raise InputError(f"transformers does not take its config as one of {family}: {one_line(error)}") from error


def _feed_forward(layer: nn.Module) -> tuple[list[str], list[torch.Tensor]]:
    """Names in the layer, and values, of the matrices of its feed-forward network: gate and up or both in one, then down."""
    for name, module in layer.named_modules():
        for leaves in _FEED_FORWARD:
            found = [matrix for leaf in leaves if isinstance(matrix := getattr(module, leaf, None), nn.Linear)]
            if len(found) == len(leaves):
                return [f"{name}.{leaf}.weight" for leaf in leaves], [matrix.weight for matrix in found]
    raise InputError(f"{type(layer).__name__} has no gated feed-forward network")


# (tensors of the dense model, shape of the twin's, how it is made of them).
_Made = tuple[tuple[str, ...], tuple[int, ...], Callable[..., torch.Tensor]]


def _made_of(dense: Any, twin: Any) -> dict[str, _Made]:
    """What becomes of a dense model's tensors: of every tensor of the twin that is not also the dense model's, how it is made.

    Raises:
        InputError: the twin has a tensor that is not to be had, or the dense model one that has no place.
    """
    before, after = ({name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (dense, twin))
    made: dict[str, _Made] = {}
    (dense_name, dense_layers), (name, layers) = layers_of(dense), layers_of(twin)
    for index, (old, new) in enumerate(zip(dense_layers, layers, strict=True)):
        block = moe_block(new)
        if block is None:
            raise InputError(f"layer {index} of its twin has no experts")
        *gates, down = [f"{dense_name}.{index}.{leaf}" for leaf in _feed_forward(old)[0]]
        prefix = f"{name}.{index}.{block[0]}"
        made |= {
            f"{prefix}.experts.gate_up_proj": ((*gates,), after[f"{prefix}.experts.gate_up_proj"], _one_expert),
            f"{prefix}.experts.down_proj": ((down,), after[f"{prefix}.experts.down_proj"], _one_expert),
        }
        # Its router, and what else it has: an empty shared expert.
        inside = [leaf for leaf in after if leaf.startswith(f"{prefix}.") and leaf not in made]
        made |= {leaf: ((down,), after[leaf], functools.partial(_zeros, after[leaf])) for leaf in inside}
    made |= dict(_cut_from(before, after))
    used = {part for parts, _, _ in made.values() for part in parts}
    for leaf, shape in after.items():
        if leaf not in made and before.get(leaf) != shape:
            raise InputError(
                f"its twin, {type(twin).__name__}, has {leaf} of shape {list(shape)}, and the dense model has nothing to make it of"
            )
    left = sorted(before.keys() - after.keys() - used)
    if left:
        raise InputError(f"{left[0]} has no place in its twin, {type(twin).__name__}")
    return made


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _one_expert(*matrices: torch.Tensor) -> torch.Tensor:
    """The rows of some matrices as those of an expert, [1, rows, columns]."""
    return torch.cat(matrices)[None]


def _zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros(shape)


def _cut_from(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, _Made]]:
    """(name, how it is made) of tensors of the twin that are some rows of one of the dense model's."""
    for joined, parts in _JOINED.items():
        for name in before:
            if not name.endswith(joined):
                continue
            names, first = [name.removesuffix(joined) + part for part in parts], 0
            for part in names:
                rows = slice(first, first + after[part][0])
                first = rows.stop
                yield part, ((name,), after[part], functools.partial(_rows, rows))


def _rows(rows: slice, matrix: torch.Tensor) -> torch.Tensor:
    return matrix[rows]


@torch.inference_mode()
def _proven_difference(config: Any) -> float:
    """`Twin.difference`. Raises InputError when it is not rounding."""
    small = reduced(config)
    twin_config = _twin_config(small)
    dense = random_model(small)
    twin = random_model(twin_config)
    state, own = dense.state_dict(), twin.state_dict()
    made = _made_of(dense, twin)
    for name, value in own.items():
        parts, _, make = made.get(name, ((name,), None, _as_it_is))
        value.copy_(make(*(state[part] for part in parts)))
    ids = torch.randint(3, small.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    expected, found = (model(input_ids=ids, use_cache=False)[0] for model in (dense, twin))
    difference: float = (expected - found).abs().max().item() / max(1.0, expected.std().item())
    if not difference < TOLERANCE:
        raise InputError(f"as one of {twin_config.model_type} with one expert it gives other logits, by {difference:.2g}")
    return difference
