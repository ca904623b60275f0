"""Time of `prism-eval`'s streaming pass against separate transformers evaluations of the same windows at the same k.

    python benchmarks/eval_speed.py REFACTORED_DIR [TOKENS]

Both run the two-level router in float32 at eight values of k over windows of 512 tokens (200,000 tokens by default, bundled text). The
separate ones load the model with `from_pretrained` for every k, as a user of transformers or lm-eval does, with its default (grouped)
experts, and take the mean loss of every window; the streaming pass is the library call behind the command. One run of each;
repeat the script for the spread.
"""

import sys
import time
from pathlib import Path

import torch
from common import print_provenance, summed_loss
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from prism_refactor.calibration.settings import Calibration
from prism_refactor.calibration.text import CALIBRATION_TEXT, EVALUATION_TEXT
from prism_refactor.evaluation.losses import Point, stream_losses
from prism_refactor.evaluation.windows import Windows, read_windows
from prism_refactor.models.checkpoint import Checkpoint
from prism_refactor.models.modeling_prism import attach, set_active
from prism_refactor.models.stream import ComputeOptions
from prism_refactor.tables import table

CHOICES, BATCH = (2, 4, 6, 8, 10, 12, 14, 16), 8


def separate(folder: Path, windows: Windows, k: int) -> float:
    """Summed loss of the scored tokens, with transformers."""
    model = attach(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder)
    set_active(model, k)
    return summed_loss(model, windows, BATCH)


def main(folder: Path, tokens: int) -> None:
    checkpoint = Checkpoint(folder)
    windows = read_windows(Calibration((EVALUATION_TEXT, CALIBRATION_TEXT), max_seq_length=512), checkpoint, 512, tokens)
    start = time.perf_counter()
    apart = [separate(folder, windows, k) for k in CHOICES]
    middle = time.perf_counter()
    points = [Point("two-level", k) for k in CHOICES]
    together = stream_losses(checkpoint, windows, points, ComputeOptions(torch.float32, batch_size=BATCH)).sums.sum(1)
    end = time.perf_counter()
    lines = [
        [k, f"{one / windows.tokens:.5f}", f"{other / windows.tokens:.5f}"]
        for k, one, other in zip(CHOICES, apart, together.tolist(), strict=True)
    ]
    print(f"{windows.tokens} tokens, {len(windows.rows)} windows")
    print(table(["k", "loss, separate", "loss, streamed"], lines))
    print(f"separate {middle - start:.1f} s, streamed {end - middle:.1f} s, ratio {(middle - start) / (end - middle):.2f}")


if __name__ == "__main__":
    logging.disable_progress_bar()
    print_provenance()
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200_000)
