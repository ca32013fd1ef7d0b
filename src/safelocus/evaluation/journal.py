"""Answers and verdicts kept as they come, so that an interrupted evaluation goes on where it stopped.

A folder with `identity.json` (what the answers depend on) and one JSON-lines file per kind, appended to
batch by batch. A line that a crash cut off is left out and asked for again. With no folder, everything is
kept in memory only. Of several processes each has a folder of its own, and all know what any of them found.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelocus import distributed
from safelocus.errors import RunError
from safelocus.run import write_json

Key = tuple[str | int, ...]


class Journal:
    """key -> value, appended to a file.

    Args:
        folder: where the file lies; made when the first value is added. None: nothing is kept. All processes give
            one, or none.
        name: the file's stem.
        identity: what the values depend on; equal to that of the values already there.

    Raises:
        RunError: the folder holds the work of another evaluation.
    """

    def __init__(self, folder: Path | None, name: str, identity: Mapping[str, Any]) -> None:
        self._folder = folder
        self._file = None if folder is None else folder / f"{name}.jsonl"
        self._identity = json.loads(json.dumps(identity))  # as it will be read back
        self._values: dict[Key, Any] = {}
        if folder is not None and (folder / "identity.json").is_file():
            self._check(folder)
            self._read()
        if folder is not None:
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
        """Keep JSON values under their keys; one write for all."""
        self._values.update(items)
        if self._folder is None or self._file is None or not items:
            return
        if not (self._folder / "identity.json").is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / "identity.json", self._identity)
        lines = "".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in items)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def _check(self, folder: Path) -> None:
        found = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
        differing = [key for key, value in self._identity.items() if found.get(key) != value]
        if differing:
            raise RunError(
                f"{folder}: an interrupted evaluation with another {', '.join(differing)} lies here; "
                "give the same inputs to resume it, or --overwrite to begin anew"
            )

    def _read(self) -> None:
        assert self._file is not None
        if not self._file.is_file():
            return
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the last line was cut off; a new one must not be glued to it
            with self._file.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.decode("utf-8").split("\n")[:-1]:
            entry = json.loads(line)
            self._values[tuple(entry["key"])] = entry["value"]
