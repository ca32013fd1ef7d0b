"""The stages of one organism in a process of their own, while those of the other are told.

One stage on a model this small leaves a second core idle; two organisms side by side do not.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from safelocus.demo.stages import Found, Place
from safelocus.errors import RunError

_PATIENCE = 10  # seconds in which a process that had Ctrl-C too may end by itself


def num_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def running_ahead(stages: Sequence[Callable[[Place], Found]], at: Place) -> Iterator[Callable[[], Found]]:
    """Within: the stages run, one after another, elsewhere; what is yielded waits for the next one and returns it.

    Errors of a stage are raised when it is asked for.

    Args:
        stages: functions of a module, since another process imports them.
        at: where they work.
    """
    context = get_context("spawn")  # a fork of a process with torch's threads may hang
    receiver, sender = context.Pipe(duplex=False)
    num_threads = torch.get_num_threads()
    share = max(1, min(num_threads, num_cores() // 2))
    process = context.Process(target=_run, args=(stages, at, sender, share), daemon=True)
    process.start()
    sender.close()  # ours: its end is then the process's own

    def following() -> Found:
        try:
            found = receiver.recv()
        except EOFError as error:
            process.join()
            raise RunError(
                f"the process that works on the {at.organism} organism ended (exit code {process.exitcode}); if memory "
                "was short, close other programs; the same command resumes"
            ) from error
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, Found)
        return found

    try:
        torch.set_num_threads(share)
        yield following
    finally:
        torch.set_num_threads(num_threads)
        process.join(_PATIENCE)
        process.terminate()
        receiver.close()


def _run(stages: Sequence[Callable[[Place], Found]], at: Place, sender: Connection, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    for stage in stages:
        try:
            found: Found | BaseException = stage(at)
        except BaseException as error:  # noqa: BLE001 (raised where the stage is asked for, Ctrl-C too)
            found = error
        try:
            sender.send(found)
        except BrokenPipeError:
            return  # nobody is there to tell
        if isinstance(found, BaseException):
            return
