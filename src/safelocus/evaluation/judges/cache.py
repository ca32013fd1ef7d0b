"""Answers of an endpoint kept on disk, so that no question is paid for twice.

One small JSON file per question, named by a digest of everything the answer depends on (address, model,
messages, parameters). It holds the answer, not the question. Files are written under a temporary name
and renamed: several runs may share a folder, and an interrupted one leaves no half file. What cannot be
read, or has changed since it was written, is asked again.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelocus.errors import JudgeError
from safelocus.run.files import sealed, unsealed, write_json


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/safelocus/answers`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safelocus" / "answers"


def digest(question: Mapping[str, Any]) -> str:
    """Name of a question: a digest of its JSON, whatever the order of its keys."""
    text = json.dumps(question, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


@dataclass(frozen=True, kw_only=True)
class AnswerCache:
    """A folder of answers.

    Raises:
        JudgeError: on writing, where the folder cannot be written.
    """

    folder: Path

    def read(self, key: str) -> dict[str, Any] | None:
        try:
            value = json.loads(data := self._path(key).read_bytes())
            if not isinstance(value, dict) or value.keys() & {"digest", "value"}:  # earlier answers have no digest
                value = unsealed(data, key)
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def write(self, key: str, value: Mapping[str, Any]) -> None:
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, sealed(value))
        except OSError as error:
            raise JudgeError(
                f"{path.parent}: the cache of answers cannot be written ({error.strerror or error}); "
                "choose another folder, or no cache"
            ) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
