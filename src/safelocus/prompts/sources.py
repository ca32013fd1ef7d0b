"""Rows from files, the hub and what is embedded; what the rows mean is `fields`' business.

Every reader returns `Row`s: the value (an object or a string) and its place in the source ("line 12"), so
that a later complaint about it can be found. Files are read whole, as UTF-8.
"""

import codecs
import csv
import difflib
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from safelocus.errors import MALFORMED, PromptError


class Row(NamedTuple):
    place: str
    value: object


class Hub(NamedTuple):
    """`org/name[/config][:split[:field]]`."""

    name: str
    config: str | None
    split: str
    field: str | None


# a split may be a slice such as train[:100], whose colon separates nothing
_HUB = re.compile(
    r"(?P<name>\w[\w.\-]*/\w[\w.\-]*)(?:/(?P<config>\w[\w.\-]*))?"
    r"(?::(?P<split>[^:\[\]]+(?:\[[^\]]*\])?)(?::(?P<field>.+))?)?"
)
# prefix -> module with `rows(name)`
EMBEDDED = {"organism": "safelocus.organism", "embedded": "safelocus.prompts.embedded"}
_SEPARATORS = (",", ";", "\t", "|")
# where a JSON object with several lists keeps its rows
_CONTAINERS = ("data", "examples", "prompts", "rows", "instances")


def parse_hub(source: str) -> Hub | None:
    """Read a hub address; None where `source` is rather the path of a file."""
    match = _HUB.fullmatch(source)
    if match is None or Path(source).suffix.casefold() in READERS:
        return None
    if match["split"] is None and Path(source).parent.is_dir():  # a name misspelt in a folder that exists
        return None
    return Hub(match["name"], match["config"], match["split"] or "train", match["field"])


def origin(source: str) -> str:
    """What a set was taken from: parts of one data set, or what one author embedded here, are no two sources.

    >>> origin("org/name:test"), origin("embedded:refusals-heldout"), origin("./prompts.json")
    ('org/name', 'embedded', 'prompts.json')
    """
    kind, separator, _ = source.partition(":")
    if separator and kind in EMBEDDED:
        return kind
    hub = parse_hub(source)
    return os.path.normpath(source) if hub is None else hub.name


def read_file(path: Path) -> list[Row]:
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix.casefold() in READERS)
        raise PromptError(f"{path}: is a folder, expected a file. Inside it: {', '.join(inside[:12]) or 'none'}.")
    if not path.exists():
        raise PromptError(_missing(path))
    reader = READERS.get(path.suffix.casefold())
    if reader is None:
        raise PromptError(f"{path}: unknown kind of file {path.suffix!r}. Expected one of: {', '.join(READERS)}.")
    if path.stat().st_size == 0:
        raise PromptError(f"{path}: the file is empty.")
    rows = reader(path)
    if not rows:
        raise PromptError(f"{path}: the file holds no rows.")
    return rows


def read_hub(hub: Hub) -> list[Row]:
    import datasets

    address = "/".join(filter(None, (hub.name, hub.config)))
    try:
        dataset = datasets.load_dataset(hub.name, hub.config, split=hub.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise PromptError(
            f"{address}:{hub.split}: neither a file nor a dataset that loads: {error} "
            "Expected a file's path or ORG/NAME[/CONFIG]:SPLIT:FIELD. "
            "Is the hub reachable, and the split right?"
        ) from error
    return from_objects(dataset)


def read_embedded(source: str) -> list[Row] | None:
    """Rows of `organism:NAME` or `embedded:NAME`; None for any other source."""
    kind, separator, name = source.partition(":")
    if not separator or kind not in EMBEDDED:
        return None
    # imported by name, on use: most prompts come from elsewhere
    return from_objects(import_module(EMBEDDED[kind]).rows(name))


def from_objects(values: Iterable[object]) -> list[Row]:
    return [Row(f"row {number}", value) for number, value in enumerate(values, start=1)]


def _read_json(path: Path) -> list[Row]:
    text = _decode(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            hint = " One object per line? Then name the file .jsonl."
        raise PromptError(f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg}).{hint}") from error
    except RecursionError as error:
        raise PromptError(f"{path}: JSON that is nested too deeply. Expected a list of objects.") from error
    if isinstance(value, Mapping):
        return _from_json_object(value, path)
    if not isinstance(value, list):
        raise PromptError(f"{path}: expected a list of objects, found a single {type(value).__name__}.")
    return from_objects(value)


def _from_json_object(value: Mapping[str, object], path: Path) -> list[Row]:
    """An object holding rows: by id, as columns, or as one list among other things."""
    cells = list(value.values())
    if cells and all(isinstance(cell, Mapping) for cell in cells):
        return _from_records(value)
    lists = {key: cell for key, cell in value.items() if isinstance(cell, list)}
    # a list of objects is a list of rows, whatever else is there (settings, a version)
    tables = [key for key, cell in lists.items() if cell and isinstance(cell[0], Mapping)]
    named = [key for key in _CONTAINERS if key in tables] or tables
    if not named and len(lists) == 1:
        named = [key for key in _CONTAINERS if key in lists]
    if named:
        if len(named) > 1:
            raise PromptError(
                f"{path}: several lists could be the rows: {', '.join(map(repr, named))}. "
                "Save the one to use in its own file."
            )
        return from_objects(lists[named[0]])
    if lists and len(lists) == len(value):
        lengths = {key: len(cell) for key, cell in lists.items()}
        if len(set(lengths.values())) > 1:
            raise PromptError(f"{path}: an object of columns, whose lengths differ: {lengths}.")
        return from_objects(dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))
    if lists or not any(isinstance(cell, str) for cell in cells):
        raise PromptError(
            f"{path}: expected a list of objects, an object of columns or an object of records, "
            f"found an object with the keys {', '.join(map(repr, list(value)[:12])) or 'none'}."
        )
    return from_objects([value])


def _from_records(value: Mapping[str, object]) -> list[Row]:
    inner = [dict(cell) for cell in value.values() if isinstance(cell, Mapping)]
    numbers = list(inner[0])
    if numbers and all(key.isdigit() for key in numbers) and all(list(cell) == numbers for cell in inner):
        # pandas' to_json: column -> row number -> value
        return [
            Row(f"row {number}", {name: cell[number] for name, cell in zip(value, inner, strict=True)})
            for number in numbers
        ]
    return [
        Row(f"record {key!r}", {"id": key, **cell} if "id" not in cell else cell)
        for key, cell in zip(value, inner, strict=True)
    ]


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    # not splitlines(): JSON may hold U+2028 and its like as they are
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(Row(f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise PromptError(
                    f"{path}:{number}:{error.colno}: not JSON ({error.msg}). Expected one object per line."
                ) from error
            except RecursionError as error:
                raise PromptError(f"{path}:{number}: JSON that is nested too deeply. Expected an object.") from error
    return rows


def read_cells(path: Path) -> list[tuple[str, list[str]]]:
    """(place, cells) of every row of a comma-separated table without a header."""
    return [(f"line {number}", cells) for number, cells in _cells(path, _decode(path), ",")]


def _cells(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """(number of its last line, cells) of every row that is not empty."""
    limit = csv.field_size_limit(max(len(text), 1))  # the module's own, of 128 KiB, is for all that use it
    # strict: an unclosed quote would otherwise swallow the rows after it without a word
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise PromptError(f"{path}:{reader.line_num}: not a {path.suffix[1:]} table ({error}).") from error
    finally:
        csv.field_size_limit(limit)


def _separator(text: str, expected: str) -> str:
    """What separates the columns: as the file's ending says, or what makes several of the one found with that."""

    def columns(delimiter: str) -> int:
        head = next(csv.reader(text.lstrip("\r\n").splitlines()[:1], delimiter=delimiter), [])
        return len(head) if sum(not name.strip() for name in head) <= 1 else 0  # pandas leaves its index without a name

    if columns(expected) > 1:
        return expected
    return max((expected, *_SEPARATORS), key=columns)


def _read_csv(path: Path, delimiter: str = ",") -> list[Row]:
    text = _decode(path)
    delimiter = _separator(text, delimiter)
    table = _cells(path, text, delimiter)
    header = [name.strip() for name in table[0][1]] if table else []
    _check_header(header, path)
    for number, cells in table[1:]:
        if len(cells) != len(header):
            raise PromptError(
                f"{path}:{number}: expected {len(header)} columns as in the header, found {len(cells)}. "
                f"Is a quotation mark or the separator {delimiter!r} left unquoted?"
            )
    return [Row(f"line {number}", dict(zip(header, cells, strict=True))) for number, cells in table[1:]]


def _check_header(header: list[str], path: Path) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise PromptError(
            f"{path}: the header names {', '.join(map(repr, repeated))} more than once. "
            "Expected a first line that names each column."
        )


def _read_text(path: Path) -> list[Row]:
    lines = _decode(path).removesuffix("\n").split("\n")
    return [Row(f"line {number}", line.rstrip("\r")) for number, line in enumerate(lines, start=1)]


def _read_parquet(path: Path) -> list[Row]:
    # `datasets` would first copy the file into its cache; its own reader does without
    import pyarrow
    import pyarrow.parquet

    try:
        return from_objects(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, *MALFORMED, OSError) as error:
        raise PromptError(f"{path}: not a parquet file ({error}).") from error


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror or error}).") from error
    mark = b"\xef\xbb\xbf"
    skipped = len(mark) if data.startswith(mark) else 0
    try:
        text = data[skipped:].decode("utf-8")
        if not _wide(data):
            return text
        offset = data.index(b"\0")
    except UnicodeDecodeError as error:
        offset = skipped + error.start
    line = data.count(b"\n", 0, offset) + 1
    message = f"{path}: byte {offset} (0x{data[offset]:02x}, line {line}) is not UTF-8."
    if (encoding := _encoding(data)) is None:
        raise PromptError(f"{message} Save the file as UTF-8.")
    command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > NEW{path.suffix}"
    raise PromptError(f"{message} It reads as {encoding}; try: {command}")


def _encoding(data: bytes) -> str | None:
    """Another encoding than UTF-8 that the bytes are text in, as iconv calls it."""
    for name in (*_wide(data), "WINDOWS-1252"):  # which is Latin-1 and what is written with it
        with suppress(UnicodeDecodeError):
            data.decode(name)
            return name
    return None


def _wide(data: bytes) -> list[str]:
    """Encodings in units of two or four bytes that the file may be in, by its mark or the zeros in it."""
    # those of UTF-32 begin with those of UTF-16
    marks = {"UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    halves = (("UTF-16LE", data[1::2]), ("UTF-16BE", data[::2]))  # zero in most letters of most texts
    found = [name for name, either in marks.items() if data.startswith(either)]
    return found + [name for name, half in halves if 2 * half.count(0) > len(half)]


def _missing(path: Path) -> str:
    message = f"{path}: no such file."
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir()]
        similar = difflib.get_close_matches(path.name, names, cutoff=0.5)
        message += f" Similar names there: {', '.join(similar)}." if similar else ""
    else:
        message += f" The folder {path.parent} does not exist either."
    return message + " (To pass prompts themselves, give a list.)"


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
