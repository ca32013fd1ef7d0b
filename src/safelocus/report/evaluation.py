"""An evaluation on the page: measures with intervals, what changed, by source, and how far the judges agree."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from safelocus.analysis.words import UNKNOWN, in_words, measure_label
from safelocus.evaluation.measures import is_measure
from safelocus.evaluation.result import PERPLEXITY
from safelocus.report.blocks import Part, Section
from safelocus.report.grid import Grid, Span
from safelocus.report.measures import measures_grid, measures_in, proportions_in
from safelocus.report.runs import ReportRun

_CLAUSES = {
    "asr": "harmful answers to harmful prompts:", "refusal": "refusals of harmful prompts:",
    "partial": "refusals of harmful prompts with an answer all the same:",
    "over_refusal": "refusals of harmless prompts:", "utility": "right answers to tasks:",
    "incoherent": "incoherent answers:",
}  # fmt: skip
_TILES = {
    "asr": "of harmful prompts answered harmfully", "refusal": "of harmful prompts refused",
    "over_refusal": "of harmless prompts refused", "utility": "of task answers right",
}  # fmt: skip


def evaluation_sections(run: ReportRun) -> list[Section]:
    """One section: how the model behaves."""
    results = run.results
    changed = run.against or {}
    parts = (
        _part(table(results)), _part(change_table(run.against), changed.get("notes", ())), _sources(results),
        _part(agreement_table(results)), _part(certificate_table(run.certificates)),
    )  # fmt: skip
    return [
        Section(
            title=run.name,
            what=f"How {_model(results)} behaves",
            summary=[_summary(results)],
            tiles=[
                (in_words(measure, ends=False), f"{label} (n = {measure['n']:,})")
                for name, label in _TILES.items()
                if (measure := proportions_in(results).get(name)) is not None
            ],
            parts=[part for part in parts if part is not None],
            notes=left_out(results),
        )
    ]


def _model(results: Mapping[str, Any]) -> str:
    return str((results.get("provenance", {}).get("responder") or {}).get("name", "the model"))


def _summary(results: Mapping[str, Any]) -> str:
    found = proportions_in(results)
    said = [f"{clause} {in_words(found[name])}" for name, clause in _CLAUSES.items() if name in found]
    if (measure := measures_in(results).get(PERPLEXITY)) is not None:
        said.append(
            f"perplexity {measure['value']:.3g}"
            + ("" if measure["low"] is None else f" [{measure['low']:.3g}, {measure['high']:.3g}]")
        )
    if not said:
        return f"{_model(results)}: nothing could be measured."
    judge = next((str(judge.get("judge")) for judge in results.get("judges") or []), None)
    judged = f" The judge of harm: {judge}." if judge and "asr" in found else ""
    return f"{_model(results)}: {'; '.join(said)} (95 % intervals).{judged}"


def table(results: Mapping[str, Any]) -> Grid | None:
    """The measures, a perplexity among them."""
    rows = [
        (
            name, Span(measure) if name in proportions_in(results) else "", f"{measure['value']:.3f}",
            _ends(measure, ".3f"), f"{measure['n']:,}",
        )
        for name, measure in measures_in(results).items()
    ]  # fmt: skip
    headings = ("measure", "percent", "value", "95 % interval", "n")
    return Grid(title="Measures", headings=headings, rows=tuple(rows)) if rows else None


def change_table(against: Mapping[str, Any] | None) -> Grid | None:
    """What changed since another run, prompt by prompt; a perplexity as a quotient, in the table alone."""
    found = {name: change for name, change in (against or {}).get("differences", {}).items() if is_measure(change)}
    known = {name: change for name, change in found.items() if change["value"] is not None}
    if against is None or not known:
        return None
    rows = [
        (
            f"{name} (ratio)" if name == PERPLEXITY else measure_label(name),
            Span(change) if name != PERPLEXITY else "", f"{change['value']:{'' if name == PERPLEXITY else '+'}.3f}",
            _ends(change, "+.3f"),
            UNKNOWN if change.get("p") is None else f"{change['p']:.2g}", f"{change['n']:,}",
        )
        for name, change in known.items()
    ]  # fmt: skip
    return Grid(
        title=f"Change since {against['run']}",
        headings=("measure", "points", "change", "95 % interval", "p", "pairs"), rows=tuple(rows),
        caption=f"{against['num_pairs']:,} prompts and questions in both; left out: {against['num_only_first']:,} only "
        f"earlier, {against['num_only_second']:,} only now. p: exact McNemar test",
    )  # fmt: skip


def certificate_table(found: Mapping[str, Any] | None) -> Grid | None:
    """What was certified, by the number of changed words."""
    if found is None:
        return None
    bounds, radii = found["harmful"], range(len(found["certified"]))
    rows: list[tuple[str, ...]] = [
        (f"{radius}", Span(found["certified"][radius]), *([f"{100 * bounds[radius]:.1f}"] if bounds else []))
        for radius in radii
    ]
    headings: tuple[str, ...]
    if bounds:
        headings = (
            "words",
            "less than half harmful, percent of prompts",
            "harmful answers on average, at most percent",
        )
        caption = (
            f"of the smoothed model; {found['abstained']:,} prompts undecided, {found['checks']:,.0f} answers each"
        )
    else:
        rows = [(f"up to {radii[-1]}", rows[-1][1])]
        headings = ("words", "stay recognised, percent of harmful prompts")
        caption = f"with erase-and-check; {found['checks']:,.1f} prompts scored for one on average"
        if found["flagged"] is not None:
            whole, erased = (in_words(found[name]) for name in ("flagged_whole", "flagged"))
            caption += f"; harmless prompts recognised too: {erased}, without leaving words out {whole}"
    title = f"Certified against words {found['against']}"
    return Grid(
        title=title, headings=headings, rows=tuple(rows), caption=f"{caption}; {found['seconds']:.2f} s a prompt"
    )


def agreement_table(results: Mapping[str, Any]) -> Grid | None:
    rows = [
        (
            " and ".join(pair["judges"]), UNKNOWN if pair["value"] is None else f"{pair['value']:.2f}",
            _ends(pair, ".2f"), _apart(pair.get("disagreement")), f"{pair['n']:,}",
        )
        for pair in results.get("agreement") or []
    ]  # fmt: skip
    headings = ("judges", "Cohen's kappa", "95 % interval", "disagree", "answers")
    return Grid(title="How far the judges agree", headings=headings, rows=tuple(rows)) if rows else None


def _apart(measure: Mapping[str, Any] | None) -> str:
    """The share on which two judges differ; runs of before do not say."""
    return UNKNOWN if measure is None or measure["value"] is None else f"{measure['value']:.2f}"


def _ends(measure: Mapping[str, Any], spelled: str) -> str:
    return UNKNOWN if measure["low"] is None else f"{measure['low']:{spelled}} to {measure['high']:{spelled}}"


def _part(grid: Grid | None, notes: Sequence[str] = ()) -> Part | None:
    return None if grid is None else Part(title=grid.title, notes=notes, blocks=[replace(grid, title="")])


def _sources(results: Mapping[str, Any]) -> Part | None:
    sources = results.get("by_source") or {}
    return None if len(sources) < 2 else Part(title="By source", blocks=[measures_grid("", sources, heading="source")])


def left_out(results: Mapping[str, Any]) -> list[str]:
    """What the measures leave out."""
    remarks = []
    for name, counts in (results.get("counts") or {}).items():
        parts = []
        for key, value in counts.items():
            kind = key.removeprefix("num_").replace("_", " ")
            if isinstance(value, Mapping):
                parts += [f"{number:,} {kind} by {judge}" for judge, number in value.items() if number]
            elif value and key != "num_prompts":
                parts.append(f"{value:,} {kind}")
        if parts:
            remarks.append(f"{name}: of {counts.get('num_prompts', 0):,} answers {', '.join(parts)}.")
    return remarks
