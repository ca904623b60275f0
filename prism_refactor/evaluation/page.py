"""Self-contained HTML pages: what prism-report shows of a refactored checkpoint, and what prism-profile shows of its source."""

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.image import imsave

from prism_refactor.models.architectures import ARCHITECTURES

# The charts' coordinates; 420 wide, so that the text is readable on a phone.
WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 408, 26, 232
SPARK = (120, 30)
ROUTERS = ("original", "stock", "two-level")
# Series stand beside each other by this many units, so that their intervals do not hide each other.
BESIDE = 5.0
RADIUS = 3.6
# From this ratio of largest to smallest on, a chart's scale is logarithmic.
LOG_FROM = 8.0
DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
SHOWN_PICTURES = 6
SHOWN_ERRORS = 3


@dataclass(frozen=True)
class Mark:
    """One point of a chart: position, interval (both ends None without one) and what a pointer over it says."""

    x: float
    y: float
    label: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one line; `kind` picks its colour and dash in the style sheet."""

    name: str
    kind: str
    marks: list[Mark]


def report_page(manifest: dict[str, Any], evaluation: dict[str, Any] | None, pictures: dict[str, np.ndarray]) -> str:
    """The page.

    Args:
        manifest: prism.json.
        evaluation: evaluation.json; None without one.
        pictures: `layer.N.before` and `layer.N.after` float32 [P, P], `layer.N.expert` int64 [1]; may be empty.

    Returns:
        HTML that refers to nothing outside itself. Raises KeyError, TypeError and their like
        (jinja2.UndefinedError for a field that only the page reads) when an input is not as described.
    """
    return _template("report.html").render(
        head=_head(manifest, evaluation),
        quality=None if evaluation is None else _quality(evaluation),
        operating=_operating(manifest),
        errors=_errors(manifest["layers"]),
        partition=_partition(manifest["layers"]),
        loads=_loads([(layer["layer"], [expert["tokens"] for expert in layer["experts"]]) for layer in manifest["layers"]]),
        pictures=_pictures(pictures, manifest["recipe"]["sub_experts"]),
        shown=SHOWN_PICTURES,
        environment=_environment({part: manifest[part] for part in ("source", "result", "recipe", "calibration", "versions")}),
    )


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
    # Globals, because templates that are imported see nothing else.
    environment.globals.update(
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        spark={"width": SPARK[0], "height": SPARK[1]},
    )
    return environment.get_template(name)


def _counts(manifest: dict[str, Any], which: str) -> tuple[int, int]:
    """(experts, active per token) of the 'source' or the 'result' under whatever names the architecture gives them."""
    architecture = ARCHITECTURES[manifest["source"]["model_type"]]
    return manifest[which][architecture.num_experts], manifest[which][architecture.top_k]


def _head(manifest: dict[str, Any], evaluation: dict[str, Any] | None) -> dict[str, Any]:
    experts, top_k = _counts(manifest, "source")
    sub_experts, most = _counts(manifest, "result")
    losses = [expert for layer in manifest["layers"] for expert in layer["experts"]]
    before, after = (float(np.mean([expert[key] for expert in losses])) for key in ("loss_before", "loss_after"))
    figures = [
        (f"{experts} → {sub_experts}", "experts → sub-experts in each MoE layer"),
        (f"{top_k} → {most}", "settings of the active number per token"),
        (f"{before:.2f} → {after:.2f}", "share of activation that the partition drops: stored order → reordered"),
    ]
    return {
        "name": manifest["source"]["name"],
        "type": manifest["source"]["model_type"],
        "layers": len(manifest["layers"]),
        "experts": experts,
        "top_k": top_k,
        "split": manifest["recipe"]["sub_experts"],
        "sub_experts": sub_experts,
        "most": most,
        "figures": [*figures, *_half_error(manifest["layers"]), *_half_quality(evaluation)],
    }


def _half_error(layers: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """How much nearer the two-level router is to the layer's full output at half the experts; nothing without that router."""
    errors = [layer["output_error"] for layer in layers]
    if not errors or any("two-level" not in error for error in errors):
        return []
    place = max(len(errors[0]["k"]) // 2 - 1, 0)
    original, refactored = (float(np.mean([error[name][place] for error in errors])) for name in ("original", "two-level"))
    if refactored <= 0:
        return []
    return [(f"{original / refactored:.1f}{TIMES}", f"smaller output error of a layer at k = {errors[0]['k'][place]} than the original's")]


def _half_quality(evaluation: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What the best curve wins back nearest to half of the active experts; nothing without an evaluation."""
    if evaluation is None:
        return []
    found = [point for curve in evaluation["refactored"] for point in curve["points"] if _finite(point["recovered"])]
    if not found:
        return []
    point = min(found, key=lambda point: (abs(point["share"] - 0.5), -point["recovered"]))
    return [(f"{point['recovered']:.0%}", f"of what the original loses at {point['share']:.0%} of its active experts is won back")]


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _interval(values: list[float] | None, form: str) -> str:
    if values is None or not all(map(_finite, values)):
        return DASH
    return f"{values[0]:{form}} {DASH} {values[1]:{form}}"


def _bound(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _value(value: float | None, form: str) -> str:
    return f"{value:{form}}" if value is not None and _finite(value) else DASH


def _kind(router: str) -> str:
    return router if router in ROUTERS else "other"


def _quality(evaluation: dict[str, Any]) -> dict[str, Any]:
    curves = [evaluation["original"], *evaluation["refactored"]]
    shares = sorted({point["share"] for curve in curves for point in curve["points"]})
    ticks = [(share, f"{share:.0%}") for share in shares] if len(shares) <= 6 else [(part / 4, f"{part / 4:.0%}") for part in range(1, 5)]
    perplexity = [Series(_title(curve), _kind(curve["router"]), _marks(curve, "perplexity", "interval")) for curve in curves]
    ratio = [Series(_title(curve), _kind(curve["router"]), _marks(curve, "ratio", "ratio_interval")) for curve in curves]
    domains = sorted(curves[0]["points"][-1]["domains"])
    return {
        "text": evaluation["text"],
        "perplexity": chart(perplexity, ticks, "active share of the original's experts", "perplexity"),
        "ratio": chart(ratio, ticks, "active share of the original's experts", "perplexity ÷ the original's"),
        "rows": [_point_row(curve, point) for curve in curves for point in curve["points"]],
        "domains": domains,
        "domain_rows": [
            (_title(curve), _kind(curve["router"]), _k(point["k"]), [_value(point["domains"].get(domain), ".2f") for domain in domains])
            for curve in curves
            for point in curve["points"]
        ],
    }


def _title(curve: dict[str, Any]) -> str:
    return "original" if curve["router"] == "original" else f"{curve['router']} router"


def _k(k: int | list[int]) -> str:
    return str(k) if isinstance(k, int) else " ".join(map(str, k))


def _marks(curve: dict[str, Any], value: str, interval: str) -> list[Mark]:
    marks = []
    for point in curve["points"]:
        if not _finite(point[value]):
            continue
        low, high = map(_bound, point[interval] or (None, None))
        bounded = low is not None and high is not None and low < high
        label = (
            f"{_title(curve)}, k = {_k(point['k'])} of {curve['full']}: {value} {point[value]:.4g} ({_interval(point[interval], '.4g')})"
        )
        marks.append(Mark(point["share"], point[value], label, low if bounded else None, high if bounded else None))
    return marks


def _point_row(curve: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    own = curve["router"] == "original"
    return {
        "title": _title(curve),
        "kind": _kind(curve["router"]),
        "first": point is curve["points"][0],
        "cells": [
            f"{_k(point['k'])} of {curve['full']}",
            f"{point['share']:.0%}",
            f"{point['cost']['active_parameters'] / 1e6:,.1f} M",
            f"{point['cost']['flops'] / 1e9:#.3g}".rstrip("."),
            _value(point["perplexity"], ".2f"),
            _interval(point["interval"], ".2f"),
            DASH if own else _value(point["ratio"], ".4f"),
            DASH if own else _interval(point["ratio_interval"], ".4f"),
            DASH if own else _value(point["recovered"], ".0%"),
            DASH if own else _interval(point["recovered_interval"], ".0%"),
        ],
    }


def _operating(manifest: dict[str, Any]) -> dict[str, Any] | None:
    found = manifest.get("operating_points")
    if found is None:
        return None
    _, most = _counts(manifest, "result")
    rows = []
    for point in found["points"]:
        gain = point["perplexity"] - point["uniform"]
        row = [point["mean_k"], _value(point["uniform"], ".3f"), _value(point["perplexity"], ".3f"), _value(gain, "+.3f")]
        same = len(set(point["k"])) == 1
        rows.append({"cells": row, "bars": bars(point["k"], most), "k": "the same in every layer" if same else _k(point["k"])})
    return {"rows": rows, "tokens": found["text"]["tokens"], "most": most}


def _errors(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Charts of the output error over layers, on one scale, at a few of the measured k below the full one."""
    choices = layers[0]["output_error"]["k"][:-1]
    places = sorted({round(place) for place in np.linspace(0, len(choices) - 1, SHOWN_ERRORS)}) if choices else []
    names = [name for name in ROUTERS if name in layers[0]["output_error"]]
    values = [value for layer in layers for name in names for place in places if (value := layer["output_error"][name][place]) > 0]
    charts = []
    for place in places:
        series = [Series(name, name, _error_marks(layers, name, place)) for name in names]
        charts.append({"k": choices[place], "chart": chart(series, _layer_ticks(layers), "layer", "relative squared error", values)})
    rows = [
        [layer["layer"], layer["output_error"]["k"][place], *(_value(layer["output_error"][name][place], ".2e") for name in names)]
        for layer in layers
        for place in range(len(choices))
    ]
    return {"charts": charts, "names": names, "rows": rows}


def _error_marks(layers: list[dict[str, Any]], name: str, place: int) -> list[Mark]:
    found = [(layer["layer"], layer["output_error"][name][place]) for layer in layers]
    return [Mark(index, value, f"layer {index}, {name}: {value:.2e}") for index, value in found if value > 0]


def _layer_ticks(layers: list[dict[str, Any]]) -> list[tuple[float, str]]:
    step = math.ceil(len(layers) / 8)
    return [(layer["layer"], str(layer["layer"])) for layer in layers[::step]]


def _partition(layers: list[dict[str, Any]]) -> dict[str, Any]:
    series = []
    for name, key, kind in (("stored order", "loss_before", "original"), ("after partition", "loss_after", "two-level")):
        marks = []
        for layer in layers:
            losses = [expert[key] for expert in layer["experts"]]
            low, mean, high = min(losses), float(np.mean(losses)), max(losses)
            label = f"layer {layer['layer']}, {name}: mean {mean:.3f}, experts {low:.3f} {DASH} {high:.3f}"
            marks.append(Mark(layer["layer"], mean, label, low, high))
        series.append(Series(name, kind, marks))
    rows = []
    for layer, before, after in zip(layers, series[0].marks, series[1].marks, strict=True):
        rows.append(
            [layer["layer"], f"{before.y:.3f}", f"{after.y:.3f}", f"{after.y / before.y - 1:+.0%}" if before.y else DASH, layer["tilt"]]
        )
    return {"chart": chart(series, _layer_ticks(layers), "layer", "share of activation dropped"), "rows": rows}


def _concentration(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The chart and table of how much of the activation lies in a quarter of the neurons."""
    series = []
    quarters = (("each token's own quarter", "own_quarter", "two-level"), ("the best fixed quarter", "fixed_quarter", "original"))
    for name, key, kind in quarters:
        marks = [Mark(layer["layer"], layer[key], f"layer {layer['layer']}, {name}: {layer[key]:.1%}") for layer in layers]
        series.append(Series(name, kind, marks))
    drawn = chart(series, _layer_ticks(layers), "layer", "share of activation", [0.0, 1.0])
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


def bars(values: list[float], most: float) -> str:
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
    """Geometry of a line chart with intervals; logarithmic upwards where the values span more than LOG_FROM.

    Args:
        series: its lines; one without points is left out.
        x_ticks: (position, label) along the bottom.
        x_title, y_title: what the axes are.
        scaled_to: values that the vertical scale covers instead of the series' own, so that charts can share it.

    Returns:
        What the template draws: titles, ticks, and each line's path and marks in the coordinates of the view box.
    """
    series = [each for each in series if each.marks]
    marks = [mark for each in series for mark in each.marks]
    own = [value for mark in marks for value in (mark.y, mark.low, mark.high) if value is not None]
    values = scaled_to or own or [0.0, 1.0]
    log = min(values) > 0 and max(values) / min(values) > LOG_FROM
    ticks = _log_ticks(min(values), max(values)) if log else _ticks(min(values), max(values))
    scale = math.log10 if log else float
    bottom, top = scale(min(ticks[0], *values)), scale(max(ticks[-1], *values))
    places = [position for position, _ in x_ticks] + [mark.x for mark in marks]
    first, last = min(places, default=0.0), max(places, default=1.0)
    margin = 22 if last > first else (RIGHT - LEFT) / 2

    def across(x: float) -> float:
        return round(LEFT + margin + (x - first) / ((last - first) or 1) * (RIGHT - LEFT - 2 * margin), 1)

    def up(y: float) -> float:
        return round(BOTTOM - (scale(y) - bottom) / ((top - bottom) or 1) * (BOTTOM - TOP), 1)

    crowd = max((len({mark.x for mark in each.marks}) for each in series), default=1)
    room = (RIGHT - LEFT - 2 * margin) / max(crowd - 1, 1) if last > first else RIGHT - LEFT
    lines = []
    for index, each in enumerate(series):
        beside = min(BESIDE, room / (len(series) + 1)) * (index - (len(series) - 1) / 2)
        drawn = [
            {
                "x": round(across(mark.x) + beside, 1),
                "y": up(mark.y),
                "low": None if mark.low is None else up(mark.low),
                "high": None if mark.high is None else up(mark.high),
                "label": mark.label,
            }
            for mark in each.marks
        ]
        path = "M" + "L".join(f"{mark['x']} {mark['y']}" for mark in drawn)
        lines.append({"name": each.name, "kind": each.kind, "path": path, "marks": drawn})
    return {
        "x_title": x_title,
        "y_title": y_title + (" (log scale)" if log else ""),
        "x_ticks": [(across(position), label) for position, label in x_ticks],
        "y_ticks": [(up(tick), f"{tick:g}") for tick in ticks],
        "lines": lines,
        "radius": round(min(RADIUS, room / 3), 1),
    }


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose low to high."""
    rough = (high - low or abs(high) or 1.0) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * place, 12) for place in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, with steps between them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    factors = (1, 2, 5) if span < 1.3 else (1, 3) if span < 3 else (1,)
    ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
    first = max((place for place, tick in enumerate(ticks) if tick <= low), default=0)
    last = min((place for place, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[first : last + 1]
