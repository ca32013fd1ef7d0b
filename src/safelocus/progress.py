"""One way to show progress: a bar on the error stream, silent where it is off or nobody looks."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


def track(
    items: Sequence[T],
    description: str,
    *,
    enabled: bool = True,
    start: int = 0,
    unit: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """Yield `items[start:]` under a progress bar; `unit` says how much each counts (a batch: its prompts)."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal), transient=True) as bar:
        task = bar.add_task(
            description,
            total=sum(unit(item) for item in items),
            completed=sum(unit(item) for item in items[:start]),
        )
        for item in items[start:]:
            yield item
            bar.advance(task, unit(item))
