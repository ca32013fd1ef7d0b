"""An evaluation on the page: measures with intervals, by source, and how far the judges agree."""

from collections.abc import Mapping
from typing import Any

from safelocus.report.blocks import Listing, Part, Section
from safelocus.report.runs import ReportRun
from safelocus.report.sections.measures import dots, in_words, listing, measures_in, proportions_in
from safelocus.report.text import UNKNOWN


def evaluation_sections(run: ReportRun) -> list[Section]:
    """One section: how the model behaves."""
    results = run.results
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
            parts=[part for part in (_measures(results), _sources(results), _agreement(results)) if part is not None],
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
