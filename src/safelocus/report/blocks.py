"""What a page is made of: plain data, which the template lays out and `drawing` draws.

A chart is a long table (one row per cell, point or interval) and a few words on how to draw it. The same numbers are
drawn, shown on hover, listed as text and downloaded as CSV, so no number stands on a page twice. They keep six
significant digits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safelocus.analysis.density import Densities
from safelocus.report.grid import Grid

Value = str | float | int | None
Format = str  # "text", "percent", "times", "count" or "number": how a column is spelled for people


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Numbers, and how they are drawn.

    Attributes:
        title: above the chart, and the stem of the names of downloads.
        columns: name (the heading of the CSV) -> format.
        rows: one value per column.
        note: below the title.
        wide: takes the full width where charts stand side by side.
    """

    title: str
    columns: Mapping[str, Format]
    rows: Sequence[Sequence[Value]]
    note: str = ""
    wide: bool = False

    def column(self, name: str) -> int:
        """Place of a column."""
        return list(self.columns).index(name)

    def to_json(self) -> dict[str, Any]:
        rows = [[float(f"{cell:.6g}") if isinstance(cell, float) else cell for cell in row] for row in self.rows]
        return {"title": self.title, "table": {"columns": dict(self.columns), "rows": rows}}


@dataclass(frozen=True, kw_only=True)
class Heat(Chart):
    """Enrichment by two places; "all" stands for the sum over one of them.

    Attributes:
        x, y, z: columns of the places and of the enrichment.
        xs, ys: places along each axis.
        limit: doublings at the ends of the scale.
        height: pixels of a row.
        opens: a cell that is chosen opens its matrix.
    """

    x: str
    y: str
    z: str
    xs: Sequence[str]
    ys: Sequence[str]
    limit: int
    height: int = 34
    opens: bool = False


@dataclass(frozen=True, kw_only=True)
class Lines(Chart):
    """A value along an axis, one line per series, with a band where there are columns `low` and `high`.

    Attributes:
        x, value, series: columns.
        kind: of the x axis: "linear", "log" or "category".
        x_title: below that axis.
        span: ends of the value axis; None: as the numbers need.
        x_span: ends of the other one.
        reference: a dotted line across.
        colours: series -> number of its colour; others in order.
        dashed: series that are only a comparison.
        mark: a point (x, value, what it is).
        plain: no marks on the lines.
    """

    x: str
    value: str
    series: str
    kind: str = "linear"
    x_title: str = ""
    span: tuple[float, float | None] | None = None
    x_span: tuple[float, float] | None = None
    reference: float | None = None
    colours: Mapping[str, int] = field(default_factory=dict)
    dashed: Sequence[str] = ()
    mark: tuple[float, float, str] | None = None
    plain: bool = False


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """The matrices that a reader can open.

    Attributes:
        densities: inside each.
        rate: density of the selection in the whole model.
        limit: doublings at the ends of the scale.
    """

    densities: Densities
    rate: float
    limit: int

    def to_json(self) -> dict[str, Any]:
        return {"kind": "matrices", "rate": self.rate, "limit": self.limit, **self.densities.to_json()}


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Claims and verdicts, one row per claim and one column per model.

    Attributes:
        titles: of the models.
        stages: name of the stage, and its rows: the claim, and per model (verdict, its tone for the eye, the numbers)
            or None.
    """

    titles: Sequence[str]
    stages: Sequence[tuple[str, Sequence[tuple[str, Sequence[tuple[str, str, str] | None]]]]]


Block = Chart | Grid | Matrices | Verdicts


@dataclass(frozen=True, kw_only=True)
class Part:
    """A heading and what stands under it.

    Attributes:
        notes: sentences under the heading.
        blocks: charts and tables, in order; tables that `folded` is true for show their title until opened.
        side_by_side: charts may stand beside one another where there is room.
        limit: doublings at the ends of the scale of what its script draws; None for none.
        unrouted: a sentence about the grey cells.
        file: stem of the picture of its charts in the run's folder; "" for none.
    """

    title: str
    blocks: Sequence[Block]
    notes: Sequence[str] = ()
    side_by_side: bool = False
    folded: bool = False
    limit: int | None = None
    unrouted: str = ""
    file: str = ""

    @property
    def charts(self) -> list[Chart]:
        return [block for block in self.blocks if isinstance(block, Chart)]


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
