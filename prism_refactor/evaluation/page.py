"""Self-contained HTML pages: what prism-report shows of a refactored checkpoint, and what prism-profile shows of its source."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import imsave

from prism_refactor.formats import Curve, Evaluation, LayerReport, Manifest, OperatingPoint

# Of a chart, in inches of 72 units.
SIZE = (4.6, 3.0)
SPARK = (120, 30)
ROUTERS = ("original", "stock", "two-level")
# Colours that stand for variables of the style sheet until the picture is drawn.
_SHEET = {"original": "#00f001", "stock": "#00f002", "two-level": "#00f003", "other": "#00f004", "rule": "#00f005", "soft": "#00f006"}
_DASHES = {"original": "--", "stock": ":", "two-level": "-", "other": "-."}
# From this ratio of largest to smallest on, a chart's scale is logarithmic.
LOG_FROM = 8.0
DASH, TIMES, RETURN = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
SHOWN_PICTURES = 6
SHOWN_ERRORS = 3
# The budget nearest to this is shown token by token.
SAMPLE_BUDGET = 0.25


@dataclass(frozen=True)
class Mark:
    """One point of a chart: position and interval (both ends None without one)."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one line; `kind` picks its colour and dash in the style sheet."""

    name: str
    kind: str
    marks: list[Mark]


def report_page(manifest: Manifest, evaluation: Evaluation | None, pictures: dict[str, np.ndarray]) -> str:
    """The page.

    Args:
        manifest: prism.json.
        evaluation: evaluation.json; None without one.
        pictures: `layer.N.before` and `layer.N.after` float32 [P, P], `layer.N.expert` int64 [1]; may be empty.

    Returns:
        HTML that refers to nothing outside itself.
    """
    return _template("report.html").render(
        head=_head(manifest, evaluation),
        quality=None if evaluation is None else _quality(evaluation),
        active=None if evaluation is None else _active(evaluation, manifest.layers),
        errors=_errors(manifest.layers),
        partition=_partition(manifest.layers),
        loads=_loads([(layer.layer, [expert.tokens for expert in layer.experts]) for layer in manifest.layers]),
        pictures=_pictures(pictures, manifest.recipe.sub_experts),
        shown=SHOWN_PICTURES,
        environment=_environment(_facts(manifest)),
    )


def _facts(manifest: Manifest) -> dict[str, dict[str, Any]]:
    parts = asdict(manifest)
    parts["source"] |= parts["source"].pop("sizes")
    return {part: parts[part] for part in ("source", "result", "recipe", "calibration", "versions")}


def profile_page(source: dict[str, Any], calibration: dict[str, Any], layers: list[dict[str, Any]]) -> str:
    """The page of a checkpoint's statistics.

    Args:
        source: its `name`, `model_type` and what else identifies it.
        calibration: how the statistics were made, with `num_samples` and `max_seq_length`.
        layers: of each MoE layer, `layer`, `tokens` (routed to each expert), `own_quarter` and `fixed_quarter` (shares of |activation|),
            `expert` and its `picture` float32 [P, P], relative co-activation in stored order.

    Returns:
        HTML that refers to nothing outside itself.
    """
    shown, scale = _on_one_scale({layer["layer"]: layer["picture"] for layer in layers})
    return _template("profile.html").render(
        name=source["name"],
        type=source["model_type"],
        tokens=calibration["num_samples"] * calibration["max_seq_length"],
        concentration=_concentration(layers),
        loads=_loads([(layer["layer"], layer["tokens"]) for layer in layers]),
        pictures=scale | {"layers": [layer | {"uri": shown[layer["layer"]]} for layer in layers]},
        environment=_environment({"source": source, "calibration": calibration}),
    )


def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # A global, because templates that are imported see nothing else.
    environment.globals.update(spark={"width": SPARK[0], "height": SPARK[1]})
    return environment.get_template(name)


def _counts(sizes: dict[str, int]) -> tuple[int, int]:
    """(experts, active per token) of the original or the result under whatever names their family gives them."""
    experts, top_k, *_ = sizes.values()
    return experts, top_k


def _head(manifest: Manifest, evaluation: Evaluation | None) -> dict[str, Any]:
    experts, top_k = _counts(manifest.source.sizes)
    sub_experts, most = _counts(manifest.result)
    before, after = manifest.dropped
    figures = [
        (f"{experts} → {sub_experts}", "experts → sub-experts in each MoE layer"),
        (f"{top_k} → {most}", "settings of the active number per token"),
        (f"{before:.2f} → {after:.2f}", "share of activation that the partition drops: stored order → reordered"),
    ]
    return {
        "name": manifest.source.name,
        "type": manifest.source.model_type,
        "layers": len(manifest.layers),
        "experts": experts,
        "top_k": top_k,
        "split": manifest.recipe.sub_experts,
        "sub_experts": sub_experts,
        "most": most,
        "figures": [*figures, *_half_error(manifest.layers), *_half_quality(evaluation)],
    }


def _half_error(layers: list[LayerReport]) -> list[tuple[str, str]]:
    """How much nearer the two-level router is to the layer's full output at half the experts; nothing where one was not measured."""
    errors = [layer.output_error for layer in layers]
    if not errors or any(not {"original", "two-level"} <= error.keys() for error in errors):
        return []
    place = max(len(errors[0]["k"]) // 2 - 1, 0)
    original, refactored = (float(np.mean([error[name][place] for error in errors])) for name in ("original", "two-level"))
    if refactored <= 0:
        return []
    return [
        (f"{original / refactored:.1f}{TIMES}", f"smaller output error of a layer at k = {layers[0].measured_k[place]} than the original's")
    ]


def _half_quality(evaluation: Evaluation | None) -> list[tuple[str, str]]:
    """What the best curve wins back nearest to half of the active experts; nothing without an evaluation."""
    if evaluation is None:
        return []
    found = [point for curve in evaluation.refactored for point in curve.points if _finite(point.recovered)]
    if not found:
        return []
    point = min(found, key=lambda point: (abs(point.share - 0.5), -(point.recovered or 0.0)))
    return [(_value(point.recovered, ".0%"), f"of what the original loses at {point.share:.0%} of its active experts is won back")]


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _interval(values: tuple[float, float] | None, form: str) -> str:
    if values is None or not all(map(_finite, values)):
        return DASH
    return f"{values[0]:{form}} {DASH} {values[1]:{form}}"


def _bound(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _value(value: float | None, form: str) -> str:
    return f"{value:{form}}" if value is not None and _finite(value) else DASH


def _kind(router: str) -> str:
    return router if router in ROUTERS else "other"


def _quality(evaluation: Evaluation) -> dict[str, Any]:
    curves = [evaluation.original, *evaluation.refactored]
    shares = sorted({point.share for curve in curves for point in curve.points})
    ticks = [(share, f"{share:.0%}") for share in shares] if len(shares) <= 6 else [(part / 4, f"{part / 4:.0%}") for part in range(1, 5)]
    perplexity = [Series(_title(curve), _kind(curve.router), _marks(curve, "perplexity", "interval")) for curve in curves]
    ratio = [Series(_title(curve), _kind(curve.router), _marks(curve, "ratio", "ratio_interval")) for curve in curves]
    domains = sorted(curves[0].points[-1].domains)
    return {
        "text": evaluation.text,
        "perplexity": chart(perplexity, ticks, "active share of the original's experts", "perplexity"),
        "ratio": chart(ratio, ticks, "active share of the original's experts", "perplexity ÷ the original's"),
        "rows": [_point_row(curve, point) for curve in curves for point in [*curve.points, *curve.budgets]],
        "domains": domains,
        "domain_rows": [
            (_title(curve), _kind(curve.router), point.k_text(curve.full), [_value(point.domains.get(domain), ".2f") for domain in domains])
            for curve in curves
            for point in [*curve.points, *curve.budgets]
        ],
    }


def _title(curve: Curve) -> str:
    return "original" if curve.router == "original" else f"{curve.router} router"


def _marks(curve: Curve, value: str, interval: str) -> list[Mark]:
    marks = []
    for point in curve.points:
        if not _finite(getattr(point, value)):
            continue
        low, high = map(_bound, getattr(point, interval) or (None, None))
        bounded = low is not None and high is not None and low < high
        marks.append(Mark(point.share, getattr(point, value), low if bounded else None, high if bounded else None))
    return marks


def _point_row(curve: Curve, point: OperatingPoint) -> dict[str, Any]:
    own = curve.router == "original"
    return {
        "title": _title(curve),
        "kind": _kind(curve.router),
        "first": point is curve.points[0],
        "cells": [
            f"{point.k_text(curve.full)} of {curve.full}" + (" on average" if point.budget is not None else ""),
            f"{point.share:.0%}",
            f"{point.cost.active_parameters / 1e6:,.1f} M",
            f"{point.cost.flops / 1e9:#.3g}".rstrip("."),
            _value(point.perplexity, ".2f"),
            _interval(point.interval, ".2f"),
            DASH if own else _value(point.ratio, ".4f"),
            DASH if own else _interval(point.ratio_interval, ".4f"),
            DASH if own else _value(point.recovered, ".0%"),
            DASH if own else _interval(point.recovered_interval, ".0%"),
        ],
    }


def _active(evaluation: Evaluation, layers: list[LayerReport]) -> dict[str, Any] | None:
    """Sub-experts that tokens run within budgets, by layer and by token of a sample; None where no budget was measured."""
    curve = next((curve for curve in evaluation.refactored if curve.budgets and curve.budgets[0].by_layer), None)
    if curve is None:
        return None
    places = {round(place) for place in np.linspace(0, len(curve.budgets) - 1, len(_DASHES))}
    series = []
    for place, kind in zip(sorted(places), _DASHES, strict=False):
        point = curve.budgets[place]
        marks = [Mark(layer.layer, active) for layer, active in zip(layers, point.by_layer, strict=False)]
        series.append(Series(f"budget {_percent(point.budget)}", kind, marks))
    shown = min(curve.budgets, key=lambda point: abs((point.budget or 0) - SAMPLE_BUDGET))
    least, most = min(shown.by_token, default=0.0), max(shown.by_token, default=1.0)
    return {
        "chart": chart(series, _layer_ticks([layer.layer for layer in layers]), "layer", "sub-experts per token", [0.0, float(curve.full)]),
        "budget": _percent(shown.budget),
        "full": curve.full,
        "range": f"{least:.1f} to {most:.1f}",
        "tokens": [
            {"text": text.replace("\n", RETURN), "ran": f"{ran:.1f}", "shade": round(100 * (ran - least) / max(most - least, 1e-9))}
            for text, ran in zip(evaluation.text.sample, shown.by_token, strict=False)
        ],
    }


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.4g}%"


def _errors(layers: list[LayerReport]) -> dict[str, Any]:
    """Charts of the output error over layers, on one scale, at a few of the measured k below the full one."""
    choices = layers[0].measured_k[:-1]
    places = sorted({round(place) for place in np.linspace(0, len(choices) - 1, SHOWN_ERRORS)}) if choices else []
    names = [name for name in ROUTERS if name in layers[0].output_error]
    values = [value for layer in layers for name in names for place in places if (value := layer.output_error[name][place]) > 0]
    charts = []
    for place in places:
        series = [Series(name, name, _error_marks(layers, name, place)) for name in names]
        charts.append(
            {
                "k": choices[place],
                "chart": chart(series, _layer_ticks([layer.layer for layer in layers]), "layer", "relative squared error", values),
            }
        )
    rows = [
        [layer.layer, layer.measured_k[place], *(_value(layer.output_error[name][place], ".2e") for name in names)]
        for layer in layers
        for place in range(len(choices))
    ]
    return {"charts": charts, "names": names, "rows": rows}


def _error_marks(layers: list[LayerReport], name: str, place: int) -> list[Mark]:
    found = [(layer.layer, layer.output_error[name][place]) for layer in layers]
    return [Mark(index, value) for index, value in found if value > 0]


def _layer_ticks(layers: list[int]) -> list[tuple[float, str]]:
    step = math.ceil(len(layers) / 8)
    return [(layer, str(layer)) for layer in layers[::step]]


def _partition(layers: list[LayerReport]) -> dict[str, Any]:
    series = []
    for name, key, kind in (("stored order", "loss_before", "original"), ("after partition", "loss_after", "two-level")):
        marks = []
        for layer in layers:
            losses = [getattr(expert, key) for expert in layer.experts]
            marks.append(Mark(layer.layer, float(np.mean(losses)), min(losses), max(losses)))
        series.append(Series(name, kind, marks))
    rows = []
    for layer, before, after in zip(layers, series[0].marks, series[1].marks, strict=True):
        rows.append([layer.layer, f"{before.y:.3f}", f"{after.y:.3f}", f"{after.y / before.y - 1:+.0%}" if before.y else DASH])
    return {"chart": chart(series, _layer_ticks([layer.layer for layer in layers]), "layer", "share of activation dropped"), "rows": rows}


def _concentration(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The chart and table of how much of the activation lies in a quarter of the neurons."""
    series = []
    quarters = (("each token's own quarter", "own_quarter", "two-level"), ("the best fixed quarter", "fixed_quarter", "original"))
    for name, key, kind in quarters:
        series.append(Series(name, kind, [Mark(layer["layer"], layer[key]) for layer in layers]))
    drawn = chart(series, _layer_ticks([layer["layer"] for layer in layers]), "layer", "share of activation", [0.0, 1.0])
    rows = [
        [
            layer["layer"],
            len(layer["tokens"]),
            f"{sum(layer['tokens']):,}",
            f"{min(layer['tokens']):,}",
            f"{layer['own_quarter']:.1%}",
            f"{layer['fixed_quarter']:.1%}",
        ]
        for layer in layers
    ]
    return {"chart": drawn, "rows": rows}


def _loads(layers: list[tuple[int, list[int]]]) -> list[dict[str, Any]]:
    """Tokens of each expert of (layer, tokens of each expert), relative to an even share, falling, on one scale for all layers."""
    relative = []
    for _, routed in layers:
        tokens = np.array(routed, dtype=np.float64)
        relative.append(np.sort(tokens / max(tokens.mean(), 1e-9))[::-1])
    most = max(float(loads.max()) for loads in relative)
    return [
        {
            "layer": layer,
            "bars": bars(loads.tolist(), most),
            "even": round(SPARK[1] * (1 - 1 / max(most, 1)), 1),
            "busiest": f"{loads[0]:.1f}{TIMES}",
            "quietest": f"{loads[-1]:.1g}{TIMES}",
            "unseen": int((loads == 0).sum()),
        }
        for (layer, _), loads in zip(layers, relative, strict=True)
    ]


def _pictures(pictures: dict[str, np.ndarray], sub_experts: int) -> dict[str, Any]:
    """PNG data of each layer's matrices, and how much more often neurons of one sub-expert meet."""
    layers = sorted(int(name.split(".")[1]) for name in pictures if name.endswith(".before"))
    if not layers:
        return {"layers": []}
    shown, scale = _on_one_scale({name: matrix for name, matrix in pictures.items() if not name.endswith(".expert")})
    found = []
    for layer in layers:
        pair = {}
        for when in ("before", "after"):
            name = f"layer.{layer}.{when}"
            pair[when] = {"uri": shown[name], "contrast": f"{_contrast(pictures[name], sub_experts):.2f}{TIMES}"}
        found.append({"layer": layer, "expert": int(pictures[f"layer.{layer}.expert"][0]), **pair})
    return scale | {"layers": found, "sub_experts": sub_experts}


def _on_one_scale(pictures: dict[Any, np.ndarray]) -> tuple[dict[Any, str], dict[str, str]]:
    """(PNG data of each matrix on one logarithmic scale, the scale: its own picture and both ends)."""
    logarithms = {name: np.log2(np.maximum(matrix, 2.0**-6)) for name, matrix in pictures.items()}
    every = np.concatenate([matrix.ravel() for matrix in logarithms.values()])
    low, high = (float(value) for value in np.percentile(every, (1, 99.5)))
    high = max(high, low + 1e-3)
    scale = png(np.linspace(low, high, 128)[None], low, high)
    shown = {name: png(matrix, low, high) for name, matrix in logarithms.items()}
    return shown, {"scale": scale, "low": f"{2**low:.2g}{TIMES}", "high": f"{2**high:.2g}{TIMES}"}


def _contrast(matrix: np.ndarray, sub_experts: int) -> float:
    """Mean of the [P, P] matrix within its diagonal blocks, the diagonal aside, over the mean outside of them."""
    side = len(matrix)
    block = np.arange(side) * sub_experts // side
    within = block[:, None] == block
    inside = within & ~np.eye(side, dtype=bool)
    if not inside.any() or within.all():
        return 1.0
    return float(matrix[inside].mean() / max(matrix[~within].mean(), 1e-9))


def _environment(parts: dict[str, dict[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(part, [(str(key), _plain(value)) for key, value in facts.items()]) for part, facts in parts.items()]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return DASH if value is None else str(value)


def png(matrix: np.ndarray, low: float, high: float) -> str:
    """A PNG data URI of a matrix [P, Q], one pixel per entry, dark at `low` and bright at `high`."""
    buffer = io.BytesIO()
    imsave(buffer, matrix, vmin=low, vmax=high, cmap="magma", format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def bars(values: Sequence[float], most: float) -> str:
    """SVG path data of bars side by side in a box of SPARK, `most` being its full height."""
    width, height = SPARK
    step = width / len(values)
    gap = step * 0.15
    parts = []
    for index, value in enumerate(values):
        top = height * (1 - value / most) if most else height
        parts.append(f"M{index * step + gap / 2:.2f} {height}V{top:.2f}h{step - gap:.2f}V{height}z")
    return "".join(parts)


def chart(
    series: list[Series], x_ticks: list[tuple[float, str]], x_title: str, y_title: str, scaled_to: list[float] | None = None
) -> dict[str, Any]:
    """A line chart with intervals; logarithmic upwards where the values span more than LOG_FROM.

    Args:
        series: its lines; one without points is left out.
        x_ticks: (position, label) along the bottom.
        x_title, y_title: what the axes are.
        scaled_to: values that the vertical scale covers instead of the series' own, so that charts can share it.

    Returns:
        `svg`, whose colours are variables of the style sheet and whose text is text, and `lines`, the (name, kind) of each line.
    """
    series = [each for each in series if each.marks]
    own = [value for each in series for mark in each.marks for value in (mark.y, mark.low, mark.high) if value is not None]
    values = scaled_to or own or [0.0, 1.0]
    log = min(values) > 0 and max(values) / min(values) > LOG_FROM
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "prism", "font.size": 9}):
        figure = Figure(figsize=SIZE, layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        for each in series:
            _draw(axes, each)
        axes.set(xlabel=x_title, yscale="log" if log else "linear", ylim=_padded(min(values), max(values), log))
        axes.set_xticks([position for position, _ in x_ticks], [label for _, label in x_ticks])
        axes.set_title(y_title + (" (log scale)" if log else ""), loc="left", fontsize=9)
        axes.grid(axis="y", color=_SHEET["rule"])
        labels = axes.get_xticklabels() + axes.get_yticklabels(which="both")
        coloured: tuple[Any, ...] = (*axes.spines.values(), axes.xaxis.label, axes.title, *labels)
        for item in coloured:
            item.set_color(_SHEET["soft"])
        axes.tick_params(which="both", color=_SHEET["soft"])
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    for name, colour in _SHEET.items():
        svg = svg.replace(colour, f"var(--{name})")
    return {"svg": Markup(svg), "lines": [(each.name, each.kind) for each in series]}


def _draw(axes: Any, series: Series) -> None:
    colour, dash = _SHEET[series.kind], _DASHES[series.kind]
    places, values = [mark.x for mark in series.marks], [mark.y for mark in series.marks]
    axes.plot(places, values, color=colour, linestyle=dash, marker="o", markersize=4, gid=f"{series.kind}-line")
    bounded = [mark for mark in series.marks if mark.low is not None and mark.high is not None]
    axes.vlines(
        [mark.x for mark in bounded], [mark.low for mark in bounded], [mark.high for mark in bounded], color=colour, alpha=0.35, lw=4
    )


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """The ends of a scale that encloses some values with a little room."""
    if log:
        room = (high / low) ** 0.05
        return low / room, high * room
    room = 0.05 * (high - low or abs(high) or 1.0)
    return low - room, high + room
