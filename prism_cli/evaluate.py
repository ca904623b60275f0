"""`prism-eval`: perplexity against active sub-experts, the original beside its refactored models."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_refactor.calibration.settings import DTYPES, Calibration
from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import INPUT_FOLDER, PICTURE, TEXT_OPTIONS, Requirements, add
from prism_refactor.errors import RequirementError, UsageError
from prism_refactor.formats import EVALUATION, Curve, Evaluation, OperatingPoint, Text
from prism_refactor.requirements import Requirement
from prism_refactor.tables import table

if TYPE_CHECKING:
    from prism_refactor.evaluation.windows import Windows
    from prism_refactor.models.refactored import RefactoredCheckpoint


@command()
@click.argument("model_dir", type=INPUT_FOLDER)
@click.argument("refactored_dirs", type=INPUT_FOLDER, nargs=-1, metavar="[REFACTORED_DIR]...")
@click.option("--k", "choices", metavar="LIST", help="Active sub-experts: '4,8,12', '2-16' or 'all'.  [default: whole experts' worth]")
@click.option("--budget", "budgets", metavar="LIST", help="Also shares that tokens run on average, each what it needs: '25%,50%'.")
@click.option(
    "--router",
    type=click.Choice(["two-level", "stock", "both"]),
    default="two-level",
    help="How the refactored models route; one without a sub-router runs stock.",
)
@add(TEXT_OPTIONS)
@click.option("--stride", type=click.IntRange(1), help="Tokens from one window to the next.  [default: half of --max-seq-length]")
@click.option("--num-tokens", type=click.IntRange(2), help="Read at most this much text.  [default: all of it]")
@click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", help="Compute type; auto is float32 on a CPU.")
@click.option("--save", is_flag=True, help=f"Store each model's result in its folder as {EVALUATION}, for prism-report.")
@click.option("--plot", type=PICTURE, help="Save the curves as a picture (.png, .svg, .pdf).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@Requirements(
    "--fail-if",
    "turn the comparison round: 'recovered@50%<0.3' becomes 'recovered@50%>=0.3'",
    "Exit with 4 unless true, e.g. 'recovered@50%>=0.3'.",
)
def main(
    reporter: Reporter,
    model_dir: Path,
    refactored_dirs: tuple[Path, ...],
    choices: str | None,
    budgets: str | None,
    router: str,
    stride: int | None,
    num_tokens: int | None,
    save: bool,
    plot: Path | None,
    as_json: bool,
    require: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure the perplexity of the checkpoint in MODEL_DIR at its own top-1 to top-K, and of models refactored from it at every k.

    One layer is in memory at a time, and each layer is read once for all k. Windows of --max-seq-length tokens overlap; each token is
    scored once. Intervals are 95 % bootstrap intervals over windows; 'recovered' is the share of what the original loses at the same
    active experts that the refactored model does not lose.
    """
    from prism_refactor.evaluation.compare import Comparison
    from prism_refactor.evaluation.curve import FIGURES, check_position
    from prism_refactor.evaluation.plot import plot_curves
    from prism_refactor.evaluation.windows import read_windows
    from prism_refactor.files import write_json
    from prism_refactor.models.checkpoint import Checkpoint
    from prism_refactor.models.refactored import RefactoredCheckpoint

    requirements = [Requirement.parse(text, FIGURES) for text in require]
    if requirements and not refactored_dirs:
        raise UsageError("--require: needs a REFACTORED_DIR")
    original = Checkpoint(model_dir)
    models = [RefactoredCheckpoint(folder) for folder in refactored_dirs]
    for model in models:
        model.check_source(original)
    requests = [_request(model, choices, router) for model in models]
    shares = _shares(budgets, models, router)
    for model, (_, values) in zip(models, requests, strict=True):
        for requirement in requirements:
            check_position(requirement, values, model.prism.max_active)
    calibration = Calibration(**options)
    windows = read_windows(calibration, original, stride, num_tokens)
    comparison = Comparison(original, windows, calibration.compute(original), calibration.seed, reporter)
    curves: list[Curve] = []
    for model, (routers, values) in zip(models, requests, strict=True):
        found = comparison.curves(model, routers, values, shares)
        curves += found
        result = _result(windows, calibration, comparison.original, found)
        if save:
            write_json(model.path / EVALUATION, asdict(result))
    reporter.close()
    if plot is not None:
        plot_curves(comparison.original, curves, plot)
    if as_json:
        click.echo(json.dumps(asdict(_result(windows, calibration, comparison.original, curves)), indent=2))
    else:
        click.echo(_tables(windows, comparison.original, curves))
    _check(requirements, curves)


def _request(model: "RefactoredCheckpoint", choices: str | None, router: str) -> tuple[list[str], list[int]]:
    """(routers, values of k) to run a refactored model at."""
    prism = model.prism
    routers = ["stock", "two-level"] if router == "both" else [router]
    if not prism.has_router:
        routers = ["stock"]
    if not prism.stock:
        if router == "stock":
            raise UsageError(f"--router stock: {model.path} as a stock model is the original; use --router two-level")
        routers = ["two-level"]
    return routers, _choices(choices, prism.max_active) if choices else prism.whole_experts


def _choices(text: str, full: int) -> list[int]:
    """The values of k of --k, rising. Raises UsageError when the text is no such list."""
    found: set[int] = set()
    for part in ("1-" + str(full) if text.strip() == "all" else text).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UsageError(f"--k {text}: write numbers and ranges such as '4,8,12' or '2-16', or 'all'")
        found |= set(range(int(first), int(last if dash else first) + 1))
    if not found or min(found) < 1 or max(found) > full:
        raise UsageError(f"--k {text}: choose from 1 to {full}")
    return sorted(found)


def _shares(text: str | None, models: list["RefactoredCheckpoint"], router: str) -> list[float]:
    """The budgets of --budget, rising. Raises UsageError when the text is no list of shares, or a model cannot run within a budget."""
    from prism_refactor.evaluation.curve import checked_budgets

    if text is None:
        return []
    for model in models:
        if router == "stock" or not model.prism.has_router:
            raise UsageError(f"--budget: {model.path} has no two-level router here; use --router two-level or another folder")
        if not model.has_thresholds:
            raise UsageError(f"--budget: {model.path} was written before there were budgets; refactor it again")
    parts = [part.strip() for part in text.split(",")]
    try:
        return checked_budgets(float(part.removesuffix("%")) / (100 if part.endswith("%") else 1) for part in parts)
    except ValueError:
        raise UsageError(f"--budget {text}: write shares such as '25%,50%' or '0.25,0.5'") from None


def _result(windows: "Windows", calibration: Calibration, original: Curve, curves: list[Curve]) -> Evaluation:
    rows, length = windows.rows.shape
    datasets = list(calibration.datasets) or ["bundled"]
    text = Text(datasets, windows.tokens, rows, length, windows.stride, calibration.seed, windows.sample)
    return Evaluation(text, original, curves)


def _tables(windows: "Windows", original: Curve, curves: list[Curve]) -> str:
    header = ["k", "share", "active", "MFLOPs", "perplexity", "95 % interval", "to original", "recovered", "95 % interval"]
    parts = [f"{windows.tokens} tokens in windows of {windows.rows.shape[1]}, stride {windows.stride}"]
    for curve in [original, *curves]:
        unit = "whole experts" if curve is original else f"sub-experts, {curve.router} router"
        rows = [_row(point, curve) for point in curve.points]
        parts.append(f"\n{curve.model}: {unit}\n{table(header[:6] if curve is original else header, rows)}")
        if curve.budgets:
            rows = [_row(point, curve) for point in curve.budgets]
            parts.append(f"within a budget, k as each token needs, on average\n{table(['mean k', *header[1:]], rows)}")
    domains = sorted(original.points[-1].domains)
    if len(domains) > 1:
        rows = [
            [curve.model, curve.router, point.k_text(curve.full), *(f"{point.domains[domain]:.2f}" for domain in domains)]
            for curve in [original, *curves]
            for point in [*curve.points, *curve.budgets]
        ]
        parts.append(f"\nperplexity by domain\n{table(['model', 'router', 'k', *domains], rows)}")
    return "\n".join(parts)


def _row(point: OperatingPoint, curve: Curve) -> list[str]:
    row = [
        f"{point.k_text(curve.full)} of {curve.full}",
        f"{point.share:.0%}",
        f"{point.cost.active_parameters / 1e6:.1f}M",
        f"{point.cost.flops / 1e6:.2f}",
        f"{point.perplexity:.2f}",
        "{:.2f} - {:.2f}".format(*point.interval),
    ]
    if curve.router == "original":
        return row
    row.append("-" if point.ratio is None else f"{point.ratio:.4f}")
    if point.recovered is None or point.recovered_interval is None:
        return [*row, "-", "-"]
    return [*row, f"{point.recovered:.0%}", "{:.0%} - {:.0%}".format(*point.recovered_interval)]


def _check(requirements: list[Requirement], curves: list[Curve]) -> None:
    from prism_refactor.evaluation.curve import figure

    failed = []
    for requirement in requirements:
        for curve in curves:
            value = figure(requirement, curve.points, curve.full)
            if not requirement.holds(value):
                failed.append(f"{curve.model} ({curve.router}): {requirement.text} does not hold, it is {value:.4g}")
    if failed:
        raise RequirementError("; ".join(failed))
