"""How the experts of a Mixture-of-Experts model are split: which config keys change, and what becomes of its routing tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prism_refactor.errors import InputError, UsageError
from prism_refactor.formats import PrismConfig
from prism_refactor.models.modeling_prism import ROUTER_NAMES, router_of
from prism_refactor.models.transformers_models import MoeBlock


@dataclass(frozen=True)
class Architecture:
    """How one kind of model is split; `discovery.discover` finds it.

    Attributes:
        num_experts, top_k, width: config keys of its sizes.
        multiplied: further config keys that are multiplied with N: of shared experts, whose common width is that many times `width`.
        shared_weight: whether the N copies of a chosen expert share its weight; else each has all of it.
        divided: routing tensors, by their names in the block, that are divided by N: corrections of scores that copies share.
        grouped: config key of the number of groups of experts, where the router chooses among groups by more than their best expert; it is
            one of `multiplied`, and sub-experts lie as `modeling_prism.places` says.
        carried: arguments in which a decoder layer gets what the one before gives beside hidden states, in their order; empty for what none
            gets.
        tokens: arguments in which a decoder layer gets the token ids.
        streams: hidden states of a token between layers.
        plain_router: whether the router reads the rows that the experts read, and nothing else but tensors of its block, and has a `top_k`.
        stock: whether the family's own classes can run the split model; see `PrismConfig.stock`.
    """

    num_experts: str
    top_k: str
    width: str
    multiplied: tuple[str, ...] = ()
    shared_weight: bool = True
    divided: tuple[str, ...] = ()
    grouped: str | None = None
    carried: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    streams: int = 1
    plain_router: bool = True
    stock: bool = True

    @classmethod
    def of_refactored(cls, prism: PrismConfig) -> "Architecture":
        """Return what a refactored checkpoint says about its original; `divided` and `streams` are not known."""
        num_experts, top_k, width, *multiplied = prism.keys or prism.source
        known: Any = {
            "carried": tuple(prism.carried),
            "tokens": tuple(prism.tokens),
            "stock": prism.stock,
            "plain_router": prism.plain_router,
        }
        return cls(num_experts, top_k, width, tuple(multiplied), prism.factor > 1, **known)

    @property
    def keys(self) -> tuple[str, ...]:
        """All config keys that change."""
        return (self.num_experts, self.top_k, self.width, *self.multiplied)

    def sizes(self, config: Any) -> dict[str, int]:
        """Return the sizes that change, as {config key: value}, from a transformers config, in the order of `keys`."""
        return {key: size_in(config, key) for key in self.keys}

    def groups(self, config: Any) -> int:
        """Return how many groups of experts a transformers config of the original has; 1 where they do not matter."""
        return int(getattr(config.get_text_config(), self.grouped)) if self.grouped else 1

    def refactored_sizes(self, config: Any, sub_experts: int) -> dict[str, int]:
        """The sizes after splitting every expert into `sub_experts`.

        Raises:
            UsageError: `sub_experts` is not a power of two greater than one or does not divide the expert width.
        """
        sizes = self.sizes(config)
        if sub_experts < 2 or sub_experts & (sub_experts - 1):
            raise UsageError(
                f"`sub_experts` {sub_experts}: must be a power of two (2, 4, 8, ...), so that scaling down_proj by it is exact"
            )
        if sizes[self.width] % sub_experts:
            raise UsageError(
                f"`sub_experts` {sub_experts}: does not divide the expert width {sizes[self.width]} ({self.width} in config.json)"
            )
        return {key: value // sub_experts if key == self.width else value * sub_experts for key, value in sizes.items()}

    def factor(self, sub_experts: int) -> int:
        """Return what `down_proj` must be multiplied with."""
        return sub_experts if self.shared_weight else 1


def dotted(*names: str | None) -> str:
    """Join the names of modules; a module's own name in itself is empty."""
    return ".".join(filter(None, names))


def size_in(config: Any, key: str) -> int:
    """Return a size from a transformers config, where it may be a number or a list of one for each layer, all the same.

    Raises:
        InputError: it is no number, or layers differ.
    """
    value = getattr(config.get_text_config(), key, None)
    found = value if isinstance(value, list) else [value]
    if len(set(map(str, found))) > 1:
        raise InputError(f"its layers differ in {key}; such models are not split")
    if not found or not isinstance(found[0], int):
        raise InputError(f"{key} is {value}; correct the config")
    return found[0]


def router_name(block: object) -> str | None:
    """What a MoE block calls its router."""
    return next((name for name in ROUTER_NAMES if isinstance(getattr(block, name, None), nn.Module)), None)


def routing_state(block: MoeBlock) -> dict[str, Any]:
    """Every tensor that routes a MoE block, by its name in the block: its router's, and those it holds itself."""
    name = router_name(block)
    return {f"{name}.{leaf}": value for leaf, value in block.get_submodule(str(name)).state_dict().items()} | own_routing(block)


def own_routing(block: MoeBlock) -> dict[str, torch.Tensor]:
    """Tensors that a MoE block holds itself and gives its router: those with a number for each expert."""
    own = [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
    return {name: value for name, value in own if block.experts.num_experts in value.shape}


def routing(block: MoeBlock, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The plain router's logits [T, E], weights [T, K] and experts int64 [T, K] for inputs [T, H]."""
    router, own = router_of(block), own_routing(block).values()
    try:
        logits, weights, experts = router(inputs, *own)
    except ValueError:
        # AFMoE's takes a batch of rows.
        logits, weights, experts = router(inputs[None], *own)
    return logits, weights, experts


def replaced_parts(name: str, block: MoeBlock, stock: bool = True) -> list[str]:
    """Modules and buffers of the MoE block called `name` that a refactoring replaces: router, experts, routing tensors of its own.

    Where the result is no stock model of split experts, only the experts.
    """
    routers = [router_name(block), *own_routing(block)] if stock else []
    return [f"{name}.{part}" for part in ("experts", *routers)]


def original_routing(block: MoeBlock) -> dict[str, torch.Tensor]:
    """Return what the router file keeps of the original block: its router's state as 'original.*', and the 'correction' it holds itself."""
    router = f"{router_name(block)}."
    return {
        f"original.{name.removeprefix(router)}" if name.startswith(router) else "correction": value.detach()
        for name, value in routing_state(block).items()
    }


def repeat_routing(source: MoeBlock, target: MoeBlock, architecture: Architecture, held: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the routing tensors of the refactored block, by their names in it: what is there per expert, for each of its sub-experts.

    With every row repeated the N copies of a chosen expert are all chosen.

    Args:
        source, target: the block before and after; of the latter only shapes are read.
        architecture: of the model.
        held: int64 [E, N], where each sub-expert lies, see `modeling_prism.places`.
    """
    sub_experts = held.shape[1]
    # Of which expert each place holds a part.
    experts = held.flatten().argsort() // sub_experts
    repeated, shapes = {}, {name: value.shape for name, value in routing_state(target).items()}
    for name, value in routing_state(source).items():
        grown = [axis for axis, size in enumerate(value.shape) if shapes[name][axis] != size]
        # Not per expert: the same before and after.
        copies = value.detach().index_select(grown[0], experts.to(value.device)) if grown else value.detach()
        repeated[name] = copies / sub_experts if name in architecture.divided else copies
    return repeated
