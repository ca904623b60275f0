"""Every partitioner on real and generated saliency, in one run and on one core: dropped share and seconds.

    python benchmarks/partitioners.py [--neurons 1024] [--groups 4 16] [--families real clustered heavy dense] [--plot loss.png]

`published` is the paper's annealing as its authors describe it (greedy start, 100,000 swaps, each re-evaluating the [tokens, groups]
sums with torch); its seconds are extrapolated from `PUBLISHED` swaps, and its dropped share is that of `annealing`, which is the same
walk compiled. `best` is the best of all methods and of a `genetic` run of up to 60 s; `+` is how far above it a method ends, relative.
The last table has problems small enough for the exact optimum. (A script named solvers.py here would hide the package.)
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from common import EXAMPLE, print_provenance

import solvers
from calibration import Calibration, profile
from checkpoints import Checkpoint
from prism_cli.options import table
from solvers import methods

TOKENS, PUBLISHED, LONG = 2048, 300, 30
METHODS = tuple(solvers.SOLVERS)


def real() -> np.ndarray:
    """[TOKENS, 256]: |activation| of the busiest expert of layer 2 of the example."""
    checkpoint, calibration = Checkpoint(EXAMPLE), Calibration(num_samples=64)
    layer = next(layer for layer in profile(checkpoint, calibration, calibration.rows(checkpoint)) if layer.layer == 2)
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
    start = time.perf_counter()
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
    return (time.perf_counter() - start) * methods.ANNEALING_ITERATIONS / PUBLISHED


def measure(saliency: np.ndarray, groups: int, kept: int) -> tuple[dict[str, tuple[float, float]], float]:
    """({method: (dropped share, seconds)}, best dropped share known)."""
    found = {}
    for method in METHODS:
        start = time.perf_counter()
        loss = solvers.solve(saliency, groups, kept, method, 0).loss
        found[method] = (loss, time.perf_counter() - start)
    found["published"] = (found["annealing"][0], published_seconds(solvers.Problem(saliency, groups, kept)))
    long = solvers.solve(saliency, groups, kept, "genetic", 1, patience=LONG, generations=10 * LONG, seconds=60).loss
    return found, min(long, *(loss for loss, _ in found.values()))


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


def plot(results: dict[str, tuple[dict[str, tuple[float, float]], float]], path: Path) -> None:
    """Relative excess over the best against seconds, geometric means over the problems."""
    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415  (after the backend is chosen)

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method in (*METHODS, "published"):
        seconds = np.exp(np.mean([np.log(max(found[method][1], 1e-4)) for found, _ in results.values()]))
        excess = np.mean([found[method][0] / best - 1 for found, best in results.values()])
        axes.plot(seconds, 100 * max(excess, 1e-4), "o")
        axes.annotate(method, (seconds, 100 * max(excess, 1e-4)), xytext=(5, 4), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="seconds per expert, one core", ylabel="dropped share above the best known, %")
    figure.savefig(path)


def main(neurons: list[int], groups: list[int], families: list[str], picture: Path | None) -> None:
    for method in METHODS:
        solvers.solve(generated("heavy", 32, 64), 4, 1, method, 0)
    results = {}
    for family in families:
        for width in [256] if family == "real" else neurons:
            saliency = real() if family == "real" else generated(family, width)
            for count in groups:
                for kept in sorted({1, max(1, count // 4), count // 2, 3 * count // 4} - {0, count}):
                    name = f"{family}, C = {width}, N = {count}, m = {kept}"
                    found, best = results[name] = measure(saliency, count, kept)
                    print(f"{name}: best known {best:.5f}")
                    rows = [
                        [method, f"{loss:.5f}", f"{100 * (loss / best - 1):.2f} %", f"{seconds:.3f}"]
                        for method, (loss, seconds) in found.items()
                    ]
                    print(table(["method", "dropped", "+", "seconds"], rows), end="\n\n", flush=True)
    rows = []
    for family, (count, kept) in itertools.product(("clustered", "heavy", "dense"), ((2, 1), (3, 1), (4, 2))):
        saliency = generated(family, 12, 200)
        exact = optimum(saliency, count, kept)
        losses = [solvers.solve(saliency, count, kept, method, 0).loss for method in ("genetic", "annealing", "ascent")]
        rows.append([family, count, kept, f"{exact:.6f}", *(f"{loss:.6f}" for loss in losses)])
    print("C = 12, 200 tokens: the exact optimum")
    print(table(["family", "N", "m", "optimum", "genetic", "annealing", "ascent"], rows))
    if picture is not None:
        plot(results, picture)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neurons", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--families", nargs="+", default=["real", "clustered", "heavy", "dense"])
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    print_provenance()
    main(options.neurons, options.groups, options.families, options.plot)
