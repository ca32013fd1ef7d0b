"""The acceptance card of a table's rows."""

import math
from collections.abc import Iterable

from topics.outcomes import SOURCES, Cell

from safelocus.analysis.acceptance import NOT_MEASURED, CardRun, Conduct, Criterion, criteria
from safelocus.analysis.words import interval
from safelocus.report.grid import Grid

CARD = (
    "How each is decided: [the acceptance card](../demo.md#the-acceptance-card). Points [95 % interval]; passes: all "
    "of the interval says so; fails: it was not shown; a number without a verdict is of one seed, and a blank was not "
    "measured."
)


def conduct(cell: Cell) -> Conduct:
    """What the model of a cell did, prompt by prompt; no task of the cells is one that was learned."""
    marks = {"1": 1.0, "0": 0.0, "-": math.nan}
    refused = {
        source: {(source, place): marks[mark] for place, mark in enumerate(found)}
        for source, found in cell["outcomes"].items()
    }
    harmless = {s: {p: 1 - value for p, value in refused[s].items()} for s in ("xstest_safe", "alpaca")}
    return Conduct(
        safe={"refusal": {source: refused[source] for source in SOURCES[:3]}}, answered=harmless,
        right={source: refused[source] for source in SOURCES[5:]}, learned={},
    )  # fmt: skip


def card_run(kind: str, lesson: str, used: Iterable[str], after: Cell, **others: Cell | None) -> CardRun:
    conducts = {name: conduct(cell) for name, cell in (("after", after), *others.items()) if cell is not None}
    return CardRun(
        name=lesson, kind=kind, seed=after["settings"]["seed"], lesson=lesson, used=frozenset(used), conducts=conducts,
        facts={},
    )  # fmt: skip


def cards(heading: str, found: dict[str, tuple[list[CardRun], list[CardRun]]]) -> list[str]:
    """A card per row of the table: (the seeds of one training, runs that learned other tasks) by its name."""
    answers = {label: criteria(*runs) for label, runs in found.items()}
    if not answers:
        return []
    asked = [each.asked for each in next(iter(answers.values()))]
    rows = tuple((label, *map(_said, card)) for label, card in answers.items())
    used = sorted(set().union(*(run.used for runs, _ in found.values() for run in runs)))
    table = Grid(
        title="", headings=(heading, *asked), rows=rows, num_labels=len(asked) + 1,
        caption=f"found, trained and chosen with: {', '.join(used)}",
    )  # fmt: skip
    return ["## The acceptance card", CARD, table.markdown()]


def _said(criterion: Criterion) -> str:
    """The verdict, where there is one, and the numbers."""
    numbers = ", ".join(f"{name} {interval(each)}" for name, each in criterion.numbers.items())
    verdict = "" if criterion.verdict == NOT_MEASURED else criterion.verdict
    return " ".join(filter(None, (verdict, numbers)))
