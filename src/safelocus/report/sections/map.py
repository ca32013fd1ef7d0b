"""A map on the page: layers, components, experts, concentration, the fullest matrices, and inside each of them."""

from collections.abc import Sequence
from dataclasses import replace

from safelocus.report import colours, text
from safelocus.report.blocks import Cell, Figure, Listing, Matrices, Part, Section, Table
from safelocus.report.density import densities
from safelocus.report.map import LayerKey, Region, SafetyMap
from safelocus.report.runs import ReportRun
from safelocus.report.sections.patterns import PATTERNS_NOTE, patterns_grid
from safelocus.report.tables import TOP_FRACTIONS, top_experts, top_matrices
from safelocus.selection import Selection

_NUM_MATRICES = 20
_NUM_EXPERTS = 12
_ROW = 34  # pixels
_MAX_HEIGHT = 720  # pixels of all rows together
_DENSITY_LIMIT = 3  # doublings


def map_sections(run: ReportRun) -> list[Section]:
    """One section per model."""
    return [
        Section(
            title=name if len(run.maps) > 1 or run.name == name else f"{run.name}: {name}",
            what=text.capital(text.selection_label(located)),
            summary=text.summary_lines(located, sign=text.TIMES),
            tiles=_tiles(located),
            parts=[
                *_places(located, run.selection(name)),
                *_concentration(located),
                _top(located),
                Part(
                    title="Patterns",
                    notes=[PATTERNS_NOTE],
                    blocks=[Listing.of(patterns_grid({name: run.patterns[name]}))],
                ),
            ],
        )
        for name, located in run.maps.items()
    ]


def selection_parts(located: SafetyMap, selection: Selection | None, *, title: str) -> list[Part]:
    """Where a selection lies whose scores are not at hand; the first part has the title and says what is left out."""
    first, *others = [*_places(located, selection), _top(located)]
    unknown = "how concentrated the scores are" + (" and which experts got tokens" if located.experts else "")
    notes = [
        *text.summary_lines(located, sign=text.TIMES),
        *first.notes,
        f"From the selection alone: {unknown} is on the page of the run that scored.",
    ]
    return [replace(first, title=title, notes=notes), *others]


def _places(located: SafetyMap, selection: Selection | None) -> list[Part]:
    """Layers and components, experts, and inside each matrix."""
    return [
        _components(located),
        *([_experts(located)] if located.experts else []),
        *([_matrices(located, selection)] if selection is not None else []),
    ]


def _tiles(located: SafetyMap) -> list[tuple[str, str]]:
    """(number, what it is), the three or four that matter."""
    part = located.num_selected / located.num_weights
    tiles = [(text.count(located.num_selected), f"weights selected, {text.percent(part)} of the eligible ones")]
    method = text.method_label(located.score_method)
    if located.selected_mass is not None:
        tiles.append((text.percent(located.selected_mass), f"of all {method} is in them"))
    best = max(located.components, key=lambda region: region.enrichment)
    label = text.component_label(best.component_key)
    tiles.append((text.times(best.enrichment, text.TIMES), f"as many in {label} matrices as their size gives"))
    if located.concentration is not None:
        tiles.append((f"{located.concentration.gini:.2f}", f"Gini coefficient of {method}"))
    return tiles


def _components(located: SafetyMap) -> Part:
    limit = colours.log2_limit(region.enrichment for region in located.cells)
    mass = _mass_column(located)
    table = Table(
        columns={"layer": "text", "component": "text", **_REGION, **mass},
        rows=[
            *(
                [text.layer_label(layer), text.component_label(component), *_numbers(located, region)]
                for (layer, component), region in located.cell.items()
            ),
            *(["all", text.component_label(r.component_key), *_numbers(located, r)] for r in located.components),
            *([text.layer_label(r.layer_key), "all", *_numbers(located, r)] for r in located.layers),
        ],
    )
    figure = Figure(
        kind="heat",
        title="Enrichment by layer and component",
        table=table,
        options={
            "x": "layer",
            "y": "component",
            "panels": [{"title": "", "z": "enrichment"}],
            "limit": limit,
            "xs": [text.layer_label(layer) for layer in located.layer_keys],
            "ys": [text.component_label(key) for key in located.component_keys],
            "row": _ROW,
            "opens": True,
        },
        wide=True,
    )
    return Part(
        title="Layers and components",
        notes=[
            "Enrichment: share of the selection divided by share of the eligible weights. 1\N{MULTIPLICATION SIGN} is "
            "what size alone gives. Choose a cell (click, or arrow keys and Enter) to look inside its matrix."
        ],
        legend=legend(limit),
        blocks=[figure],
    )


def _experts(located: SafetyMap) -> Part:
    """Enrichment, and tokens routed where they were counted, on one scale."""
    layers = [layer for layer in located.layer_keys if (layer, 0) in located.expert]
    mean = {layer: _mean_tokens(located, layer) for layer in layers}
    counted = located.unrouted is not None

    def load(region: Region) -> float | None:
        return (region.tokens or 0) / mean[region.layer_key] if counted and mean[region.layer_key] else None

    loads = [value for region in located.experts if region.tokens != 0 and (value := load(region)) is not None]
    limit = colours.log2_limit([*(r.enrichment for r in located.experts if r.tokens != 0), *loads])
    panels = [{"title": "Share of the selection, relative to size", "z": "enrichment"}]
    columns = {"layer": "text", "expert": "text", **_REGION, **_mass_column(located)}
    if counted:
        panels.append({"title": "Tokens routed, relative to the layer's mean", "z": "load"})
        columns |= {"tokens": "count", "load": "times"}
    rows: list[list[Cell]] = [
        [
            text.layer_label(region.layer_key),
            str(region.expert),
            *_numbers(located, region),
            *([region.tokens, load(region)] if counted else []),
        ]
        for region in located.experts
    ]
    figure = Figure(
        kind="heat",
        title="Routed experts",
        table=Table(columns=columns, rows=rows),
        options={
            "x": "layer",
            "y": "expert",
            "panels": panels,
            "limit": limit,
            "xs": [text.layer_label(layer) for layer in layers],
            "ys": [str(number) for number in range(located.num_experts)],
            "row": max(4, min(_ROW - 6, _MAX_HEIGHT // located.num_experts)),
            "opens": True,
        },
        wide=True,
    )
    unrouted = (
        f"{text.unrouted_note(located)}: a score of zero for want of data says nothing about importance."
        if located.unrouted
        else ""
    )
    return Part(
        title="Routed experts",
        legend=legend(limit),
        unrouted=unrouted,
        blocks=[figure, _expert_listing(located)],
        side_by_side=len(layers) <= 24,
    )


def _expert_listing(located: SafetyMap) -> Listing:
    mass, tokens = _has_mass(located), located.unrouted is not None
    headings = ["most enriched experts", "enriched", "selected", "share", "size"]
    headings += [f"of all {text.method_label(located.score_method)}"] * mass + ["tokens"] * tokens
    rows = [
        [
            text.expert_label(region).replace(" expert", ", expert"),
            text.times(region.enrichment, text.TIMES),
            text.count(region.num_selected),
            text.share_percent(region.share),
            text.share_percent(region.expected),
            *([_maybe(region.score_mass)] if mass else []),
            *([text.UNKNOWN if region.tokens is None else text.count(region.tokens)] if tokens else []),
        ]
        for region in top_experts(located, _NUM_EXPERTS)
    ]
    return Listing(headings=headings, rows=rows)


def _matrices(located: SafetyMap, selection: Selection) -> Part:
    found = densities(selection)
    notes = [
        "Where in a matrix the selected weights are: outputs down, inputs across, in bins; attention heads and "
        "neurons where the matrix has them. 1\N{MULTIPLICATION SIGN} is the density of the whole matrix."
    ]
    if found["num_left_out"]:
        notes.append(
            f"The {len(found['matrices']):,} matrices that hold most are here; {found['num_left_out']:,} others hold "
            "selected weights too."
        )
    rate = located.num_selected / located.num_weights
    return Part(
        title="Inside a matrix",
        notes=notes,
        legend=legend(_DENSITY_LIMIT),
        blocks=[Matrices(title="Inside a matrix", data={**found, "rate": rate, "limit": _DENSITY_LIMIT})],
    )


def _concentration(located: SafetyMap) -> list[Part]:
    """None for a map without scores."""
    curve = located.concentration
    if curve is None:
        return []
    method = text.method_label(located.score_method)
    observed, even = method, "all weights alike"
    rows: list[list[Cell]] = [[observed, p.fraction, p.mass, p.num_weights] for p in curve.points]
    rows += [[even, p.fraction, p.fraction, p.num_weights] for p in curve.points]
    mark = None
    if located.selected_mass is not None:
        part = located.num_selected / located.num_weights
        label = [f"selection: {text.percent(part)}", f"holds {text.percent(located.selected_mass)}"]
        mark = {"x": part, "y": located.selected_mass, "label": label}
    decades = [10.0**power for power in range(-5, 1) if 10.0**power >= curve.points[0].fraction * 0.999]
    figure = Figure(
        kind="lines",
        title="Concentration",
        table=Table(
            columns={"curve": "text", "top": "percent", "share of scores": "percent", "weights": "count"}, rows=rows
        ),
        options={
            "series": "curve",
            "x": "top",
            "value": "share of scores",
            "x_type": "log",
            "x_title": "highest-scored part of the eligible weights",
            "ticks": decades,
            "tick_labels": [text.percent(decade) for decade in decades],
            "range": [0, 1.01],
            "styles": {observed: {"colour": 0}, even: {"colour": 2, "dash": "dash"}},
            "mark": mark,
            "plain": True,
        },
        wide=True,
    )
    listing = Listing(
        headings=("top", "weights", f"of all {method}", ""),
        rows=[
            (text.percent(p.fraction), text.count(p.num_weights), text.share_percent(p.mass), p.mass)
            for p in curve.points
            if p.fraction in TOP_FRACTIONS
        ],
        bars=3,
        note=f"Gini coefficient {curve.gini:.3f}; {text.share_percent(curve.num_zero / curve.num_weights)} of the "
        f"{text.count(curve.num_weights)} eligible weights score exactly zero. The curve is exact"
        # never rounded below the bound
        + (f" to {1.05 * curve.mass_error:.1e}." if curve.mass_error else "."),
    )
    note = f"What part of all {method} lies in the highest-scored weights."
    return [Part(title="Concentration", notes=[note], blocks=[figure, listing])]


def _top(located: SafetyMap) -> Part:
    mass, tokens = _has_mass(located), any(row.tokens is not None for row in located.matrices)
    headings = ["matrix", "enriched", "selected", "of", "share", "size"]
    headings += [f"of all {text.method_label(located.score_method)}"] * mass + ["tokens"] * tokens
    rows = [
        [
            row.name,
            text.times(row.enrichment, text.TIMES),
            text.count(row.num_selected),
            text.count(row.num_weights),
            text.share_percent(row.share),
            text.share_percent(row.expected),
            *([_maybe(row.score_mass)] if mass else []),
            *([text.UNKNOWN if row.tokens is None else text.count(row.tokens)] if tokens else []),
        ]
        for row in top_matrices(located, _NUM_MATRICES)
    ]
    return Part(title="Most enriched matrices", blocks=[Listing(headings=headings, rows=rows, names=True)])


def legend(limit: int) -> list[str]:
    """Tick labels from end to end of the scale."""
    powers = range(-limit, limit + 1)
    labels = [f"{2**power}{text.TIMES}" if power >= 0 else f"1/{2**-power}{text.TIMES}" for power in powers]
    inner = [label if limit < 4 or i % 2 else "" for i, label in enumerate(labels[1:-1])]  # 1x has an odd i there
    return [f"≤ {labels[0]}", *inner, f"≥ {labels[-1]}"]


_REGION = {
    "enrichment": "times",
    "share of selection": "percent",
    "share of weights": "percent",
    "selected": "count",
    "weights": "count",
}


def _numbers(located: SafetyMap, region: Region) -> list[Cell]:
    mass: list[Cell] = [region.score_mass] if _has_mass(located) else []
    return [region.enrichment, region.share, region.expected, region.num_selected, region.num_weights, *mass]


def _mass_column(located: SafetyMap) -> dict[str, str]:
    return {f"share of all {text.method_label(located.score_method)}": "percent"} if _has_mass(located) else {}


def _has_mass(located: SafetyMap) -> bool:
    return located.components[0].score_mass is not None


def _mean_tokens(located: SafetyMap, layer: LayerKey) -> float:
    tokens: Sequence[int] = [r.tokens or 0 for (key, _), r in located.expert.items() if key == layer]
    return sum(tokens) / len(tokens)


def _maybe(share: float | None) -> str:
    return text.UNKNOWN if share is None else text.share_percent(share)
