"""One self-contained HTML page of one or more maps: heatmaps, concentration curve and tables.

plotly.js is inlined once, and the page's own policy forbids every network request. Everything that
comes from outside (names of models, objectives, tensors) is escaped: in HTML by jinja2, in scripts by
its JSON filter, and none of it reaches plotly, which reads some HTML in its labels.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from safelocus import __version__
from safelocus.report import colours, text
from safelocus.report.map import LayerKey, Region, SafetyMap
from safelocus.report.tables import TOP_FRACTIONS, top_experts, top_matrices
from safelocus.run import write_text

_GAP = 0.35  # between the cells and their totals, in cells
_NUM_MATRICES = 20
_NUM_EXPERTS = 12
_ROW = 34  # pixels
_MAX_HEIGHT = 720  # pixels of all rows together


def write_page(maps: Sequence[tuple[str, SafetyMap]], path: Path, *, heading: str = "Safety map") -> None:
    """Write the page under a temporary name and rename it.

    Args:
        maps: (name of the model as it is to be shown, its map), in the order of the page.
        path: the HTML file to be; about 5 MB, nearly all of it plotly.js.
    """
    from plotly.offline import get_plotlyjs

    html = _template().render(
        heading=heading,
        models=[_model(name, located) for name, located in maps],
        plotly=Markup(get_plotlyjs()),
        light=colours.LIGHT,
        dark=colours.DARK,
        unrouted={"light": colours.UNROUTED_LIGHT, "dark": colours.UNROUTED_DARK},
        version=__version__,
    )
    write_text(Path(path), html)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("safelocus", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": text.share_percent,
        "times": lambda value: text.times(value, text.TIMES),
        "count": text.count,
        "component": text.component_label,
        "layer": text.layer_label,
        "breakable": _breakable,
    }
    environment.filters.update(filters)
    return environment.get_template("page.html")


def _breakable(name: str) -> Markup:
    """A tensor's name that may break after its dots and underscores, and copies as it is."""
    return escape(name).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))


def _model(name: str, located: SafetyMap) -> dict[str, Any]:
    """What the template says of one model."""
    limit = colours.log2_limit(region.enrichment for region in located.cells)
    return {
        "name": name,
        "map": located,
        "selection": text.selection_label(located),
        "method": text.method_label(located.score_method),
        "summary": [line.replace(" %", "\u00a0%") for line in text.summary_lines(located, sign=text.TIMES)],
        "tiles": _tiles(located),
        "components": _component_heatmap(located, limit),
        "legend": _legend(limit),
        "experts": _expert_heatmaps(located),
        "unrouted": text.unrouted_note(located),
        "curve": _curve(located),
        "curve_error": _curve_error(located),
        "top_fractions": _top_fractions(located),
        "top_matrices": top_matrices(located, _NUM_MATRICES),
        "top_experts": top_experts(located, _NUM_EXPERTS),
        "has_mass": any(row.score_mass is not None for row in located.matrices),
        "has_tokens": any(row.tokens is not None for row in located.matrices),
    }


def _tiles(located: SafetyMap) -> list[tuple[str, str]]:
    """(number, what it is), the three or four that matter."""
    part = located.num_selected / located.num_weights
    tiles = [
        (text.count(located.num_selected), f"weights selected, {text.percent(part)} of the eligible ones"),
    ]
    method = text.method_label(located.score_method)
    if located.selected_mass is not None:
        tiles.append((text.percent(located.selected_mass), f"of all {method} is in them"))
    best = max(located.components, key=lambda region: region.enrichment)
    label = text.component_label(best.component_key)
    tiles.append((text.times(best.enrichment, text.TIMES), f"as many in {label} matrices as their size gives"))
    if located.concentration is not None:
        tiles.append((f"{located.concentration.gini:.2f}", f"Gini coefficient of {method}"))
    return tiles


def _legend(limit: int) -> list[str]:
    """Tick labels from end to end of the scale."""
    powers = range(-limit, limit + 1)
    labels = [f"{2**power}{text.TIMES}" if power >= 0 else f"1/{2**-power}{text.TIMES}" for power in powers]
    inner = [label if limit < 4 or i % 2 else "" for i, label in enumerate(labels[1:-1])]  # 1x has an odd i there
    return [f"≤ {labels[0]}", *inner, f"≥ {labels[-1]}"]


def _component_heatmap(located: SafetyMap, limit: int) -> dict[str, Any]:
    layers, components = located.layer_keys, located.component_keys
    span = max(1.0, len(layers) / 24)  # the totals stay legible beside many layers
    far_x, far_y = len(layers) - 0.5 + _GAP * span, len(components) + _GAP
    whole = [[located.cell.get((layer, component)) for layer in layers] for component in components]
    traces = [
        _heat(located, whole, range(len(layers)), range(len(components))),
        _heat(
            located,
            [[region] for region in located.components],
            [far_x, far_x + span],
            range(len(components)),
        ),
        _heat(located, [list(located.layers)], range(len(layers)), [far_y]),
    ]
    return {
        "kind": "heat",
        "traces": traces,
        "limit": limit,
        "columns": [*(text.layer_label(layer) for layer in layers), "all"],
        "rows": [*(text.component_label(key) for key in components), "all"],
        "x": [*range(len(layers)), far_x + span / 2],
        "end": far_x + span,
        "y": [*range(len(components)), far_y],
        "x_title": "layer",
        "row": _ROW,
    }


def _expert_heatmaps(located: SafetyMap) -> dict[str, Any] | None:
    """Enrichment, and tokens routed where they were counted, on one scale; None for dense models."""
    if not located.experts:
        return None
    layers = [layer for layer in located.layer_keys if (layer, 0) in located.expert]
    mean = {layer: _mean_tokens(located, layer) for layer in layers}
    values: list[tuple[str, Callable[[Region], float | None]]] = [
        ("Share of the selection, relative to size", lambda region: region.enrichment)
    ]
    if located.unrouted is not None:
        values.append(
            (
                "Tokens routed, relative to the layer's mean",
                lambda r: (r.tokens or 0) / mean[r.layer_key] if mean[r.layer_key] else None,
            )
        )
    numbers = [value for _, of in values for r in located.experts if r.tokens != 0 and (value := of(r)) is not None]
    limit = colours.log2_limit(numbers)
    row = max(4, min(_ROW - 6, _MAX_HEIGHT // located.num_experts))
    return {
        "legend": _legend(limit),
        "wide": len(layers) > 24,
        "plots": [
            {
                "title": title,
                "spec": {
                    "kind": "heat",
                    "traces": _expert_traces(located, layers, of),
                    "limit": limit,
                    "columns": [text.layer_label(layer) for layer in layers],
                    "rows": [str(number) for number in range(located.num_experts)],
                    "x": list(range(len(layers))),
                    "end": len(layers) - 0.5,
                    "y": list(range(located.num_experts)),
                    "x_title": "layer",
                    "row": row,
                },
            }
            for title, of in values
        ],
    }


def _expert_traces(
    located: SafetyMap, layers: Sequence[LayerKey], of: Callable[[Region], float | None]
) -> list[dict[str, Any]]:
    numbers = range(located.num_experts)
    grid = [[located.expert.get((layer, number)) for layer in layers] for number in numbers]
    routed = [[region if region and region.tokens != 0 else None for region in row] for row in grid]
    unrouted = [[region if region and region.tokens == 0 else None for region in row] for row in grid]
    traces = [_heat(located, routed, range(len(layers)), numbers, of)]
    if any(region for row in unrouted for region in row):
        trace = _heat(located, unrouted, range(len(layers)), numbers, of)
        traces.append({**trace, "role": "unrouted", "text": None})
    return traces


def _mean_tokens(located: SafetyMap, layer: LayerKey) -> float:
    tokens = [region.tokens or 0 for region in located.experts if region.layer_key == layer]
    return sum(tokens) / len(tokens)


def _heat(
    located: SafetyMap,
    regions: Sequence[Sequence[Region | None]],
    x: Sequence[float],
    y: Sequence[float],
    of: Callable[[Region], float | None] = lambda region: region.enrichment,
) -> dict[str, Any]:
    """A plotly heatmap of regions [rows, columns]: colour by log2, the number as text, the rest on hover.

    `x` and `y` are the middles of cells, or their edges (one more).
    """
    values = [[of(region) if region else None for region in row] for row in regions]
    return {
        "type": "heatmap",
        "role": "heat",
        "x": list(x),
        "y": list(y),
        "z": [[None if v is None else _log2(v) for v in row] for row in values],
        "text": [["" if v is None else text.short_times(v, "") for v in row] for row in values],
        "hovertext": [[_hover(located, region) if region else "" for region in row] for row in regions],
    }


def _log2(value: float) -> float:
    return round(float(np.log2(value)), 3) if value > 0 else -99.0  # far below the scale's end


def _hover(located: SafetyMap, region: Region) -> str:
    where = []
    if region.layer_key != (None, None):
        where.append(f"layer {text.layer_label(region.layer_key)}")
    if region.expert is not None:
        where.append(f"expert {region.expert}")
    if region.component is not None:
        where.append(text.component_label(region.component_key))
    lines = [
        f"<b>{escape(', '.join(where))}: {text.times(region.enrichment, text.TIMES)}</b>",
        f"{text.share_percent(region.share)} of the selection",
        f"{text.share_percent(region.expected)} of the eligible weights",
        f"{text.count(region.num_selected)} of {text.count(region.num_weights)} weights selected",
    ]
    if region.score_mass is not None:
        method = escape(text.method_label(located.score_method))
        lines.append(f"{text.share_percent(region.score_mass)} of all {method}")
    if region.tokens is not None:
        lines.append(f"{text.count(region.tokens)} tokens routed" if region.tokens else "never given a token")
    return "<br>".join(lines)


def _curve(located: SafetyMap) -> dict[str, Any] | None:
    curve = located.concentration
    if curve is None:
        return None
    fractions = [point.fraction for point in curve.points]
    selection = None
    if located.selected_mass is not None:
        part = located.num_selected / located.num_weights
        label = [f"selection: {text.percent(part)}", f"holds {text.percent(located.selected_mass)}"]
        selection = {"x": part, "y": located.selected_mass, "label": label}
    decades = [10.0**power for power in range(-5, 1) if 10.0**power >= fractions[0] * 0.999]
    return {
        "kind": "curve",
        "x": fractions,
        "y": [point.mass for point in curve.points],
        "hovertext": [
            f"the top {text.percent(point.fraction)} ({text.count(point.num_weights)} weights)<br>"
            f"hold {text.percent(point.mass)}"
            for point in curve.points
        ],
        "selection": selection,
        "ticks": decades,
        "tick_labels": [text.percent(decade) for decade in decades],
    }


def _curve_error(located: SafetyMap) -> str:
    error = located.concentration.mass_error if located.concentration else 0.0
    return f" to {1.05 * error:.1e}" if error else ""  # never rounded below the bound


def _top_fractions(located: SafetyMap) -> list[tuple[str, str, float]]:
    """(top part, number of weights, mass) of the round fractions."""
    points = located.concentration.points if located.concentration else ()
    return [
        (text.percent(p.fraction), text.count(p.num_weights), p.mass) for p in points if p.fraction in TOP_FRACTIONS
    ]
