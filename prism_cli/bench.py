"""`prism-bench`: how long a step takes, over tokens, k and context."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_refactor.calibration.settings import torch_dtype
from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import INPUT_FOLDER, PICTURE, SERVING_OPTIONS, add
from prism_refactor.errors import UsageError
from prism_refactor.serving.scheduling import Limits
from prism_refactor.tables import table

if TYPE_CHECKING:
    from prism_refactor.formats import LatencyGrid
    from prism_refactor.serving.performance import PerformanceModel


@command()
@click.argument("refactored_dir", type=INPUT_FOLDER)
@add(SERVING_OPTIONS)
@click.option("--context", type=click.IntRange(1), help="Longest context measured.  [default: half of the model's, at most 1024]")
@click.option("--repeats", type=click.IntRange(1), default=5, help="Times that every point is measured; medians count.")
@click.option("--held-out", type=click.IntRange(0), default=12, help="Points of each kind that predictions are compared with.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the held-out points.")
@click.option("--plot", type=PICTURE, help="Also draw it: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print the model as JSON.")
def main(reporter: Reporter, refactored_dir: Path, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Measure how long a step of the serving engine takes with the checkpoint in REFACTORED_DIR, on this machine.

    A step is a batch of requests that each run one token (decode), or a prompt (prefill). Medians over the tokens of a step, k and the
    context are written to REFACTORED_DIR/performance.json, where prism-serve and prism-loadtest --simulate find them, with the error on
    points between those measured.
    """
    import torch

    from prism_refactor.formats import LatencyGrid
    from prism_refactor.models.loading import load
    from prism_refactor.serving.engine import Engine
    from prism_refactor.serving.performance import Sampling, fit, powers
    from prism_refactor.serving.transformers_batching import KV_PAGE

    model = load(refactored_dir, options["device"], torch_dtype(options["dtype"]))
    context = options["context"] or min(1024, model.config.get_text_config().max_position_embeddings // 2)
    tokens, requests = options["max_batch_tokens"], options["max_requests"]
    engine = Engine(model, "fifo", Limits(tokens, requests, kv_tokens=requests * (context + KV_PAGE) + tokens))
    if context + tokens > engine.context:
        raise UsageError(f"--context {context} and {tokens} tokens of a step: the model takes {engine.context} together")
    contexts = sorted({min(16, context), context // 4 or 1, context})
    ks = sorted({max(engine.full_k * quarter // 4, 1) for quarter in (1, 2, 3, 4)})
    grids = {"decode": LatencyGrid(powers(requests), ks, contexts), "prefill": LatencyGrid(powers(tokens, 16, 2), ks, [0, context])}
    about = {
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    sampling = Sampling(options["held_out"], options["repeats"], options["seed"])
    performance = fit(engine.measure, engine.full_k, grids, sampling, about, reporter)
    engine.close()
    path = performance.save(refactored_dir)
    reporter.close()
    if plot is not None:
        draw(performance, plot)
    click.echo(path.read_text().rstrip() if as_json else describe(performance))
    if not as_json:
        click.echo(f"written to {path}" + (f" and {plot}" if plot else ""))


def describe(performance: "PerformanceModel") -> str:
    """Milliseconds of a step at the middle context, by tokens and k, and how far predictions were off."""
    parts = []
    for name, grid in (("decode", performance.decode), ("prefill", performance.prefill)):
        middle = len(grid.context) // 2 if name == "decode" else 0
        rows = [
            [tokens, *(f"{grid.seconds[row][column][middle] * 1e3:.1f}" for column in range(len(grid.k)))]
            for row, tokens in enumerate(grid.tokens)
        ]
        parts.append(f"{name}, context {grid.context[middle]}: milliseconds of a step")
        parts.append(table(["tokens", *(f"k={k}" for k in grid.k)], rows))
    if performance.held_out:
        parts.append(
            f"{len(performance.held_out)} points between these: predictions were off by {performance.error():.1%} (median), "
            f"{performance.error(0.9):.1%} (90 % of them at most)"
        )
    return "\n".join(parts)


def draw(performance: "PerformanceModel", path: Path) -> None:
    """Seconds against tokens, a line per k, with quartiles and the held-out points."""
    from matplotlib.figure import Figure

    from prism_refactor.files import save_figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        grid: LatencyGrid = getattr(performance, name)
        middle = len(grid.context) // 2 if name == "decode" else 0
        for column, k in enumerate(grid.k):
            low, mid, high = ([row[column][middle] * 1e3 for row in values] for values in (grid.low, grid.seconds, grid.high))
            line = axes.plot(grid.tokens, mid, marker="o", markersize=3, label=f"k = {k}")[0]
            axes.fill_between(grid.tokens, low, high, alpha=0.2, color=line.get_color())
        points = [point for point in performance.held_out if point.kind == name]
        axes.plot([point.tokens for point in points], [point.seconds * 1e3 for point in points], "kx", label="held out")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=f"{name}, context {grid.context[middle]}")
        axes.legend()
    save_figure(figure, path)
