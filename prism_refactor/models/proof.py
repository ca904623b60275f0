"""Proof that a split of experts is exact: a small random model and what becomes of it give the same.

`prove` splits a small model in every way that may be right, and accepts the one whose logits and experts' outputs are the source's, with
the stock router and with the two-level router, where every other way is further off. `prove_in_place` cuts the experts of a model that is
else left as it is.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prism_refactor.errors import InputError, one_line
from prism_refactor.formats import PrismConfig
from prism_refactor.models.architectures import Architecture, dotted, original_routing, repeat_routing, routing, routing_state
from prism_refactor.models.experts import experts_forward
from prism_refactor.models.modeling_prism import ActiveK, cut, full_k, install, moe_block, places, router_of, two_level_router, uninstall
from prism_refactor.models.transformers_models import FusedExperts, build_model, layers_of, named_arguments, run_experts_with

# The split that is tried, the largest difference that counts as equal, and how much worse every other plan must be.
TRIED, TOLERANCE, WORSE = 2, 1e-4, 10
# Tokens of the random texts.
_LENGTH = 24
# Finds, for further keys that are multiplied, (all keys that change, the config of the split model).
FindKeys = Callable[[tuple[str, ...]], tuple[list[str], Any]]


def moe_blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, MoE block) of every decoder layer that has experts."""
    name, layers = layers_of(model)
    for index, layer in enumerate(layers):
        found = moe_block(layer)
        if found is not None:
            yield dotted(name, str(index), found[0]), found[1]


@dataclass(frozen=True)
class Proof:
    """What `discover` found.

    Attributes:
        architecture: how the model is split.
        experts: class of the experts module.
        stock: largest difference of a logit, or of an output of the experts, between the small model and its split, at full k; in units of
            the standard deviation of what differs, where that is above 1. Where its own classes cannot run the split one, of the model with
            neurons in another order.
        two_level: the same with the two-level router.
        runner_up: of the second best plan; 0 where there is one plan.
        obstacle: why its own classes cannot run the split model; None if they can.
    """

    architecture: Architecture
    experts: str
    stock: float
    two_level: float
    runner_up: float = 0.0
    obstacle: str | None = None


def random_model(config: Any) -> Any:
    """A model with random weights: biases and corrections are not zero, norms not one, and the router's rows large."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(config, torch.float32, text_only=True)
        # It takes experts of any width.
        run_experts_with(model, "eager")
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            # Of buffers those that a checkpoint holds, but no tables: MiniMax's say what is causal.
            learned = isinstance(value, nn.Parameter) or (name in model.state_dict() and value.numel() == max(value.shape, default=1))
            if not (learned and value.is_floating_point()):
                continue
            if value.ndim >= 2 and min(value.shape) > 1:
                value.data.normal_(std=0.1)
            elif not name.endswith(("A_log", "dt_bias")):
                value.data.add_(torch.randn_like(value), alpha=0.1)
        for _, block in moe_blocks(model):
            for value in router_of(block).parameters():
                value.data.mul_(4 if value.ndim == 2 else 1)
            for value in routing_state(block).values():
                if value.is_floating_point() and value.numel() == max(value.shape):
                    # Large enough to decide which experts are chosen.
                    value.data.normal_(std=0.3)
    return model


class _Run:
    """One forward of a model over random text.

    Args:
        model: the model.
        other: another text, whose first half is the same.

    Attributes:
        logits: [rows, T, V], of a model without a head its last hidden states [rows, T, H].
        outputs: of every experts module that ran, [T, H].
        given: its arguments: inputs [T, H], experts int64 [T, K], weights [T, K].
        ids: the text, int64 [rows, T].
        calls: of every decoder layer (hidden states, other arguments by name, output).
        leaves_for_later: whether layers are given an empty dict or list, and one has put something there for later ones.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, other: bool = False):
        self.outputs: list[torch.Tensor] = []
        self.given: list[tuple[torch.Tensor, ...]] = []
        self.calls: list[tuple[torch.Tensor, dict[str, Any], Any]] = []
        self._left: list[Any] = []
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(1)
        self.ids, others = (torch.randint(3, vocabulary, (2, _LENGTH), generator=generator) for _ in range(2))
        if other:
            self.ids[:, _LENGTH // 2 :] = others[:, _LENGTH // 2 :]
        handles = [block.experts.register_forward_hook(self._experts_ran) for _, block in moe_blocks(model)]
        layers = layers_of(model)[1]
        handles.append(layers[0].register_forward_pre_hook(self._look_at, with_kwargs=True))
        for layer in layers:
            handles.append(layer.register_forward_hook(self._layer_ran, with_kwargs=True))
        try:
            self.logits = model(input_ids=self.ids, use_cache=False)[0]
        finally:
            for handle in handles:
                handle.remove()
        self.leaves_for_later = any(self._left)

    def _experts_ran(self, _: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.given.append(given)
        self.outputs.append(output.flatten(0, -2))

    def _layer_ran(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        self.calls.append((given[0], named_arguments(layer, given[1:], named), output))

    def _look_at(self, _: nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._left = [value for value in named.values() if isinstance(value, dict | list) and not value]

    def difference(self, other: "_Run") -> float:
        """The largest one of a logit or an expert's output; infinite where not the same blocks ran."""
        if len(self.outputs) != len(other.outputs):
            return float("inf")
        pairs = zip([self.logits, *self.outputs], [other.logits, *other.outputs], strict=True)
        differences = [((one - two).abs().max() / two.std().clamp_min(1)).item() for one, two in pairs]
        return max(differences) if all(map(math.isfinite, differences)) else float("inf")


def _arguments_of_layers(model: Any, run: _Run) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`Architecture.carried` and `tokens`, from a run of a small model.

    Raises:
        InputError: its layers cannot be run one at a time: they are given more than hidden states, what the layer before gives, token ids,
            and what is the same for all text. Or it is not causal.
    """
    layer = type(layers_of(model)[1][0]).__name__
    refusal = InputError(f"its layers ({layer}) get more than hidden states, and arguments that are the same for all text")
    others = [output[1:] if isinstance(output, tuple) else () for _, _, output in run.calls]
    outputs = [output[0] if isinstance(output, tuple) else output for _, _, output in run.calls]
    unlike = any(output.shape != hidden.shape for output, (hidden, _, _) in zip(outputs, run.calls, strict=True))
    if unlike or run.leaves_for_later or len({len(each) for each in others}) > 1:
        raise refusal
    carried: list[str] = []
    for place in range(len(others[0])):
        pairs = [(before[place], named) for before, (_, named, _) in zip(others[:-1], run.calls[1:], strict=True)]
        # Some layers give nothing.
        names = [name for name in run.calls[-1][1] if all(named.get(name) is value for value, named in pairs)]
        given = any(value is not None for value, _ in pairs)
        if given and not names:
            raise refusal
        carried.append(names[0] if given else "")
    again = _Run(model, other=True)
    known = slice(_LENGTH // 2)
    if not (run.logits[:, known] - again.logits[:, known]).abs().max() < TOLERANCE * run.logits.std().clamp_min(1):
        raise InputError("it is no causal language model: what it says of a token depends on the text behind it")
    tokens: list[str] = []
    for (_, one, _), (_, other, _) in zip(run.calls, again.calls, strict=True):
        for name in one.keys() - set(carried) - set(tokens):
            if not _same(one[name], other[name]):
                if not _same(one[name], run.ids):
                    raise refusal
                tokens.append(name)
    return tuple(carried), tuple(sorted(tokens))


def _same(one: Any, other: Any) -> bool:
    """Whether an argument of a layer is the same for two texts."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return all(map(_same, one, other))
    if isinstance(one, dict):
        return all(_same(value, other[name]) for name, value in one.items())
    return True


@torch.inference_mode()
def _is_plain(model: Any, run: _Run) -> bool:
    """`Architecture.plain_router`, from a run of a small model."""
    for (_, block), (inputs, experts, _) in zip(moe_blocks(model), run.given, strict=True):
        router = router_of(block)
        own = getattr(router, "top_k", None)
        if own is None:
            return False
        try:
            _, _, found = routing(block, inputs)
            router.top_k = 1
            _, _, best = routing(block, inputs)
        except Exception:
            return False
        finally:
            router.top_k = own
        if not torch.equal(found, experts) or best.shape[1] != 1:
            return False
    return True


class Reference:
    """A random model of a small config, and what it gives: what its split is compared with.

    Args:
        config: small.

    Attributes:
        model: the model.
        exact: its run.
        facts: fields of its `Architecture` that say how it runs.

    Raises:
        InputError: it does not run, or cannot be run a layer at a time, or its experts are no ones that can be split.
    """

    def __init__(self, config: Any):
        self.model = random_model(config)
        try:
            self.exact = _Run(self.model)
        except Exception as error:
            raise InputError(f"a small model of its kind does not run: {one_line(error)}") from error
        self._check_experts()
        rows, length, _ = self.exact.logits.shape
        streams = self.exact.calls[0][0].numel() // (rows * length * config.hidden_size)
        carried, tokens = _arguments_of_layers(self.model, self.exact)
        plain = _is_plain(self.model, self.exact)
        self.facts: dict[str, Any] = {"carried": carried, "tokens": tokens, "streams": streams, "plain_router": plain}

    @torch.inference_mode()
    def _check_experts(self) -> None:
        if len(self.exact.outputs) != len(list(moe_blocks(self.model))):
            raise InputError("some of its MoE layers do not run on text")
        for (name, block), given, output in zip(moe_blocks(self.model), self.exact.given, self.exact.outputs, strict=True):
            inputs, experts, weights = given
            ours = experts_forward(block.experts, inputs, experts, weights)
            if not (ours - output).abs().max() / output.std().clamp_min(1) < TOLERANCE:
                raise InputError(f"{name}: {type(block.experts).__name__} computes otherwise than transformers' interface of experts")


def prove_in_place(reference: Reference, keys: list[str], obstacle: str) -> Proof:
    """Cut the experts of a small model, all else left as it is.

    Args:
        reference: the model, which is changed.
        keys: of the numbers of experts and of a token's experts, and of their width.
        obstacle: why its own classes cannot run the split model.

    Raises:
        InputError: the outputs change.
    """
    source, exact = reference.model, reference.exact
    experts, top_k, width = keys
    architecture = Architecture(experts, top_k, width, shared_weight=False, stock=False, **reference.facts)
    generator = torch.Generator().manual_seed(2)
    for _, block in moe_blocks(source):
        fused = FusedExperts(block.experts)
        for name, value in fused.reordered(_random_order(fused, generator)).items():
            getattr(block.experts, name).data.copy_(value)
    stock = _Run(source).difference(exact)
    for _, block in moe_blocks(source):
        cut(block.experts, TRIED)
    two_level = _two_level(source, source, architecture).difference(exact)
    if not max(stock, two_level) < TOLERANCE:
        raise InputError(f"cutting its experts in place changes its outputs by {max(stock, two_level):.2g}")
    return Proof(architecture, type(block.experts).__name__, stock, two_level, obstacle=obstacle)


def prove(reference: Reference, groups: list[tuple[str, str]], find_keys: FindKeys) -> Proof:
    """Split a small model in every way that may be right.

    Args:
        reference: the model.
        groups: pairs of its config's keys: of the number of groups of experts, and of how many of them are kept.
        find_keys: see `FindKeys`.

    Raises:
        InputError: no way is right.
    """
    source, exact = reference.model, reference.exact
    best = float("inf")
    # First without: a router that chooses groups by their best expert needs nothing for them.
    for multiplied in ((), *groups):
        grouped = multiplied[0] if multiplied else None
        keys, split = find_keys(multiplied)
        target = random_model(split)
        found = sorted(_differences(source, target, keys, reference.facts | {"grouped": grouped}, exact), key=lambda pair: pair[0])
        (difference, architecture), (second, _) = found[:2]
        best = min(best, difference)
        if difference < TOLERANCE and second > WORSE * difference:
            _fill(source, target, architecture)
            two_level = _two_level(source, target, architecture).difference(exact)
            if not two_level < TOLERANCE:
                raise InputError(f"with the two-level router its outputs change by {two_level:.2g}")
            return Proof(architecture, type(next(moe_blocks(source))[1].experts).__name__, difference, two_level, second)
    raise InputError(f"no way to split its experts leaves its outputs as they are; they change by {best:.2g}")


def _differences(source: Any, target: Any, keys: list[str], facts: dict[str, Any], exact: _Run) -> Iterator[tuple[float, Architecture]]:
    """(difference from the source, plan) of every plan with some keys; `facts`: fields of all."""
    # Of the split model, which has two experts at least.
    routing = routing_state(next(moe_blocks(target))[1])
    vectors = [name for name, value in routing.items() if value.ndim == 1 or min(value.shape) == 1]
    experts, top_k, width, *multiplied = keys
    # Where a token uses all experts, corrections of their scores decide nothing.
    count = 0 if getattr(source.config, experts) == getattr(source.config, top_k) else len(vectors)
    subsets = [chosen for size in range(count + 1) for chosen in itertools.combinations(vectors, size)]
    for shared, divided in itertools.product((True, False), subsets[:8]):
        architecture = Architecture(experts, top_k, width, tuple(multiplied), shared, divided, **facts)
        _fill(source, target, architecture)
        yield _Run(target).difference(exact), architecture


def _fill(source: Any, target: Any, architecture: Architecture) -> None:
    """Give the split model the source's weights: its experts' neurons in random order, its routing tensors repeated."""
    generator, groups = torch.Generator().manual_seed(2), architecture.groups(source.config)
    state = {name: value for name, value in source.state_dict().items() if ".experts." not in name}
    for (name, before), (_, after) in zip(moe_blocks(source), moe_blocks(target), strict=True):
        fused = FusedExperts(before.experts)
        held = places(fused.shape[0], TRIED, groups)
        split = fused.split(_random_order(fused, generator), held, architecture.factor(TRIED))
        state |= {f"{name}.experts.{leaf}": value for leaf, value in split.items()}
        state |= {f"{name}.{leaf}": value for leaf, value in repeat_routing(before, after, architecture, held).items()}
    own = target.state_dict()
    for name, value in state.items():
        if name in own:
            own[name].copy_(value)


def _random_order(fused: FusedExperts, generator: torch.Generator) -> torch.Tensor:
    """Each expert's neurons in random order, int64 [E, C]."""
    experts, _, neurons = fused.shape
    return torch.stack([torch.randperm(neurons, generator=generator) for _ in range(experts)])


def _two_level(source: Any, target: Any, architecture: Architecture) -> _Run:
    """The split model at full k with its two-level router."""
    config = target.config
    sizes, groups = architecture.sizes(source.config), architecture.groups(source.config)
    factor = architecture.factor(TRIED)
    config.prism = vars(PrismConfig(TRIED, factor, "linear", architecture.top_k, sizes, groups, stock=architecture.stock))
    active = ActiveK([full_k(config)])
    blocks = list(zip(moe_blocks(source), moe_blocks(target), strict=True))
    try:
        for (_, before), (_, after) in blocks:
            original = original_routing(before) if architecture.stock else {}
            install(after, two_level_router(after, config, original), active, 0)
        return _Run(target)
    except Exception as error:
        raise InputError(f"the two-level router does not run in it: {one_line(error)}") from error
    finally:
        for _, (_, after) in blocks:
            if hasattr(after.experts, "two_level"):
                uninstall(after)
