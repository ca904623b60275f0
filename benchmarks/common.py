"""What every benchmark prints first: when, where and with which command its figures were made."""

import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from prism_refactor.evaluation.windows import Windows

EXAMPLE = Path(__file__).parents[1] / "examples" / "olmoe-tiny"
# Text that comes with the product: calibration.jsonl, and evaluation.jsonl, which is held out.
TEXT = Path(__file__).parents[1] / "calibration" / "data"


def print_provenance() -> None:
    model = platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    print(f"{date.today()}, {len(os.sched_getaffinity(0))} x {model}: python {' '.join(sys.argv)}\n")


def markdown(headers: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [headers, ["---"] * len(headers), *rows])


@torch.inference_mode()
def summed_loss(model: Any, windows: Windows, batch: int = 8) -> float:
    """Summed loss of the scored tokens, as transformers computes it; nats."""
    total = 0.0
    for rows, scored in zip(windows.rows.split(batch), windows.scored.split(batch), strict=True):
        total += model(input_ids=rows, labels=torch.where(scored, rows, -100)).loss.item() * int(scored.sum())
    return total
