"""What a refactoring is asked to do: one frozen model; the command line takes its defaults from it."""

from dataclasses import asdict, dataclass
from typing import Any

from prism_refactor.calibration.statistics import COACTIVE_SHARE
from prism_refactor.errors import UsageError
from prism_refactor.routing.proxy import GATE_NEURONS
from prism_refactor.solvers import SOLVERS

ROUTERS = ("linear", "calibrated-proxy", "proxy", "replicate")
SALIENCIES = ("contribution", "activation", "energy")


@dataclass(frozen=True)
class Recipe:
    """Options that decide the output's bytes.

    Attributes:
        sub_experts: N, parts per expert.
        solver: a name in `solvers.SOLVERS`.
        router: 'linear' (ridge sub-router, compensation, tilted stock rows), 'calibrated-proxy' (gate neurons chosen and calibrated to
            predict the size of the output, compensation), 'proxy' (the paper's gate neurons), 'replicate' (stock rows only).
        keep: sub-experts a token keeps in the partition objective; None is a quarter of N, at least 1.
        saliency: 'contribution' (|activation| x norm of the neuron's down_proj column), 'activation' (the paper's) or 'energy' (the
            square of the contribution).
        gate_neurons: r, neurons that speak for a sub-expert in either proxy.
        coactive_share: k_a / C, share of a token's activations that count as active when the paper's proxy chooses its gate neurons.
        max_shard_bytes: largest shard.
        seed: of the solvers and samples.
    """

    sub_experts: int = 4
    solver: str = "genetic"
    router: str = "linear"
    keep: int | None = None
    saliency: str = "contribution"
    gate_neurons: int = GATE_NEURONS
    coactive_share: float = COACTIVE_SHARE
    max_shard_bytes: int = 5 * 10**9
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--solver", self.solver, tuple(SOLVERS)),
            ("--router", self.router, ROUTERS),
            ("--saliency", self.saliency, SALIENCIES),
        ):
            if value not in known:
                raise UsageError(f"{option} {value}: choose one of {', '.join(known)}")
        if self.keep is not None and not 1 <= self.keep < self.sub_experts:
            raise UsageError(f"--keep {self.keep}: must be at least 1 and less than --sub-experts {self.sub_experts}")

    @property
    def kept(self) -> int:
        """`keep` with its default."""
        return self.keep or max(1, self.sub_experts // 4)

    def recorded(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self) | {"keep": self.kept}
