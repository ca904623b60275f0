"""What a refactoring is asked to do: one frozen model; the command line takes its defaults from it."""

from dataclasses import asdict, dataclass
from typing import Any

from prism_refactor.errors import UsageError

SOLVERS = ("genetic", "annealing", "ascent", "greedy", "kmeans", "spectral", "metis", "random", "contiguous")
ROUTERS = ("linear", "proxy", "replicate")
# Largest |difference| of a logit at full k that floating-point reordering explains, in float32.
LOGIT_TOLERANCE = 1e-3
ENGINES = ("local", "ray")
SALIENCIES = ("contribution", "activation")
# N of a dense model: its one expert is as wide as many.
DENSE_SUB_EXPERTS = 16


@dataclass(frozen=True)
class Recipe:
    """Options that decide the output's bytes.

    Attributes:
        sub_experts: N, parts per expert.
        solver: a name in `solvers.SOLVERS`.
        router: 'linear' (ridge sub-router and compensation), 'proxy' (the paper's gate neurons) or 'replicate' (the stock router only).
        keep: sub-experts a token keeps in the partition objective; None is a quarter of N, at least 1.
        saliency: 'contribution' (|activation| x norm of the neuron's down_proj column) or 'activation' (the paper's).
        gate_neurons: r, neurons that speak for a sub-expert in the proxy.
        coactive_share: k_a / C, share of a token's activations that count as active when the proxy chooses its gate neurons.
        max_shard_bytes: largest shard.
        seed: of the solvers and samples.

    Raises:
        UsageError: a name is not known, or `keep` is out of range.
    """

    sub_experts: int = 4
    solver: str = "genetic"
    router: str = "linear"
    keep: int | None = None
    saliency: str = "contribution"
    gate_neurons: int = 4
    coactive_share: float = 0.75
    max_shard_bytes: int = 5 * 10**9
    seed: int = 0

    def __post_init__(self) -> None:
        for field, value, known in (
            ("solver", self.solver, SOLVERS),
            ("router", self.router, ROUTERS),
            ("saliency", self.saliency, SALIENCIES),
        ):
            if value not in known:
                raise UsageError(f"`{field}` {value}: choose one of {', '.join(known)}")
        if self.keep is not None and not 1 <= self.keep < self.sub_experts:
            raise UsageError(f"`keep` {self.keep}: must be at least 1 and less than `sub_experts` {self.sub_experts}")

    @classmethod
    def of(cls, options: dict[str, Any], dense: bool) -> "Recipe":
        """Return the recipe of some options, those that are None left out; `dense`: for a dense model."""
        given = {name: value for name, value in options.items() if value is not None}
        return cls(**({"sub_experts": DENSE_SUB_EXPERTS} if dense else {}) | given)

    @property
    def has_router(self) -> bool:
        """Whether a sub-expert router is written beside the stock one."""
        return self.router != "replicate"

    @property
    def kept(self) -> int:
        """`keep` with its default."""
        return self.keep or max(1, self.sub_experts // 4)

    def recorded(self) -> dict[str, Any]:
        """Return the recipe as JSON values, for the manifest."""
        return asdict(self) | {"keep": self.kept}
