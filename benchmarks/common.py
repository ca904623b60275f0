"""What every benchmark prints first: when, where and with which command its figures were made."""

import os
import platform
import sys
from datetime import date
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "olmoe-tiny"


def print_provenance() -> None:
    model = platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    print(f"{date.today()}, {len(os.sched_getaffinity(0))} x {model}: python {' '.join(sys.argv)}\n")
