"""A recorded trace of routing under every policy and cache size, without a model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prism_refactor.errors import InputError, one_line
from prism_refactor.formats import RoutingHeader, RoutingPass, parse
from prism_refactor.offload.policies import Belady, Policy


@dataclass(frozen=True)
class Pass:
    """One forward pass: its request, and for each MoE layer the sub-experts used, rising, and by how many tokens each."""

    request: str
    used: list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Trace:
    """What `prism-run --trace` writes.

    Attributes:
        layers, experts: MoE layers, and sub-experts of each.
        sub_expert_bytes: size of one.
        passes: in order.
    """

    layers: int
    experts: int
    sub_expert_bytes: int
    passes: list[Pass]

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Read a trace. Raises InputError with the line that is none."""
        line = 0
        try:
            with open(path, encoding="utf-8") as file:
                header = RoutingHeader.parse(file.readline())
                if header is None:
                    raise InputError(f"{path}: is no trace; prism-run --trace writes one")
                passes = []
                for line, text in enumerate(file, 2):  # noqa: B007  (an error names it)
                    passes.append(_pass(parse(RoutingPass, text), header))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {line or 1}: is no line of a trace ({one_line(error)}); record it again") from None
        if not passes:
            raise InputError(f"{path}: holds no forward pass; record one with prism-run --trace")
        return cls(header.layers, header.experts, header.sub_expert_bytes, passes)


def _pass(entry: RoutingPass, header: RoutingHeader) -> Pass:
    used = []
    for chosen, counts in entry.used:
        pair = np.array(chosen, dtype=np.int64), np.array(counts, dtype=float)
        if pair[0].shape != pair[1].shape or (pair[0] < 0).any() or (pair[0] >= header.experts).any():
            raise ValueError("a layer's sub-experts or their counts do not fit")
        used.append(pair)
    if len(used) != header.layers:
        raise ValueError(f"{len(used)} layers of {header.layers}")
    return Pass(entry.request, used)


def belady(trace: Trace) -> Belady:
    """The policy that knows the trace."""
    return Belady(trace.layers, trace.experts, [chosen for passed in trace.passes for chosen, _ in passed.used])


def hit_rate(trace: Trace, policy: Policy, slots: int) -> float:
    """Share of uses that found their sub-expert in a cache of some slots, as `Cache` runs it without prefetch.

    Args:
        trace: what was used.
        policy: a fresh one.
        slots: at least one; a layer that uses more loads some in place of what it has used.
    """
    resident = np.zeros((trace.layers, trace.experts), bool)
    free, hits, uses = slots, 0, 0
    for passed, following in _with_next(trace.passes):
        for layer, (chosen, counts) in enumerate(passed.used):
            row = np.zeros(trace.experts)
            row[chosen] = counts
            policy.use(layer, {passed.request: row})
            misses = chosen[~resident[layer, chosen]]
            uses += len(chosen)
            hits += len(chosen) - len(misses)
            for expert in misses.tolist():
                if free:
                    free -= 1
                else:
                    leaving = resident.copy()
                    leaving[layer, chosen] = False
                    if not leaving.any():
                        leaving = resident
                    resident.flat[np.where(leaving, policy.keep(), np.inf).argmin()] = False
                resident[layer, expert] = True
        if following is None or following.request != passed.request:
            policy.end(passed.request)
    return hits / uses if uses else 1.0


def _with_next(passes: list[Pass]) -> Iterator[tuple[Pass, Pass | None]]:
    yield from zip(passes, [*passes[1:], None], strict=True)
