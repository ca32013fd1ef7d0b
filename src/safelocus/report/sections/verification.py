"""A verification on the page: curves of the top selection against controls, the ranking of scorers; and stability."""

from collections.abc import Iterator, Sequence

from safelocus.report import colours, text
from safelocus.report.blocks import Cell, Figure, Listing, Part, Section, Table
from safelocus.report.runs import ReportRun
from safelocus.report.sections.measures import COLUMNS, dots, in_words
from safelocus.report.verification import by_size, ranking_grid, settings_grid, stability_grid
from safelocus.verification import Stability, Verification, VerificationVerdict
from safelocus.verification.verification import Pooled, Setting

_MEASURES = ("refusal", "asr", "utility", "over_refusal", "incoherent")
_SELECTIONS = ("top", "random", "bottom")


def verification_sections(run: ReportRun) -> list[Section]:
    """One section: what broke when the selected weights were disturbed, and what when others were."""
    found = Verification.load(run.folder)
    return [
        Section(
            title=run.name,
            what=f"What disturbing weights of {found.provenance.get('model', 'the model')} breaks",
            summary=[_brief(found, verdict) for verdict in found.verdicts.values()],
            tiles=_tiles(found),
            parts=[_verdicts(found), _curves(found, found.scorers[0]), *_ranking(found), *_others(found)],
            notes=found.notes,
        )
    ]


_SAYS = {
    "specific": "Safety rests on these weights, and far more so than other abilities.",
    "general": "Refusals rest on these weights, but so do other abilities.",
    "unclear": "Refusals rest on these weights; whether other abilities do too was not measured or cannot be told.",
    "none": "Nothing shows that refusals rest on these weights more than on others.",
    "untestable": "The undisturbed model refuses too little for this to be tested.",
}


def _brief(found: Verification, verdict: VerificationVerdict) -> str:
    """The verdict in a sentence for each thing measured; the whole of it stands in the section."""
    effect, says = verdict.effect, _SAYS[verdict.kind]
    if effect is None or verdict.kind == "untestable":
        return says
    levels = {which: found.pool(which, effect.scorer, effect.setting) for which in _SELECTIONS}
    method = text.method_label(effect.scorer)
    said = []
    for name, words in (("refusal", "refusals of harmful prompts"), ("utility", "right answers")):
        top, random = (entry.measures.get(name) if entry else None for entry in (levels["top"], levels["random"]))
        before = found.baseline.measures.get(name)
        if before is not None and top is not None:
            control = f" (as many random weights: {in_words(random.to_json())})" if random is not None else ""
            said.append(f"{words} go from {_percent(before.value)} to {in_words(top.to_json())}{control}")
    return f"{says} When the top weights by {method} are disturbed ({effect.setting}), {'; '.join(said)}."


def _verdicts(found: Verification) -> Part:
    return Part(title="Verdict", notes=[verdict.text for verdict in found.verdicts.values()], blocks=[])


def stability_sections(run: ReportRun) -> list[Section]:
    """One section: how far a selection depends on what it was made with."""
    found = Stability.load(run.folder)
    rows: list[list[Cell]] = [
        [f"{row['kind']}: {row['what']}", f"top {100 * row['ratio']:g} %", row["iou"], row["lowest"], row["highest"],
         row["chance"], row["num_pairs"]]
        for row in found.summary()
    ]  # fmt: skip
    columns = {"differs in": "text", "ratio": "text", "IoU": "number", "lowest": "number", "highest": "number",
               "chance": "number", "pairs": "count"}  # fmt: skip
    figure = Figure(
        kind="dots",
        title="Agreement of selections",
        table=Table(columns=columns, rows=rows),
        options={"group": "differs in", "series": "ratio", "value": "IoU", "low": "lowest", "high": "highest",
                 "range": [0, 1]},
        note="Intersection over union of two selections; the bar runs from the least to the most alike pair.",
        wide=True,
    )  # fmt: skip
    ratios = sorted({row["ratio"] for row in found.summary()})
    said = [
        f"{row['what']}: {row['iou']:.2f} (chance {row['chance']:.3f})"
        for row in found.summary()
        if row["ratio"] == ratios[len(ratios) // 2]
    ]
    typical = f"{100 * ratios[len(ratios) // 2]:g} %" if ratios else ""
    return [
        Section(
            title=run.name,
            what=f"How stable the selections of {found.provenance.get('model', 'the model')} are",
            summary=[f"Agreement of the top {typical} (1: the same weights). {text.capital('; '.join(said))}."]
            if said
            else [],
            parts=[Part(title="Agreement", blocks=[figure, Listing.of(stability_grid(found))])] if rows else [],
            notes=found.notes,
        )
    ]


def _tiles(found: Verification) -> list[tuple[str, str]]:
    """Refusals at the first verdict's operating point, beside the baseline and the controls."""
    effect = found.verdict.effect
    tiles = []
    if effect is not None and (before := found.baseline.measures.get("refusal")) is not None:
        tiles.append((_percent(before.value), "of harmful prompts refused, undisturbed"))
        for selection in _SELECTIONS:
            entry = found.pool(selection, effect.scorer, effect.setting)
            if entry is not None:
                number = _percent(entry.measures["refusal"].value)
                tiles.append((number, f"with the {selection} weights disturbed ({effect.setting})"))
    return tiles


def _percent(value: float | None) -> str:
    return text.UNKNOWN if value is None else f"{100 * value:.0f} %"


def _curves(found: Verification, scorer: str) -> Part:
    figures = [
        _curve(found, scorer, name, *group)
        for name in _MEASURES
        if name in found.measure_names
        for group in _groups([setting for setting in found.settings if found.pool("top", scorer, setting)])
    ]
    return Part(
        title=f"Top weights by {text.method_label(scorer)} against as many others",
        notes=[
            "Bands: 95 % intervals over seeds and prompts. Dotted: the undisturbed model. The random control draws "
            "other weights with every seed."
        ],
        blocks=[*figures, Listing.of(settings_grid(found, scorer), folded=True)],
        side_by_side=True,
    )


def _groups(settings: Sequence[Setting]) -> Iterator[tuple[str, str, list[tuple[str, Setting]]]]:
    """(what is alike, what runs along x, its settings by x): noise by strength, everything else by size."""
    for size, members in by_size([setting for setting in settings if setting.noise is not None]):
        yield size, "noise in sigma", [(f"{setting.noise:g}", setting) for setting in members]
    still = [setting for setting in settings if setting.noise is None]
    for intervention in dict.fromkeys(setting.intervention for setting in still):
        members = sorted((s for s in still if s.intervention == intervention), key=lambda setting: setting.k)
        yield intervention, "share of the weights", [(_size(setting), setting) for setting in members]


def _size(setting: Setting) -> str:
    return f"{setting.k:,}" if setting.ratio is None else f"{100 * setting.ratio:g} %"


def _curve(
    found: Verification, scorer: str, name: str, alike: str, x: str, settings: Sequence[tuple[str, Setting]]
) -> Figure:
    entries = [
        (selection, at, entry)
        for selection in _SELECTIONS
        for at, setting in settings
        if (entry := found.pool(selection, scorer, setting)) is not None
    ]
    return Figure(
        kind="lines",
        title=f"{text.capital(text.measure_label(name))}, {alike}",
        table=Table(
            columns={"selection": "text", x: "text", **COLUMNS, "cells": "count"},
            rows=[[selection, at, *_cells(entry, name), entry.num_cells] for selection, at, entry in entries],
        ),
        options={
            "series": "selection",
            "x": x,
            "value": "value",
            "x_type": "category",
            "x_title": x,
            "range": [-0.02, 1.02],
            "styles": {role: {"colour": number} for role, number in colours.ROLES.items()},
            "reference": found.baseline.measures[name].value,
        },
    )


def _cells(entry: Pooled, name: str) -> list[Cell]:
    measure = entry.measures[name]
    return [measure.value, measure.low, measure.high, measure.n]


def _ranking(found: Verification) -> list[Part]:
    if len(found.scorers) < 2:
        return []
    parts = []
    for intervention, entries in found.rankings.items():
        figure = dots(
            f"What each scorer's top weights break under {intervention}",
            {
                text.method_label(rank.scorer): {
                    name: entry.measures[name].to_json() for name in _MEASURES if name in entry.measures
                }
                for rank in entries
                if (entry := found.pool("top", rank.scorer, rank.effect.setting)) is not None
            },
            series="scorer",
            note="Levels at each scorer's own operating point.",
        )
        table = Listing.of(ranking_grid(found, intervention))
        parts.append(Part(title=f"Scorers under {intervention}", blocks=[figure, table] if figure else [table]))
    return parts


def _others(found: Verification) -> list[Part]:
    """Tables of the other scorers, without curves."""
    listings = [Listing.of(settings_grid(found, scorer), folded=True) for scorer in found.scorers[1:]]
    return [Part(title="The other scorers", blocks=listings)] if listings else []
