"""A table of plain text, which the terminal, the page and a Markdown file print alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from rich import box
from rich.color import Color
from rich.style import Style
from rich.table import Table
from rich.text import Text

from safelocus.analysis.words import interval, numbers_of
from safelocus.inert import markdown
from safelocus.report import colours


class Tint(str):
    """A cell's text on the colour of an enrichment; `place` is where on the scale, from 0 to 1."""

    place: float

    def __new__(cls, text: str, place: float) -> Self:
        made = super().__new__(cls, text)
        made.place = place
        return made

    def __reduce__(self) -> tuple[Any, ...]:  # tables come from other processes
        return type(self), (str(self), self.place)

    @property
    def level(self) -> int:
        """Number of its colour."""
        return colours.level(self.place)


class Span(str):
    """A proportion or a change in words, "67 [51,83]", with its numbers, which the page draws below."""

    numbers: Mapping[str, Any]
    is_change: bool

    def __new__(cls, measure: Any, *, is_change: bool = False) -> Self:
        """Of a measure, a difference, or either's JSON; None is unknown. A paired difference is known by its p."""
        made = super().__new__(cls, interval(measure))
        made.numbers = numbers_of(measure)
        made.is_change = is_change or "p" in made.numbers
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), is_change=self.is_change), (self.numbers or None,)

    @property
    def exact(self) -> str:
        """ "0.6667 [0.5081, 0.8277], n 30"."""
        low, high = self.numbers["low"], self.numbers["high"]
        ends = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
        return f"{self.numbers['value']:.4g}{ends}, n {self.numbers['n']}"

    @property
    def bar(self) -> tuple[float, float, float]:
        """Places of low, value and high in percent of a cell; a change has 0 in the middle."""
        value = self.numbers["value"]
        ends = (self.numbers[end] if self.numbers[end] is not None else value for end in ("low", "high"))
        low, high = ends
        start, width = (-1.0, 2.0) if self.is_change else (0.0, 1.0)
        at = [100 * min(1.0, max(0.0, (number - start) / width)) for number in (low, value, high)]
        return at[0], at[1], at[2]


_SHORT = 5  # characters of "0.99×"
_MANY = 12  # columns that would not fit into 80 characters with a space more each


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of text: title, headings, rows, a remark below, and the numbers of rows that begin a section."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    sections: tuple[int, ...] = ()
    num_labels: int = 1  # leading columns of words; the others hold numbers

    def rich(self) -> Table:
        table = Table(
            title=Text(self.title, style="table.title"), box=box.SIMPLE,
            padding=(0, int(len(self.headings) < _MANY), 0, 0), pad_edge=False,
        )  # fmt: skip
        if self.caption:
            table.caption = Text(self.caption, style="table.caption")
        for number, heading in enumerate(self.headings):
            broken = heading.replace(" %", "\N{NO-BREAK SPACE}%")  # long ones squeeze the numbers
            broken = broken.replace("-", "-\n").replace("/", "/\n").replace(" ", "\n")
            # what is too long for a narrow terminal is broken, not cut; a short number never
            longest = max((len(row[number]) for row in self.rows), default=0)
            table.add_column(
                Text(broken), justify="left" if number < self.num_labels else "right", overflow="fold",
                min_width=min(longest, _SHORT),
            )  # fmt: skip
        for number, row in enumerate(self.rows):
            if number in self.sections:
                table.add_section()
            # Text, because Rich would read "[0.1, 0.2]" as markup
            table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        return table

    def markdown(self) -> str:
        rule = ["---" if number < self.num_labels else "---:" for number in range(len(self.headings))]
        rows = ([markdown(cell) for cell in row] for row in (self.headings, *self.rows))
        heading, *lines = [f"| {' | '.join(cells)} |" for cells in rows]
        lines = [heading, f"| {' | '.join(rule)} |", *lines]
        return "\n".join([*lines, *(["", self.caption] if self.caption else [])])


def _style(cell: str) -> Style:
    if not isinstance(cell, Tint):
        return Style()
    ground = colours.interpolate(colours.LIGHT.heat, cell.place)
    ink = "#000000" if colours.is_light(ground) else "#ffffff"
    return Style(color=Color.parse(ink), bgcolor=Color.from_rgb(*ground))
