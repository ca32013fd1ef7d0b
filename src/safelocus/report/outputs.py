"""What a run shows of a map: tables in the terminal, figures, page and numbers in the run folder."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from safelocus.report.figures import component_figure, concentration_figure, expert_figure, save_png
from safelocus.report.map import SafetyMap
from safelocus.report.page import write_page
from safelocus.report.runs import ReportRun
from safelocus.report.tables import (
    concentration_table,
    experts_table,
    layer_component_table,
    top_matrices_table,
)
from safelocus.report.text import summary_lines
from safelocus.run import write_json

PAGE = "report.html"


def print_map(console: Console, located: SafetyMap, *, top: int = 10) -> None:
    """Summary, layer x component, experts, top matrices and concentration."""
    tables = (
        layer_component_table(located),
        experts_table(located),
        top_matrices_table(located, n=top),
        concentration_table(located),
    )
    for table in tables:
        if table is not None:
            console.print(table)
            console.print()
    for line in summary_lines(located):
        console.print(line, soft_wrap=True, highlight=False)


def write_map(folder: Path, maps: Sequence[tuple[str, SafetyMap]], *, place: Path | None = None) -> list[str]:
    """results.json, report.html and PNG figures of one or more models; returns the names of the files.

    Args:
        folder: of the run; selections that lie in it are opened on the page.
        maps: (name of the model as it is to be shown, its map).
        place: what the folder will be called when the run is complete; by default as it is now.
    """
    write_json(folder / "results.json", {"maps": {model: located.to_json() for model, located in maps}})
    write_page([ReportRun.read(folder, place=place)], folder / PAGE)
    written = ["results.json", PAGE]
    for model, located in maps:
        stem = "" if len(maps) == 1 else model.rpartition(":")[2].replace("/", "-") + "-"
        for figure, kind in (
            (component_figure(located), "map"),
            (expert_figure(located), "experts"),
            (concentration_figure(located), "concentration"),
        ):
            if figure is not None:
                save_png(figure, folder / f"{stem}{kind}.png")
                written.append(f"{stem}{kind}.png")
    return written
