"""`safelocus select SCORES`: exactly K weights, or whole groups of them, from saved scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safelocus.cli.command import RunOptions, SeedOption, argument, command, flag, option
from safelocus.cli.locating import selection_file
from safelocus.cli.options import ShareOptions
from safelocus.cli.output import check_file, show
from safelocus.cli.sources import scores_folder


@dataclass(frozen=True, kw_only=True)
class PickOptions(ShareOptions, SeedOption):
    """What `Scores.select` takes as it is given."""

    which: Literal["top", "bottom", "random"] = option("Which weights to take.", default="top")
    granularity: Literal["weight", "row", "column", "head", "neuron", "expert", "matrix", "layer"] = option(
        "Take single weights, or whole groups ranked by their mean score; a matrix without heads or experts is one.",
        default="weight",
    )


@dataclass(frozen=True, kw_only=True)
class Select(PickOptions, RunOptions):
    scores: Path = argument("Run folder of `score`, or its scores folder.")
    output: Path = option("Selection file to write.", "-o")
    minus: list[Path] | None = option("Leave out the weights of this selection (of utility, say); may be repeated.")
    intersect: list[Path] | None = option("Keep only the weights that this selection has too.", "--and")
    allow_mismatch: bool = flag("Those selections were made for another model (a fine-tuned sibling).")


@command
def select(given: Select) -> None:
    """Select weights from saved scores. Set operations apply after the ratio, so K may fall below it."""
    from safelocus.analysis.map import safety_map
    from safelocus.errors import SelectionError
    from safelocus.report.maps import map_parts
    from safelocus.scoring.scores import Scores
    from safelocus.selection.selection import Operation, Selection

    check_file(given.output, given.overwrite)
    scores = Scores.load(scores_folder(given.scores))
    selection = scores.select(**given.part(PickOptions))
    operands: list[tuple[Path, Operation]] = [(path, "-") for path in given.minus or []]
    operands += [(path, "&") for path in given.intersect or []]
    for path, operation in operands:
        other = Selection.load(selection_file(path))
        selection = selection.combine(other, operation, allow_mismatch=given.allow_mismatch)
    if not selection.k:
        raise SelectionError("nothing is left of the selection: all its weights are in --minus, or none in --and")
    selection.save(given.output)
    drawn = safety_map(scores, selection)
    found = {"k": selection.k, "map": drawn.to_json()}
    remarks = selection.provenance.extra.get("remarks", ())
    show(given, found, *map_parts(drawn), notes=remarks, wrote=[f"{selection.k:,} weights"])
