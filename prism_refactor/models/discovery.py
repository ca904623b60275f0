"""How a Mixture-of-Experts model can be split: found from its modules and config, and proven (proof.py) on a small model of its kind.

Nothing here knows a family by its name. `discover` makes the config small (`reduced`), and finds which keys set the number of experts,
their width and the number that a token uses, by building it with one key changed at a time, without weights.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from prism_refactor.errors import InputError, one_line
from prism_refactor.models.architectures import own_routing, routing_state, size_in
from prism_refactor.models.modeling_prism import PLAIN, inner_projection, router_of
from prism_refactor.models.proof import TRIED, Proof, Reference, moe_blocks, prove, prove_in_place
from prism_refactor.models.transformers_models import FusedExperts, build_meta_model

_EXPERTS, _ACTIVE = 12, 2
# What families call the number of experts that a token uses.
ACTIVE_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
_SHARED_WIDTHS = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim")
# What keys that many families share are made at most. All sizes differ, so that a tensor's shape tells which it has.
_SMALL: dict[str, int] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(ACTIVE_KEYS, _ACTIVE),
    **dict.fromkeys(("n_group", "num_expert_group", "zero_expert_num"), 4),
    **dict.fromkeys(("topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 2),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("hidden_size", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "d_ff"), 48),
    "intermediate_size_mlp": 56,
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(_SHARED_WIDTHS, 40),
    **dict.fromkeys(("num_attention_heads", "swa_num_attention_heads"), 4),
    **{"q_lora_rank": 28, "kv_lora_rank": 20, "vocab_size": 256, "max_position_embeddings": 512, "sliding_window": 16},
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_topk", "sliding_window_size"), 16),
    **{"index_n_heads": 2, "index_head_dim": 32, "rel_extent": 64, "router_hidden_size": 36, "d_rel": 8},
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "chunk_size", "mamba_chunk_size"), 16),
}
# Of a head; kept where positions have a factor for each of its dimensions.
_HEAD: dict[str, int] = {
    **dict.fromkeys(("head_dim", "swa_head_dim", "qk_head_dim"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 16),
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Layers that predict further tokens are no part of the model that is split.
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_modules", "num_mtp_layers", "mtp_num_hidden_layers")
NO_EXPERTS = "it has no experts"
_SHORTEST, _LONGEST = 4, 12
_LARGEST = 10**8
# Keys of the number of groups of experts, and of how many of them a token's experts are chosen from.
_GROUPS, _KEPT_GROUPS = ("n_group", "num_expert_group"), "topk_group"


def reduced(config: Any) -> Any:
    """Return a config of the same kind with small sizes, the same flags, and a layer of every kind, with the one behind it.

    Raises:
        InputError: transformers does not take the smaller sizes.
    """
    before = config_values(config)
    values = dict(before)
    layers_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    layers = values.get(layers_key, getattr(config, "num_hidden_layers", None))
    if not isinstance(layers, int) or layers < 1:
        raise InputError(f"{layers_key} is {layers}")
    per_layer = {key: value for key, value in values.items() if isinstance(value, list) and len(value) == layers}
    kinds = [repr(kind) for kind in zip(*per_layer.values(), strict=True)]
    # And the layer behind it, which may be given something by it.
    first = {kinds.index(kind) + behind for kind in kinds for behind in (0, 1)}
    kept = sorted({*range(min(layers, _SHORTEST)), *(index for index in first if index < layers)})[:_LONGEST]
    values |= {key: [value[index] for index in kept] for key, value in per_layer.items()}
    values |= {key: 0 for key in FURTHER_LAYERS if values.get(key)}
    values |= {key: value for key, value in PLAIN.items() if key in values}
    if layers_key in values:
        values[layers_key] = len(kept)
    own = values.get("per_layer_config")
    if isinstance(own, dict):
        values["per_layer_config"] = {str(new): own[str(old)] for new, old in enumerate(kept) if str(old) in own}
    rotary = values.get("rope_parameters")
    by_dimension = isinstance(rotary, dict) and any(isinstance(value, list) for value in rotary.values())
    values |= _shrunk(values, _SMALL if by_dimension else _SMALL | _HEAD)
    if by_dimension and values.get("head_dim") is None and isinstance(before.get("num_attention_heads"), int):
        # Heads have a share of the hidden size.
        values["hidden_size"] = before["hidden_size"] // before["num_attention_heads"] * values["num_attention_heads"]
    for heads in ("num_attention_heads", "swa_num_attention_heads"):
        shared = heads.replace("attention", "key_value")
        if isinstance(values.get(shared), int) and isinstance(before.get(heads), int):
            # As many as heads, fewer, or one: whatever divides.
            values[shared] = values[heads] if before[shared] == before[heads] else min(2, values[shared])
    if before.get("head_dim") is not None and before["head_dim"] == before.get("qk_rope_head_dim"):
        # One number under two names.
        values["head_dim"] = values["qk_rope_head_dim"]
    values |= {key: token for key, token in _TOKENS.items() if values.get(key) is not None}
    for key in ("mlp_only_layers", "moe_layers"):
        if isinstance(values.get(key), list):
            values[key] = [index for index in values[key] if index < len(kept)]
    if isinstance(values.get("moe_layer_end_index"), int):
        values["moe_layer_end_index"] = min(values["moe_layer_end_index"], len(kept) - 1)
    return _with(config, values)


def _shrunk(values: dict[str, Any], most: dict[str, int]) -> dict[str, Any]:
    """Sizes, or lists of them, that are made smaller."""
    found: dict[str, Any] = {}
    for key, largest in most.items():
        value = values.get(key)
        if isinstance(value, int) and value > largest:
            found[key] = largest
        elif isinstance(value, list) and all(isinstance(each, int) for each in value):
            found[key] = [min(each, largest) for each in value]
    return found


def config_values(config: Any) -> dict[str, Any]:
    """A config as JSON values."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    for key in ("transformers_version", "dtype", "torch_dtype", "quantization_config", "auto_map", "architectures"):
        values.pop(key, None)
    return values


def _with(config: Any, values: dict[str, Any]) -> Any:
    """A config of the same class with some values changed."""
    try:
        return type(config).from_dict(copy.deepcopy(config_values(config) | values))
    except Exception as error:
        raise InputError(f"transformers does not take the sizes of a small model of its kind: {one_line(error)}") from error


def first_layer(config: Any) -> Any:
    """Return a config of the same kind and sizes with one layer."""
    layers = config.num_hidden_layers
    values = {key: value[:1] for key, value in config_values(config).items() if isinstance(value, list) and len(value) == layers}
    return _with(config, values | {"num_hidden_layers": 1})


class Sketch:
    """A small model without weights, looked at.

    Args:
        config: of the model.

    Attributes:
        blocks: (name, MoE block) of every layer that has experts.
        experts, width, top_k: E, C, and how many a token uses.

    Raises:
        InputError: it cannot be built, or its experts cannot be split; the message says why.
    """

    def __init__(self, config: Any):
        try:
            self.model = build_meta_model(config, torch.float32, text_only=True)
        except Exception as error:
            raise InputError(f"transformers cannot build a language model of it: {one_line(error)}") from error
        size = sum(value.numel() for value in self.model.parameters())
        if size > _LARGEST:
            raise InputError(f"a small model of its kind has {size} parameters, because its config has sizes that are not known")
        self.blocks = list(moe_blocks(self.model))
        if not self.blocks:
            raise InputError(_why_no_blocks(self.model))
        for name, block in self.blocks:
            obstacle = _obstacle(block)
            if obstacle:
                raise InputError(f"{name}: {obstacle}")
        first = self.blocks[0][1]
        self.experts, _, self.width = FusedExperts(first.experts).shape
        self.top_k = _active(first, config)
        if not 1 <= self.top_k <= self.experts:
            raise InputError(f"{self.experts} experts, of which a token uses {self.top_k}, make no router; correct the config")
        self._inside = {f"{name}.experts." for name, _ in self.blocks}
        self.routing = {f"{name}.{leaf}" for name, block in self.blocks for leaf in routing_state(block)}

    def outside(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that is not one of the experts'."""
        state = self.model.state_dict()
        return {name: tuple(value.shape) for name, value in state.items() if not name.startswith(tuple(self._inside))}


def _why_no_blocks(model: Any) -> str:
    fused = [name for name, module in model.named_modules() if getattr(getattr(module, "down_proj", None), "ndim", 0) == 3]
    if fused:
        return f"its experts, {fused[0]}, are not in a block with a router in a list of decoder layers"
    classes = sorted({type(module).__name__ for module in model.modules() if "Expert" in type(module).__name__})
    return f"its experts ({classes[0]}) are not one fused module" if classes else NO_EXPERTS


def _obstacle(block: Any) -> str | None:
    """Why the experts of a block cannot be split; None if they can."""
    experts = block.experts
    if getattr(experts, "has_post_expert_norm", False):
        return "a norm behind every expert: a sum of parts is not normed like the whole"
    if not hasattr(experts, inner_projection(experts)):
        return "its experts are not fused"
    if not all(hasattr(experts, flag) for flag in ("num_experts", "has_bias", "is_transposed", "is_concatenated")):
        return f"{type(experts).__name__} does not follow transformers' interface of experts"
    if len(own_routing(block)) > 1:
        return "more than one routing tensor outside its router"
    return None


def _active_keys(config: Any) -> list[str]:
    """The keys of a config that may hold the number of experts that a token uses, by their names."""
    return [key for key in ACTIVE_KEYS if getattr(config, key, None)]


def _active(block: Any, config: Any) -> int:
    """How many experts a block's router chooses: as it says, as it does without weights, or as the config says; 0 if none does."""
    router = router_of(block)
    if isinstance(getattr(router, "top_k", None), int):
        return int(router.top_k)
    try:
        _, _, chosen = router(torch.empty(1, FusedExperts(block.experts).shape[1], device="meta"))
        return int(chosen.shape[1])
    except Exception:
        return next((size_in(config, key) for key in _active_keys(config)), 0)


def _size_keys(config: Any, plain: Sketch) -> list[str]:
    """The keys of the number of experts, of a token's experts, and of their width, where they are not to change."""
    values = config_values(config)

    def found(old: int, new: int, fits: Callable[[Sketch], bool]) -> str | None:
        candidates = [key for key, value in values.items() if value == old and _is_size(value)]
        return next((key for key in candidates if _fits(config, {key: new}, fits)), None)

    keys = [
        found(plain.experts, plain.experts * TRIED, lambda new: new.experts == plain.experts * TRIED),
        next((key for key in _active_keys(config) if size_in(config, key) == plain.top_k), None),
        found(plain.width, plain.width // TRIED, lambda new: new.width == plain.width // TRIED),
    ]
    if None in keys:
        raise InputError("no keys of its config set the sizes of its experts")
    return [str(key) for key in keys]


def _find_keys(config: Any, plain: Sketch, multiplied: tuple[str, ...]) -> tuple[list[str], Any]:
    """The keys that change, and the config with experts split into `TRIED`: number, top-k, width, then others that are multiplied.

    Some of the latter may be given.
    """
    wanted: list[tuple[str, int, int, Callable[[Sketch], bool]]] = [
        ("experts", plain.experts, plain.experts * TRIED, lambda new: new.experts == plain.experts * TRIED),
        ("experts of a token", plain.top_k, plain.top_k * TRIED, lambda new: new.top_k == plain.top_k * TRIED),
        ("neurons of an expert", plain.width, plain.width // TRIED, lambda new: new.width == plain.width // TRIED),
    ]
    values: dict[str, Any] = config_values(config)
    changed: dict[str, int] = {}
    for what, old, new, fits in wanted:
        candidates = [key for key, value in values.items() if value == old and _is_size(value) and key not in changed]
        # On top of what was found: a token may use more experts than there were.
        key = next((key for key in candidates if _fits(config, changed | {key: new}, fits)), None)
        if key is None:
            raise InputError(f"no key of its config sets the number of {what} ({old} in the small model)")
        changed[key] = new
    changed |= {key: values[key] * TRIED for key in multiplied}
    shapes = plain.outside()
    wrong = _unlike(_sketch(config, changed), plain, shapes)
    for key, value in values.items():
        if wrong and key not in changed and _is_size(value):
            try:
                left = _unlike(_sketch(config, changed | {key: value * TRIED}), plain, shapes)
            except InputError:
                continue
            if len(left) < len(wrong):
                wrong, changed[key] = left, value * TRIED
    if wrong:
        raise InputError(f"{wrong[0]} changes its shape with the sizes of the experts")
    return list(changed), _with(config, changed)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _sketch(config: Any, values: dict[str, int]) -> Sketch:
    return Sketch(_with(config, values))


def _fits(config: Any, values: dict[str, int], fits: Callable[[Sketch], bool]) -> bool:
    try:
        return fits(_sketch(config, values))
    except InputError:
        return False


def _unlike(split: Sketch, plain: Sketch, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Tensors outside the experts that are not as before, but for the routing's, which have a row for each expert."""
    new = split.outside()

    def follows(name: str) -> bool:
        if name not in new or new[name] == shapes[name]:
            return name in new
        if name not in plain.routing or len(new[name]) != len(shapes[name]):
            return False
        grown = (plain.experts, plain.experts * TRIED)
        return all(pair in (grown, (pair[0], pair[0])) for pair in zip(shapes[name], new[name], strict=True))

    return [name for name in shapes if not follows(name)]


_known: dict[str, Proof] = {}


def discover(config: Any) -> Proof:
    """Find and prove how the experts of a transformers config can be split; about two seconds, the same config again takes none.

    Raises:
        InputError: they cannot be, and why.

    Example:
        >>> discover(AutoConfig.from_pretrained("OLMoE-1B-7B")).architecture.num_experts
        'num_experts'
    """
    name = json.dumps([type(config).__name__, config_values(config)], sort_keys=True)
    if name not in _known:
        with _one_thread():
            _known[name] = _discover(config)
    return _known[name]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small products take longer with several threads, and much longer where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _discover(config: Any) -> Proof:
    small = reduced(config)
    plain, values = Sketch(small), config_values(small)
    groups = [(key, _KEPT_GROUPS) for key in _GROUPS if (values.get(key) or 1) > 1]
    reference = Reference(small)
    try:
        return prove(reference, groups, lambda multiplied: _find_keys(small, plain, multiplied))
    except InputError as error:
        try:
            return prove_in_place(reference, _size_keys(small, plain), str(error))
        except InputError:
            raise error from None
