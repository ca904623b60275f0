"""`prism-profile`: activation statistics of a checkpoint."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_refactor.calibration.settings import Calibration
from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import CALIBRATION_OPTIONS, INPUT_FOLDER, OUTPUT_FOLDER, STATS_FOLDER, OutputFile, add
from prism_refactor.cli.resuming import RESUME, Resumption
from prism_refactor.formats import INDEX
from prism_refactor.tables import table

if TYPE_CHECKING:
    from prism_refactor.models.checkpoint import Checkpoint


class Shard(click.ParamType):
    """A part of a whole, I/M."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(I, M)."""
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is not I/M with I from 1 to M, such as 2/8", param, ctx)
        return int(match[1]), int(match[2])


def _explain(context: click.Context, parameter: click.Parameter, folder: Path | None) -> None:
    """Callback of an eager option: print how the checkpoint in `folder` can be split and exit."""
    if folder is not None:
        from prism_refactor.refactoring.families import explanation

        click.echo(explanation(folder))
        context.exit()


@command()
@click.argument("stats_dir", type=OUTPUT_FOLDER)
@click.argument("shard_dirs", type=STATS_FOLDER, nargs=-1, required=True, metavar="SHARD_DIR...")
@click.option("--overwrite", is_flag=True, help="Replace an existing STATS_DIR that prism-profile wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def merge(_: Reporter, stats_dir: Path, shard_dirs: tuple[Path, ...], overwrite: bool, as_json: bool) -> None:
    """Merge what prism-profile --shard 1/M ... M/M wrote to the SHARD_DIRs into STATS_DIR: what one run would have found."""
    from prism_refactor.calibration.store import merge_statistics
    from prism_refactor.files import check_target

    for folder in shard_dirs:
        check_target(stats_dir, folder, overwrite, INDEX)
    summaries = [record["summary"] for record in merge_statistics(stats_dir, list(shard_dirs))]
    click.echo(json.dumps(summaries, indent=2) if as_json else profile_table(summaries))


@command(merge=merge)
@click.argument("model_dir", type=INPUT_FOLDER)
@click.argument("stats_dir", type=OUTPUT_FOLDER)
@add(CALIBRATION_OPTIONS)
@click.option("--shard", type=Shard(), default="1/1", metavar="I/M", help="Run part I of M of the text, for prism-profile merge.")
@RESUME
@click.option("--overwrite", is_flag=True, help="Replace an existing STATS_DIR that this command wrote.")
@click.option("--html", "page", type=OutputFile(), help="Also show the statistics as an HTML page, here.")
@click.option(
    "--explain",
    type=INPUT_FOLDER,
    is_eager=True,
    expose_value=False,
    callback=_explain,
    metavar="MODEL_DIR",
    help="Say how the checkpoint in MODEL_DIR can be split, or why it cannot, and exit.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def main(
    reporter: Reporter,
    model_dir: Path,
    stats_dir: Path,
    shard: tuple[int, int],
    resume: bool,
    overwrite: bool,
    page: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run text through the checkpoint in MODEL_DIR, one layer in memory at a time, and write what its experts' neurons did to STATS_DIR.

    Use the result with prism-refactor --stats STATS_DIR. An interrupted run keeps its finished layers in STATS_DIR.partial; --resume goes
    on with them. `prism-profile merge STATS_DIR SHARD_DIR...` puts the shards of a text together.
    """
    from prism_refactor.calibration.profile import Profile
    from prism_refactor.calibration.store import estimated_bytes, write_statistics
    from prism_refactor.files import check_target, unfinished_bytes
    from prism_refactor.models.checkpoint import Checkpoint
    from prism_refactor.models.layered import LayeredModel
    from prism_refactor.refactoring.plan import memory_needed
    from prism_refactor.resources import check_disk, check_memory

    check_target(stats_dir, model_dir, overwrite, INDEX)
    checkpoint = Checkpoint(model_dir)
    calibration = Calibration(**options)
    layered = LayeredModel(checkpoint, None)
    check_memory(memory_needed(layered, calibration))
    check_disk(stats_dir, estimated_bytes(checkpoint, calibration, shard[1]) - (unfinished_bytes(stats_dir) if resume else 0))
    rows = calibration.rows(checkpoint)
    reporter.warn_of(calibration.shortage(rows, checkpoint))
    with Resumption(reporter, stats_dir, len(layered.moe_blocks)):
        records = write_statistics(stats_dir, Profile(checkpoint, calibration, rows, reporter, shard), resume)
    if page is not None:
        _write_page(page, checkpoint, calibration.recorded(rows), records)
    reporter.close()
    summaries = [record["summary"] for record in records]
    for summary in summaries:
        if summary["unrouted"]:
            reporter.warning(f"layer {summary['layer']}: no token reached expert {', '.join(map(str, summary['unrouted']))}")
    click.echo(json.dumps(summaries, indent=2) if as_json else profile_table(summaries))


def _write_page(page: Path, checkpoint: "Checkpoint", calibration: dict[str, Any], records: list[dict[str, Any]]) -> None:
    import numpy as np

    from prism_refactor.evaluation.page import profile_page
    from prism_refactor.files import output_file

    source = {
        "name": checkpoint.path.resolve().name,
        "model_type": checkpoint.config.model_type,
        "fingerprint": checkpoint.fingerprint(),
    }
    shown = [record["shown"] | {"picture": np.array(record["shown"]["picture"], np.float32)} for record in records]
    with output_file(page) as partial:
        partial.write_text(profile_page(source, calibration, shown), encoding="utf-8")


def profile_table(summaries: list[dict[str, Any]]) -> str:
    """One row per MoE layer, from `LayerSummary` as dicts."""
    from prism_refactor.calibration.statistics import TOKEN_FLOOR

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
        below = ", ".join(map(str, summary["below_floor"])) or "-"
        share = f"{summary['top_quarter_share']:.1%}"
        rows.append([*(summary[key] for key in ("layer", "experts", "tokens_routed", "least_routed")), share, below])
    caption = "L1 mass in top quarter: median share of a token's |activation| in the quarter of an expert's neurons where it is largest"
    return f"{table(header, rows)}\n{caption}"
