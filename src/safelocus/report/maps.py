"""A map as tables and charts: layers, components, experts, concentration, the fullest matrices, and inside of each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from safelocus.analysis import words
from safelocus.analysis.density import densities
from safelocus.analysis.map import LayerKey, Region, SafetyMap, enrichment_of
from safelocus.analysis.patterns import Pattern
from safelocus.analysis.words import UNKNOWN, count, percent, share_percent, times
from safelocus.report import colours
from safelocus.report.blocks import Heat, Lines, Matrices, Part, Section, Value
from safelocus.report.grid import Grid, Tint
from safelocus.report.runs import ReportRun
from safelocus.selection.selection import Selection

MAX_ROWS = 48  # of a terminal; in deeper models adjacent layers are taken together
MAX_EXPERT_COLUMNS = 16
TOP_FRACTIONS = (1e-4, 1e-3, 1e-2, 1e-1)
PATTERNS_NOTE = (
    "The paper finds safety in the value matrices, the MLPs and the middle layers of dense models, and in the expert "
    "MLPs of late layers of mixture-of-experts models. Each is tested against chance that deals out the densities of "
    "this model anew, among the components of a layer or among layers, sizes kept; weights of one matrix never "
    "count as independent."
)
_NUM_MATRICES = 20
_BAR = 30
BARS = "▏▎▍▌▋▊▉█"  # eighths of a character
_ROW, _MAX_HEIGHT = 34, 720  # pixels of a row of a heatmap, and of all together
_DENSITY_LIMIT = 3  # doublings


# tables


def map_parts(located: SafetyMap) -> Iterator[Grid | str]:
    """Layer x component, experts, top matrices, concentration, and the summary, for the terminal."""
    grids = layers_grid(located), experts_grid(located), matrices_grid(located, n=10), concentration_grid(located)
    for grid in grids:
        if grid is not None:
            yield from (grid, "")
    yield from words.summary_lines(located)


def layers_grid(located: SafetyMap, *, max_rows: int = MAX_ROWS) -> Grid:
    """Enrichment of every layer and component, with totals, and the shares it is made of."""
    limit = colours.log2_limit(region.enrichment for region in located.cells)
    total = {region.layer_key: region for region in located.layers}
    rows = []
    for band in _bands(located.layer_keys, max_rows):
        cells = [[located.cell[at, key] for at in band if (at, key) in located.cell] for key in located.component_keys]
        whole = [total[layer] for layer in band]
        shares = [share_percent(sum(getattr(region, name) for region in whole)) for name in ("share", "expected")]
        label = words.layer_label(band[0]) + (f"-{band[-1][1]}" if len(band) > 1 else "")
        rows.append((label, *(_tint(cell, limit) for cell in cells), _tint(whole, limit), *shares))
    parts = located.components
    rows += [
        ("all", *(_tint([region], limit) for region in parts), Tint(times(1), 0.5), "100 %", "100 %"),
        ("share", *(share_percent(region.share) for region in parts), "", "", ""),
        ("size", *(share_percent(region.expected) for region in parts), "", "", ""),
    ]
    return Grid(
        title=f"Enrichment: {words.selection_label(located)}",
        headings=("layer", *map(words.component_label, located.component_keys), "all", "share", "size"),
        rows=tuple(rows),
        caption=f"share of the selection / share of the weights; {times(1)}: as by size alone",
        sections=(len(rows) - 3,),
    )


def experts_grid(located: SafetyMap, *, n: int = 15) -> Grid | None:
    """Enrichment of the routed experts: all where they fit, else the top `n`. None for dense models."""
    if not located.experts:
        return None
    caption = f"{words.unrouted_note(located)}: their scores say nothing" if located.unrouted else ""
    if located.num_experts > MAX_EXPERT_COLUMNS or len(located.layer_keys) > MAX_ROWS:
        return replace(top_experts_grid(located, n=n), caption=caption)
    limit = colours.log2_limit(region.enrichment for region in located.experts)
    numbers = range(located.num_experts)
    rows = []
    for layer in _routed_layers(located):
        regions = [located.expert.get((layer, number)) for number in numbers]
        rows.append((
            words.layer_label(layer),
            *("never" if r is not None and r.tokens == 0 else _tint([r] if r else [], limit) for r in regions),
        ))  # fmt: skip
    return Grid(
        title="Enrichment by layer and routed expert", headings=("layer", *map(str, numbers)), rows=tuple(rows),
        caption=caption,
    )  # fmt: skip


def top_experts_grid(located: SafetyMap, *, n: int = 15) -> Grid:
    """The `n` most enriched routed experts that hold anything selected."""
    held = [region for region in located.experts if region.num_selected]
    best = sorted(held, key=lambda region: (-region.enrichment, -region.num_selected))[:n]
    return _regions_grid(
        located, f"Most enriched of {count(len(located.experts))} routed experts", ("layer", "expert"),
        [((words.layer_label(region.layer_key), str(region.expert)), region) for region in best],
    )  # fmt: skip


def matrices_grid(located: SafetyMap, *, n: int = 15) -> Grid:
    """The `n` most enriched matrices, none of them below 1×."""
    held = [row for row in located.matrices if row.enrichment > 1 - 1e-9]
    best = sorted(held, key=lambda row: (-row.enrichment, -row.num_selected))[:n]
    # without what is the same in all names, to fit one line
    named = [((row.name.removeprefix("model.").removesuffix(".weight"),), row) for row in best]
    return _regions_grid(located, f"Most enriched of {count(len(located.matrices))} matrices", ("matrix",), named)


def _regions_grid(
    located: SafetyMap, title: str, headings: tuple[str, ...], regions: Sequence[tuple[tuple[str, ...], Region]]
) -> Grid:
    """A line per region; scores and tokens where they are known of any."""
    columns = {
        "enriched": lambda region: times(region.enrichment),
        "selected": lambda region: count(region.num_selected),
        "share": lambda region: share_percent(region.share),
        "size": lambda region: share_percent(region.expected),
    }
    if any(region.score_mass is not None for _, region in regions):
        columns[f"of all {words.method_label(located.score_method)}"] = lambda region: (
            UNKNOWN if region.score_mass is None else share_percent(region.score_mass)
        )
    if any(region.tokens is not None for _, region in regions):
        columns["tokens"] = lambda region: UNKNOWN if region.tokens is None else count(region.tokens)
    rows = [(*names, *(column(region) for column in columns.values())) for names, region in regions]
    return Grid(title=title, headings=(*headings, *columns), rows=tuple(rows), num_labels=len(headings))


def concentration_grid(located: SafetyMap) -> Grid | None:
    """What part of all scores the top weights hold. None for a map without scores."""
    curve = located.concentration
    if curve is None:
        return None
    method = words.method_label(located.score_method)
    points = [point for point in curve.points if point.fraction in TOP_FRACTIONS]
    # never rounded below the bound
    exact = f" to {1.05 * curve.mass_error:.1e}" if curve.mass_error else ""
    return Grid(
        title=f"Concentration of {method} over {count(curve.num_weights)} eligible weights",
        headings=("top", "weights", f"of all {method}", ""),
        rows=tuple((percent(p.fraction), count(p.num_weights), percent(p.mass), _bar(p.mass)) for p in points),
        caption=f"Gini {curve.gini:.2f} (0: all equal, 1: one holds all); "
        f"{share_percent(curve.num_zero / curve.num_weights)} score zero; the curve is exact{exact}",
    )


def patterns_grid(found: Mapping[str, Sequence[Pattern]]) -> Grid:
    """One row per model and pattern; the model's name stands in the title, or where there are several, in a column."""
    several = len(found) > 1
    rows = []
    for name, tested in found.items():
        for pattern in tested:
            ends = "" if pattern.low is None or pattern.high is None else f" [{pattern.low:.2f}, {pattern.high:.2f}]"
            turned = UNKNOWN if pattern.p_rotation is None else words.p_value(pattern.p_rotation)
            rows.append((
                *([name] if several else []), pattern.name, "yes" if pattern.claimed else "no",
                share_percent(pattern.share), share_percent(pattern.expected), f"{pattern.fold:.2f}{ends}",
                words.p_value(pattern.p_holm), turned,
            ))  # fmt: skip
    return Grid(
        title="Patterns of the paper" + ("" if several or not found else f": {next(iter(found))}"),
        headings=(*(["model"] if several else []), "pattern", "claimed", "share", "size", "fold", "p", "p turned"),
        rows=tuple(rows),
        caption="claimed: by the paper, for this kind of model; fold: share / size [95 % interval]; p: "
        "permutation test, one-sided, Holm-corrected; p turned: keeps the order of the layers",
        num_labels=3 if several else 2,
    )


# charts


def layers_chart(located: SafetyMap) -> Heat:
    """Enrichment of every layer and component, with totals."""
    label, named = words.layer_label, words.component_label
    return Heat(
        title="Enrichment by layer and component",
        columns={"layer": "text", "component": "text", **_region_columns(located)},
        rows=[
            *([label(at), named(key), *_numbers(located, region)] for (at, key), region in located.cell.items()),
            *(["all", named(region.component_key), *_numbers(located, region)] for region in located.components),
            *([label(region.layer_key), "all", *_numbers(located, region)] for region in located.layers),
        ],
        x="layer", y="component", z="enrichment", xs=[label(key) for key in located.layer_keys],
        ys=[named(key) for key in located.component_keys], opens=True, wide=True, height=_ROW,
        limit=colours.log2_limit(region.enrichment for region in located.cells),
    )  # fmt: skip


def experts_charts(located: SafetyMap) -> list[Heat]:
    """Enrichment by layer and routed expert, and the tokens routed where they were counted, on one scale."""
    layers = _routed_layers(located)
    of_layer = {layer: [r.tokens or 0 for (key, _), r in located.expert.items() if key == layer] for layer in layers}
    mean = {layer: sum(tokens) / len(tokens) for layer, tokens in of_layer.items()}
    counted = located.unrouted is not None

    def load(region: Region) -> float | None:
        return (region.tokens or 0) / mean[region.layer_key] if counted and mean[region.layer_key] else None

    routed = [region for region in located.experts if region.tokens != 0]
    loads = [value for region in routed if (value := load(region)) is not None]
    more = {"tokens": "count", "load": "times"} if counted else {}
    places = [(words.layer_label(region.layer_key), str(region.expert)) for region in located.experts]
    first = Heat(
        title="Routed experts", note="Share of the selection, relative to size." if counted else "",
        columns={"layer": "text", "expert": "text", **_region_columns(located), **more},
        rows=[
            [*place, *_numbers(located, region), *([region.tokens, load(region)] if counted else [])]
            for place, region in zip(places, located.experts, strict=True)
        ],
        x="layer", y="expert", z="enrichment", xs=[words.layer_label(layer) for layer in layers],
        ys=[str(number) for number in range(located.num_experts)], opens=True,
        height=max(4, min(_ROW - 6, _MAX_HEIGHT // located.num_experts)),
        limit=colours.log2_limit([*(region.enrichment for region in routed), *loads]),
    )  # fmt: skip
    if not counted:
        return [first]
    tokens = replace(
        first, title="Tokens routed", note="Relative to the layer's mean.", z="load",
        columns={"layer": "text", "expert": "text", **more},
        rows=[[*place, r.tokens, load(r)] for place, r in zip(places, located.experts, strict=True)],
    )  # fmt: skip
    return [first, tokens]


def concentration_chart(located: SafetyMap) -> Lines | None:
    """What part of all scores lies in the top weights. None for a map without scores."""
    curve = located.concentration
    if curve is None:
        return None
    observed, even = words.method_label(located.score_method), "all weights alike"
    rows: list[list[Value]] = [[observed, p.fraction, p.mass, p.num_weights] for p in curve.points]
    rows += [[even, p.fraction, p.fraction, p.num_weights] for p in curve.points]
    mark = None
    if located.selected_mass is not None:
        part = located.num_selected / located.num_weights
        mark = part, located.selected_mass, f"selection: {percent(part)} holds {percent(located.selected_mass)}"
    return Lines(
        title="Concentration",
        columns={"curve": "text", "top": "percent", "share of scores": "percent", "weights": "count"},
        rows=rows, series="curve", x="top", value="share of scores", kind="log", span=(0, 1.01), plain=True, mark=mark,
        x_title="highest-scored part of the eligible weights", colours={observed: 0, even: 2}, dashed=(even,),
        wide=True,
    )  # fmt: skip


# the page


def map_sections(run: ReportRun) -> list[Section]:
    """One section per model."""
    sections = []
    for name, located in run.maps.items():
        patterns = patterns_grid({name: run.patterns[name]})
        stem = "" if len(run.maps) == 1 else name.rpartition(":")[2].replace("/", "-") + "-"
        parts = [
            *_places(located, run.selection(name)), *_concentration(located), _top(located),
            Part(title="Patterns", notes=[PATTERNS_NOTE], blocks=[patterns]),
        ]  # fmt: skip
        sections.append(Section(
            title=name if len(run.maps) > 1 or run.name == name else f"{run.name}: {name}",
            what=words.capital(words.selection_label(located)), summary=words.summary_lines(located),
            tiles=_tiles(located), parts=[replace(part, file=part.file and stem + part.file) for part in parts],
        ))  # fmt: skip
    return sections


def selection_parts(located: SafetyMap, selection: Selection | None, *, title: str) -> list[Part]:
    """Where a selection lies whose scores are not at hand; the first part has the title and says what is left out."""
    first, *others = [*_places(located, selection), _top(located)]
    unknown = "how concentrated the scores are" + (" and which experts got tokens" if located.experts else "")
    notes = [
        *words.summary_lines(located), *first.notes,
        f"From the selection alone: {unknown} is on the page of the run that scored.",
    ]  # fmt: skip
    return [replace(part, file="") for part in (replace(first, title=title, notes=notes), *others)]


def _places(located: SafetyMap, selection: Selection | None) -> list[Part]:
    """Layers and components, experts, and inside each matrix."""
    chart = layers_chart(located)
    parts = [Part(
        title="Layers and components", file="map",
        notes=[
            f"Enrichment: share of the selection divided by share of the eligible weights. 1{words.TIMES} is what size "
            "alone gives. Choose a cell (click, or arrow keys and Enter) to look inside its matrix."
        ],
        blocks=[chart],
    )]  # fmt: skip
    if located.experts:
        charts = experts_charts(located)
        note = "a score of zero for want of data says nothing about importance."
        parts.append(Part(
            title="Routed experts", file="experts", blocks=[*charts, top_experts_grid(located)],
            unrouted=f"{words.unrouted_note(located)}: {note}" if located.unrouted else "",
            side_by_side=len(charts[0].xs) <= 12,
        ))  # fmt: skip
    return [*parts, *([_inside(located, selection)] if selection is not None else [])]


def _inside(located: SafetyMap, selection: Selection) -> Part:
    found = densities(selection)
    notes = [
        "Where in a matrix the selected weights are: outputs down, inputs across, in bins; attention heads and "
        f"neurons where the matrix has them. 1{words.TIMES} is the density of the whole matrix."
    ]
    if found.num_left_out:
        notes.append(
            f"The {len(found.matrices):,} matrices that hold most are here; {found.num_left_out:,} others hold "
            "selected weights too."
        )
    rate = located.num_selected / located.num_weights
    block = Matrices(densities=found, rate=rate, limit=_DENSITY_LIMIT)
    return Part(title="Inside a matrix", notes=notes, limit=_DENSITY_LIMIT, blocks=[block])


def _concentration(located: SafetyMap) -> list[Part]:
    chart, grid = concentration_chart(located), concentration_grid(located)
    if chart is None or grid is None:
        return []
    note = f"What part of all {words.method_label(located.score_method)} lies in the highest-scored weights."
    return [Part(title="Concentration", notes=[note], blocks=[chart, grid], file="concentration")]


def _top(located: SafetyMap) -> Part:
    return Part(title="Most enriched matrices", blocks=[matrices_grid(located, n=_NUM_MATRICES)])


def _tiles(located: SafetyMap) -> list[tuple[str, str]]:
    """(number, what it is), the three or four that matter."""
    part = located.num_selected / located.num_weights
    tiles = [(count(located.num_selected), f"weights selected, {percent(part)} of the eligible ones")]
    method = words.method_label(located.score_method)
    if located.selected_mass is not None:
        tiles.append((percent(located.selected_mass), f"of all {method} is in them"))
    best = max(located.components, key=lambda region: region.enrichment)
    label = words.component_label(best.component_key)
    tiles.append((times(best.enrichment), f"as many in {label} matrices as their size gives"))
    if located.concentration is not None:
        tiles.append((f"{located.concentration.gini:.2f}", f"Gini coefficient of {method}"))
    return tiles


# cells


def _region_columns(located: SafetyMap) -> dict[str, str]:
    columns = {
        "enrichment": "times", "share of selection": "percent", "share of weights": "percent", "selected": "count",
        "weights": "count",
    }  # fmt: skip
    mass = {f"share of all {words.method_label(located.score_method)}": "percent"} if _has_mass(located) else {}
    return columns | mass


def _numbers(located: SafetyMap, region: Region) -> list[Value]:
    mass: list[Value] = [region.score_mass] if _has_mass(located) else []
    return [region.enrichment, region.share, region.expected, region.num_selected, region.num_weights, *mass]


def _has_mass(located: SafetyMap) -> bool:
    return located.components[0].score_mass is not None


def _routed_layers(located: SafetyMap) -> list[LayerKey]:
    return [layer for layer in located.layer_keys if (layer, 0) in located.expert]


def _bands(layers: Sequence[LayerKey], max_rows: int) -> list[list[LayerKey]]:
    """Adjacent layers of one stack in bands of equal height, so that at most about `max_rows` are left."""
    height = -(-len(layers) // max_rows)
    bands: list[list[LayerKey]] = []
    for layer in layers:
        alike = bands and bands[-1][0][0] == layer[0] and None not in (bands[-1][0][1], layer[1])
        if alike and len(bands[-1]) < height:
            bands[-1].append(layer)
        else:
            bands.append([layer])
    return bands


def _tint(regions: Sequence[Region], limit: int) -> str:
    """Enrichment of regions taken together."""
    if not regions:
        return UNKNOWN
    enrichment = enrichment_of(regions)
    return Tint(times(enrichment), colours.position(enrichment, limit))


def _bar(part: float) -> str:
    """A bar in eighths of a character."""
    whole, rest = divmod(round(part * _BAR * 8), 8)
    return "█" * whole + ("" if rest == 0 else BARS[rest - 1])
