"""Search or sample: what more generations and what more tokens are worth to the partition of one wide expert.

    python benchmarks/large_experts.py MODEL_DIR [--layer 15] [--sub-experts 16]

MODEL_DIR is a dense checkpoint (benchmarks/real_dense.py makes one), whose feed-forward networks are one expert each. The dropped share is
that of 4,096 tokens which no partition has seen.
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import numpy as np
from common import markdown, print_provenance

from prism_refactor import solvers
from prism_refactor.calibration.profile import Profile
from prism_refactor.calibration.settings import Calibration
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.layered import LayeredModel
from prism_refactor.refactoring.layer import column_norms

HELD_OUT, SAMPLE = 4096, 12_288
# (tokens, solver, its options).
TRIED = (
    (1024, "ascent", {}),
    (1024, "genetic", {"short": False}),
    (2048, "ascent", {}),
    (2048, "genetic", {}),
    (2048, "genetic", {"short": False}),
    (4096, "ascent", {}),
    (4096, "genetic", {}),
    (8192, "ascent", {}),
)


def contributions(folder: Path, layer: int) -> np.ndarray:
    """|activation| x norm of the neuron's column of `down_proj`, float32 [tokens, neurons], in random order."""
    checkpoint, calibration = Checkpoint(folder), Calibration(tokens_per_expert=SAMPLE)
    profile = Profile(checkpoint, calibration, calibration.rows(checkpoint))
    statistics = next(islice(profile, layer, None))
    source = LayeredModel(checkpoint, None)
    name = source.moe_blocks[layer]
    with source.loaded(name):
        norms = column_norms(source.model.get_submodule(name))[0]
    found: np.ndarray = (statistics.activations[0].float().abs() * norms).numpy()
    return found[np.random.default_rng(0).permutation(len(found))]


def main(folder: Path, layer: int, size: int) -> None:
    values = contributions(folder, layer)
    held_out = solvers.Problem(values[-HELD_OUT:], size, max(1, size // 4))
    solvers.solve(values[:64], size, 1, "genetic")
    rows = [["-", "stored order", "", "", f"{held_out.loss(held_out.contiguous()):.4f}"]]
    for tokens, solver, options in TRIED:
        start = time.process_time()
        partition = solvers.solve(values[:tokens], size, max(1, size // 4), solver, **options)
        seconds = time.process_time() - start
        # A short search is what is done there by default (see `genetic`).
        name = f"{solver}, long" if options else solver
        rows.append([tokens, name, f"{seconds:.1f}", f"{partition.loss:.4f}", f"{held_out.loss(partition.labels):.4f}"])
    print(f"layer {layer}, {values.shape[1]} neurons, N = {size}, m = {max(1, size // 4)}\n")
    print(markdown(["tokens", "solver", "processor s", "dropped, these tokens", "dropped, held out"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--sub-experts", type=int, default=16)
    given = parser.parse_args()
    print_provenance()
    main(given.model_dir, given.layer, given.sub_experts)
