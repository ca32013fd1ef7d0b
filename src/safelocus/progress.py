"""One way to show progress: a bar on the error stream, silent where it is off or nobody looks."""

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
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


@contextmanager
def progress_bar(
    description: str, total: int, *, enabled: bool = True, start: int = 0
) -> Iterator[Callable[[int], None]]:
    """Within: a bar of `total` units; call what it yields with the units done since the last call."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal), transient=True) as bar:
        task = bar.add_task(description, total=total, completed=start)
        yield lambda units: bar.advance(task, units)


def track(
    items: Sequence[T],
    description: str,
    *,
    enabled: bool = True,
    start: int = 0,
    unit: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """Yield `items[start:]` under a progress bar; `unit` says how much each counts (a batch: `size_of`)."""
    units = [unit(item) for item in items]
    with progress_bar(description, sum(units), enabled=enabled, start=sum(units[:start])) as advance:
        for item, size in zip(items[start:], units[start:], strict=True):
            yield item
            advance(size)


def size_of(batch: Sized | None) -> int:
    """`unit` for batches; those that only keep in step with other processes are None, and count nothing."""
    return len(batch or ())
