"""Where the command line prints: results on standard output, everything else on the error stream."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.segment import Segment

from safelocus.cli.command import RunOptions
from safelocus.errors import RunError
from safelocus.inert import inert

if TYPE_CHECKING:
    from safelocus.report.grid import Grid

_MANY = 20_000  # characters of a message: more would only push what else is there out of sight


class _Inert(Console):
    """What is shown may come from strangers: only this program's own styles reach the terminal."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=inert(segment.text))


results = _Inert(emoji=False)  # a hub address may hold ":train:"
errors = _Inert(stderr=True, emoji=False)
remarks = _Inert(stderr=True, emoji=False)


def print_json(value: Any) -> None:
    """Machine-readable result: one JSON document on standard output."""
    print(inert(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)))  # noqa: T201


def note(message: str) -> None:
    """A remark for people, on the error stream."""
    remarks.print(cut(message), highlight=False, markup=False, soft_wrap=True)


def complain(message: str) -> None:
    """An error, on the error stream."""
    errors.print("[bold red]error[/]:", end=" ")
    errors.print(cut(message), markup=False, highlight=False, soft_wrap=True)


def cut(text: str) -> str:
    """The beginning of a text that is very long."""
    return text if len(text) <= _MANY else f"{text[:_MANY]}... ({len(text):,} characters)"


def together(command: Callable[..., int | None]) -> Callable[..., None]:
    """A command that the processes of `torchrun` or `accelerate launch` run as one; only the first makes remarks.

    What it returns is the exit code.
    """

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        from safelocus import distributed

        with distributed.processes() as several:
            quiet, remarks.quiet = remarks.quiet, not distributed.is_main()
            try:
                if distributed.is_main():
                    check_output(*arguments)
                code = command(*arguments, **options) or 0
            finally:
                remarks.quiet = quiet
        if several:
            distributed.leave(code)
        if code:
            raise typer.Exit(code)

    return run


def check_output(given: RunOptions) -> None:
    """Refuse an output folder that is taken, or that holds an input; at once.

    Raises:
        RunError: so it is.
    """
    from safelocus.run.files import place_of
    from safelocus.run.folder import check_free

    place = place_of(given.output)
    check_free(place, given.overwrite)
    if not place.exists():
        return
    for field in fields(given):
        value = None if field.name in ("output", "config") else getattr(given, field.name)
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, str | Path) or not str(each) or not (own := Path(each).resolve()).exists():
                continue
            if place in (own, *own.parents):
                raise RunError(f"{each}: is read, and lies in what is written ({given.output}); choose another output")


@contextmanager
def shared_run(given: RunOptions) -> Iterator[Path]:
    """`run_folder` for all processes that work on a run: it appears only if none of them was lost.

    The first one writes. The others get a folder too, for what they resume from; it vanishes with the run's end.
    """
    from safelocus import distributed
    from safelocus.run.folder import part_folder, run_folder

    number, count = distributed.rank(), distributed.world_size()
    if distributed.is_main():
        config, overwrite = given.resolved(), given.overwrite
        with run_folder(given.output, config=config, overwrite=overwrite, processes=count) as folder:
            distributed.barrier()
            yield folder
            distributed.barrier()  # all is done,
            distributed.barrier()  # and the others' parts are gone
        return
    distributed.barrier()  # an earlier run at this place is refused, or forgotten
    with part_folder(given.output, number) as folder:
        yield folder
        distributed.barrier()
    distributed.barrier()


def mind(notes: Iterable[str]) -> None:
    """Notes that change how a result is read."""
    for each in notes:
        remarks.print("[bold]mind:[/]", end=" ")
        note(each)


def show(
    given: RunOptions,
    found: Any,
    *shown: "Grid | str | None",
    remarks: Iterable[str] = (),
    notes: Iterable[str] = (),
    wrote: Iterable[str],
    then: str = "",
) -> None:
    """Say what a run found: one JSON document; or tables and sentences, remarks, what to mind, and what was written.

    Args:
        found: what was found, as JSON or with `to_json`.
        shown: grids and sentences; None is left out.
        then: what to do next.
    """
    if given.json:
        told = found if isinstance(found, dict) else found.to_json()
        said = {"remarks": list(remarks), "notes": list(notes)}
        print_json({"output": str(given.output), **{name: each for name, each in said.items() if each}, **told})
        return
    for part in shown:
        if isinstance(part, str):
            results.print(part, highlight=False, markup=False, soft_wrap=True)
        elif part is not None:
            results.print(part.rich())
    for remark in remarks:
        note(remark)
    mind(notes)
    note(f"wrote {given.output}: {', '.join(wrote)}")
    if then:
        note(then)


def check_file(file: Path, overwrite: bool) -> None:
    """Refuse to write a file that is there, or in a folder that is not."""
    if file.exists() and not overwrite:
        raise RunError(f"{file}: exists already; choose another name, or --overwrite it")
    if not file.parent.is_dir():
        raise RunError(f"{file}: the folder {file.parent} does not exist")
