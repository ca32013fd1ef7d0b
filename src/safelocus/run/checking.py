"""Whether files are as they were written: any artefact alone, or all of a run, finished or not.

Two things can say so, and whichever is there is asked: a digest within the file (selections, patches, journals, tensors
of unfinished work), and the `digests.json` of a folder above it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safelocus.errors import RunError
from safelocus.run.files import DIGESTS, digest_of, expected_digest, inside, read_digests, unsealed
from safelocus.run.tensors import own_digest

_SEALED = re.compile(rb'\{\s*"digest": "|",\s*"value": ')  # how `files.sealed` begins; either, should one be damaged
_HEAD = 100
_MARKS = (b'"safelocus.', b"xxh3_128")  # of a file with its digest; either, should one be damaged


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One file, and whether it is as it was written.

    Attributes:
        file: where it is.
        state: "intact"; "changed", "missing" or "damaged"; "no digest": nothing says how it was.
    """

    file: Path
    state: str

    @property
    def is_bad(self) -> bool:
        return self.state not in ("intact", "no digest")


def check(path: Path) -> list[Checked]:
    """The one file; or every file of a folder, those within it included, and those that should be there.

    Raises:
        RunError: there is no such file or folder.
    """
    path = Path(path)
    if path.is_file():
        return [_file(path)]
    if not path.is_dir():
        raise RunError(f"{path}: no such file or folder; expected an artefact of safelocus, or a run folder")
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix != ".tmp"]
    missing = [Checked(file=name, state="missing") for file in files if file.name == DIGESTS for name in _missing(file)]
    return [*map(_file, files), *missing]


def require_checked(folder: Path, what: str) -> None:
    """Raise RunError unless all files of a sealed folder are as they were when it was."""
    for found in check(folder):
        if found.is_bad:
            raise RunError(
                f"{found.file}: {found.state} since {what} was written. Remove {folder} to go on from what was there "
                "before it, or --overwrite to begin anew"
            )


def _file(path: Path) -> Checked:
    try:
        expected = expected_digest(path)
        answers = [_by_itself(path), expected is None or expected == digest_of(path)]
    except (RunError, OSError):
        return Checked(file=path, state="damaged")
    if False in answers:
        return Checked(file=path, state="changed")
    return Checked(file=path, state="no digest" if expected is None and answers[0] is None else "intact")


def _by_itself(path: Path) -> bool | None:
    """Whether a digest in the file fits; None where there is none."""
    if path.name == DIGESTS:
        read_digests(path.parent)
        return True
    if path.suffix == ".safetensors":
        digest = own_digest(path)
        return digest.found == digest.expected if digest is not None else False if _is_ours(path) else None
    if path.suffix in (".json", ".jsonl"):
        data = path.read_bytes()
        if _SEALED.search(data, 0, _HEAD):
            # a last line without its end was cut off by a crash: it is left out when the work is resumed
            for part in data.split(b"\n")[:-1] if path.suffix == ".jsonl" else [data]:
                unsealed(part, path)
            return True
    return None


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(1 << 20)
    return any(mark in head for mark in _MARKS)


def _missing(digests: Path) -> Iterator[Path]:
    try:
        names = read_digests(digests.parent)
        yield from (file for name in names if not (file := inside(digests.parent, name)).exists())
    except RunError:  # said already, of the file itself
        return
