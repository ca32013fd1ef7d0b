"""Unfinished work on disk, which the same run takes up again and no other ever does: for every stage alike.

    claim           a folder belongs to one identity from now on; a RunError names what differs where it has another
    Journal         key -> JSON value, appended as they come: answers, verdicts, cells, looks
    Snapshots       tensors and a position, the newest of which counts: sums of gradients
    StopAtBoundary  Ctrl-C at a good moment: long loops stop where their state is whole, and save it first

A folder holds `identity.json` beside the work itself; parts of a run have folders within it, whose own identity adds
what the whole run's does not say. Of several processes each has a folder of its own. What a crash cut off is left out,
and what was changed since is refused.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

from torch import Tensor

from safelocus import distributed
from safelocus.errors import RunError
from safelocus.run.files import sealed, unsealed, write_json
from safelocus.run.folder import IDENTITY, holds_work
from safelocus.run.identity import Identity
from safelocus.run.tensors import TensorFile

Key = tuple[str | int, ...]
_SNAPSHOT = TensorFile(kind="snapshot", version=1, made_by="an interrupted run")


def claim(folder: Path | None, inputs: Mapping[str, Any]) -> None:
    """Make a folder, and say whose unfinished work it holds from now on; None: nothing is kept.

    Args:
        inputs: what the work depends on, by the names that an error should use; see `Identity.of`.

    Raises:
        RunError: it holds work of a run with other inputs.
    """
    if folder is None:
        return
    file, identity = folder / IDENTITY, Identity.of(inputs)
    if file.is_file() and holds_work(folder):
        found = Identity(unsealed(file.read_bytes(), file))
        if differences := identity.differences(found):
            raise RunError(
                f"{folder}: the work of another run lies here, from which this one differs in "
                f"{', in '.join(differences)}. Give the same inputs to resume it, or --overwrite to begin anew (in a "
                "script: remove the folder)"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, sealed(identity.parts))


def newest(positions: set[int]) -> int | None:
    """The highest number that every process has; None where there is none."""
    return max(set.intersection(*distributed.gather_objects(positions)), default=None)


class Journal:
    """key -> JSON value, appended to a JSON-lines file; known in all processes, whichever found it.

    Args:
        folder: where the file lies, claimed already. None: values are kept in memory only. All processes give one, or
            none.
        name: the file's stem.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self._file = None if folder is None else folder / f"{name}.jsonl"
        self._values: dict[Key, Any] = {}
        if self._file is not None:
            self._read(self._file)
            self._values = distributed.merged(self._values)

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def __getitem__(self, key: Key) -> Any:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def learn(self, items: Sequence[tuple[Key, Any]]) -> None:
        """Know values that another process keeps."""
        self._values.update(items)

    def add(self, items: Sequence[tuple[Key, Any]]) -> None:
        """Keep values under their keys; one write for all."""
        self._values.update(items)
        if self._file is None or not items:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(sealed({"key": key, "value": value})) + "\n" for key, value in items)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the last line was cut off; a new one must not be glued to it
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            entry = unsealed(line, f"{path}:{number}")
            self._values[tuple(entry["key"])] = entry["value"]


class Snapshots:
    """This process's tensors at some position of a long sum, whole or absent; the newest ones count.

    Args:
        folder: where they lie, claimed already.
        in_step: all processes pass the same positions, and go on from the newest that every one has.
    """

    def __init__(self, folder: Path, *, in_step: bool = False) -> None:
        self._folder, self._in_step = folder, in_step

    def save(self, position: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write tensors and a JSON state, and forget older ones."""
        file = self._file(position)
        _SNAPSHOT.write(file, {"state": state}, {name: distributed.local(tensor) for name, tensor in tensors.items()})
        # a process may be ended before the others have saved: in step, all have the one before
        for old in sorted(self._positions())[: -2 if self._in_step else -1]:
            self._file(old).unlink()

    def load(self, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]] | None:
        """Fill tensors from the newest: its position and state; None where there is none."""
        positions = self._positions()
        position = newest(positions) if self._in_step else max(positions, default=None)
        if position is None:
            return None
        header, saved = _SNAPSHOT.read(self._file(position))
        for name, tensor in saved.items():
            distributed.local(tensors[name]).copy_(tensor)
        return position, header["state"]

    def _positions(self) -> set[int]:
        return {int(file.stem.rpartition("-")[2]) for file in self._folder.glob("snapshot-*.safetensors")}

    def _file(self, position: int) -> Path:
        return self._folder / f"snapshot-{position}.safetensors"


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


def part_of(folder: Path | None, name: str) -> Path | None:
    """A folder within another, where there is one."""
    return None if folder is None else folder / name
