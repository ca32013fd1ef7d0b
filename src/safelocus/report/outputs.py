"""What a command leaves in its run folder: artefacts, numbers, figures and page; and a map in the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from safelocus.enhancement.result import Enhancement
from safelocus.preservation.result import Preservation
from safelocus.report import enhancement, preservation, verification
from safelocus.report.figures import component_figure, concentration_figure, expert_figure, save_png
from safelocus.report.map import SafetyMap
from safelocus.report.page import write_run_page
from safelocus.report.tables import (
    concentration_table,
    experts_table,
    layer_component_table,
    top_matrices_table,
)
from safelocus.report.text import summary_lines
from safelocus.run import write_json
from safelocus.selection import Selection
from safelocus.verification import Verification

SELECTION = "selection.safetensors"


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


def write_map(folder: Path, maps: Sequence[tuple[str, SafetyMap]], *, place: Path, pictures: bool = True) -> list[str]:
    """results.json, report.html and PNG figures of one or more models; returns the names of the files.

    Args:
        folder: of the run; selections that lie in it are opened on the page.
        maps: (name of the model as it is to be shown, its map).
        place: what the folder will be called when the run is complete.
        pictures: write the page and the figures too.
    """
    write_json(folder / "results.json", {"maps": {model: located.to_json() for model, located in maps}})
    if not pictures:
        return ["results.json"]
    written = ["results.json", write_run_page(folder, place=place)]
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


def write_verification(found: Verification, folder: Path, *, place: Path, pictures: bool = True) -> list[str]:
    """Everything that a run of `verify` consists of; returns the names of the pictures. Arguments as of `write_map`."""
    found.save(folder)
    return [write_run_page(folder, place=place), *verification.write_figures(found, folder)] if pictures else []


def write_enhancement(
    found: Enhancement, selection: Selection, folder: Path, *, place: Path, pictures: bool = True
) -> list[str]:
    """The same for `enhance`: with the selection that was trained, and the patch's model card."""
    found.save(folder)
    selection.save(folder / SELECTION)
    enhancement.write_card(found, folder / "README.md")
    return [write_run_page(folder, place=place), *enhancement.write_figures(found, folder)] if pictures else []


def write_preservation(
    found: Preservation, selection: Selection, folder: Path, *, place: Path, pictures: bool = True
) -> list[str]:
    """The same for `preserve`: with the selection that was protected."""
    found.save(folder)
    selection.save(folder / SELECTION)
    return [write_run_page(folder, place=place), *preservation.write_figures(found, folder)] if pictures else []
