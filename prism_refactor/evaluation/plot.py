"""The quality curve as a picture."""

from pathlib import Path

from prism_refactor.files import save_figure
from prism_refactor.formats import Curve


def plot_curves(original: Curve, curves: list[Curve], path: Path) -> None:
    """Save perplexity against the active share of the experts, with 95 % intervals; the file's ending chooses the format."""
    # Imported here: it takes a second that the other commands should not.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for curve in [original, *curves]:
        for points, style, name in ((curve.points, "o-", ""), (curve.budgets, "^:", ", within a budget")):
            if points:
                values = [point.perplexity for point in points]
                spread = [[value - point.interval[0] for value, point in zip(values, points, strict=True)]]
                spread.append([point.interval[1] - value for value, point in zip(values, points, strict=True)])
                label = f"{curve.model}, {curve.router}{name}" if curve is not original else f"{curve.model}, whole experts"
                axes.errorbar([100 * point.share for point in points], values, yerr=spread, fmt=style, capsize=3, label=label)
    axes.set(xlabel="active share of the experts, %", ylabel="perplexity (less is better)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
