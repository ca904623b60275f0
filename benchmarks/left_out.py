"""Text of a kind that calibration never saw: each domain of the bundled text is judged by a model that was calibrated without it.

    python benchmarks/left_out.py WORK_DIR [--model MODEL_DIR] [--option NAME=VALUE ...]

For every domain the model is refactored on the bundled calibration text of the other domains, and on that of all, and both run the
domain's part of the evaluation text: perplexity at k of a quarter, a half and three quarters of the sub-experts, and within budgets of
that share, beside whole experts of the original. The last row is all domains together. What WORK_DIR has is
not made again: other models and options need another one.
"""

import argparse
import ast
import json
import math
from pathlib import Path
from typing import Any

from common import EXAMPLE, TEXT, markdown, print_provenance

import prism_refactor
from prism_refactor.formats import Curve
from prism_refactor.models.refactored import RefactoredCheckpoint

CALIBRATION, EVALUATION = TEXT / "calibration.jsonl", TEXT / "evaluation.jsonl"
SHARES = (1 / 4, 1 / 2, 3 / 4)
# A manual in Japanese, which the example never learned: it is better at it with fewer experts.
SKIPPED = "perljp"


def records(path: Path) -> list[dict[str, Any]]:
    """The documents of a file of the bundled text."""
    with path.open() as file:
        return [json.loads(line) for line in file if SKIPPED not in line]


def write(path: Path, documents: list[dict[str, Any]]) -> str:
    """Save documents; returns the path as an option."""
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


class Domain:
    """A domain, and the curves on its evaluation text: the original's, and those of the models calibrated on others and on all."""

    def __init__(self, name: str, work: Path, model: Path, options: dict[str, Any]):
        self.name = name
        text = write(work / f"{name}.jsonl", [record for record in records(EVALUATION) if record["domain"] == name])
        others = [record for record in records(CALIBRATION) if record["domain"] != name]
        self.curves = []
        for out, documents in ((work / f"without-{name}", others), (work / "with-all", records(CALIBRATION))):
            if not out.exists():
                prism_refactor.refactor(model, out, datasets=(write(work / f"{out.name}.jsonl", documents),), **options)
            prism = RefactoredCheckpoint(out).prism
            full = prism.max_active
            if full % 4 or full // prism.sub_experts % 4:
                raise SystemExit(f"{model}: its {full // prism.sub_experts} active experts have no quarter to compare with")
            ks = [round(share * full) for share in (*SHARES, 1)]
            original, refactored = prism_refactor.evaluate(model, out, k=ks, budgets=SHARES, datasets=(text,))
            self.original = original
            self.curves.append(refactored)
        self.characters = len((work / f"{name}.jsonl").read_text())

    def perplexities(self) -> list[dict[float, float]]:
        """By share: of the original; of each model at k and within budgets."""
        found = [by_share(self.original)]
        for curve in self.curves:
            budgets = {point.budget: point.perplexity for point in curve.budgets} | {1.0: by_share(curve)[1.0]}
            found += [by_share(curve), budgets]
        return found


def by_share(curve: Curve) -> dict[float, float]:
    """Perplexity by active share."""
    return {point.share: point.perplexity for point in curve.points}


def recovered(own: dict[float, float], original: dict[float, float], share: float) -> float:
    """Share of what the original loses that is won back."""
    return (original[share] - own[share]) / (original[share] - original[1.0])


def together(domains: list[Domain]) -> list[dict[float, float]]:
    """Perplexities of all domains, weighted by their characters."""
    weights = [domain.characters / sum(each.characters for each in domains) for domain in domains]
    every = [domain.perplexities() for domain in domains]
    return [
        {share: math.exp(sum(w * math.log(own[way][share]) for w, own in zip(weights, every, strict=True))) for share in (*SHARES, 1.0)}
        for way in range(len(every[0]))
    ]


def main(work: Path, model: Path, options: dict[str, Any]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    names = sorted({record["domain"] for record in records(EVALUATION)})
    domains = [Domain(name, work, model, options) for name in names]
    rows = []
    for name, (original, *ways) in [*((domain.name, domain.perplexities()) for domain in domains), ("together", together(domains))]:
        shares = [" / ".join(f"{recovered(own, original, share):.0%}" for share in SHARES) for own in ways]
        rows.append([name, *shares])
    print("recovered at a quarter / a half / three quarters\n")
    print(markdown(["judged on", "calibrated without it, k", "and budget", "calibrated with all, k", "and budget"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, metavar="WORK_DIR")
    parser.add_argument("--model", type=Path, default=EXAMPLE)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of prism_refactor.refactor; repeat")
    given = parser.parse_args()
    pairs = dict(option.split("=", 1) for option in given.option)
    print_provenance()
    main(given.work, given.model, {name: ast.literal_eval(value) for name, value in pairs.items()})
