"""The processes that a launcher started become one group, and end together."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from safelocus.distributed.exchange import barrier, is_main, rank
from safelocus.errors import ResourceError, RunError

_PATIENCE = 5.0  # seconds in which a launcher ends all processes after one
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # environment that a launcher leaves behind


@contextmanager
def processes() -> Iterator[bool]:
    """Within: the processes that a launcher started form one group; yields whether they do.

    Nothing happens in a process started alone. Where one of them fails, or the launcher ends them, the others leave
    the block with a RunError.
    """
    if dist.is_initialized():
        yield False
        return
    if os.environ.get("WORLD_SIZE") == "1" or not set(_LAUNCHED) <= os.environ.keys():
        try:
            yield False
        finally:
            if dist.is_initialized():  # see `keep_on_host`
                dist.destroy_process_group()
        return
    _bind_accelerator()
    dist.init_process_group()  # gloo for tensors on the CPU, the accelerator's own library beside it
    try:
        with _ended_by_launcher():
            yield True
            barrier()
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "peer" in str(error)):
            raise
        raise RunError(
            f"process {rank()}: another process of this run has ended; its own message, or the launcher's, says why"
        ) from error
    dist.destroy_process_group()


def leave(code: int = 0) -> None:
    """End this process now, its work done, without Python's own shutdown.

    gloo's threads release tensors when they come to it, and abort the process where Python is gone by then
    (pytorch#179291): a finished run would be reported as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _bind_accelerator() -> None:
    """Each process of a machine takes the accelerator of its own number."""
    if torch.accelerator.current_accelerator(check_available=True) is None:
        return
    local, available = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if local >= available:
        raise ResourceError(
            f"process {local} of this machine has no accelerator: there are {available}. Launch at most that many "
            f"(--nproc-per-node {available})"
        )
    torch.accelerator.set_device_index(local)


@contextmanager
def _ended_by_launcher() -> Iterator[None]:
    """Turns the launcher's SIGTERM into an error, so that what is half-written is cleaned up.

    A process that is ending already, with an error of its own, cleans up and says so undisturbed. Most errors, wrong
    inputs above all, are met by all processes at once: the first one says so, the others wait to be ended with it.
    """
    ended = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal ended
        if sys.exc_info()[0] is None:
            ended = True
            raise RunError(f"process {rank()}: ended by the launcher, because another process failed or it was stopped")

    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not is_main() and not ended and isinstance(error, Exception) and not isinstance(error, RuntimeError):
            signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
            time.sleep(_PATIENCE)
        raise
    signal.signal(signal.SIGTERM, previous)
