"""`safelocus check FILE | RUN ...`: whether artefacts are as they were written."""

from dataclasses import dataclass
from pathlib import Path

import typer

from safelocus.cli.command import JsonOption, argument, command
from safelocus.cli.output import print_json, results


@dataclass(frozen=True, kw_only=True)
class Check(JsonOption):
    paths: list[Path] = argument("Selections, patches, scores, run folders, or any file in them.")


@command
def check(given: Check) -> None:
    """Compare files with the digests that were written with them: exit code 1 where one is not as it was."""
    from safelocus.report.grid import Grid
    from safelocus.run.checking import check as check_all

    found = [each for path in given.paths for each in check_all(path)]
    states = [each.state for each in found]
    if given.json:
        print_json({"files": [{"file": str(each.file), "state": each.state} for each in found]})
    else:
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        worst_first = sorted(found, key=lambda each: not each.is_bad)
        rows = tuple((str(each.file), each.state) for each in worst_first)
        results.print(Grid(title="", headings=("file", "state"), rows=rows, caption=counts, num_labels=2).rich())
    # nothing that could be compared is no good news
    if "intact" not in states or any(each.is_bad for each in found):
        raise typer.Exit(1)
