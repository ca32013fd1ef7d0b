"""`safelocus compare A B ...`: how much selections, or scores, agree."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelocus.cli import options
from safelocus.cli.output import print_json, results

if TYPE_CHECKING:
    from safelocus.scoring.comparison import Overlap, ScoreComparison, SelectionComparison
    from safelocus.scoring.scores import Scores
    from safelocus.selection.selection import Selection


def compare(
    artefacts: Annotated[
        list[Path],
        typer.Argument(help="Two or more selections, scores folders or run folders of `score`.", show_default=False),
    ],
    ratio: options.Ratio = 0.01,
    json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Compare selections (overlap beside chance) or scores (rank correlation), each with the first."""
    from safelocus.errors import RunError
    from safelocus.scoring.comparison import ScoreComparison
    from safelocus.scoring.comparison import compare as compare_two

    if len(artefacts) < 2:
        raise RunError(f"nothing to compare {artefacts[0]} with; give two or more selections or scores")
    loaded: list[Selection | Scores] = [_load(path) for path in artefacts]
    found = []
    for path, other in zip(artefacts[1:], loaded[1:], strict=True):
        found.append((path, compare_two(loaded[0], other, ratio=ratio)))
    if json:
        print_json({"first": str(artefacts[0]), "comparisons": {str(p): c.to_json() for p, c in found}})
        return
    for path, comparison in found:
        if isinstance(comparison, ScoreComparison):
            results.print(_correlation_table(artefacts[0], path, comparison))
        overlap = comparison.top if isinstance(comparison, ScoreComparison) else comparison
        results.print(_overlap_table(artefacts[0], path, overlap))


def _load(path: Path) -> "Selection | Scores":
    """A selection file, a scores folder, or the scores (else the selection) of a run folder."""
    from safelocus.cli.select import scores_folder
    from safelocus.errors import RunError
    from safelocus.scoring.scores import Scores
    from safelocus.selection.selection import Selection

    if not path.exists():
        raise RunError(f"{path}: does not exist; expected a selection, a scores folder or a run folder")
    if path.is_dir():
        return Scores.load(scores_folder(path))
    return Selection.load(path)


def _overlap_table(first: Path, second: Path, comparison: "SelectionComparison") -> Any:
    from rich.table import Table

    table = Table(title=f"{first} against {second}", caption="chance: IoU of two random selections of these sizes")
    table.add_column("where")
    for heading in ("selected in A", "in B", "in both", "IoU", "chance"):
        table.add_column(heading, justify="right")

    def add(name: str, overlap: "Overlap", **style: Any) -> None:
        table.add_row(
            name, f"{overlap.num_a:,}", f"{overlap.num_b:,}", f"{overlap.num_both:,}", _iou(overlap.iou),
            _iou(overlap.expected_iou), **style,
        )  # fmt: skip

    add("all", comparison.overall, style="bold", end_section=True)
    for name, overlap in comparison.components.items():
        add(name, overlap, end_section=name == list(comparison.components)[-1])
    for name, overlap in comparison.layers.items():
        add(f"layer {name}", overlap)
    return table


def _correlation_table(first: Path, second: Path, comparison: "ScoreComparison") -> Any:
    from rich.table import Table

    table = Table(title=f"{first} against {second}: rank correlation of scores")
    table.add_column("where")
    table.add_column("Spearman's rho", justify="right")
    table.add_column("weights ranked", justify="right")
    for name, correlation in {"all": comparison.correlation, **comparison.components}.items():
        rho = "-" if correlation.rho is None else f"{correlation.rho:.3f}"
        table.add_row(name, rho, f"{correlation.num_ranked:,} of {correlation.num_weights:,}")
    return table


def _iou(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
