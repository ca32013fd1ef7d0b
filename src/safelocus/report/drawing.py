"""Charts as SVG: the same drawing in a page and in a picture file.

What has a colour has a class of `colours.Theme.style`, so a page changes them with its theme; lines and marks take
`currentColor` from the class of their series. Every cell and mark carries the number of its row (`data-row`), by which
the page's script finds what to show. A picture brings the light colours with it. Strangers' text is
escaped and inert.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from safelocus.analysis.words import TIMES, percent
from safelocus.inert import inert
from safelocus.report import colours
from safelocus.report.blocks import Chart, Heat, Lines, Value
from safelocus.run.files import write_text

HEAT, WIDE, NARROW = 720, 520, 440  # pixels of a heatmap at most, and of other charts
SIZE = 12  # pixels of its letters
LETTER = 6.4  # pixels that one takes, about
_SCALE_WIDTH = 220
_MOST_MARKS = 400  # of a line
_FONT = "font-family:system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
_DASHES = ("", "7 4", "2 3", "7 3 2 3", "10 4", "10 3 2 3")
_MARKS = (
    "M0-4a4 4 0 1 0 .01 0z", "M-3.5-3.5h7v7h-7z", "M0-5l5 5-5 5-5-5z", "M0-4.500l4.700 8h-9.400z",
    "M-3-4.500l3 3 3-3 1.500 1.500-3 3 3 3-1.500 1.500-3-3-3 3-1.500-1.500 3-3-3-3z",
    "M-1.500-4.500h3v3h3v3h-3v3h-3v-3h-3v-3h3z", "M0 4.500l4.700-8h-9.400z",
    "M0-5l1.500 3.300 3.600.400-2.700 2.400.800 3.600L0 2.900l-3.200 1.800.800-3.600-2.700-2.400 3.600-.400z",
)  # fmt: skip

Drawn = tuple[str, float, float]  # SVG elements, width, height
Scale = Callable[[float], float]


def svg(chart: Chart) -> str:
    """A chart as an element of a page."""
    body, width, height = draw(chart)
    more = f'role="img" aria-label="{escape(inert(chart.title))}. The numbers follow." '
    return _svg(body, width, height, more, least=0.65 * width)


def picture(title: str, charts: Sequence[Chart]) -> str:
    """Charts below one another, or several in two columns, as an SVG file of their own."""
    drawn = [draw(chart) for chart in charts]
    columns = 2 if len(charts) > 3 and all(width <= NARROW for _, width, _ in drawn) else 1
    inside = max(width for _, width, _ in drawn) * columns
    lines = textwrap.wrap(title, int(inside / LETTER * 0.85)) or [""]
    body = [_text(12, 22 + 18 * n, line, size=14, weight=600) for n, line in enumerate(lines)]
    top = 22.0 + 18 * len(lines)
    for first in range(0, len(charts), columns):
        row = list(zip(charts, drawn, strict=True))[first : first + columns]
        for number, (chart, (elements, _, _)) in enumerate(row):
            x, y = 12 + number * inside / columns, top
            if len(charts) > 1:
                body.append(_text(x, y + 10, chart.title, weight=600))
                y += 18
            body.append(f'<g transform="translate({x:.1f} {y:.1f})">{elements}</g>')
        top += max(height for _, (_, _, height) in row) + (30 if len(charts) > 1 else 12)
    style = f"<style>{colours.LIGHT.style}</style>"
    ground = '<rect class="paper" width="100%" height="100%"/>'
    return _svg(style + ground + "".join(body), inside + 24, top, 'xmlns="http://www.w3.org/2000/svg" ') + "\n"


def write_picture(path: Path, title: str, charts: Sequence[Chart]) -> str:
    """Write a picture under a temporary name and rename it; returns its name."""
    write_text(path, picture(title, charts))
    return path.name


def draw(chart: Chart) -> Drawn:
    """The elements of a chart with their extent."""
    match chart:
        case Heat():
            return _heat(chart)
        case Lines():
            return _lines(chart)
    raise AssertionError(type(chart))


# heatmaps


def _heat(chart: Heat) -> Drawn:
    x, y, z = (chart.column(name) for name in (chart.x, chart.y, chart.z))
    tokens = chart.column("tokens") if "tokens" in chart.columns else None
    rows = {(str(row[x]), str(row[y])): (number, row) for number, row in enumerate(chart.rows)}
    span = max(1.0, len(chart.xs) / 24)  # the totals stay legible beside many layers
    left = 14 + LETTER * max(map(len, chart.ys))
    room = max(5.0, min(58.0, (HEAT - left) / (len(chart.xs) + span + 0.35)))
    across = [(label, left + room * place, room) for place, label in enumerate(chart.xs)]
    down = [(label, float(chart.height * place)) for place, label in enumerate(chart.ys)]
    if ("all", chart.ys[0]) in rows:
        across.append(("all", left + room * (len(chart.xs) + 0.35), room * span))
    if (chart.xs[0], "all") in rows:
        down.append(("all", chart.height * (len(chart.ys) + 0.35)))
    gap, body = 1.5 if room > 9 else 0.5, []
    for column, (name, at, width) in enumerate(across):
        for line, (other, top) in enumerate(down):
            if (name, other) not in rows:
                continue
            number, row = rows[name, other]
            value = row[z]
            grey = value is None or (tokens is not None and row[tokens] == 0)
            level = 0 if grey else colours.level(colours.position(_number(value), chart.limit))
            look = "unrouted" if grey else f"h{level}"
            body.append(
                f'<rect class="{look}" x="{at:.1f}" y="{top:.1f}" width="{width - gap:.1f}" '
                f'height="{chart.height - gap}" data-row="{number}" data-at="{column},{line}"/>'
            )
            if not grey and width >= 27 and chart.height >= 17:
                body.append(
                    _text(at + width / 2, top + chart.height / 2 + 4, _short(_number(value)), "middle", f"t{level}")
                )
    bottom = down[-1][1] + chart.height
    step = _step(len(chart.xs), max(LETTER * max(map(len, chart.xs)), 14) + 6, room)
    for place, (name, at, width) in enumerate(across):
        if name == "all" or place % step == 0:
            body.append(_text(at + width / 2, bottom + 16, name, "middle"))
    step = _step(len(chart.ys), 14, chart.height)
    body += [
        _text(left - 8, top + chart.height / 2 + 4, name, "end")
        for place, (name, top) in enumerate(down)
        if name == "all" or place % step == 0
    ]
    right = across[-1][1] + across[-1][2]
    body.append(_text((left + right) / 2, bottom + 34, chart.x, "middle", "muted"))
    body += _scale(left, bottom + 50, chart.limit)
    return "".join(body), max(right + 2, left + _SCALE_WIDTH), bottom + 74


def _scale(left: float, top: float, limit: int) -> Iterator[str]:
    """What the colours mean: as many doublings to either side."""
    step = (_SCALE_WIDTH - 60) / (colours.LEVELS + 1)
    for level in range(colours.LEVELS + 1):
        at = left + 20 + step * level
        yield f'<rect class="h{level}" x="{at:.1f}" y="{top}" width="{step + 0.3:.1f}" height="8"/>'
    for place, label in ((0, f"1/{2**limit}{TIMES}"), (0.5, f"1{TIMES}"), (1, f"{2**limit}{TIMES}")):
        yield _text(left + 20 + (_SCALE_WIDTH - 60) * place, top + 21, label, "middle", "muted")


def _short(value: float) -> str:
    return "0" if value == 0 else "<.1" if value < 0.05 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _step(number: int, need: float, room: float) -> int:
    """Every how many cells a label of so many pixels fits."""
    return next((step for step in (1, 2, 4, 8, 16, 32, 64) if step * room >= need or step >= number), 128)


# lines


def _lines(chart: Lines) -> Drawn:
    x, value = chart.column(chart.x), chart.column(chart.value)
    ends = [chart.column(name) for name in ("low", "high") if name in chart.columns]
    width, height = (WIDE if chart.wide else NARROW), (300 if chart.wide else 220)
    series = _series(chart, chart.series)
    body, top = _legend([name for name, _ in series], width, _look(chart), marked=not chart.plain)
    left, right, bottom = 52.0, width - 22.0, top + height
    format = chart.columns[chart.value]
    known = [_number(row[i]) for row in chart.rows for i in (value, *ends) if row[i] is not None]
    lowest, highest, ticks = _span(chart.span, known, chart.reference, format)
    at_y: Scale = lambda v: bottom - (v - lowest) / (highest - lowest) * height  # noqa: E731
    places, at_x, marks = _along(chart, [row[x] for row in chart.rows], left + 8, right - 8)
    for tick in ticks:
        body.append(f'<path class="rule" d="M{left} {at_y(tick):.1f}H{right}"/>')
        body.append(_text(left - 6, at_y(tick) + 4, _spelled(tick, format), "end"))
    for at, label in _apart(marks):
        body.append(f'<path class="rule" d="M{at:.1f} {top}V{bottom}"/>')
        body.append(_text(at, bottom + 17, label, "middle"))
    if chart.reference is not None:
        body.append(f'<path class="mark" stroke-dasharray="2 3" d="M{left} {at_y(chart.reference):.1f}H{right}"/>')
    bands, curves = [], []
    for place, (name, members) in enumerate(series):
        colour, dash, mark = _look(chart)(name, place)
        points = [(n, at_x(places(row[x])), at_y(_number(row[value]))) for n, row in members if row[value] is not None]
        ranged = [
            (at_x(places(row[x])), *(at_y(_number(row[end])) for end in ends))
            for _, row in members
            if ends and None not in (row[value], *(row[end] for end in ends))
        ]
        if len(ranged) > 1:
            around = [(at, high) for at, _, high in ranged] + [(at, low) for at, low, _ in reversed(ranged)]
            bands.append(f'<path class="s{colour}" fill="currentColor" fill-opacity=".15" d="{_path(around)}z"/>')
        elif ranged:
            at, low, high = ranged[0]
            curves.append(f'<path class="s{colour}" stroke="currentColor" d="M{at:.1f} {low:.1f}V{high:.1f}"/>')
        curves.append(
            f'<path class="s{colour}" fill="none" stroke="currentColor" stroke-width="2" stroke-dasharray="{dash}" '
            f'd="{_path([(at, up) for _, at, up in points])}"/>'
        )
        shape = "M0-7a7 7 0 1 0 .01 0z" if chart.plain else _MARKS[mark]
        curves += [_mark(n, at, up, colour, shape, hidden=chart.plain) for n, at, up in points[:_MOST_MARKS]]
    body += [*bands, *curves]
    if chart.mark is not None:
        at, up = min(max(at_x(chart.mark[0]), left + 8), right - 8), at_y(chart.mark[1])
        beside, anchor = (8, "start") if at < (left + right) / 2 else (-8, "end")
        body.append(f'<circle class="ink" cx="{at:.1f}" cy="{up:.1f}" r="4.5"/>')
        body.append(_text(at + beside, up - 6, chart.mark[2], anchor))
    if chart.x_title:
        body.append(_text((left + right) / 2, bottom + 35, chart.x_title, "middle", "muted"))
    return "".join(body), width, bottom + (42 if chart.x_title else 24)


Rows = list[tuple[int, Sequence[Value]]]


def _series(chart: Lines, name: str) -> list[tuple[str, Rows]]:
    """Series with their rows and the rows' numbers, in order of appearance."""
    column = chart.column(name)
    found: dict[str, Rows] = {}
    for number, row in enumerate(chart.rows):
        found.setdefault(str(row[column]), []).append((number, row))
    return list(found.items())


def _look(chart: Lines) -> Callable[[str, int], tuple[int, str, int]]:
    """(name, number of a series) -> its colour, dashes and mark."""

    def look(name: str, number: int) -> tuple[int, str, int]:
        dash = "5 4" if name in chart.dashed else "" if name in chart.colours else _DASHES[number % len(_DASHES)]
        return chart.colours.get(name, number) % len(colours.LIGHT.series), dash, number % len(_MARKS)

    return look


def _legend(
    names: Sequence[str], width: float, look: Callable[[str, int], tuple[int, str, int]], *, marked: bool
) -> tuple[list[str], float]:
    """The keys of several series, and where they end."""
    body: list[str] = []
    at, top = 4.0, 14.0
    if len(names) < 2:
        return body, 8.0
    for number, name in enumerate(names):
        need = 44 + LETTER * len(name)
        if at > 4 and at + need > width:
            at, top = 4.0, top + 18
        colour, dash, mark = look(name, number)
        body.append(
            f'<path class="s{colour}" stroke="currentColor" stroke-width="2" stroke-dasharray="{dash}" '
            f'd="M{at:.1f} {top - 4}h26"/>'
        )
        if marked:
            body.append(_mark(None, at + 13, top - 4, colour, _MARKS[mark]))
        body.append(_text(at + 31, top, name, cls="muted"))
        at += need
    return body, top + 12


def _along(
    chart: Lines, values: Sequence[Value], left: float, right: float
) -> tuple[Callable[[Value], float], Scale, list[tuple[float, str]]]:
    """Value -> number, number -> pixel, and (pixel, label) of the ticks."""
    if chart.kind == "category":
        names = list(dict.fromkeys(values))
        step = (right - left) / max(1, len(names))
        at: Scale = lambda place: left + step * (place + 0.5)  # noqa: E731
        return names.index, at, [(at(place), str(name)) for place, name in enumerate(names)]
    numbers = [_number(value) for value in values]
    first, last = chart.x_span or (min(numbers), max(numbers))
    if chart.kind == "log":
        a, b = math.log10(first), math.log10(last) if last > first else math.log10(first) + 1
        at = lambda v: left + (math.log10(v) - a) / (b - a) * (right - left)  # noqa: E731
        decades = [10.0**power for power in range(math.ceil(a - 1e-6), math.floor(b + 1e-6) + 1)]
        ticks = decades if len(decades) > 2 else sorted(set(numbers))
    else:
        last = last if last > first else first + 1
        at = lambda v: left + (v - first) / (last - first) * (right - left)  # noqa: E731
        ticks = _nice(first, last, most=6)
    return _number, at, [(at(tick), _spelled(tick, chart.columns[chart.x])) for tick in ticks]


def _apart(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The last tick and those before it whose labels do not run into one another."""
    kept: list[tuple[float, str]] = []
    for at, label in reversed(ticks):
        if not kept or kept[-1][0] - at >= LETTER * (len(label) + len(kept[-1][1])) / 2 + 6:
            kept.append((at, label))
    return kept[::-1]


def _span(
    span: tuple[float, float | None] | None, values: Sequence[float], reference: float | None, format: str
) -> tuple[float, float, list[float]]:
    """Ends of a value axis and its ticks."""
    every = [*values, *([] if reference is None else [reference])] or [0.0, 1.0]
    lowest = min(every) if span is None else span[0]
    highest = max(every) if span is None or span[1] is None else span[1]
    if highest <= lowest:
        highest = lowest + 1
    if span is None or span[1] is None:
        highest += 0.06 * (highest - lowest)
    if format == "percent" and span is not None:
        return lowest, highest, [-1.0, -0.5, 0.0, 0.5, 1.0] if lowest < -0.5 else [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    return lowest, highest, _nice(lowest, highest)


def _nice(low: float, high: float, most: int = 5) -> list[float]:
    """At most about `most` round numbers from `low` to `high`."""
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(unit * by for by in (1, 2, 5, 10) if (high - low) / (unit * by) <= most)
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _spelled(value: float, format: str) -> str:
    if format == "percent":
        return percent(value) if value >= 0 else f"\N{MINUS SIGN}{percent(-value)}"
    return f"{value:.4g}{TIMES if format == 'times' else ''}"


# elements


def _svg(body: str, width: float, height: float, more: str, *, least: float = 0) -> str:
    """`least`: pixels below which a narrow page scrolls rather than shrink it."""
    extent = f"{math.ceil(width)} {math.ceil(height)}"
    size = f'width="{math.ceil(width)}" height="{math.ceil(height)}"'
    style = f"{_FONT};font-size:{SIZE}px;min-width:{least:.0f}px"
    return f'<svg {more}viewBox="0 0 {extent}" {size} style="{style}">{body}</svg>'


def _text(
    x: float, y: float, text: str, anchor: str = "start", cls: str = "ink", *, size: int = 0, weight: int = 0
) -> str:
    more = (f' font-size="{size}"' if size else "") + (f' font-weight="{weight}"' if weight else "")
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{cls}" x="{x:.1f}" y="{y:.1f}"{where}{more}>{escape(inert(text))}</text>'


def _mark(number: int | None, x: float, y: float, colour: int, shape: str, *, hidden: bool = False) -> str:
    row = "" if number is None else f' data-row="{number}"'
    see = ' fill-opacity="0"' if hidden else ""
    return f'<path class="s{colour}" fill="currentColor"{see} transform="translate({x:.1f} {y:.1f})" d="{shape}"{row}/>'


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _number(value: Value) -> float:
    assert isinstance(value, int | float), value
    return float(value)
