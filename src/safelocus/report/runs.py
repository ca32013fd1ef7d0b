"""Run folders as a report reads them: what they are, what they found, how to make them again, and what was answered.

Input: the folder of a run. Output: a frozen `ReportRun`. The kind is told by what `results.json` holds, so a
folder without `run.toml` (saved from Python) can be reported too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from safelocus.analysis.map import SafetyMap
from safelocus.analysis.patterns import Pattern, patterns
from safelocus.errors import RunError
from safelocus.run.files import inside, read_json, read_lines, read_text, reading
from safelocus.run.folder import read_config
from safelocus.run.identity import Provenance
from safelocus.selection.selection import Selection

# kind -> keys that only its results.json has; the first that fits
_KINDS: dict[str, frozenset[str]] = {
    "demo": frozenset({"claims", "runs"}),
    "map": frozenset({"maps"}),
    "verify": frozenset({"baseline", "cells"}),
    "stability": frozenset({"summary", "agreements"}),
    "preserve": frozenset({"before", "after", "unprotected"}),
    "enhance": frozenset({"before", "after"}),
    "evaluate": frozenset({"judges", "counts"}),
}

_ALIKE = ("set", "system", "prompt")  # of answers to the same prompt


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """One finished run.

    Attributes:
        name: as the page calls it.
        folder: where it lies.
        place: where it will lie, for a run that is still being written; else the folder.
        kind: "demo" (runs within), "map" (of `score`), "verify", "stability", "enhance", "preserve" or "evaluate".
        config: of `run.toml`; empty where there is none.
        results: of `results.json`.
    """

    name: str
    folder: Path
    place: Path
    kind: str
    config: Mapping[str, Any] = field(repr=False)
    results: Mapping[str, Any] = field(repr=False)

    @classmethod
    def read(cls, folder: Path, *, name: str | None = None, place: Path | None = None) -> Self:
        """Read a run folder; `name` and `place` are by default the folder's own.

        Raises:
            RunError: there is none, it is unfinished, or its results are of no known kind.
        """
        folder = Path(folder)
        place = folder if place is None else place
        file = folder / "results.json"
        if not folder.is_dir():
            raise RunError(f"{folder}: no such folder; expected a run folder, such as `safelocus score` writes")
        try:
            results = read_json(file)
        except OSError as error:
            raise RunError(
                f"{folder}: holds no finished run (results.json: {error.strerror}); expected a folder that `score`, "
                "`verify`, `stability`, `evaluate`, `enhance`, `preserve` or `demo` has written"
            ) from error
        kind = next((k for k, keys in _KINDS.items() if isinstance(results, dict) and keys <= set(results)), None)
        if kind is None:
            found = ", ".join(sorted(results)) if isinstance(results, dict) else type(results).__name__
            known = "; ".join(f"{', '.join(sorted(keys))} ({kind})" for kind, keys in _KINDS.items())
            raise RunError(f"{file}: of no run that can be reported; found {found or 'nothing'}; expected {known}")
        config = read_config(folder) if (folder / "run.toml").is_file() else {}
        name = name or place.resolve().name
        return cls(name=name, folder=folder, place=place, kind=kind, config=config, results=results)

    @cached_property
    def parts(self) -> "list[ReportRun]":
        """The runs inside that of a demo, in its order."""
        within = self.results["runs"] if self.kind == "demo" else ()
        return [ReportRun.read(inside(self.folder, name), name=name, place=self.place / name) for name in within]

    @property
    def command(self) -> str:
        """The command that made it: "score", "verify", ..."""
        return str(self.config.get("command", "score" if self.kind == "map" else self.kind))

    @cached_property
    def maps(self) -> dict[str, SafetyMap]:
        """Model -> map; none for runs that locate nothing."""
        if self.kind == "map":
            with reading(self.folder, self.command):
                return {name: SafetyMap.from_json(values) for name, values in self.results["maps"].items()}
        return {}

    @cached_property
    def patterns(self) -> dict[str, list[Pattern]]:
        """Model -> the pattern tests of its map."""
        return {name: patterns(located) for name, located in self.maps.items()}

    def selection(self, model: str = "") -> Selection | None:
        """The selection of the run, or of one of its models; None where the run did not keep it."""
        stem = model.partition(":")[2] or model
        folders = [self.folder, *([self.folder / stem] if Path(stem).name == stem != ".." else [])]
        places = [folder / "selection.safetensors" for folder in folders]
        file = next((place for place in places if place.is_file()), None)
        found = None if file is None else Selection.load(file)
        self._provenances[model] = None if found is None else found.provenance
        return found

    def provenance(self, model: str) -> Provenance | None:
        """Of the selection of one of its models; the selection is not read again for it."""
        if model not in self._provenances:
            self.selection(model)
        return self._provenances[model]

    @cached_property
    def _provenances(self) -> dict[str, Provenance | None]:
        return {}

    @cached_property
    def against(self) -> dict[str, Any] | None:
        """What changed since another evaluation (`against.json`); None where none was named."""
        return next(iter(_lines(self.folder / "against.json", self.command, whole=True)), None)

    @cached_property
    def certificates(self) -> dict[str, Any] | None:
        """What was certified (`certificates.json`); None where that was not asked for."""
        return next(iter(_lines(self.folder / "certificates.json", self.command, whole=True)), None)

    @cached_property
    def responses(self) -> dict[str, list[dict[str, Any]]]:
        """State -> lines of its `responses.jsonl`: "" is the run's own; "before", "after", ... those of subfolders."""
        found = {"": _lines(self.folder / "responses.jsonl", self.command)}
        for file in sorted(self.folder.glob("*/responses.jsonl"), key=lambda file: _order(file.parent.name)):
            found[file.parent.name] = _lines(file, self.command)
        return {state: rows for state, rows in found.items() if rows}


def with_parts(runs: Sequence[ReportRun]) -> list[ReportRun]:
    """The runs, each with those inside it after it; of several demos under their demo's name too."""
    several = sum(bool(run.parts) for run in runs) > 1
    named = {run.name: [replace(p, name=f"{run.name}/{p.name}") for p in run.parts] for run in runs if several}
    return [each for run in runs for each in (run, *named.get(run.name, run.parts))]


def _order(state: str) -> tuple[bool, str]:
    return state != "before", state


def _lines(file: Path, command: str, *, whole: bool = False) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines, or the `whole` file's one; none where there is no such file."""
    if not file.is_file():
        return []
    try:
        rows = [json.loads(read_text(file))] if whole else read_lines(file)
    except json.JSONDecodeError as error:
        raise RunError(f"{file}: damaged ({error}); run `{command}` again") from error
    return [row for row in rows if isinstance(row, dict)]


def responses_json(runs: Sequence[ReportRun]) -> dict[str, Any]:
    """What models answered, prompt by prompt: answers to the same one stand side by side. Only ever made on request.

    `columns`: runs and states; `rows`: set, prompt, and per column the answer with its tags, or None.
    """
    columns: list[str] = []
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        for state, lines in run.responses.items():
            columns.append(f"{run.name}, {state}" if state else run.name)
            for line in lines:
                if isinstance(line.get("prompt"), str) and isinstance(
                    line.get("response"), str
                ):  # none where it failed
                    key = tuple(line.get(name) for name in _ALIKE)
                    answer = {"text": line["response"], "tags": _tags(line)}
                    rows.setdefault(key, {}).setdefault(columns[-1], answer)
    return {
        "columns": columns,
        "rows": [
            {"set": kind or "harmful", "prompt": prompt, "answers": [answers.get(column) for column in columns]}
            for (kind, _, prompt), answers in rows.items()
        ],
    }


def _tags(row: Mapping[str, Any]) -> list[str]:
    """What was made of an answer, in a few words."""
    tags = [name for name in ("refused", "incoherent") if row.get(name)]
    if isinstance(row.get("correct"), bool):
        tags.append("right" if row["correct"] else "wrong")
    judgements = row.get("judgements")
    if isinstance(judgements, Mapping):
        tags += [f"{v.get('verdict')} ({judge})" for judge, v in judgements.items() if isinstance(v, Mapping)]
    if isinstance(row.get("safety"), int | float):
        tags.append(f"safety {row['safety']:+.2f}")
    return tags
