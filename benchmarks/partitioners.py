"""Every partitioner on real and generated saliency, on one core: dropped share and processor seconds.

    python benchmarks/partitioners.py RESULTS [--neurons 1024] [--groups 4 16] [--families real clustered heavy dense] [--plot loss.png]
    python benchmarks/partitioners.py --defaults

RESULTS (a JSON file) keeps what is measured; a stopped run goes on from there. `published` is the paper's annealing as its authors
describe it (greedy start, 100,000 swaps, each re-evaluating the [tokens, groups] sums with torch); its seconds are extrapolated from
`PUBLISHED` swaps; its dropped share is taken to be that of `annealing`, the same walk compiled, with other draws. `best` is the best of
all methods and of `genetic` with `SEEDS` other seeds; `+` is how far above it a method ends, relative. The last table has problems
small enough for the exact optimum. `--defaults` varies what `genetic` takes as default. (A script named solvers.py here would hide the
package.)
"""

import argparse
import importlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from common import EXAMPLE, markdown, print_provenance

from prism_refactor import solvers
from prism_refactor.calibration.profile import Profile
from prism_refactor.calibration.settings import Calibration
from prism_refactor.files import write_json
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.solvers import methods

TOKENS, PUBLISHED, SEEDS = 2048, 300, 3
METHODS = tuple(solvers.SOLVERS)
MARKERS = dict(zip((*METHODS, "published"), "o^sDv<>Pp*", strict=True))
FAMILIES = ("real", "clustered", "heavy", "dense")


def real() -> np.ndarray:
    """[TOKENS, 256]: |activation| of the busiest expert of layer 2 of the example."""
    checkpoint, calibration = Checkpoint(EXAMPLE), Calibration(num_samples=64)
    layer = next(layer for layer in Profile(checkpoint, calibration, calibration.rows(checkpoint)) if layer.layer == 2)
    return layer.activations[int(layer.tokens_routed.argmax())].float().abs().numpy()


def generated(family: str, neurons: int, tokens: int = TOKENS) -> np.ndarray:
    """[tokens, neurons] of a family: neurons that fire in 32 overlapping patterns; independent with heavy tails; independent, uniform."""
    rng = np.random.default_rng(0)
    if family == "clustered":
        patterns = rng.random((32, neurons)) ** 4
        values = patterns[rng.integers(32, size=tokens)] * rng.exponential(size=(tokens, neurons))
    elif family == "heavy":
        values = np.abs(rng.standard_t(2, (tokens, neurons)))
    else:
        values = rng.random((tokens, neurons))
    return values.astype(np.float32)


def published_seconds(problem: solvers.Problem) -> float:
    """Seconds of 100,000 swaps of the published loop in torch, extrapolated from `PUBLISHED`."""
    matrix = torch.from_numpy(problem.saliency)
    labels = torch.from_numpy(methods.greedy(problem, 0)).long()
    sums = torch.zeros(len(matrix), problem.num_groups).index_add_(1, labels, matrix)
    generator = torch.Generator().manual_seed(0)
    temperature, dropped = methods.ANNEALING_TEMPERATURE, problem.num_groups - problem.kept
    loss = sums.sort(dim=1).values[:, :dropped].sum().item()
    start = time.process_time()
    for _ in range(PUBLISHED):
        first, second = torch.randint(problem.neurons, (2,), generator=generator).tolist()
        p, q = labels[first].item(), labels[second].item()
        if p != q:
            trial = sums.clone()
            trial[:, p] += matrix[:, second] - matrix[:, first]
            trial[:, q] += matrix[:, first] - matrix[:, second]
            new = trial.sort(dim=1).values[:, :dropped].sum().item()
            if new < loss or torch.rand((), generator=generator).item() < np.exp((loss - new) / temperature):
                sums, loss = trial, new
                labels[first], labels[second] = q, p
        temperature *= methods.ANNEALING_COOLING
    return (time.process_time() - start) * methods.ANNEALING_ITERATIONS / PUBLISHED


def measure(saliency: np.ndarray, groups: int, kept: int) -> tuple[dict[str, tuple[float, float]], float]:
    """({method: (dropped share, seconds)}, best dropped share known)."""
    found = {}
    for method in METHODS:
        start = time.process_time()
        loss = solvers.solve(saliency, groups, kept, method, 0).loss
        found[method] = (loss, time.process_time() - start)
    found["published"] = (found["annealing"][0], published_seconds(solvers.Problem(saliency, groups, kept)))
    others = (solvers.solve(saliency, groups, kept, "genetic", seed).loss for seed in range(1, SEEDS + 1))
    return found, min(*others, *(loss for loss, _ in found.values()))


def optimum(saliency: np.ndarray, groups: int, kept: int) -> float:
    """The least dropped share, by trying every balanced partition."""
    problem = solvers.Problem(saliency, groups, kept)
    return min(problem.loss(labels) for labels in balanced(problem.neurons, groups))


def balanced(neurons: int, groups: int) -> Iterator[np.ndarray]:
    """Every partition of the neurons into equal groups, once."""
    labels = np.full(neurons, -1, dtype=np.int32)

    def place(group: int) -> Iterator[np.ndarray]:
        free = np.flatnonzero(labels < 0)
        if len(free) == 0:
            yield labels
            return
        # The first free neuron opens the group, so that no partition comes twice.
        for others in itertools.combinations(free[1:], neurons // groups - 1):
            chosen = [free[0], *others]
            labels[chosen] = group
            yield from place(group + 1)
            labels[chosen] = -1

    return place(0)


def plot(results: dict[str, Any], path: Path) -> None:
    """Relative excess over the best against seconds, means over the problems, one panel per family."""
    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415  (after the backend is chosen)

    families = list(dict.fromkeys(name.split(",")[0] for name in results))
    figure, panels = pyplot.subplots(1, len(families), figsize=(4.5 * len(families), 4), layout="constrained", sharey=True, squeeze=False)
    for family, axes in zip(families, panels[0], strict=True):
        chosen = [found for name, found in results.items() if name.startswith(f"{family},")]
        for method in (*METHODS, "published"):
            seconds = np.exp(np.mean([np.log(max(found["methods"][method][1], 1e-4)) for found in chosen]))
            excess = 100 * max(np.mean([found["methods"][method][0] / found["best"] - 1 for found in chosen]), 1e-4)
            axes.plot(seconds, excess, MARKERS[method], label=method)
        axes.set(xscale="log", yscale="log", title=f"{family} ({len(chosen)} problems)", xlabel="seconds per expert, one core")
    panels[0, 0].set_ylabel("dropped share above the best known, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right")
    with pyplot.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, dpi=100)


def report(results: dict[str, Any]) -> str:
    """A row per problem: how far above the best every method ends, and for some the seconds."""
    timed = ("genetic", "annealing", "ascent")
    others = [method for method in METHODS if method not in timed]
    headers = ["problem", "best", *itertools.chain(*((f"{method} +", "s") for method in timed)), *(f"{method} +" for method in others)]
    rows = []
    for name, found in results.items():
        above = {method: f"{100 * (loss / found['best'] - 1):.2f} %" for method, (loss, _) in found["methods"].items()}
        seconds = {method: f"{value:.2f}" for method, (_, value) in found["methods"].items()}
        rows.append([name, f"{found['best']:.5f}", *itertools.chain(*((above[method], seconds[method]) for method in timed))])
        rows[-1] += [*(above[method] for method in others), f"{found['methods']['published'][1]:.0f}"]
    return markdown([*headers, "published s"], rows)


def summary(results: dict[str, Any]) -> str:
    """A row per family: how many problems `genetic` ends within 0.1 % of the best on, and how far above it methods end."""
    rows = []
    for family in dict.fromkeys(name.split(",")[0] for name in results):
        chosen = [found for name, found in results.items() if name.startswith(f"{family},")]
        above = {name: [100 * (found["methods"][name][0] / found["best"] - 1) for found in chosen] for name in METHODS}
        cells = [f"{np.mean(above[name]):.2f} % ({max(above[name]):.2f})" for name in ("genetic", "annealing", "ascent")]
        rows.append([family, len(chosen), sum(value <= 0.1 for value in above["genetic"]), *cells])
    return markdown(["family", "problems", "genetic within 0.1 %", "genetic +, mean (worst)", "annealing +", "ascent +"], rows)


def optima() -> str:
    """Problems of 12 neurons: the optimum and what the methods find."""
    rows = []
    for family, (count, kept) in itertools.product(("clustered", "heavy", "dense"), ((2, 1), (3, 1), (4, 2))):
        saliency = generated(family, 12, 200)
        exact = optimum(saliency, count, kept)
        losses = [solvers.solve(saliency, count, kept, method, 0).loss for method in ("genetic", "annealing", "ascent")]
        rows.append([family, count, kept, f"{exact:.6f}", *(f"{loss:.6f}" for loss in losses)])
    return markdown(["family", "N", "m", "optimum", "genetic", "annealing", "ascent"], rows)


def defaults() -> str:
    """`genetic` with one default changed at a time: dropped share (mean of `SEEDS` seeds) in so many seconds."""
    module = importlib.import_module("prism_refactor.solvers.genetic")
    problems = {
        "real 16/8": (real(), 16, 8),
        "clustered 4/1": (generated("clustered", 1024), 4, 1),
        "clustered 4/3": (generated("clustered", 1024), 4, 3),
        "heavy 4/1": (generated("heavy", 1024), 4, 1),
    }
    changes: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("defaults", {}, {})]
    changes += [(f"population {value}", {"population": value}, {}) for value in (4, 16)]
    changes += [(f"offspring {value}", {"offspring": value}, {}) for value in (4, 16)]
    changes += [(f"patience {value}", {"patience": value}, {}) for value in (2, 6)]
    changes += [(f"generations {value} x patience", {}, {"GENERATIONS_PER_PATIENCE": value}) for value in (2, 4)]
    changes += [(f"crossover {value}", {"crossover": value}, {}) for value in (0.5, 1.0)]
    changes += [(f"swaps {value}", {"swaps": value}, {}) for value in (2, 10)]
    changes += [(f"mutated share {value}", {}, {"MUTATED_SHARE": value}) for value in (0.01, 0.1)]
    changes += [(f"warmest {value}", {}, {"WARMEST": value}) for value in (0.3, 3.0)]
    changes += [(f"cold {value}", {}, {"COLD": value}) for value in (0.01, 0.1)]
    changes += [(f"last annealing {value}", {}, {"FINAL_SWAPS": value}) for value in (5, 500)]
    rows = []
    for name, options, constants in changes:
        before = {key: getattr(module, key) for key in constants}
        for key, value in constants.items():
            setattr(module, key, value)
        cells = []
        for saliency, groups, kept in problems.values():
            start = time.process_time()
            losses = [solvers.solve(saliency, groups, kept, "genetic", seed, **options).loss for seed in range(SEEDS)]
            cells.append(f"{np.mean(losses):.5f} in {(time.process_time() - start) / SEEDS:.2f} s")
        rows.append([name, *cells])
        for key, value in before.items():
            setattr(module, key, value)
    return markdown(["", *problems], rows)


def main(path: Path, neurons: list[int], groups: list[int], families: list[str], picture: Path | None) -> None:
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for family in families:
        for width in [256] if family == "real" else neurons:
            saliency = real() if family == "real" else generated(family, width)
            for count in groups:
                for kept in sorted({1, max(1, count // 4), count // 2, 3 * count // 4}):
                    name = f"{family}, C = {width}, N = {count}, m = {kept}"
                    if name not in results:
                        found, best = measure(saliency, count, kept)
                        results[name] = {"best": best, "methods": found}
                        write_json(path, results)
    print(summary(results), end="\n\n")
    print(report(results), end="\n\n")
    print("C = 12, 200 tokens: the exact optimum")
    print(optima())
    if picture is not None:
        plot(results, picture)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("partitioners.json"))
    parser.add_argument("--neurons", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--defaults", action="store_true", help="only vary the defaults of `genetic`")
    options = parser.parse_args()
    print_provenance()
    # Compile, or load what was compiled.
    for method in METHODS:
        solvers.solve(generated("heavy", 32, 64), 4, 1, method, 0)
    if options.defaults:
        print(defaults())
    else:
        main(options.results, options.neurons, options.groups, options.families, options.plot)
