"""`safelocus compare A B ...`: how much selections, or scores, agree."""

from dataclasses import dataclass
from pathlib import Path

from safelocus.cli.command import ConfigOptions, argument, command
from safelocus.cli.options import RatioOption
from safelocus.cli.output import print_json, results
from safelocus.cli.sources import read_artefact


@dataclass(frozen=True, kw_only=True)
class Compare(RatioOption, ConfigOptions):
    artefacts: list[Path] = argument("Two or more selections, scores folders or run folders of `score`.")


@command
def compare(given: Compare) -> None:
    """Compare selections (overlap beside chance) or scores (rank correlation), each with the first."""
    from safelocus.errors import RunError
    from safelocus.report.artefacts import correlation_grid, overlap_grid
    from safelocus.scoring.comparison import ScoreComparison
    from safelocus.scoring.comparison import compare as compare_two

    first, *others = given.artefacts
    if not others:
        raise RunError(f"nothing to compare {first} with; give two or more selections or scores")
    one, *loaded = [read_artefact(path) for path in given.artefacts]
    found = [(path, compare_two(one, other, ratio=given.ratio)) for path, other in zip(others, loaded, strict=True)]
    if given.json:
        print_json({"first": str(first), "comparisons": {str(path): each.to_json() for path, each in found}})
        return
    for path, each in found:
        title = f"{first} against {path}"
        if isinstance(each, ScoreComparison):
            results.print(correlation_grid(title, each).rich())
            each = each.top
        results.print(overlap_grid(title, each).rich())
