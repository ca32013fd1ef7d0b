"""Measures with intervals, as `results.json` writes them, in tables and curves.

Readers are tolerant: a measure that is missing or unknown (None) is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from safelocus.analysis.words import capital, measure_label
from safelocus.evaluation.measures import is_measure
from safelocus.report.blocks import Lines, Value
from safelocus.report.grid import Grid, Span

COLUMNS = {"value": "percent", "low": "percent", "high": "percent", "n": "count"}
ORDER = ("refusal", "asr", "partial", "over_refusal", "utility", "task", "incoherent")  # proportions all


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


def measures_grid(
    title: str,
    states: Mapping[str, Any],
    *,
    heading: str,
    extra: Mapping[str, Sequence[str]] | None = None,
    caption: str = "percent [95 % interval]",
    sections: tuple[int, ...] = (),
) -> Grid:
    """One row per state, one column per measure; `extra`: heading -> one text per state, before the measures.

    A divergence from the original (`kl`) comes last, in nats per token.
    """
    names, extra = _names(states.values()), extra or {}
    kl = [measures_in(values).get("kl") for values in states.values()]
    rows = [
        (
            state, *(texts[number] for texts in extra.values()),
            *(Span(proportions_in(values).get(name)) for name in names),
            *([_nats(kl[number])] if any(kl) else []),
        )
        for number, (state, values) in enumerate(states.items())
    ]  # fmt: skip
    headings = (heading, *extra, *map(measure_label, names), *(["KL"] if any(kl) else []))
    caption += "; KL: nats per token from the first, along its answers to harmless prompts" if any(kl) else ""
    return Grid(title=title, headings=headings, rows=tuple(rows), caption=caption, sections=sections)


def _nats(measure: Mapping[str, Any] | None) -> str:
    if measure is None:
        return ""
    return f"{measure['value']:.2g}" + (
        f" [{measure['low']:.2g},{measure['high']:.2g}]" if measure["low"] is not None else ""
    )


def curves(points: Sequence[tuple[str, float, Any]], *, x: str, x_title: str, kind: str = "linear") -> list[Lines]:
    """One chart per measure; `points`: (curve, x, values that hold measures)."""
    charts = []
    for name in _names(values for _, _, values in points):
        rows: list[list[Value]] = [
            [series, at, *(found[name][key] for key in COLUMNS)]
            for series, at, values in points
            if name in (found := proportions_in(values))
        ]
        charts.append(Lines(
            title=capital(measure_label(name)), columns={"curve": "text", x: "number", **COLUMNS}, rows=rows,
            series="curve", x=x, value="value", kind=kind, x_title=x_title, span=(-0.02, 1.02),
        ))  # fmt: skip
    return charts


def _names(values: Any) -> list[str]:
    """Names of the proportions in any of the values."""
    return list(dict.fromkeys(name for each in values for name in proportions_in(each)))
