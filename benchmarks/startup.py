"""Seconds that every command takes to answer --help, a usage error, --version and a missing folder; and what importing the package adds.

    python benchmarks/startup.py [REPEATS]

Medians of REPEATS (5) runs, in turn, so that a slow spell of the machine is spread over all of them.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import print_provenance

from prism_refactor.tables import table

COMMANDS = ("refactor", "profile", "verify", "eval", "finetune", "bench", "serve", "loadtest", "run", "replay", "report")
FOLDERS = {"refactor": 2, "profile": 2, "verify": 2, "eval": 2, "finetune": 2, "bench": 1, "serve": 1, "run": 1, "replay": 1, "report": 1}
ASKED = {"--help": ["--help"], "usage error": ["--no-such-option"], "--version": ["--version"]}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(arguments, capture_output=True, check=False)
    return time.perf_counter() - start


def main(repeats: int) -> None:
    tried: dict[tuple[str, str], list[str]] = {
        ("python", "-c pass"): [sys.executable, "-c", "pass"],
        ("python", "-c 'import prism_refactor'"): [sys.executable, "-c", "import prism_refactor"],
    }
    for name in COMMANDS:
        command = str(Path(sys.executable).parent / f"prism-{name}")
        tried |= {(name, what): [command, *arguments] for what, arguments in ASKED.items()}
        if name in FOLDERS:
            tried[name, "missing folder"] = [command, *["/nowhere"] * FOLDERS[name], *(["--prompt", "x"] if name == "run" else [])]
    found: dict[tuple[str, str], list[float]] = {key: [] for key in tried}
    for _ in range(repeats):
        for key, arguments in tried.items():
            found[key].append(seconds(arguments))
    middle = {key: statistics.median(values) for key, values in found.items()}
    plain, imported = (middle[key] for key in list(tried)[:2])
    print(f"python -c pass {plain:.3f} s; with import prism_refactor {imported - plain:+.3f} s")
    header = [*ASKED, "missing folder"]
    rows = [[f"prism-{name}", *(f"{middle[name, what]:.2f}" if (name, what) in middle else "-" for what in header)] for name in COMMANDS]
    print(table(["seconds", *header], rows))


if __name__ == "__main__":
    print_provenance()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
