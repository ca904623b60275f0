"""`prism-profile merge`: one statistics folder from those of the shards of a text."""

import json
from pathlib import Path

import click

from prism_refactor.calibration.store import INDEX, merge_statistics
from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import FOLDER
from prism_refactor.cli.profile import profile_table
from prism_refactor.files import check_target


@command
@click.argument("stats_dir", type=FOLDER)
@click.argument("shard_dirs", type=FOLDER, nargs=-1, required=True, metavar="SHARD_DIR...")
@click.option("--overwrite", is_flag=True, help="Replace an existing STATS_DIR that prism-profile wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def main(_: Reporter, stats_dir: Path, shard_dirs: tuple[Path, ...], overwrite: bool, as_json: bool) -> None:
    """Merge what prism-profile --shard 1/M ... M/M wrote to the SHARD_DIRs into STATS_DIR: what one run would have found."""
    for folder in shard_dirs:
        check_target(stats_dir, folder, overwrite, INDEX)
    records = merge_statistics(stats_dir, list(shard_dirs))
    summaries = [record["summary"] for record in records]
    click.echo(json.dumps(summaries, indent=2) if as_json else profile_table(summaries))
