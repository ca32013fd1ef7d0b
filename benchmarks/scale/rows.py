"""Rows of the tables, and how they are printed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from machine import Times


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: what was timed, for how many units, against which baseline and which limit.

    Attributes:
        what: the action; `kind`, `weights`: of which model.
        ours, baseline, limit: seconds, round by round; no baseline where it did not fit.
        units: that `ours` is divided by; weights, or weights times prompts.
        limit_units: how much of the limit's work `ours` has to do, in the limit's own runs.
        flops, bytes: that must be done or moved at least, for absolute figures.
        more: other columns.
    """

    what: str
    kind: str
    weights: int
    ours: Times
    units: float
    baseline: Times | None = None
    limit: Times | None = None
    limit_units: float = 1.0
    flops: float = 0.0
    bytes: float = 0.0
    more: dict[str, object] = field(default_factory=dict)

    @property
    def nanoseconds(self) -> float:
        return self.ours.median / self.units * 1e9

    def cells(self, smallest: "Row") -> dict[str, str]:
        low, high = (edge / self.units * 1e9 for edge in (min(self.ours.seconds), max(self.ours.seconds)))
        cells = {
            "what": self.what,
            "kind": self.kind,
            "weights": _number(self.weights),
            "seconds": f"{self.ours.median:.3g}",
            "ns/unit": f"{self.nanoseconds:.3g} [{low:.3g}, {high:.3g}]",
            "of smallest": f"{self.nanoseconds / smallest.nanoseconds:.2f}",
            "baseline/ours": "-" if self.baseline is None else _ratio(self.baseline.over(self.ours)),
        }
        if self.limit is not None:
            share, least, most = (self.limit_units * ratio for ratio in self.limit.over(self.ours))
            cells["of limit"] = f"{share:.0%} [{least:.0%}, {most:.0%}]"
        if self.flops:
            cells["GFLOP/s"] = f"{self.flops / self.ours.median / 1e9:,.0f}"
        if self.bytes:
            cells["GB/s"] = f"{self.bytes / self.ours.median / 1e9:,.1f}"
        return cells | {name: _cell(value) for name, value in self.more.items()}

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def table(rows: Sequence[Row]) -> str:
    """Markdown. `of smallest` compares with the first row of the same action and kind."""
    first: dict[tuple[str, str], Row] = {}
    cells = [row.cells(first.setdefault((row.what, row.kind), row)) for row in rows]
    names = list(dict.fromkeys(name for each in cells for name in each))
    lines = [names, [":--" if name in ("what", "kind") else "--:" for name in names]]
    lines += [[each.get(name, "") for name in names] for each in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown of rows that are no times."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["--:"] * len(names), *([_cell(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def dump(rows: Sequence[object]) -> str:
    return json.dumps([row.to_json() if isinstance(row, Row) else row for row in rows])


def _ratio(values: tuple[float, float, float]) -> str:
    median, least, most = values
    return f"{median:.2f} [{least:.2f}, {most:.2f}]"


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _number(value: int) -> str:
    return f"{value / 1e9:.2f}B" if value >= 1e9 else f"{value / 1e6:.1f}M"
