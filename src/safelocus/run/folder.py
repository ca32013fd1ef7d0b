"""A run folder: everything one command made, complete or not there at all.

    run.toml        the resolved configuration; `safelocus COMMAND --config run.toml` repeats the run
    results.json    numbers
    ...             artefacts and pictures
    digests.json    of all of these (see `files`)

The folder is written under a temporary name beside it and renamed when complete. What an interrupted
run can resume from stays under the temporary name; anything else is removed. Of several processes each
resumes from its own part, so it takes as many to go on.
"""

import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w

from safelocus.errors import RunError
from safelocus.run.files import DIGESTS, alone, place_of, read_text, seal, within, write_text

CHECKPOINT = "checkpoint"  # subfolder of an unfinished run that it resumes from
IDENTITY = "identity.json"  # file in it, and in its parts, that says whose work it is
_PARTS = "processes"  # subfolder with those of the other processes
_COUNT = "processes.txt"
OWN_NAMES = (CHECKPOINT, _PARTS, _COUNT, "run.toml", DIGESTS)  # within a run folder


@contextmanager
def run_folder(path: Path, *, config: Mapping[str, Any], overwrite: bool = False, processes: int = 1) -> Iterator[Path]:
    """Yield the folder to write into; it becomes `path` when the block ends without an error.

    Args:
        path: the run folder to be.
        config: what `run.toml` will say; None values are left out.
        overwrite: replace an earlier run at `path`, and forget an interrupted one.
        processes: that work on the run; this is the first of them, see `part_folder` for the others.

    Raises:
        RunError: `path` is taken or cannot be written, or another command or other processes were interrupted there;
            or `run.toml` cannot say what is in `config`. Raised before the block runs.
    """
    resolved = _in_toml(config)
    with ExitStack() as until_the_end:
        with _writing(Path(path)):
            path = place_of(Path(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            until_the_end.enter_context(alone(path))
            if not overwrite:
                read_unfinished(path, config.get("command"))
            partial = _begin(path, resolved, overwrite, processes)
        try:
            yield partial
        except BaseException:
            with suppress(OSError):  # the disk may be the reason
                if not holds_work(partial / CHECKPOINT):
                    _forget(partial)
            raise
        with _writing(path):
            _finish(partial, path, resolved)


def _begin(path: Path, resolved: str, overwrite: bool, processes: int) -> Path:
    _restore(path)
    check_free(path, overwrite)
    partial = _partial(path)
    if not overwrite:
        _check_count(partial, processes)
    if partial.exists() and (overwrite or not holds_work(partial / CHECKPOINT)):
        _forget(partial)
    partial.mkdir(exist_ok=True)
    (partial / DIGESTS).unlink(missing_ok=True)  # of an attempt that was killed: its files are made again
    (partial / _COUNT).write_text(f"{processes}\n")
    if not (partial / "run.toml").is_file():  # an interrupted run keeps its own, should this one not be the same
        write_text(partial / "run.toml", resolved)
    return partial


def _finish(partial: Path, path: Path, resolved: str) -> None:
    """Nothing is lost wherever this ends: until it has its place, the run is resumed or begun anew."""
    write_text(partial / "run.toml", resolved)
    for left in (partial / DIGESTS, *partial.rglob(".*.tmp")):  # of an attempt that was killed
        left.unlink(missing_ok=True)
    files = (file.relative_to(partial) for file in within(partial))
    seal(partial, [str(file) for file in files if file.parts[0] not in (CHECKPOINT, _PARTS, _COUNT)])
    for unfinished in (CHECKPOINT, _PARTS):
        _forget(partial / unfinished)
    (partial / _COUNT).unlink()
    old = _replaced(path)
    shutil.rmtree(old, ignore_errors=True)  # of a run that ended after the next lines
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
    except OSError as error:
        _restore(path)
        raise RunError(
            f"{path}: cannot be put in its place ({error.strerror or error}). The finished run lies in {partial}: move "
            "it, before the same command begins anew"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); choose another output folder"
        ) from error


@contextmanager
def part_folder(path: Path, number: int) -> Iterator[Path]:
    """Yield the folder of another process of the run at `path`: removed at the end, unless it can be resumed from.

    It lies within the unfinished run, or alone on a machine that does not share the first process's files.
    """
    part = _partial(place_of(Path(path))) / _PARTS / str(number)
    part.mkdir(parents=True, exist_ok=True)
    try:
        yield part
    except BaseException:
        if not holds_work(part / CHECKPOINT):
            shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(part, ignore_errors=True)
    for emptied in (part.parent, part.parent.parent):
        with suppress(OSError):
            emptied.rmdir()


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a `run.toml`, or in the run folder that holds one."""
    file = path / "run.toml" if path.is_dir() else path
    try:
        return tomllib.loads(read_text(file))
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RunError(f"{file}: not valid TOML: {error}") from error


def read_unfinished(path: Path, command: str | None) -> dict[str, Any]:
    """The configuration of an interrupted run that the same command would resume; empty where there is none.

    Raises RunError for the work of another command, which would be lost.
    """
    partial = _partial(place_of(path))
    if not (holds_work(partial / CHECKPOINT) and (partial / "run.toml").is_file()):
        return {}
    found = read_config(partial)
    if (other := found.get("command")) != command:
        raise RunError(
            f"{partial}: the work of an interrupted `safelocus {other}` lies here; that command resumes it. Choose "
            "another output folder, or --overwrite to begin anew"
        )
    return found


def holds_work(checkpoint: Path) -> bool:
    """Whether there is anything to resume from in such a folder: more than that it was begun."""
    return any(file.is_file() and file.name != IDENTITY for file in checkpoint.rglob("*"))


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _restore(path: Path) -> None:
    """Bring an earlier run back, if another was killed just when it took its place."""
    if (_replaced(path) / "run.toml").is_file() and not path.exists():
        os.replace(_replaced(path), path)


def _forget(folder: Path) -> None:
    """Remove a folder at once: what is left, should this process be killed meanwhile, is nobody's unfinished work."""
    going = folder.with_name(f".{folder.name.lstrip('.')}.gone")
    shutil.rmtree(going, ignore_errors=True)
    if folder.exists():
        os.replace(folder, going)
        shutil.rmtree(going, ignore_errors=True)


def _check_count(partial: Path, processes: int) -> None:
    count = partial / _COUNT
    if not holds_work(partial / CHECKPOINT) or not count.is_file():
        return
    if (earlier := count.read_text().strip()) != str(processes):
        raise RunError(
            f"{partial}: a run of {earlier} processes was interrupted here, and this one has {processes}; launch "
            f"{earlier} to resume it, or --overwrite to begin anew"
        )


def check_free(path: Path, overwrite: bool) -> None:
    """RunError for a place that a run cannot take: files of others, or a run that is not to be replaced."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.is_dir() and not (path / "run.toml").is_file():
        raise RunError(f"{path}: holds files that are no run of safelocus; choose another output folder")
    if path.is_dir() and not overwrite:
        raise RunError(f"{path}: holds an earlier run; choose another folder, or --overwrite it")
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file; expected a folder to write the run into")


def _in_toml(config: Mapping[str, Any]) -> str:
    """What `run.toml` will say; RunError for what it cannot: names of files that are no UTF-8."""
    values = _without_none(config)
    for name, value in values.items():
        try:
            tomli_w.dumps({name: value}).encode()
        except UnicodeEncodeError as error:
            raise RunError(f"{name} = {value!r}: not UTF-8, so run.toml cannot say it; rename the file") from error
    return tomli_w.dumps(values)


def _without_none(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value is not None
    }
