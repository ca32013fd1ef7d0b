"""A table of plain text, which the terminal, the page and a Markdown file print alike."""

from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text


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
            title=Text(self.title, style="table.title"), caption=self.caption or None, box=box.SIMPLE,
            padding=(0, 1, 0, 0), pad_edge=False,
        )  # fmt: skip
        for number, heading in enumerate(self.headings):
            broken = heading.replace("-", "-\n").replace(" ", "\n")  # long headings would squeeze the numbers
            # a word that is too long for a narrow terminal is broken, not cut
            table.add_column(broken, justify="left" if number < self.num_labels else "right", overflow="fold")
        for number, row in enumerate(self.rows):
            if number in self.sections:
                table.add_section()
            # Text, because Rich would read "[0.1, 0.2]" as markup
            table.add_row(*(Text(cell) for cell in row))
        return table

    def markdown(self) -> str:
        rule = ["---" if number < self.num_labels else "---:" for number in range(len(self.headings))]
        lines = [f"| {' | '.join(cells)} |" for cells in (self.headings, rule, *self.rows)]
        return "\n".join([*lines, *(["", self.caption] if self.caption else [])])
