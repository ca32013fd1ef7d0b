"""Measures with intervals, as `results.json` writes them, in charts, tables and words.

Readers are tolerant: a measure that is missing or unknown (None) is left out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from safelocus.report.blocks import Cell, Figure, Listing, Table
from safelocus.report.text import UNKNOWN, capital, measure_label

COLUMNS = {"value": "percent", "low": "percent", "high": "percent", "n": "count"}
ORDER = ("asr", "refusal", "over_refusal", "utility", "task", "incoherent")  # proportions all


def measures_in(values: Any) -> dict[str, Mapping[str, Any]]:
    """The measures among the values, known ones first; those that are parts of another ("asr@guard") after it."""
    if not isinstance(values, Mapping):
        return {}
    found = {name: value for name, value in values.items() if is_measure(value) and value["value"] is not None}
    known = {name: place for place, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: known.get(item[0].partition("@")[0], len(ORDER))))


def proportions_in(values: Any) -> dict[str, Mapping[str, Any]]:
    """The measures that are proportions (a perplexity is none)."""
    return {name: value for name, value in measures_in(values).items() if name.partition("@")[0] in ORDER}


def is_measure(value: Any) -> bool:
    return isinstance(value, Mapping) and {"value", "low", "high", "n"} <= set(value)


def cells(measure: Mapping[str, Any]) -> list[Cell]:
    """value, low, high, n."""
    return [measure["value"], measure["low"], measure["high"], measure["n"]]


def percent_interval(measure: Mapping[str, Any] | None) -> str:
    """In percent: "67 [51, 83]"; a dash where it is unknown."""
    if measure is None or measure["value"] is None:
        return UNKNOWN
    shown = f"{100 * measure['value']:.0f}"
    if measure["low"] is not None and measure["high"] is not None:
        shown += f" [{100 * measure['low']:.0f}, {100 * measure['high']:.0f}]"
    return re.sub(r"-0(?![0-9])", "0", shown)


def in_words(measure: Mapping[str, Any]) -> str:
    """ "67 % [51, 83]"."""
    value, bracket, rest = percent_interval(measure).partition(" [")
    return f"{value} %{bracket}{rest}"


def dots(title: str, states: Mapping[str, Any], *, series: str = "state", note: str = "") -> Figure | None:
    """A mark with its interval per measure and state; None where there are none.

    Args:
        states: name of the state (a legend) -> values that hold measures.
    """
    names = list(dict.fromkeys(name for values in states.values() for name in proportions_in(values)))
    rows: list[list[Cell]] = [
        [measure_label(name), state, *cells(proportions_in(values)[name])]
        for name in names
        for state, values in states.items()
        if name in proportions_in(values)
    ]
    if not rows:
        return None
    return Figure(
        kind="dots",
        title=title,
        table=Table(columns={"measure": "text", series: "text", **COLUMNS}, rows=rows),
        options={"group": "measure", "series": series, "value": "value", "range": [0, 1]},
        note=note,
        wide=True,
    )


def listing(states: Mapping[str, Any], *, heading: str, extra: Mapping[str, Sequence[str]] | None = None) -> Listing:
    """One row per state, one column per measure; `extra`: heading -> one text per state."""
    names = list(dict.fromkeys(name for values in states.values() for name in proportions_in(values)))
    extra = extra or {}
    rows = [
        [
            state,
            *(percent_interval(proportions_in(values).get(name)) for name in names),
            *(texts[number] for texts in extra.values()),
        ]
        for number, (state, values) in enumerate(states.items())
    ]
    return Listing(
        headings=[heading, *map(measure_label, names), *extra],
        rows=rows,
        note="percent [95 % interval]",
    )


def curves(points: Sequence[tuple[str, float, Any]], *, x: str, x_title: str, x_type: str = "linear") -> list[Figure]:
    """One chart per measure; `points`: (curve, x, values that hold measures)."""
    names = list(dict.fromkeys(name for _, _, values in points for name in proportions_in(values)))
    figures = []
    for name in names:
        rows: list[list[Cell]] = [
            [series, at, *cells(found[name])]
            for series, at, values in points
            if name in (found := proportions_in(values))
        ]
        figures.append(
            Figure(
                kind="lines",
                title=capital(measure_label(name)),
                table=Table(columns={"curve": "text", x: "number", **COLUMNS}, rows=rows),
                options={
                    "series": "curve", "x": x, "value": "value", "x_type": x_type, "x_title": x_title,
                    "range": [-0.02, 1.02],
                },
            )
        )  # fmt: skip
    return figures
