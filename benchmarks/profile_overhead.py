"""Wall time of profiling beside a plain transformers forward pass over the same tokens: median of several alternating runs.

    python benchmarks/profile_overhead.py [MODEL_DIR]

Both read the checkpoint from disk and compute in float32 with the same batch size; the plain pass is `from_pretrained` and
`model(input_ids)` with transformers' default (grouped) experts, and with its eager ones.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from common import EXAMPLE, print_provenance
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from prism_refactor.calibration.profile import Profile
from prism_refactor.calibration.settings import Calibration
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.tables import table

ROUNDS = 5


@torch.inference_mode()
def plain(model_dir: Path, rows: torch.Tensor, batch_size: int, experts: str) -> float:
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, experts_implementation=experts)
    for begin in range(0, len(rows), batch_size):
        model(input_ids=rows[begin : begin + batch_size])
    return time.perf_counter() - start


def profiled(checkpoint: Checkpoint, calibration: Calibration, rows: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in Profile(checkpoint, calibration, rows):
        pass
    return time.perf_counter() - start


def main(model_dir: Path) -> None:
    checkpoint, calibration = Checkpoint(model_dir), Calibration(num_samples=128)
    rows = calibration.rows(checkpoint)
    times: dict[str, list[float]] = {"plain, grouped": [], "plain, eager": [], "profile": []}
    for _ in range(ROUNDS):
        times["plain, grouped"].append(plain(model_dir, rows, calibration.batch_size, "grouped_mm"))
        times["plain, eager"].append(plain(model_dir, rows, calibration.batch_size, "eager"))
        times["profile"].append(profiled(checkpoint, calibration, rows))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{rows.numel()} tokens, median of {ROUNDS}")
    lines = [
        [name, f"{seconds:.2f}", f"{seconds / medians['plain, grouped']:.2f}", f"{seconds / medians['plain, eager']:.2f}"]
        for name, seconds in medians.items()
    ]
    print(table(["", "seconds", "of plain grouped", "of plain eager"], lines))


if __name__ == "__main__":
    logging.disable_progress_bar()
    print_provenance()
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLE)
