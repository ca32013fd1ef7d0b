"""Files that notice what happened to them: what is written has a digest of its bytes, compared with it when it is read.

    seal, read_text, read_json, read_lines    a folder's `digests.json`: name -> digest of every file in it
    sealed, unsealed                          a JSON value beside its own: what an unfinished run keeps
    TensorFile                                see `tensors`: one safetensors file with its own in its header

All are 128 bits of xxh3, as quick as memory: they notice damage and careless edits. They are no signatures: whoever
means to deceive can write new ones.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from safelocus.errors import MALFORMED, RunError
from safelocus.run.identity import digest

DIGESTS = "digests.json"
FORMAT_VERSION = 1


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name and rename it."""
    with renamed_to(path) as temporary:
        # lone surrogates, which models and JSON can bring, are no UTF-8: they are written as JSON escapes them
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


@contextmanager
def renamed_to(path: Path) -> Iterator[Path]:
    """Within: a file beside the one to be, to write, which takes its place at the end, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """UTF-8 text, as it was when its folder was sealed (a file that no `digests.json` lists is taken as it is).

    Raises:
        RunError: changed since, or not UTF-8. OSError: cannot be read.
    """
    data = path.read_bytes()
    require_intact(path, xxhash.xxh3_128_hexdigest(data))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: not UTF-8 text ({error}); save it as UTF-8, or make it again") from error


def read_json(path: Path) -> Any:
    """A JSON value; as `read_text`, and RunError for what is not JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RunError(f"{path}: not valid JSON ({error}); copy it again, or make it again") from error


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines under a temporary name and rename it."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[Any]:
    """JSON values, one on each line; as `read_text`, and json.JSONDecodeError for what is not JSON."""
    # not splitlines: texts may hold other line separators
    return [json.loads(line) for line in read_text(path).split("\n") if line]


@contextmanager
def reading(folder: Path, command: str) -> Iterator[None]:
    """Within: the reading of what a run of `command` wrote, put together to what it was.

    Raises:
        RunError: a file cannot be read, or has another shape than one of such a run.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error}); expected a run of `{command}`") from error
    except RunError:
        raise
    except MALFORMED as error:
        raise RunError(f"{folder}: damaged results ({error!r}); run `{command}` again") from error


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write down the digests of a folder's files: all of them, or those named, beside what is written down already.

    A folder within that is sealed itself counts by its own `digests.json`.
    """
    known = {} if names is None else _known(folder)
    files = within(folder) if names is None else (folder / name for name in names)
    values = {**known, **{file.relative_to(folder).as_posix(): digest_of(file) for file in files}}
    write_json(folder / DIGESTS, {"format_version": FORMAT_VERSION, "digest": digest(values), "files": values})


def require_intact(path: Path, found: str | None = None) -> Path:
    """The file, as its folder's `digests.json` says it is, where that lists it; RunError otherwise.

    Args:
        found: the file's digest, where it is known.
    """
    expected = expected_digest(path)
    if expected is not None and (found or digest_of(path)) != expected:
        raise RunError(
            f"{path}: changed since it was written (its digest is not the one in {DIGESTS}). Copy it again, or make it "
            f"again; if it was changed on purpose, {DIGESTS} must go"
        )
    return path


def expected_digest(path: Path) -> str | None:
    """What the nearest `digests.json` above a file says of it; None where there is none, or it does not list the file.

    Raises RunError where that is damaged.
    """
    folder, name = _listing(path)
    return None if folder is None else read_digests(folder).get(name)


def rewritten(path: Path) -> None:
    """Write down the new digest of a file that was changed on purpose, where it is listed, and so on upwards."""
    folder, name = _listing(path)
    if folder is not None and name in read_digests(folder):
        seal(folder, [name])
        rewritten(folder / DIGESTS)


def _listing(path: Path) -> tuple[Path | None, str]:
    """(the nearest folder above that has digests, a file's name in them)"""
    path = Path(os.path.abspath(path))
    above = path.parents[1:] if path.name == DIGESTS else path.parents
    folder = next((folder for folder in above if (folder / DIGESTS).is_file()), None)
    return folder, "" if folder is None else path.relative_to(folder).as_posix()


def read_digests(folder: Path) -> dict[str, str]:
    """Name -> digest, of a sealed folder; RunError where its `digests.json` is damaged."""
    file = folder / DIGESTS
    try:
        values = json.loads(file.read_bytes())
        files: dict[str, str] = values["files"]
        is_whole = values["format_version"] == FORMAT_VERSION and values["digest"] == digest(files)
    except (ValueError, KeyError, TypeError, RecursionError):
        is_whole, files = False, {}
    if not is_whole:
        raise RunError(f"{file}: damaged, or of another version, so nothing says whether the files are as they were")
    return files


def within(folder: Path) -> Iterator[Path]:
    """The files of a folder that its digests count."""
    for place, folders, names in os.walk(folder):
        if place != str(folder) and DIGESTS in names:
            folders.clear()
            names = [DIGESTS]
        folders.sort()
        skipped = DIGESTS if place == str(folder) else ""
        yield from (Path(place, name) for name in sorted(names) if name != skipped and not name.endswith(".tmp"))


def digest_of(path: Path) -> str:
    """128 bits of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def sealed(value: Any) -> dict[str, Any]:
    """A JSON value beside its digest."""
    return {"digest": digest(value), "value": value}


def unsealed(text: str | bytes, where: Path | str) -> Any:
    """The value in the JSON of what `sealed` made; RunError where it is not that."""
    try:
        entry = json.loads(text)
        value, is_whole = entry["value"], entry["digest"] == digest(entry["value"])
    except (ValueError, KeyError, TypeError, RecursionError):
        value, is_whole = None, False
    if not is_whole:
        raise RunError(
            f"{where}: damaged, or the unfinished work of another version: its digest is not that of what it holds. "
            "--overwrite begins anew (in a script: remove the folder)"
        )
    return value


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within: no other process of safelocus writes to this place. However this one ends, the place is free then.

    Raises RunError where another is at work. (Where there are no locks of files, as on Windows, all are let in.)
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("a", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = os.fstat(file.fileno()).st_nlink > 0  # else its last owner was just about to leave
        except BlockingIOError:
            is_free = False
        except OSError:
            is_free = True
        if not is_free:
            raise RunError(f"{path}: another process is writing there; wait for its end, or choose another place")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Within: an empty folder beside the one to be, which takes its place at the end, complete or not at all.

    Raises RunError where another process of safelocus writes there.
    """
    folder = place_of(folder)
    partial, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    folder.parent.mkdir(parents=True, exist_ok=True)

    def tidy() -> None:
        if old.exists() and not folder.exists():  # ended just when the new one took its place
            os.replace(old, folder)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)

    with alone(folder):
        tidy()  # after a process that was killed
        try:
            partial.mkdir()
            yield partial
            if folder.exists():
                os.replace(folder, old)
            os.replace(partial, folder)
        finally:
            tidy()


def place_of(folder: Path) -> Path:
    """Where a folder really lies whose place another takes at the end: a link stays, and leads to the new one.

    Raises RunError for one that nothing can take the place of: the current folder, or where a disk is mounted.
    """
    place = folder.expanduser().resolve()
    if place == Path.cwd() or place.is_mount():
        what = "the current folder" if place == Path.cwd() else "where a disk is mounted"
        raise RunError(f"{folder}: is {what}, whose place nothing can take; choose a folder within it")
    return place


def inside(folder: Path, name: str) -> Path:
    """A file or folder within another, by a name from an artefact; RunError for one that leads elsewhere."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise RunError(f"{folder}: names {name!r}, which is not within; a damaged or forged file")
    return path


def _known(folder: Path) -> Mapping[str, str]:
    try:
        return read_digests(folder) if (folder / DIGESTS).is_file() else {}
    except RunError:  # what is saved now is not lost for that
        return {}
