"""The map as tables for a terminal of 80 to 100 columns. Renderables only: nothing is printed here.

Cells are coloured by enrichment, and say it in numbers, so that they read as well without colour.
"""

from collections.abc import Sequence

from rich import box
from rich.color import Color
from rich.style import Style
from rich.table import Table
from rich.text import Text

from safelocus.report import colours
from safelocus.report.map import LayerKey, MatrixRow, Region, SafetyMap
from safelocus.report.text import (
    component_label,
    count,
    layer_label,
    method_label,
    percent,
    selection_label,
    share_percent,
    short_times,
    summary_lines,
    times,
    unrouted_note,
)

__all__ = [
    "concentration_table",
    "experts_table",
    "layer_component_table",
    "summary_lines",
    "top_matrices_table",
]

MAX_ROWS = 48  # deeper models: adjacent layers are taken together
MAX_EXPERT_COLUMNS = 16
TOP_FRACTIONS = (1e-4, 1e-3, 1e-2, 1e-1)
_BAR = 30
_NONE = Text("-", style="dim")


def layer_component_table(located: SafetyMap, *, max_rows: int = MAX_ROWS) -> Table:
    """Enrichment of every layer and component, with totals, and the shares it is made of."""
    limit = colours.log2_limit(region.enrichment for region in located.cells)
    table = Table(
        title=Text(f"Enrichment: {selection_label(located)}", style="table.title"),
        caption="share of the selection / share of the weights; 1.0x: as by size alone",
        box=box.SIMPLE,
        padding=0,
        collapse_padding=True,
    )
    keys = located.component_keys
    table.add_column("layer", justify="right", no_wrap=True)
    for key in keys:
        table.add_column(component_label(key).replace(" ", "\n").replace("/", "/\n"), justify="right", min_width=6)
    for name in ("all", "share", "size"):
        table.add_column(name, justify="right", no_wrap=True, min_width=7)
    total = {region.layer_key: region for region in located.layers}
    for band in _bands(located.layer_keys, max_rows):
        cells = [_merge([located.cell[layer, key] for layer in band if (layer, key) in located.cell]) for key in keys]
        whole = _merge([total[layer] for layer in band])
        table.add_row(_band_label(band), *(_heat(cell, limit) for cell in cells), *_totals(whole, limit))
    table.add_section()
    components = located.components
    everything = (1.0, 1.0, 1.0)
    table.add_row(
        "all",
        *(_heat(_merge([region]), limit) for region in components),
        *_totals(everything, limit),
        style="bold",
    )
    table.add_row("share", *(share_percent(region.share) for region in components))
    table.add_row("size", *(share_percent(region.expected) for region in components))
    return table


def top_matrices_table(located: SafetyMap, *, n: int = 15) -> Table:
    """The `n` most enriched matrices, none of them below 1x."""
    with_mass = any(row.score_mass is not None for row in located.matrices)
    with_tokens = any(row.tokens is not None for row in located.matrices)
    table = Table(title=f"Most enriched of {count(len(located.matrices))} matrices", box=box.SIMPLE, padding=(0, 1))
    table.add_column("matrix", overflow="fold", ratio=1)
    for name in ("enriched", "selected", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    if with_mass:
        table.add_column(method_label(located.score_method), justify="right", no_wrap=True)
    if with_tokens:
        table.add_column("tokens", justify="right", no_wrap=True)
    for row in top_matrices(located, n):
        # without what is the same in all names, to fit one line; Text, because Rich would read "[query]" as markup
        name = row.name.removeprefix("model.").removesuffix(".weight")
        cells: list[str | Text] = [Text(name), times(row.enrichment), count(row.num_selected)]
        cells.append(share_percent(row.share))
        if with_mass:
            cells.append(_NONE if row.score_mass is None else share_percent(row.score_mass))
        if with_tokens:
            cells.append(_NONE if row.tokens is None else count(row.tokens))
        table.add_row(*cells)
    return table


def experts_table(located: SafetyMap, *, n: int = 15, max_rows: int = MAX_ROWS) -> Table | None:
    """Enrichment of the routed experts: all where they fit, else the top `n`. None for dense models."""
    if not located.experts:
        return None
    if located.num_experts <= MAX_EXPERT_COLUMNS and len(located.layer_keys) <= max_rows:
        return _experts_grid(located)
    table = Table(
        title=f"Most enriched of {count(len(located.experts))} routed experts",
        caption=_unrouted_caption(located),
        box=box.SIMPLE,
        padding=(0, 1),
    )
    for name in (
        "layer",
        "expert",
        "enriched",
        "selected",
        "share",
        "size",
        method_label(located.score_method),
        "tokens",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for region in top_experts(located, n):
        table.add_row(
            layer_label(region.layer_key),
            str(region.expert),
            times(region.enrichment),
            count(region.num_selected),
            share_percent(region.share),
            share_percent(region.expected),
            _NONE if region.score_mass is None else share_percent(region.score_mass),
            _NONE if region.tokens is None else count(region.tokens),
        )
    return table


def concentration_table(located: SafetyMap) -> Table | None:
    """What part of all scores the top weights hold. None for a map without scores."""
    curve = located.concentration
    if curve is None:
        return None
    method = method_label(located.score_method)
    table = Table(
        title=f"Concentration of {method} over {count(curve.num_weights)} eligible weights",
        caption=f"Gini {curve.gini:.2f} (0: all equal, 1: one holds all); "
        f"{share_percent(curve.num_zero / curve.num_weights)} score zero",
        box=box.SIMPLE,
        padding=(0, 1),
    )
    table.add_column("top", justify="right")
    table.add_column("weights", justify="right")
    table.add_column(f"of all {method}", justify="right")
    table.add_column("", no_wrap=True, width=_BAR)
    for fraction in TOP_FRACTIONS:
        mass = curve.mass_at(fraction)
        if mass is not None:
            number = next(p.num_weights for p in curve.points if p.fraction == fraction)
            table.add_row(percent(fraction), count(number), percent(mass), Text(_bar(mass), style="#d9702f"))
    return table


def top_matrices(located: SafetyMap, n: int) -> list[MatrixRow]:
    """The `n` most enriched matrices, as far as they hold at least what their size gives."""
    held = [row for row in located.matrices if row.enrichment > 1 - 1e-9]
    return sorted(held, key=lambda row: (-row.enrichment, -row.num_selected))[:n]


def top_experts(located: SafetyMap, n: int) -> list[Region]:
    """The `n` most enriched routed experts that hold anything selected."""
    held = [region for region in located.experts if region.num_selected]
    return sorted(held, key=lambda region: (-region.enrichment, -region.num_selected))[:n]


def _experts_grid(located: SafetyMap) -> Table:
    limit = colours.log2_limit(region.enrichment for region in located.experts)
    table = Table(
        title="Enrichment by layer and routed expert",
        caption=_unrouted_caption(located),
        box=box.SIMPLE,
        padding=0,
        collapse_padding=True,
    )
    table.add_column("layer", justify="right", no_wrap=True)
    for number in range(located.num_experts):
        table.add_column(str(number), justify="right", no_wrap=True, min_width=5)
    for layer in located.layer_keys:
        cells = []
        for number in range(located.num_experts):
            region = located.expert.get((layer, number))
            unrouted = region is not None and region.tokens == 0
            cells.append(
                Text("never", style="dim") if unrouted else _heat(_merge([region] if region else []), limit, short=True)
            )
        if any((layer, number) in located.expert for number in range(located.num_experts)):
            table.add_row(layer_label(layer), *cells)
    return table


def _unrouted_caption(located: SafetyMap) -> str | None:
    if not located.unrouted:
        return None
    return f"{unrouted_note(located)}: their scores say nothing"


def _bands(layers: Sequence[LayerKey], max_rows: int) -> list[list[LayerKey]]:
    """Adjacent layers of one stack in bands of equal height, so that at most about `max_rows` are left."""
    height = -(-len(layers) // max_rows)
    bands: list[list[LayerKey]] = []
    for layer in layers:
        if bands and len(bands[-1]) < height and bands[-1][0][0] == layer[0] and layer[1] is not None:
            bands[-1].append(layer)
        else:
            bands.append([layer])
    return bands


def _band_label(band: Sequence[LayerKey]) -> str:
    return layer_label(band[0]) if len(band) == 1 else f"{layer_label(band[0])}-{band[-1][1]}"


Sums = tuple[float, float, float]  # enrichment, share, expected


def _merge(regions: Sequence[Region]) -> Sums | None:
    if not regions:
        return None
    share, expected = sum(region.share for region in regions), sum(region.expected for region in regions)
    return share / expected, share, expected


def _heat(sums: Sums | None, limit: float, *, short: bool = False) -> Text:
    if sums is None:
        return _NONE
    enrichment = sums[0]
    ground = colours.interpolate(colours.LIGHT, colours.position(enrichment, limit))
    ink = "#000000" if colours.is_light(ground) else "#ffffff"
    text = short_times(enrichment) if short else times(enrichment)
    return Text(f" {text}", style=Style(color=Color.parse(ink), bgcolor=Color.from_rgb(*ground)), justify="right")


def _totals(sums: Sums | None, limit: float) -> tuple[Text, str, str]:
    assert sums is not None
    return _heat(sums, limit), share_percent(sums[1]), share_percent(sums[2])


def _bar(part: float) -> str:
    """A bar in eighths of a character."""
    eighths = round(part * _BAR * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + ("" if rest == 0 else "▏▎▍▌▋▊▉"[rest - 1])
