"""What is in the files that the commands write and read: the only module that knows their keys.

Each file is a dataclass here: `PrismConfig` is the `prism` object of config.json, `Manifest` is prism.json, `Evaluation` evaluation.json,
`Performance` performance.json, `Arrival` a line of a request trace, `RoutingHeader` and `RoutingPass` the lines of a routing trace.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from prism_refactor.distillation import Distillation
from prism_refactor.errors import InputError, PrismError, one_line
from prism_refactor.files import write_json
from prism_refactor.recipe import Recipe

MANIFEST, MANIFEST_FORMAT = "prism.json", 3
# What prism-eval --save adds to a refactored checkpoint, and what prism-bench adds.
EVALUATION = "evaluation.json"
PERFORMANCE, PERFORMANCE_FORMAT = "performance.json", 1
# Of a statistics folder.
INDEX = "index.json"
# What prism-report writes.
PAGE = "report.html"
# Co-activation of some neurons of every layer, for prism-report.
PICTURE_FILE = "coactivation.safetensors"
# The model card.
CARD = "README.md"
ROUTING_TRACE = "prism-run 1"
# More sub-experts, and larger ones, than any model has: what a damaged trace asks for must not take all memory.
MOST_SUB_EXPERTS, MOST_SUB_EXPERT_BYTES = 10**7, 2**40

Read = TypeVar("Read")


def read(kind: type[Read], path: Path, remedy: str) -> Read:
    """Return the object that a JSON file holds.

    Args:
        kind: its dataclass; fields that it does not have are ignored.
        path: of the file.
        remedy: what to do where the file is broken.

    Raises:
        InputError: the file cannot be read, or does not hold such an object.
    """
    try:
        return parse(kind, path.read_bytes())
    except (OSError, ValueError, LookupError, RecursionError, PrismError) as error:
        raise InputError(f"{path}: is not as this version writes it ({one_line(error)}); {remedy}") from None


def parse(kind: type[Read], given: str | bytes | dict[str, Any]) -> Read:
    """Return the object of a dataclass that a JSON text, or its dict, holds. Raises ValueError with the first field that is wrong."""
    # It takes a third of a second that commands which read nothing should not.
    from pydantic import ValidationError  # noqa: PLC0415

    adapter: Any = _adapter(kind)  # type: ignore[arg-type]  # a class can be hashed
    try:
        return adapter.validate_python(given) if isinstance(given, dict) else adapter.validate_json(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None


@functools.cache
def _adapter(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter  # noqa: PLC0415

    return TypeAdapter(kind)


def check_format(path: Path, expected: int, remedy: str) -> None:
    """Raise InputError when a JSON file says that it is of another format; what is no JSON at all is found when it is read."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and found.get("format") != expected:
            raise InputError(f"{path}: format {found.get('format')} is not this version's {expected}; {remedy}")


@dataclass(frozen=True)
class PrismConfig:
    """What config.json of a refactored checkpoint says about the original, as its object `prism`.

    Attributes:
        sub_experts: N.
        factor: what `down_proj` is multiplied with.
        router: kind of sub-expert router, one of `recipe.ROUTERS`.
        top_k: the config key of the number of active experts.
        source: the sizes of the original, by config key: number of experts, top-k, width, then others that were multiplied with N.
        groups: of experts, among which the family's router chooses, in the original; 1 where it does not. See `modeling_prism.places`.
        carried: see `Architecture.carried`.
        keys: those of `source` in that order, which is lost where somebody sorts a JSON object; empty in checkpoints of version 0.2.
        stock: whether the checkpoint is a model of split experts in the family's own classes. Else it is the original, with each expert's
            neurons in another order, and its experts are cut when the two-level router is attached.
        plain_router, tokens: see `Architecture`.
    """

    sub_experts: int
    factor: int
    router: str
    top_k: str
    source: dict[str, int]
    groups: int = 1
    carried: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    stock: bool = True
    plain_router: bool = True
    tokens: list[str] = field(default_factory=list)

    @property
    def max_active(self) -> int:
        """Sub-experts per token at which the model is the original: N times the original top-k."""
        return self.sub_experts * self.source[self.top_k]

    @property
    def whole_experts(self) -> list[int]:
        """The sub-experts per token that cost as much as 1, 2, ... of the original's experts; of a dense one, shares of it."""
        if self.max_active == self.sub_experts:
            return sorted({max(1, self.sub_experts * eighths // 8) for eighths in (1, 2, 4, 6, 8)})
        return list(range(self.sub_experts, self.max_active + 1, self.sub_experts))

    @property
    def has_router(self) -> bool:
        """Whether there is a sub-expert router beside the stock one."""
        return self.router != "replicate"

    @property
    def best_router(self) -> str:
        """'two-level' where there is a sub-expert router, else 'stock'."""
        return "two-level" if self.has_router else "stock"

    @classmethod
    def of(cls, config: Any) -> "PrismConfig | None":
        """Return that of a transformers config; None where the model is not refactored. Raises InputError where it is damaged."""
        known = getattr(config.get_text_config(), "prism", None)
        if not known:
            return None
        try:
            found = cls(**known)
            if min(found.sub_experts, found.factor, found.max_active, found.groups) < 1:
                raise ValueError("a size is not above 0")
        except (TypeError, ValueError, LookupError) as error:
            raise InputError(f"config.json has a damaged 'prism' ({type(error).__name__}: {one_line(error)}); refactor again") from None
        return found

    @classmethod
    def required(cls, config: Any, where: object) -> "PrismConfig":
        """As `of`. Raises InputError where the model is not refactored, too."""
        found = cls.of(config)
        if found is None:
            raise InputError(f"{where}: not a refactored checkpoint; write one with prism-refactor")
        return found


@dataclass(frozen=True)
class Source:
    """The original of a refactored checkpoint.

    Attributes:
        name: of its folder.
        fingerprint: see `Checkpoint.fingerprint`.
        model_type: as in config.json.
        sizes: those that the refactoring changes, by config key.
        quantised: how its weights are, as its config.json names it; None if they are not.
        dense: the model type of a dense original, or of its text model, which was read as one of one expert; None of a Mixture of Experts.
        stock, plain_router: see `PrismConfig`.
        inside: see `models.dense.Twin`.
    """

    name: str
    fingerprint: str
    model_type: str
    sizes: dict[str, int]
    quantised: str | None = None
    dense: str | None = None
    stock: bool = True
    plain_router: bool = True
    inside: str | None = None


@dataclass(frozen=True)
class ExpertReport:
    """One expert: calibration tokens routed to it, share of its activation that a token loses, in stored order and partitioned."""

    tokens: int
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class LayerReport:
    """One refactored MoE layer.

    Attributes:
        layer: index of the decoder layer.
        output_error: squared relative error of the layer's output, by router ('original' and 'stock' where the router is plain, the latter
            where the model is stock; 'two-level' where there is a sub-expert router), at the sub-experts per
            token 'k'; of the original at as many whole experts.
        unrouted: experts that saw no token.
        experts: in their order.
    """

    layer: int
    output_error: dict[str, list[int | float]]
    unrouted: list[int]
    experts: list[ExpertReport]

    @property
    def dropped(self) -> tuple[float, float]:
        """Mean share that the experts drop, in stored order and partitioned."""
        return fmean(expert.loss_before for expert in self.experts), fmean(expert.loss_after for expert in self.experts)

    @property
    def measured_k(self) -> list[int]:
        """The sub-experts per token at which the output error was measured."""
        return [int(k) for k in self.output_error["k"]]


@dataclass(frozen=True)
class Text:
    """The text of an evaluation: what `datasets`, scored tokens, windows, their length and stride, the seed of their choice.

    Attributes:
        sample: some of its tokens, which follow each other, as text.
    """

    datasets: list[str]
    tokens: int
    windows: int
    length: int
    stride: int
    seed: int
    sample: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FineTuned(Distillation):
    """How a router was trained: which router, the step whose state was kept, and its held-out perplexity."""

    router: str
    best_step: int
    held_out_perplexity: float


@dataclass(frozen=True)
class Manifest:
    """prism.json: what a refactored checkpoint was made from, how, and what became of it.

    Attributes:
        format: `MANIFEST_FORMAT`.
        source: the original.
        result: the sizes that changed, by config key.
        recipe: options of the refactoring.
        calibration: the text, as `Calibration.recorded` gives it.
        versions: of the packages that decide the bytes.
        layers: the MoE layers.
        finetuning: of the router; None where it was not trained.
    """

    format: int
    source: Source
    result: dict[str, int]
    recipe: Recipe
    calibration: dict[str, Any]
    versions: dict[str, str]
    layers: list[LayerReport]
    finetuning: FineTuned | None = None

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Return that of a refactored checkpoint. Raises InputError when there is none, or one of another version."""
        path = folder / MANIFEST
        if not path.exists():
            raise InputError(f"{folder}: not a refactored checkpoint; write one with prism-refactor")
        check_format(path, MANIFEST_FORMAT, "refactor again")
        manifest = read(cls, path, "refactor again")
        for layer in manifest.layers:
            if (
                not layer.experts
                or len({len(values) for values in layer.output_error.values()} | {len(layer.output_error.get("k", []))}) > 1
            ):
                raise InputError(f"{path}: layer {layer.layer} is damaged; refactor again")
        if not manifest.layers:
            raise InputError(f"{path}: has no layers; refactor again")
        return manifest

    @property
    def dropped(self) -> tuple[float, float]:
        """Mean share of an expert's activation outside each token's best sub-experts, in stored order and partitioned."""
        experts = [expert for layer in self.layers for expert in layer.experts]
        return fmean(expert.loss_before for expert in experts), fmean(expert.loss_after for expert in experts)

    @property
    def unrouted(self) -> int:
        """Experts that saw no calibration token."""
        return sum(len(layer.unrouted) for layer in self.layers)

    def write(self, folder: Path) -> None:
        """Write prism.json."""
        write_json(folder / MANIFEST, {name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class Cost:
    """Of one token.

    Attributes:
        active_parameters: parameters that take part: all but the experts that are not chosen.
        flops: floating-point operations of a forward pass: two per multiply-add of every matrix product and of attention over half a
            window; activations, norms and the softmax are not counted.
    """

    active_parameters: int
    flops: int


@dataclass(frozen=True)
class OperatingPoint:
    """One number of active sub-experts with its figures.

    Attributes:
        k: active (sub-)experts per token; within a budget, the most that one may run.
        share: active share of the experts that the original uses; within a budget, as measured.
        cost: per token.
        perplexity, interval: with its 95 % bootstrap interval over windows.
        domains: perplexity by domain.
        budget: the share that was asked for; None where k was.
        ratio, ratio_interval: perplexity relative to the original's at the same active experts; None where it has no such setting.
        recovered, recovered_interval: share of what the original loses at the same active experts that is won back; None where it loses
            nothing.
        by_layer, by_token: within a budget, the sub-experts that tokens ran in each MoE layer on average, and that each token of
            `Text.sample` ran, mean over layers.
    """

    k: int
    share: float
    cost: Cost
    perplexity: float
    interval: tuple[float, float]
    domains: dict[str, float]
    budget: float | None = None
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    recovered: float | None = None
    recovered_interval: tuple[float, float] | None = None
    by_layer: list[float] = field(default_factory=list)
    by_token: list[float] = field(default_factory=list)

    def k_text(self, full: int) -> str:
        """k as people read it: '4', or '4.07', the mean within a budget; `full`: of the curve."""
        return str(self.k) if self.budget is None else f"{self.share * full:.2f}"


@dataclass(frozen=True)
class Curve:
    """One model under one router.

    Attributes:
        model: name of its folder.
        router: 'original', 'stock' or 'two-level'.
        full: k at which everything runs.
        points: by rising k.
        budgets: points within a budget, by rising budget; only where asked for.
    """

    model: str
    router: str
    full: int
    points: list[OperatingPoint]
    budgets: list[OperatingPoint] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json, and what `prism-eval --json` prints: the original and models refactored from it on one text."""

    text: Text
    original: Curve
    refactored: list[Curve]

    @classmethod
    def read(cls, folder: Path) -> "Evaluation | None":
        """Return that of a refactored checkpoint; None where it was not measured. Raises InputError when the file is broken."""
        path = folder / EVALUATION
        return read(cls, path, "run prism-eval --save again") if path.exists() else None


@dataclass(frozen=True)
class LatencyGrid:
    """Seconds on a grid: medians and quartiles, each nested lists [tokens][k][context].

    Attributes:
        tokens: of a step; for decoding the same as its requests.
        k: sub-experts per token.
        context: tokens of each request in the KV cache.
        seconds: medians.
        low: lower quartiles.
        high: upper quartiles.
    """

    tokens: list[int]
    k: list[int]
    context: list[int]
    seconds: list[list[list[float]]] = field(default_factory=list)
    low: list[list[list[float]]] = field(default_factory=list)
    high: list[list[list[float]]] = field(default_factory=list)

    def points(self) -> Iterator[tuple[int, int, int]]:
        """Yield all (tokens, k, context)."""
        return product(self.tokens, self.k, self.context)


@dataclass(frozen=True)
class HeldOut:
    """A point that the model was not fitted on: measured and predicted seconds."""

    kind: str
    tokens: int
    k: int
    context: int
    seconds: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return abs(self.predicted - self.seconds) / self.seconds


@dataclass
class Performance:
    """performance.json: seconds of the engine's steps on the machine where they were measured.

    Attributes:
        full_k: sub-experts per token at which the model is the original.
        device: where it was measured.
        dtype: of the weights.
        threads: of torch.
        decode: steps in which every request runs one token.
        prefill: steps in which one request runs many.
        held_out: measured points that are no grid points.
        machine: processor and cores.
        format: `PERFORMANCE_FORMAT`.
    """

    full_k: int
    device: str
    dtype: str
    threads: int
    decode: LatencyGrid
    prefill: LatencyGrid
    held_out: list[HeldOut] = field(default_factory=list)
    machine: str = ""
    format: int = PERFORMANCE_FORMAT


@dataclass(frozen=True)
class Arrival:
    """One request of a request trace, a line of JSON.

    Attributes:
        at: seconds after the start.
        prompt_tokens: length of its prompt.
        max_tokens: tokens that it generates.
        k: its floor; None: full quality.
        priority: higher is sooner.
        deadline: seconds after it came in which it should be done.
    """

    at: float
    prompt_tokens: int
    max_tokens: int
    k: int | None = None
    priority: int = 0
    deadline: float | None = None

    @classmethod
    def parse(cls, line: str) -> "Arrival":
        """Return the request of a line. Raises ValueError when the line holds none."""
        given = json.loads(line)
        unknown = sorted(given.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise ValueError(f"unknown {unknown}")
        arrival = parse(cls, {name: value for name, value in given.items() if value is not None})
        counts = [arrival.prompt_tokens, arrival.max_tokens, *([] if arrival.k is None else [arrival.k])]
        if not 0 <= arrival.at < float("inf") or min(counts) < 1:
            raise ValueError("times, lengths and k must be positive")
        return arrival


@dataclass(frozen=True)
class RoutingHeader:
    """The first line of a routing trace: MoE layers, sub-experts of each, bytes of one."""

    layers: int
    experts: int
    sub_expert_bytes: int
    trace: str = ROUTING_TRACE

    def line(self) -> str:
        """Return it as a line."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def parse(cls, line: str) -> "RoutingHeader | None":
        """Return the header of a line; None where the file is no routing trace. Raises ValueError when its sizes are no model's."""
        try:
            given = json.loads(line)
        except ValueError:
            return None
        if not isinstance(given, dict) or given.get("trace") != ROUTING_TRACE:
            return None
        header = parse(cls, line)
        smallest = min(header.layers, header.experts, header.sub_expert_bytes)
        if smallest < 1 or header.layers * header.experts > MOST_SUB_EXPERTS or header.sub_expert_bytes > MOST_SUB_EXPERT_BYTES:
            raise ValueError("its sizes are no model's")
        return header


@dataclass(frozen=True)
class RoutingPass:
    """A further line of a routing trace: a forward pass.

    Attributes:
        request: its name.
        used: of each MoE layer, the sub-experts used, rising, and by how many tokens each.
    """

    request: str
    used: list[tuple[list[int], list[float]]]

    def line(self) -> str:
        """Return it as a line."""
        return json.dumps(asdict(self)) + "\n"
