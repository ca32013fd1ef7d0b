"""Finished cells on disk, so that an interrupted verification goes on where it stopped.

One JSON line each, appended when the cell is finished; a line cut short by a crash is dropped. The first line
says what all cells depend on, and cells of other inputs are never taken over. Several processes, each with a folder of
its own, know what any of them finished.
"""

import json
from pathlib import Path
from typing import Any

from safelocus import distributed
from safelocus.errors import RunError
from safelocus.run import write_text
from safelocus.verification.plan import Step
from safelocus.verification.verification import Cell

_CELLS = "cells.jsonl"


class Journal:
    """Finished cells, one per line; without a folder it remembers nothing."""

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        self._file = None if folder is None else folder / _CELLS
        self._known: dict[str, Cell] = {}
        if self._file is None:
            return
        if self._file.is_file():
            self._read(self._file, identity)
        else:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._append({"identity": identity})
        self._known = distributed.merged(self._known)

    def _read(self, file: Path, identity: dict[str, Any]) -> None:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may have been cut short
        earlier = whole[0]["identity"] if whole else {}
        if differing := [key for key, value in identity.items() if whole and earlier.get(key) != value]:
            raise RunError(
                f"{file.parent}: an interrupted verification with another {', '.join(differing)} lies here; give the "
                "same inputs to resume it, or --overwrite to begin anew"
            )
        write_text(file, "".join(json.dumps(row) + "\n" for row in whole or [{"identity": identity}]))
        self._known = {row["key"]: Cell.from_line(row) for row in whole[1:]}

    def find(self, step: Step) -> Cell | None:
        return self._known.get(step.key)

    def add(self, step: Step, cell: Cell) -> None:
        if self._file is not None:
            self._append({"key": step.key, **cell.to_line()})

    def _append(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
