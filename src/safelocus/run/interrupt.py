"""Ctrl-C at a good moment: long loops stop where their state is whole, and save it first."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from safelocus import distributed


class StopAtBoundary:
    """Within a loop that can be resumed: the first Ctrl-C waits for the next boundary, a second one does not.

    Args:
        save: called with the number of steps done, every `every_seconds` and before stopping.
        enabled: false leaves Ctrl-C alone and never saves.
        in_step: all processes pass the same boundaries, and save and stop at the same one.
    """

    def __init__(
        self, save: Callable[[int], None], *, every_seconds: float, enabled: bool = True, in_step: bool = False
    ) -> None:
        self._save = save
        self._every = every_seconds
        self._enabled = enabled
        self._in_step = in_step
        self._last = time.monotonic()
        self._asked = False
        self._previous: Any = None
        # signals belong to the main thread; elsewhere only the regular saving remains
        self._handles = enabled and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._handles:
            self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handles:
            signal.signal(signal.SIGINT, self._previous)

    def passed(self, done: int) -> None:
        """Call at every boundary; saves when it is time, and raises KeyboardInterrupt if asked to stop."""
        if not self._enabled:
            return
        wishes = (self._asked, time.monotonic() - self._last > self._every)
        asked, due = map(any, zip(*distributed.gather_objects(wishes), strict=True)) if self._in_step else wishes
        if asked or due:
            self._save(done)
            self._last = time.monotonic()
        if asked:
            raise KeyboardInterrupt

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
