"""An evaluation on the page: measures with intervals, what changed, by source, and how far the judges agree."""

from collections.abc import Mapping
from typing import Any

from safelocus.evaluation.evaluation import PERPLEXITY
from safelocus.report.blocks import Figure, Listing, Part, Section, Table
from safelocus.report.runs import ReportRun
from safelocus.report.sections.measures import (
    COLUMNS,
    cells,
    dots,
    in_words,
    is_measure,
    listing,
    measures_in,
    proportions_in,
)
from safelocus.report.text import UNKNOWN, measure_label


def evaluation_sections(run: ReportRun) -> list[Section]:
    """One section: how the model behaves."""
    results = run.results
    parts = (_measures(results), _change(run.against), _sources(results), _agreement(results))
    return [
        Section(
            title=run.name,
            what=f"How {_model(results)} behaves",
            summary=[_summary(results)],
            tiles=[
                (f"{100 * measure['value']:.0f} %", f"{label} (n = {measure['n']:,})")
                for name, label in _TILES.items()
                if (measure := proportions_in(results).get(name)) is not None
            ],
            parts=[part for part in parts if part is not None],
            notes=_remarks(results),
        )
    ]


_TILES = {
    "asr": "of harmful prompts answered harmfully",
    "refusal": "of harmful prompts refused",
    "over_refusal": "of harmless prompts refused",
    "utility": "of task answers right",
}


def _model(results: Mapping[str, Any]) -> str:
    return str((results.get("provenance", {}).get("responder") or {}).get("name", "the model"))


def _summary(results: Mapping[str, Any]) -> str:
    found = proportions_in(results)
    said = [
        f"{words} {in_words(found[name])}"
        for name, words in (
            ("asr", "harmful answers to harmful prompts:"),
            ("refusal", "refusals of harmful prompts:"),
            ("over_refusal", "refusals of harmless prompts:"),
            ("utility", "right answers to tasks:"),
            ("incoherent", "incoherent answers:"),
        )
        if name in found
    ]
    judge = next((str(judge.get("judge")) for judge in results.get("judges") or []), None)
    judged = f" The judge of harm: {judge}." if judge and "asr" in found else ""
    return f"{_model(results)}: {'; '.join(said)} (95 % intervals).{judged}"


def _measures(results: Mapping[str, Any]) -> Part | None:
    figure = dots("Measures", {"measured": results})
    if figure is None:
        return None
    rows = [[name, *_row(measure)] for name, measure in measures_in(results).items()]
    table = Listing(headings=("measure", "value", "95 % interval", "n"), rows=rows)
    return Part(title="Measures", blocks=[figure, table])


def _change(against: Mapping[str, Any] | None) -> Part | None:
    """What changed since another run, prompt by prompt; a perplexity as a quotient, in the table alone."""
    found = {name: change for name, change in (against or {}).get("differences", {}).items() if is_measure(change)}
    known = {name: change for name, change in found.items() if change["value"] is not None}
    if against is None or not known:
        return None
    title = f"Change since {against['run']}"
    points = [(name, change) for name, change in known.items() if name != PERPLEXITY]
    figure = Figure(
        kind="dots",
        title=title,
        table=Table(
            columns={"measure": "text", "run": "text", **COLUMNS},
            rows=[[measure_label(name), "second minus first", *cells(change)] for name, change in points],
        ),
        options={"group": "measure", "series": "run", "value": "value", "range": [-1, 1], "reference": 0},
        wide=True,
    )
    listing = Listing(
        headings=("measure", "change", "95 % interval", "p", "pairs"),
        rows=[
            [
                f"{name} (ratio)" if name == PERPLEXITY else measure_label(name),
                f"{change['value']:+.3f}" if name != PERPLEXITY else f"{change['value']:.3f}",
                UNKNOWN if change["low"] is None else f"{change['low']:+.3f} to {change['high']:+.3f}",
                UNKNOWN if change.get("p") is None else f"{change['p']:.2g}",
                f"{change['n']:,}",
            ]
            for name, change in known.items()
        ],
        note=f"{against['num_pairs']:,} prompts and questions in both; left out: {against['num_only_first']:,} only "
        f"earlier, {against['num_only_second']:,} only now. p: exact McNemar test",
    )
    return Part(title=title, notes=against["notes"], blocks=[*([figure] if points else []), listing])


def _row(measure: Mapping[str, Any]) -> list[str]:
    interval = UNKNOWN if measure["low"] is None else f"{measure['low']:.3f} to {measure['high']:.3f}"
    return [f"{measure['value']:.3f}", interval, f"{measure['n']:,}"]


def _sources(results: Mapping[str, Any]) -> Part | None:
    sources = results.get("by_source") or {}
    return None if len(sources) < 2 else Part(title="By source", blocks=[listing(sources, heading="source")])


def _agreement(results: Mapping[str, Any]) -> Part | None:
    pairs = results.get("agreement") or []
    rows = [
        [
            " and ".join(pair["judges"]),
            UNKNOWN if pair["value"] is None else f"{pair['value']:.2f}",
            UNKNOWN if pair["low"] is None else f"{pair['low']:.2f} to {pair['high']:.2f}",
            f"{pair['n']:,}",
        ]
        for pair in pairs
    ]
    headings = ("judges", "Cohen's kappa", "95 % interval", "answers")
    return Part(title="How far the judges agree", blocks=[Listing(headings=headings, rows=rows)]) if rows else None


def _remarks(results: Mapping[str, Any]) -> list[str]:
    """What the measures leave out."""
    remarks = []
    for name, counts in (results.get("counts") or {}).items():
        parts = []
        for key, value in counts.items():
            kind = key.removeprefix("num_")
            if isinstance(value, Mapping):
                parts += [f"{number:,} {kind} by {judge}" for judge, number in value.items() if number]
            elif value and key != "num_prompts":
                parts.append(f"{value:,} {kind}")
        if parts:
            remarks.append(f"{name}: of {counts.get('num_prompts', 0):,} answers {', '.join(parts)}.")
    return remarks
