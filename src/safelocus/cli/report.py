"""`safelocus report RUN...`: one page, or one table, of what runs found."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelocus.cli import options
from safelocus.cli.output import note, print_json, results

if TYPE_CHECKING:
    from safelocus.report.runs import ReportRun

TABLES = ("patterns",)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders of score, verify, stability, evaluate, enhance, preserve or demo.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="HTML file to write.", show_default="report.html in the folder of a single run"
        ),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(help="Print a table instead of writing a page: patterns.", show_default=False),
    ] = None,
    responses: Annotated[
        bool,
        typer.Option("--responses", help="Bundle prompts and answers, harmful ones among them (folded away)."),
    ] = False,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Safety report",
    seed: options.Seed = 0,
    json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Show one or more runs on one self-contained HTML page; several stand side by side.

    The page holds everything it needs and asks the network for nothing. It replaces an earlier one.
    """
    from safelocus.errors import RunError
    from safelocus.report.page import write_page

    if table is not None and table not in TABLES:
        raise typer.BadParameter(f"{table!r} is not one of {', '.join(TABLES)}", param_hint="--table")
    read = _read(runs)
    if table is not None:
        _print_patterns(read, seed, json=json)
        return
    if output is None and len(runs) > 1:
        raise RunError(f"{len(runs)} runs make one page; say where to write it: -o PAGE.html")
    page = output or runs[0] / "report.html"
    if page.is_dir():
        raise RunError(f"{page}: is a folder; expected the name of a page, such as {page / 'report.html'}")
    if not page.parent.is_dir():
        raise RunError(f"{page}: the folder {page.parent} does not exist")
    write_page(read, page, heading=title, responses=responses)
    if json:
        print_json({"output": str(page), "bytes": page.stat().st_size, "runs": [_describe(run) for run in read]})
        return
    note(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB): {', '.join(run.name for run in read)}")
    if responses:
        note("[bold]mind:[/] the page holds prompts and answers, harmful ones among them")


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
