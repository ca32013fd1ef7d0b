"""What a page is made of: plain data that the template lays out and the page's script draws.

A figure is a long table (one row per cell, point or interval) and a few words on how to draw it. The same table
is drawn, shown on hover, listed as text and downloaded as CSV, so no number stands on a page twice. Numbers keep
six significant digits.

    heat    columns x and y name a cell, z its enrichment
    lines   columns series, x, value, and where known low and high (a band, or bars where x has no order)
    dots    columns group, series, value, low, high: one mark with its interval per row
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from safelocus.report.grid import Grid

Cell = str | float | int | None
Format = str  # "text", "percent", "times", "count" or "number": how a column is spelled for people


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns by name with their formats, and rows.

    Attributes:
        columns: name (the heading of the CSV) -> format.
        rows: one value per column.
    """

    columns: Mapping[str, Format]
    rows: Sequence[Sequence[Cell]]

    def to_json(self) -> dict[str, Any]:
        return {"columns": dict(self.columns), "rows": [[_short(cell) for cell in row] for row in self.rows]}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One chart.

    Attributes:
        kind: "heat", "lines" or "dots".
        title: above the chart, in exports, and the stem of their names.
        table: what is drawn.
        options: how; see `page.js`, one function per kind.
        note: below the title.
        wide: takes the full width where figures stand side by side.
    """

    kind: str
    title: str
    table: Table
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    wide: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "title": self.title, "table": self.table.to_json(), **self.options}


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A table to read.

    Attributes:
        headings, rows: text; the first `num_labels` columns are words, the others numbers.
        bars: index of a column of shares (0 to 1) that is drawn as a bar; None for none.
        names: the first column holds names of tensors, which may break anywhere.
        title, note: above and below.
        folded: only the title shows until it is opened.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str | float]]
    num_labels: int = 1
    bars: int | None = None
    names: bool = False
    title: str = ""
    note: str = ""
    folded: bool = False
    kind: str = "listing"

    @classmethod
    def of(cls, grid: Grid, *, folded: bool = False) -> Self:
        """A table of the terminal."""
        return cls(
            title=grid.title, headings=grid.headings, rows=grid.rows, num_labels=grid.num_labels, note=grid.caption,
            folded=folded,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """The matrices that a reader can open, each with the density of the selection inside; see `density`."""

    title: str
    data: Mapping[str, Any]
    note: str = ""
    kind: str = "matrices"

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "title": self.title, **self.data}


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Claims and verdicts, one row per claim and one column per model.

    Attributes:
        titles: of the models.
        stages: name of the stage, and its rows: the claim, and per model (verdict, its tone for the eye, the numbers)
            or None.
    """

    titles: Sequence[str]
    stages: Sequence[tuple[str, Sequence[tuple[str, Sequence[tuple[str, str, str] | None]]]]]
    kind: str = "claims"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A heading and what stands under it.

    Attributes:
        notes: sentences under the heading.
        blocks: figures and tables, in order.
        side_by_side: figures may stand beside one another where there is room.
        legend: tick labels of the scale of heatmaps; none for no scale.
        unrouted: a sentence about the grey cells.
    """

    title: str
    blocks: Sequence[Figure | Listing | Matrices | Claims]
    notes: Sequence[str] = ()
    side_by_side: bool = False
    legend: Sequence[str] = ()
    unrouted: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """What a page says of one run, or of one model of a run.

    Attributes:
        title: the run's name.
        what: what it is, in a line.
        summary: what was found, in plain sentences with numbers; stands at the top of the page.
        tiles: (number, what it is): the few that matter.
        parts: the rest.
        notes: what a reader should mind.
        leads: stands whole at the top, and the other sections below as a list of contents.
    """

    title: str
    what: str
    summary: Sequence[str]
    tiles: Sequence[tuple[str, str]] = ()
    parts: Sequence[Part] = ()
    notes: Sequence[str] = ()
    leads: bool = False


def _short(cell: Cell) -> Cell:
    return float(f"{cell:.6g}") if isinstance(cell, float) else cell
