"""The map as pictures for a paper: one function per figure, drawn without a display or global state.

Layers run along x. Enrichment has a diverging log2 scale that is safe for colour-blind readers and the
same as in the terminal and on the page; its numbers stand in the cells where there is room.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from safelocus.report import colours
from safelocus.report.map import LayerKey, Region, SafetyMap
from safelocus.report.text import (
    TIMES,
    component_label,
    layer_label,
    method_label,
    percent,
    title,
    unrouted_note,
)

DPI = 200
_WIDTH = 7.2  # inches: two columns of a paper
INK = "#222222"
MUTED = "#6b6b6b"
_ACCENT = "#c2571a"
_GAP = 0.3  # between the cells and their totals, in cells
_ROOM = 0.27  # inches a cell needs for its number
_MAP = LinearSegmentedColormap.from_list("enrichment", colours.LIGHT).with_extremes(bad=colours.UNROUTED_LIGHT)


def component_figure(located: SafetyMap) -> Figure:
    """Heatmap of enrichment, layer x component, with totals along both sides."""
    layers, components = located.layer_keys, located.component_keys
    cells = np.full((len(components), len(layers)), np.nan)
    for (layer, component), region in located.cell.items():
        cells[components.index(component), layers.index(layer)] = region.enrichment
    by_layer = np.array([[region.enrichment for region in located.layers]])
    by_component = np.array([[region.enrichment] for region in located.components])

    width = _width(len(layers) + 1)
    figure = new_figure(width, 1.35 + 0.3 * (len(components) + 1))
    axes = figure.add_subplot()
    limit = colours.log2_limit(cells[np.isfinite(cells)])
    span = max(1.0, len(layers) / 24)  # the totals stay legible beside many layers
    far_x, far_y = len(layers) + _GAP * span, len(components) + _GAP
    room = (width - 2.4) / (len(layers) + span)
    _heatmap(axes, (0, 0), cells, limit, numbers=room >= _ROOM)
    _heatmap(axes, (0, far_y), by_layer, limit, numbers=room >= _ROOM)
    _heatmap(axes, (far_x, 0), by_component, limit, numbers=room * span >= _ROOM, width=span)
    axes.set_xlim(0, far_x + span)
    axes.set_ylim(far_y + 1, 0)
    _layer_ticks(axes, layers, extra=far_x + span / 2, room=room)
    axes.set_yticks(
        [*np.arange(len(components)) + 0.5, far_y + 0.5],
        [*(component_label(key) for key in components), "all"],
    )
    finish(axes, "layer", "")
    _colour_bar(figure, axes, limit, f"enrichment (1{TIMES}: as by size)")
    figure.suptitle(title(located), fontsize=9, color=INK)
    return figure


def expert_figure(located: SafetyMap) -> Figure | None:
    """Heatmaps of enrichment and of the tokens routed, layer x expert. None for dense models."""
    if not located.experts:
        return None
    layers = [layer for layer in located.layer_keys if (layer, 0) in located.expert]
    enrichment = _expert_grid(located, layers, lambda region: None if region.tokens == 0 else region.enrichment)
    panels = [("share of the selection / of the weights", enrichment)]
    if located.unrouted is not None:
        mean = {layer: _mean_tokens(located, layer) for layer in layers}
        tokens = _expert_grid(
            located,
            layers,
            lambda r: r.tokens / mean[r.layer_key] if r.tokens and mean[r.layer_key] else None,
        )
        panels.append(("tokens routed / mean of the layer's experts", tokens))
    height = min(8.5, 1.5 + max(0.05, min(0.26, 6.5 / located.num_experts)) * located.num_experts)
    width = max(_WIDTH if len(panels) == 2 else _WIDTH / 2, min(12.0, 2.0 + 0.13 * len(layers) * len(panels)))
    figure = new_figure(width, height)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    limit = colours.log2_limit(np.concatenate([values[np.isfinite(values)] for _, values in panels]))
    room = (width - 1.8) / len(panels) / len(layers)
    numbers = room >= _ROOM and (height - 1.3) / located.num_experts >= 0.13
    for axes, (name, values) in zip(all_axes, panels):
        _heatmap(axes, (0, 0), values, limit, numbers=numbers, nothing=colours.UNROUTED_LIGHT)
        axes.set_xlim(0, len(layers))
        axes.set_ylim(located.num_experts, 0)
        _layer_ticks(axes, layers, room=room)
        axes.set_title(name, fontsize=8, color=INK)
        finish(axes, "layer", "")
    step = _step(located.num_experts, (height - 1.3) / located.num_experts)
    ticks = range(0, located.num_experts, step)
    all_axes[0].set_yticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    all_axes[0].set_ylabel("routed expert", fontsize=8, color=INK)
    _colour_bar(figure, list(all_axes), limit, f"relative to expected (1{TIMES})")
    note = f" (grey: {unrouted_note(located)})" if located.unrouted else ""
    figure.suptitle(title(located) + note, fontsize=9, color=INK)
    return figure


def concentration_figure(located: SafetyMap) -> Figure | None:
    """What part of all scores lies in the top weights. None for a map without scores."""
    curve = located.concentration
    if curve is None:
        return None
    figure = new_figure(_WIDTH / 2 + 0.6, 3.1)
    axes = figure.add_subplot()
    fractions = np.array([point.fraction for point in curve.points])
    axes.plot(
        fractions,
        fractions,
        color=MUTED,
        linewidth=1,
        linestyle=(0, (4, 3)),
        label="if all weights scored equal",
    )
    axes.plot(
        fractions,
        [p.mass for p in curve.points],
        color=_ACCENT,
        linewidth=1.8,
        label=f"observed (Gini {curve.gini:.2f})",
    )
    if located.selected_mass is not None:
        part = located.num_selected / located.num_weights
        axes.plot([part], [located.selected_mass], "o", color=INK, markersize=4.5, clip_on=False)
        axes.annotate(
            f"selection: {percent(part)}\nholds {percent(located.selected_mass)}",
            (part, located.selected_mass),
            xytext=(-7, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=INK,
        )
    axes.set_xscale("log")
    axes.set_xlim(fractions[0], 1)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(FixedLocator([10.0**e for e in range(-5, 1) if 10.0**e >= fractions[0] * 0.999]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: percent(x)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.legend(fontsize=7, frameon=False, loc="upper left", labelcolor=INK)
    finish(
        axes,
        "highest-scored part of the eligible weights",
        f"part of all {method_label(located.score_method)}",
        grid=True,
    )
    figure.suptitle(title(located), fontsize=8.5, color=INK, wrap=True)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a PNG of 200 dots per inch under a temporary name and rename it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # no version of matplotlib inside: the same map gives the same file
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.set_facecolor("white")
    return figure


def _width(num_columns: int) -> float:
    """Inches: narrow for few layers, the full width of a page from about 16 on."""
    return min(_WIDTH, max(4.6, 2.4 + 0.4 * num_columns))


def _heatmap(
    axes: Axes,
    corner: tuple[float, float],
    values: np.ndarray,
    limit: int,
    *,
    numbers: bool,
    width: float = 1.0,
    nothing: str = "white",
) -> None:
    """Cells of `width` x 1 from a corner on; values [rows, columns]; NaN is drawn as `nothing`."""
    x, y = corner[0] + width * np.arange(values.shape[1] + 1), corner[1] + np.arange(values.shape[0] + 1)
    with np.errstate(divide="ignore"):
        logs = np.ma.masked_invalid(np.where(values == 0, -limit, np.clip(np.log2(values), -limit, limit)))
    axes.pcolormesh(
        x,
        y,
        logs,
        cmap=_MAP.with_extremes(bad=nothing),
        norm=Normalize(-limit, limit),
        edgecolors="white",
        linewidth=0.6,
    )
    if not numbers:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ground = colours.interpolate(colours.LIGHT, colours.position(float(value), limit))
            axes.text(
                corner[0] + width * (column + 0.5),
                corner[1] + row + 0.5,
                _number(float(value)),
                ha="center",
                va="center_baseline",
                fontsize=6.5,
                color=INK if colours.is_light(ground) else "white",
            )


def _expert_grid(located: SafetyMap, layers: Sequence[LayerKey], value: Callable[[Region], float | None]) -> np.ndarray:
    """[experts, layers]; NaN where the value is None."""
    grid = np.full((located.num_experts, len(layers)), np.nan)
    for (layer, number), region in located.expert.items():
        if (found := value(region)) is not None:
            grid[number, layers.index(layer)] = found
    return grid


def _mean_tokens(located: SafetyMap, layer: LayerKey) -> float:
    tokens = [region.tokens or 0 for (key, _), region in located.expert.items() if key == layer]
    return sum(tokens) / len(tokens)


def _layer_ticks(axes: Axes, layers: Sequence[LayerKey], *, room: float, extra: float | None = None) -> None:
    several = any(stack for stack, _ in layers)
    ticks = list(range(0, len(layers), _step(len(layers), room / (3 if several else 1))))
    labels = [layer_label(layers[tick]).replace(" ", "\n") for tick in ticks]
    places = [tick + 0.5 for tick in ticks]
    if extra is not None:
        places, labels = [*places, extra], [*labels, "all"]
    axes.set_xticks(places, labels)


def _step(number: int, room: float) -> int:
    """Every how many cells a tick label fits: 1, 2, 4, 8 or 16."""
    return next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if step * room >= 0.17 or step >= number)


def finish(axes: Axes, x: str, y: str, *, grid: bool = False) -> None:
    """Labels and ticks in the style of all figures, no frame; with `grid`, lines behind what is drawn."""
    axes.set_xlabel(x, fontsize=8, color=INK)
    if y:
        axes.set_ylabel(y, fontsize=8, color=INK)
    axes.tick_params(labelsize=7, length=0, colors=INK)
    if grid:
        axes.grid(True, color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def finish_lines(axes: Axes, x: str, y: str) -> None:
    """`finish` for curves: with a grid behind and a legend."""
    finish(axes, x, y, grid=True)
    axes.legend(fontsize=7, frameon=False, labelcolor=INK)


def _colour_bar(figure: Figure, axes: Axes | list[Axes], limit: int, label: str) -> None:
    from matplotlib.cm import ScalarMappable

    scale = ScalarMappable(norm=Normalize(-limit, limit), cmap=_MAP)
    bar = figure.colorbar(scale, ax=axes, fraction=0.04, pad=0.02, aspect=25)
    bar.set_ticks(
        list(range(-limit, limit + 1)), labels=[_fraction(power, limit) for power in range(-limit, limit + 1)]
    )
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(labelsize=7, length=2, colors=INK)
    bar.set_label(label, fontsize=7.5, color=INK)
    bar.outline.set_visible(False)


def _fraction(power: int, limit: int) -> str:
    text = f"{2**power}{TIMES}" if power >= 0 else f"1/{2**-power}{TIMES}"
    return f"≤{text}" if power == -limit else f"≥{text}" if power == limit else text


def _number(value: float) -> str:
    return f"{value:.1f}" if 0.05 <= value < 9.95 else f"{value:.0f}" if value == 0 or value > 1 else "<.1"
