"""A verification, and the stability of selections: tables, curves, and what the page says of them."""

from collections.abc import Iterator, Sequence

from safelocus.analysis.words import MEASURES, UNKNOWN, capital, in_words, measure_label, method_label
from safelocus.evaluation.measures import Measure
from safelocus.report import colours
from safelocus.report.blocks import Block, Lines, Part, Section
from safelocus.report.grid import Grid, Span
from safelocus.report.measures import COLUMNS, measures_grid
from safelocus.report.runs import ReportRun
from safelocus.verification import Stability, Verification, VerificationVerdict
from safelocus.verification.cells import Setting
from safelocus.verification.ranking import Rank

_MEASURES = ("refusal", "asr", "utility", "over_refusal", "incoherent")
_SELECTIONS = ("top", "random", "bottom")
_SAYS = {
    "specific": "Safety rests on these weights, and more than twice as much as other abilities.",
    "general": "Refusals rest on these weights, but so do other abilities, or language itself.",
    "unclear": "Refusals rest on these weights; whether other abilities do too was not measured or cannot be told.",
    "none": "Nothing shows that refusals rest on these weights more than on others.",
    "untestable": "The undisturbed model refuses too little for this to be tested.",
}


# tables


def settings_grid(found: Verification, scorer: str | None = None) -> Grid:
    """Levels of every measure at every setting: baseline, then top, random and bottom."""
    scorer = scorer or found.scorers[0]
    names = [name for name in MEASURES if name in found.measure_names]
    language = found.baseline.measures.get("perplexity")
    before = [] if language is None else [UNKNOWN if language.value is None else f"{language.value:.2f}"]
    rows = [("baseline", "", *(Span(found.baseline.measures[name]) for name in names), *before, "1")]
    sections = []
    for setting in found.settings:
        pooled = [found.pool(selection, scorer, setting) for selection in _SELECTIONS]
        if pooled[0] is None:
            continue
        sections.append(len(rows))
        for entry in pooled:
            if entry is not None:
                label = str(setting) if entry is pooled[0] else ""
                levels = (Span(entry.measures[name]) for name in names)
                after = [] if language is None else [_times(found.perplexity(entry.selection, scorer, setting))]
                rows.append((label, entry.selection, *levels, *after, str(entry.num_cells)))
    return Grid(
        title=f"Disturbing the top weights by {method_label(scorer)}, and as many others",
        headings=("change", "selection", *(MEASURES[n] for n in names), *(["perplexity"] if before else []), "cells"),
        rows=tuple(rows), sections=tuple(sections), num_labels=2,
        caption="percent [95 % interval over seeds and prompts]; sigma: standard deviation of a weight's own matrix",
    )  # fmt: skip


def ranking_grid(found: Verification, intervention: str) -> Grid:
    """One line per scorer, best first."""
    rows = []
    for entry in found.rankings[intervention]:
        effect = entry.effect
        rows.append((
            method_label(entry.scorer), _quotient(entry), "yes" if entry.has_contrast else "no", str(effect.setting),
            *(Span(change, is_change=True) for change in
              (effect.fall, effect.beyond_random, effect.utility_fall, effect.net)),
        ))  # fmt: skip
    return Grid(
        title=f"Scorers under {intervention}: how much refusal breaks per utility lost",
        headings=(
            "scorer", "refusal lost per utility lost", "beyond controls", "at", "refusal falls", "more than random",
            "utility falls", "refusal minus utility",
        ),
        rows=tuple(rows),
        caption="first number and last column: lost as shares of the baseline; the first number is over all "
        "shared settings, the others, in percent, are at each scorer's own operating point",
    )  # fmt: skip


def stability_grid(found: Stability) -> Grid:
    """Agreement of selections beside chance."""
    rows = []
    for row in found.summary():
        ends = f" ({row['lowest']:.3f} to {row['highest']:.3f})" if row["num_pairs"] > 1 else ""
        rho = UNKNOWN if row["rho"] is None else f"{row['rho']:.3f}"
        rows.append((
            str(row["kind"]), str(row["what"]), f"{100 * row['ratio']:g} %", str(row["num_pairs"]),
            f"{row['iou']:.3f}{ends}", f"{row['chance']:.4f}", rho,
        ))  # fmt: skip
    return Grid(
        title="Stability of the top weights",
        headings=("differs in", "what", "ratio", "pairs", "IoU (lowest to highest)", "chance", "rank correlation"),
        rows=tuple(rows), caption="chance: IoU of two random selections of these sizes", num_labels=2,
    )  # fmt: skip


def _times(perplexity: Measure | None) -> str:
    """As a multiple of the baseline's."""
    if perplexity is None:
        return UNKNOWN
    return "no number" if perplexity.value is None else f"{perplexity.value:.3g} times"


def _quotient(entry: Rank) -> str:
    if entry.mean_utility_fall is None or not entry.has_contrast:
        return UNKNOWN
    if entry.keeps_utility or entry.per_utility is None:
        return "utility kept"
    return f"{entry.per_utility:.2f} [{entry.low or 0.0:.2f}, {entry.high or 0.0:.2f}]"


# charts


def curves_charts(found: Verification, scorer: str) -> list[Lines]:
    """Levels against the strength of the disturbance: per measure one chart per size, or per intervention."""
    tested = [setting for setting in found.settings if found.pool("top", scorer, setting)]
    return [
        _curve(found, scorer, name, *group)
        for name in _MEASURES
        if name in found.measure_names
        for group in _groups(tested)
    ]


def ranking_chart(found: Verification, intervention: str) -> Lines | None:
    """Refusal lost against utility lost, one path per scorer. None for one scorer or where either was not measured."""
    if len(found.scorers) < 2 or not {"refusal", "utility"} <= set(found.measure_names):
        return None
    even = "as much as utility"
    rows: list[tuple[str, float, float]] = []
    for scorer in found.scorers:
        falls = sorted(
            (-utility, -refusal)
            for setting in found.settings
            if setting.intervention == intervention
            and (entry := found.pool("top", scorer, setting)) is not None
            and (utility := entry.changes["utility"].value) is not None
            and (refusal := entry.changes["refusal"].value) is not None
        )
        rows += [(method_label(scorer), *point) for point in [(0.0, 0.0), *falls]]
    rows += [(even, 0.0, 0.0), (even, 1.0, 1.0)]
    return Lines(
        title=f"What {intervention} breaks first",
        columns={"scorer": "text", "utility lost": "percent", "refusal lost": "percent"}, rows=rows,
        series="scorer", x="utility lost", value="refusal lost", x_title="utility lost (up: refusal lost)",
        span=(min(0.0, *(row[2] for row in rows)), 1.02), dashed=(even,), wide=True,
    )  # fmt: skip


def _groups(settings: Sequence[Setting]) -> Iterator[tuple[str, str, list[tuple[str, Setting]]]]:
    """(what is alike, what runs along x, its settings by x): noise by strength, everything else by size."""
    noisy = [setting for setting in settings if setting.noise is not None]
    for ratio, k in dict.fromkeys((setting.ratio, setting.k) for setting in noisy):
        members = sorted((s for s in noisy if (s.ratio, s.k) == (ratio, k)), key=lambda setting: setting.noise or 0.0)
        size = f"{k:,} weights" + (f" ({100 * ratio:g} %)" if ratio is not None else "")
        yield size, "noise in sigma", [(f"{setting.noise:g}", setting) for setting in members]
    still = [setting for setting in settings if setting.noise is None]
    for intervention in dict.fromkeys(setting.intervention for setting in still):
        members = sorted((s for s in still if s.intervention == intervention), key=lambda setting: setting.k)
        sizes = [f"{s.k:,}" if s.ratio is None else f"{100 * s.ratio:g} %" for s in members]
        yield intervention, "share of the weights", list(zip(sizes, members, strict=True))


def _curve(
    found: Verification, scorer: str, name: str, alike: str, x: str, settings: Sequence[tuple[str, Setting]]
) -> Lines:
    entries = [
        (selection, at, entry)
        for selection in _SELECTIONS
        for at, setting in settings
        if (entry := found.pool(selection, scorer, setting)) is not None
    ]
    return Lines(
        title=f"{capital(measure_label(name))}, {alike}",
        columns={"selection": "text", x: "text", **COLUMNS, "cells": "count"},
        rows=[
            [which, at, *map(entry.measures[name].to_json().get, COLUMNS), entry.num_cells]
            for which, at, entry in entries
        ],
        series="selection", x=x, value="value", kind="category", x_title=x, span=(-0.02, 1.02), colours=colours.ROLES,
        reference=found.baseline.measures[name].value,
    )  # fmt: skip


# the page


def verification_sections(run: ReportRun) -> list[Section]:
    """One section: what broke when the selected weights were disturbed, and what when others were."""
    found = Verification.load(run.folder)
    verdicts = Part(title="Verdict", notes=[verdict.text for verdict in found.verdicts.values()], blocks=[])
    first, *others = [_curves(found, scorer) for scorer in found.scorers]
    return [
        Section(
            title=run.name,
            what=f"What disturbing weights of {found.provenance.get('model', 'the model')} breaks",
            summary=[_brief(found, verdict) for verdict in found.verdicts.values()], tiles=_tiles(found),
            parts=[verdicts, first, *_ranking(found), *others], notes=found.notes,
        )
    ]  # fmt: skip


def stability_sections(run: ReportRun) -> list[Section]:
    """One section: how far a selection depends on what it was made with."""
    found = Stability.load(run.folder)
    ratios = sorted({row["ratio"] for row in found.summary()})
    typical = ratios[len(ratios) // 2] if ratios else None
    said = [
        f"{row['what']}: {row['iou']:.2f} (chance {row['chance']:.3f})"
        for row in found.summary()
        if row["ratio"] == typical
    ]
    words = f"Agreement of the top {100 * (typical or 0):g} % (1: the same weights). {capital('; '.join(said))}."
    return [
        Section(
            title=run.name,
            what=f"How stable the selections of {found.provenance.get('model', 'the model')} are",
            summary=[words] if said else [], notes=found.notes,
            parts=[Part(title="Agreement", blocks=[stability_grid(found)])] if ratios else [],
        )
    ]  # fmt: skip


def _brief(found: Verification, verdict: VerificationVerdict) -> str:
    """The verdict in a sentence for each thing measured; the whole of it stands in the section."""
    effect, says = verdict.effect, _SAYS[verdict.kind]
    if effect is None or verdict.kind == "untestable":
        return says
    if verdict.kind == "unclear" and (effect.is_unscored or not effect.has_contrast):  # or without controls
        says = _SAYS["none"]
    levels = {which: found.pool(which, effect.scorer, effect.setting) for which in _SELECTIONS}
    said = []
    for name, words in (("refusal", "refusals of harmful prompts"), ("utility", "right answers")):
        top, random = (entry.measures.get(name) if entry else None for entry in (levels["top"], levels["random"]))
        before = found.baseline.measures.get(name)
        if before is not None and top is not None:
            control = f" (as many random weights: {in_words(random)})" if random is not None else ""
            went = f"go from {in_words(before, ends=False)} to {in_words(top)}"
            if top.value is None:
                went = "can no longer be told"
            said.append(f"{words} {went}{control}")
    if effect.perplexity is not None:
        control = f" (as many random weights: {_times(effect.random_perplexity)})" if effect.random_perplexity else ""
        said.append(f"perplexity goes to {_times(effect.perplexity)} of what it was{control}")
    method = method_label(effect.scorer)
    return f"{says} When the top weights by {method} are disturbed ({effect.setting}), {'; '.join(said)}."


def _tiles(found: Verification) -> list[tuple[str, str]]:
    """Refusals at the first verdict's operating point, beside the baseline and the controls."""
    effect, before = found.verdict.effect, found.baseline.measures.get("refusal")
    if effect is None or before is None:
        return []
    pooled = {which: found.pool(which, effect.scorer, effect.setting) for which in _SELECTIONS}
    return [
        (in_words(before, ends=False), "of harmful prompts refused, undisturbed"),
        *(
            (in_words(refused, ends=False), f"with the {which} weights disturbed ({effect.setting})")
            for which, entry in pooled.items()
            if entry is not None and (refused := entry.measures.get("refusal")) is not None
        ),
    ]


def _curves(found: Verification, scorer: str) -> Part:
    is_first = scorer == found.scorers[0]
    stem = "".join(character if character.isalnum() else "-" for character in scorer).strip("-").lower()
    return Part(
        title=f"Top weights by {method_label(scorer)} against as many others",
        notes=[
            "Bands: 95 % intervals over seeds and prompts. Dotted: the undisturbed model. The random control draws "
            "other weights with every seed."
        ],
        blocks=[*curves_charts(found, scorer), settings_grid(found, scorer)],
        side_by_side=True, folded=True, file="curves" if is_first else f"curves-{stem}",
    )  # fmt: skip


def _ranking(found: Verification) -> list[Part]:
    if len(found.scorers) < 2:
        return []
    parts = []
    for intervention, entries in found.rankings.items():
        pooled = {rank.scorer: found.pool("top", rank.scorer, rank.effect.setting) for rank in entries}
        levels = measures_grid(
            "Levels at each scorer's own operating point",
            {
                method_label(scorer): {name: measure.to_json() for name, measure in entry.measures.items()}
                for scorer, entry in pooled.items()
                if entry is not None
            },
            heading="scorer",
        )
        chart = ranking_chart(found, intervention)
        grids = [levels, ranking_grid(found, intervention)]
        blocks: list[Block] = [*grids] if chart is None else [chart, *grids]
        file = "" if chart is None else f"ranking-{intervention}"
        parts.append(Part(title=f"Scorers under {intervention}", blocks=blocks, file=file))
    return parts
