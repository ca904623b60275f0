"""`prism-profile`: activation statistics of a checkpoint."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from calibration import INDEX, TOKEN_FLOOR, Calibration, LayerStatistics, LayerSummary, Profile, estimated_bytes, write_statistics
from checkpoints import Checkpoint, check_disk, check_target, output_file
from prism_cli.architectures import explain
from prism_cli.door import Reporter, command
from prism_cli.options import CALIBRATION_OPTIONS, FOLDER, add, check_parent, table
from reporting import profile_page

# Share of a token's neurons that count as active in the pictures of --html.
ACTIVE_SHARE = 1 / 8


@command
@click.argument("model_dir", type=FOLDER)
@click.argument("stats_dir", type=FOLDER)
@add(CALIBRATION_OPTIONS)
@click.option("--overwrite", is_flag=True, help="Replace an existing STATS_DIR that this command wrote.")
@click.option("--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Also show the statistics as an HTML page, here.")
@click.option(
    "--explain",
    type=FOLDER,
    is_eager=True,
    expose_value=False,
    callback=explain,
    metavar="MODEL_DIR",
    help="Say how the checkpoint in MODEL_DIR can be split, or why it cannot, and exit.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def main(reporter: Reporter, model_dir: Path, stats_dir: Path, overwrite: bool, page: Path | None, as_json: bool, **options: Any) -> None:
    """Run text through the checkpoint in MODEL_DIR, one layer in memory at a time, and write what its experts' neurons did to STATS_DIR.

    Use the result with prism-refactor --stats STATS_DIR.
    """
    check_target(stats_dir, model_dir, overwrite, INDEX)
    check_parent("--html", page)
    checkpoint = Checkpoint(model_dir)
    calibration = Calibration(**options)
    check_disk(stats_dir, estimated_bytes(checkpoint, calibration))
    layers = checkpoint.config.num_hidden_layers
    rows = calibration.rows(checkpoint)
    collected: Iterable[LayerStatistics] = Profile(
        checkpoint, calibration, rows, lambda layer, done, total: reporter.step("rows profiled", layer, layers, done, total)
    )
    drawn: list[dict[str, Any]] = []
    if page is not None:
        collected = _drawing(collected, drawn)
    summaries = write_statistics(stats_dir, checkpoint, calibration.recorded(rows), collected)
    if page is not None:
        shown = [layer | {"own_quarter": summary.top_quarter_share} for layer, summary in zip(drawn, summaries, strict=True)]
        source = {
            "name": checkpoint.path.resolve().name,
            "model_type": checkpoint.config.model_type,
            "fingerprint": checkpoint.fingerprint(),
        }
        with output_file(page) as partial:
            partial.write_text(profile_page(source, calibration.recorded(rows), shown), encoding="utf-8")
    reporter.close()
    for summary in summaries:
        if summary.unrouted:
            reporter.warning(f"layer {summary.layer}: no token reached expert {', '.join(map(str, summary.unrouted))}")
    shortage = calibration.shortage(rows)
    if shortage:
        reporter.warning(shortage)
    click.echo(json.dumps([asdict(summary) for summary in summaries], indent=2) if as_json else profile_table(summaries))


def _drawing(layers: Iterable[LayerStatistics], drawn: list[dict[str, Any]]) -> Iterator[LayerStatistics]:
    """Pass the statistics on, keeping the little of each layer that the page shows."""
    for statistics in layers:
        expert = int(statistics.tokens_routed.argmax())
        drawn.append(
            {
                "layer": statistics.layer,
                "tokens": statistics.tokens_routed.tolist(),
                "fixed_quarter": statistics.fixed_quarter_share(),
                "expert": expert,
                "picture": statistics.coactivation_picture(expert, ACTIVE_SHARE).numpy(),
            }
        )
        yield statistics
        # Not kept while the next layer is made.
        del statistics


def profile_table(summaries: list[LayerSummary]) -> str:
    """One row per MoE layer."""
    header = [
        "layer",
        "experts",
        "tokens routed",
        "fewest to an expert",
        "L1 mass in top quarter",
        f"expert numbers below {TOKEN_FLOOR} tokens",
    ]
    rows = []
    for summary in summaries:
        below = ", ".join(map(str, summary.below_floor)) or "-"
        share = f"{summary.top_quarter_share:.1%}"
        rows.append([summary.layer, summary.experts, summary.tokens_routed, summary.least_routed, share, below])
    caption = "L1 mass in top quarter: median share of a token's |activation| in the quarter of an expert's neurons where it is largest"
    return f"{table(header, rows)}\n{caption}"
