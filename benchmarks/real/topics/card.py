"""The acceptance card of a table's rows."""

import math
from collections.abc import Iterable

from topics.outcomes import (
    SOURCES,
    Cell,
)

from safelocus.analysis.acceptance import CardRun, Conduct, criteria
from safelocus.report.grid import Grid

CARD = (
    "How each is decided: [the acceptance card](../demo.md#the-acceptance-card). Points [95 % interval]; passes: all "
    "of the interval says so; fails: it was not shown."
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
    rows = [
        (label if number == 0 else "", each.asked, each.verdict, each.measured)
        for label, (runs, elsewhere) in found.items()
        for number, each in enumerate(criteria(runs, elsewhere))
    ]
    table = Grid(title="", headings=(heading, "question", "verdict", "measured"), rows=tuple(rows), num_labels=4)
    return ["## The acceptance card", CARD, table.markdown()] if rows else []
