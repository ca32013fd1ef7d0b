"""A run folder: everything one command made, complete or not there at all.

    run.toml        the resolved configuration; `safelocus COMMAND --config run.toml` repeats the run
    results.json    numbers
    ...             artefacts and pictures

The folder is written under a temporary name beside it and renamed when complete. What an interrupted
run can resume from stays under the temporary name; anything else is removed.
"""

import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from safelocus.errors import RunError

CHECKPOINT = "checkpoint"  # subfolder of an unfinished run that it resumes from


@contextmanager
def run_folder(path: Path, *, config: Mapping[str, Any], overwrite: bool = False) -> Iterator[Path]:
    """Yield the folder to write into; it becomes `path` when the block ends without an error.

    Args:
        path: the run folder to be.
        config: what `run.toml` will say; None values are left out.
        overwrite: replace an earlier run at `path`, and forget an interrupted one.

    Raises:
        RunError: `path` is taken or cannot be written. Raised before the block runs.
    """
    path = Path(path)
    _check_free(path, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if overwrite and partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        write_text(partial / "run.toml", tomli_w.dumps(_without_none(config)))
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); choose another output folder"
        ) from error
    try:
        yield partial
    except BaseException:
        if not (partial / CHECKPOINT).is_dir():
            shutil.rmtree(partial)
        raise
    shutil.rmtree(partial / CHECKPOINT, ignore_errors=True)
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old)
    else:
        os.replace(partial, path)


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a `run.toml`, or in the run folder that holds one."""
    file = path / "run.toml" if path.is_dir() else path
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror or error})") from error
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{file}: not valid TOML: {error}") from error


def read_unfinished(path: Path) -> dict[str, Any]:
    """The configuration of an interrupted run that the same command would resume; empty where there is none."""
    partial = path.with_name(f".{path.name}.partial")
    return read_config(partial) if (partial / CHECKPOINT).is_dir() and (partial / "run.toml").is_file() else {}


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _check_free(path: Path, overwrite: bool) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.is_dir() and not (path / "run.toml").is_file():
        raise RunError(f"{path}: holds files that are no run of safelocus; choose another output folder")
    if path.is_dir() and not overwrite:
        raise RunError(f"{path}: holds an earlier run; choose another folder, or --overwrite it")
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file; expected a folder to write the run into")


def _without_none(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value is not None
    }
