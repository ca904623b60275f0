"""Many experts side by side, as prism-refactor partitions them: seconds with one and with two processes, and what the processes cost.

    python benchmarks/partition_experts.py [--experts 64] [--family clustered]

A layer of generated experts, each with its own saliency, partitioned with the defaults: in this process, in two that start anew, and in
the same two once more, as in the layers that follow. `start` is the share of the second time that the third does not need; `rest` the share
of the third that is not half of the first: passing arrays, waiting for the last expert, sharing caches and memory. OLMoE-1B-7B has
1,024 experts of 1,024 neurons; the last column extrapolates to them.
"""

import argparse
import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from common import print_provenance
from joblib.externals.loky import get_reusable_executor
from partitioners import FAMILIES, generated

from prism_refactor import solvers
from prism_refactor.models.architectures import Architecture
from prism_refactor.recipe import Recipe
from prism_refactor.refactoring.layer import Run, partition_layers
from prism_refactor.refactoring.workers import Workers
from prism_refactor.tables import table

# Neurons and tokens of an expert: a tiny model, examples/olmoe-tiny, OLMoE-1B-7B.
SIZES = ((64, 512), (256, 1024), (1024, 2048))
OLMOE = 1024


def layer(experts: int, family: str, neurons: int, tokens: int) -> Any:
    """What `partition_layers` reads of a layer's statistics: experts alike in kind, none equal."""
    saliency = generated(family, neurons, tokens)
    activations = [torch.from_numpy(saliency[:, np.random.default_rng(expert).permutation(neurons)]) for expert in range(experts)]
    return cast(Any, SimpleNamespace(layer=0, activations=activations))


def main(experts: int, family: str) -> None:
    recipe = Recipe()
    solvers.solve(generated(family, 32, 64), recipe.sub_experts, recipe.kept, recipe.solver, 0)
    rows = []
    for neurons, tokens in SIZES:
        statistics = layer(experts, family, neurons, tokens)
        seconds, labels = [], []
        get_reusable_executor().shutdown(wait=True)
        for workers in (1, 2, 2):
            start = time.perf_counter()
            with Workers(workers) as running:
                run = Run(recipe, Architecture("num_experts", "num_experts_per_tok", "intermediate_size"), running, layers=1)
                (found,) = list(partition_layers([(statistics, torch.ones(experts, neurons))], run))
            seconds.append(time.perf_counter() - start)
            labels.append(np.stack([partition.labels for partition in found]))
        assert (labels[0] == labels[1]).all()
        one, anew, again = seconds
        olmoe = f"{again * OLMOE / experts / 60:.1f} min" if neurons == OLMOE else "-"
        shares = [f"{100 * (1 - again / anew):.0f} %", f"{100 * (1 - one / (2 * again)):.0f} %"]
        rows.append([neurons, tokens, *(f"{value:.2f}" for value in seconds), *shares, olmoe])
    print(f"{experts} {family} experts, N = {recipe.sub_experts}, m = {recipe.kept}, {recipe.solver}")
    print(table(["neurons", "tokens", "1 process, s", "2 anew, s", "2 again, s", "start", "rest", f"{OLMOE} experts"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--family", choices=FAMILIES[1:], default="clustered")
    options = parser.parse_args()
    print_provenance()
    main(options.experts, options.family)
