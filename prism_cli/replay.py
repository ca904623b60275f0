"""`prism-replay`: a recorded trace under every replacement policy and cache size."""

import json
from pathlib import Path

import click

from prism_refactor.cli.app import Reporter, command
from prism_refactor.cli.options import PICTURE
from prism_refactor.offload.options import CacheBudget
from prism_refactor.offload.policies import POLICIES
from prism_refactor.offload.replay import Trace, belady, hit_rate
from prism_refactor.tables import table

SIZES = ("10%", "25%", "50%", "75%", "90%")
BOUND = "belady"


@command()
@click.argument("trace", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--fast-memory", "sizes", multiple=True, default=SIZES, help="Cache size, bytes (2GiB) or a share (25%); repeat to compare.")
@click.option("--policy", "policies", type=click.Choice(list(POLICIES)), multiple=True, help="Repeat to compare.  [default: all]")
@click.option("--plot", type=PICTURE, help="Also draw it: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(reporter: Reporter, trace: Path, sizes: tuple[str, ...], policies: tuple[str, ...], plot: Path | None, as_json: bool) -> None:
    """Compare replacement policies and cache sizes on the routing in TRACE, which prism-run --trace recorded.

    Prints the share of uses that find their sub-expert in fast memory, without prefetch. belady knows the future: no policy can be better.
    """
    budgets = [CacheBudget(size) for size in sizes]
    recorded = Trace.load(trace)
    total = recorded.layers * recorded.experts
    names = [*(policies or POLICIES), BOUND]
    slots = [max(min(budget.bytes(total * recorded.sub_expert_bytes) // recorded.sub_expert_bytes, total), 1) for budget in budgets]
    rates: dict[str, list[float]] = {name: [] for name in names}
    for done, number in enumerate(slots):
        for name in names:
            policy = belady(recorded) if name == BOUND else POLICIES[name](recorded.layers, recorded.experts)
            rates[name].append(hit_rate(recorded, policy, number))
        reporter.progress("cache sizes replayed", done + 1, len(slots))
    reporter.close()
    if plot is not None:
        draw(rates, [number / total for number in slots], plot)
    if as_json:
        click.echo(json.dumps({"sizes": sizes, "slots": slots, "sub_experts": total, "hit_rates": rates}, indent=2))
        return
    rows = [
        [size, number, *(f"{rates[name][row]:.1%}" for name in names)] for row, (size, number) in enumerate(zip(sizes, slots, strict=True))
    ]
    click.echo(table(["fast memory", "slots", *names], rows))
    if plot is not None:
        click.echo(f"drawn to {plot}")


def draw(rates: dict[str, list[float]], shares: list[float], path: Path) -> None:
    """Hit rate against the share of the sub-experts that fits."""
    from matplotlib.figure import Figure

    from prism_refactor.files import save_figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    order = sorted(range(len(shares)), key=lambda row: shares[row])
    for name, values in rates.items():
        style = "k--" if name == BOUND else "o-"
        axes.plot([shares[row] for row in order], [values[row] for row in order], style, markersize=4, label=name)
    axes.set(xlabel="share of the sub-experts in fast memory", ylabel="hit rate", ylim=(0, 1))
    axes.legend()
    save_figure(figure, path)
