"""`safelocus report RUN...`: one page, or one table, of what runs found."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from safelocus.cli.command import ConfigOptions, SeedOption, argument, command, flag, option
from safelocus.cli.options import only_with
from safelocus.cli.output import check_file, mind, note, print_json, results

if TYPE_CHECKING:
    from safelocus.report.runs import ReportRun

TABLES = ("patterns",)


@dataclass(frozen=True, kw_only=True)
class Report(SeedOption, ConfigOptions):
    runs: list[Path] = argument("Run folders of score, verify, stability, evaluate, enhance, preserve or demo.")
    output: Path | None = option("HTML file to write.", "-o", shown="report.html in the folder of a single run")
    table: str | None = option("Print a table instead of writing a page: patterns.")
    responses: bool = flag("Bundle prompts and answers, harmful ones among them (folded away).")
    title: str = option("Heading of the page.", default="Safety report")


@command
def report(given: Report) -> None:
    """Show one or more runs on one self-contained HTML page; several stand side by side.

    The page holds everything it needs and asks the network for nothing. It replaces an earlier one.
    """
    from safelocus.errors import RunError
    from safelocus.report.page import PAGE, write_page
    from safelocus.run.files import rewritten

    if given.table is not None and given.table not in TABLES:
        raise typer.BadParameter(f"{given.table!r} is not one of {', '.join(TABLES)}", param_hint="--table")
    only_with(given, "a page, which --table does not write", given.table is None, "output", "title", "responses")
    runs = _read(given.runs)
    if given.table is not None:
        _print_patterns(runs, given.seed, json=given.json)
        return
    if given.output is None and len(runs) > 1:
        raise RunError(f"{len(runs)} runs make one page; say where to write it: -o PAGE.html")
    page = given.output or given.runs[0] / PAGE
    if page.is_dir():
        raise RunError(f"{page}: is a folder; expected the name of a page, such as {page / PAGE}")
    check_file(page, overwrite=True)
    if given.output is not None and page.is_file() and not _begins_as_page(page):
        raise RunError(f"{page}: is no page, which a new one would replace; choose another name, such as page.html")
    write_page(runs, page, heading=given.title, responses=given.responses)
    rewritten(page)
    if given.json:
        print_json({"output": str(page), "bytes": page.stat().st_size, "runs": [_describe(run) for run in runs]})
        return
    note(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB): {', '.join(run.name for run in runs)}")
    if given.responses:
        mind(["the page holds prompts and answers, harmful ones among them"])


def _begins_as_page(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(64).lstrip().lower().startswith(b"<!doctype html")


def _read(paths: Sequence[Path]) -> "list[ReportRun]":
    """Runs under the names of their folders; where these repeat, under their paths."""
    from safelocus.report.runs import ReportRun

    names = [path.resolve().name for path in paths]
    return [
        ReportRun.read(path, name=name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names, strict=True)
    ]


def _describe(run: "ReportRun") -> dict[str, Any]:
    return {"name": run.name, "folder": str(run.folder), "kind": run.kind, "command": run.command}


def _print_patterns(runs: "Sequence[ReportRun]", seed: int, *, json: bool) -> None:
    from safelocus.analysis.patterns import patterns
    from safelocus.errors import RunError
    from safelocus.report.comparison import named
    from safelocus.report.maps import patterns_grid
    from safelocus.report.runs import with_parts

    tested = {name: patterns(run.maps[model], seed=seed) for name, run, model in named(with_parts(runs))}
    if not tested:
        raise RunError("none of these runs holds a map; expected runs of `score` or `demo`")
    if json:
        print_json({"patterns": {name: [pattern.to_json() for pattern in found] for name, found in tested.items()}})
        return
    for name, found in tested.items():
        results.print(patterns_grid({name: found}).rich())
