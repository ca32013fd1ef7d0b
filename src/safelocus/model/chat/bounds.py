"""A chat template comes with a model, from wherever that comes: it is rendered in a sandbox, and within bounds.

    steps     lines of Python that a rendering may take: loops in loops are stopped, after a second or two
    memory    that it may take beside what the process has: strings that double are stopped (not on Windows)
    powers    `9 ** 9 ** 9` would be one step, and for ever: a template that takes powers is refused

jinja's own sandbox keeps templates from files, imports and private attributes; a range has 100,000 numbers at most.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2

from safelocus.errors import MALFORMED, ModelError

MOST_STEPS = 5_000_000
MOST_BYTES = 1 << 28
_INSTEAD = "is the model from where it should be? With --template, a plain one takes its place"


class _TooMany(BaseException):
    """Not to be caught by the template's own engine."""


@contextmanager
def bounded(template: str) -> Iterator[None]:
    """Within: the rendering of a template, by this thread.

    Raises:
        ModelError: it took too many steps or too much memory, or takes powers.
    """
    if _takes_powers(template):
        raise ModelError(f"the chat template takes powers (**), which may be without end; {_INSTEAD}")
    try:
        with _counted(), _limited():
            yield
    except (_TooMany, MemoryError, RecursionError) as error:
        took = "too much memory" if isinstance(error, MemoryError) else "too many steps"
        raise ModelError(f"the chat template was stopped: it took {took}; {_INSTEAD}") from None
    except jinja2.TemplateError:
        raise
    except MALFORMED as error:  # Python's own, of what the template does
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error


@lru_cache
def _takes_powers(template: str) -> bool:
    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateError:  # it is its rendering that says so
        return False
    # `**` before a call's arguments unpacks them
    words = [(kind, value) for _, kind, value in tokens if kind != "whitespace"]
    return any(
        value == "**" and kind == "operator" and before[1] not in ("(", ",")
        for before, (kind, value) in pairwise(words)
    )


@contextmanager
def _counted() -> Iterator[None]:
    steps = 0

    def count(_frame: FrameType, _event: str, _argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MOST_STEPS:
            raise _TooMany
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _limited() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    limit = now + MOST_BYTES
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
