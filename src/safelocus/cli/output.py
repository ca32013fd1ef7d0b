"""Where the command line prints: results on standard output, everything else on the error stream."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from rich.console import Console

results = Console()
errors = Console(stderr=True)
remarks = Console(stderr=True)


def print_json(value: Any) -> None:
    """Machine-readable result: one JSON document on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))  # noqa: T201


def note(message: str) -> None:
    """A remark for people, on the error stream."""
    remarks.print(message, highlight=False, soft_wrap=True)


def together(command: Callable[..., None]) -> Callable[..., None]:
    """A command that the processes of `torchrun` or `accelerate launch` run as one; only the first makes remarks."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        from safelocus import distributed

        with distributed.processes() as several:
            quiet, remarks.quiet = remarks.quiet, not distributed.is_main()
            try:
                command(*arguments, **options)
            finally:
                remarks.quiet = quiet
        if several:
            distributed.leave()

    return run


@contextmanager
def shared_run(output: Path, *, config: Mapping[str, Any], overwrite: bool = False) -> Iterator[Path]:
    """`run_folder` for all processes that work on a run: it appears only if none of them was lost.

    The first one writes. The others get a folder too, for what they resume from; it vanishes with the run's end.
    """
    from safelocus import distributed
    from safelocus.run.folder import part_folder, run_folder

    number, count = distributed.rank(), distributed.world_size()
    if distributed.is_main():
        with run_folder(output, config=config, overwrite=overwrite, processes=count) as folder:
            distributed.barrier()
            yield folder
            distributed.barrier()  # all is done,
            distributed.barrier()  # and the others' parts are gone
        return
    distributed.barrier()  # an earlier run at this place is refused, or forgotten
    with part_folder(output, number) as folder:
        yield folder
        distributed.barrier()
    distributed.barrier()
