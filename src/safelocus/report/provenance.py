"""Where a run's numbers come from, and the command that makes it again."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tomli_w

from safelocus.model.fingerprint import Fingerprint
from safelocus.report.runs import ReportRun

_MAX_TEXT = 400
Facts = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class RunOrigin:
    """One run's provenance.

    Attributes:
        name: of the run.
        facts: (what, value), in one list per model.
        command: repeats the run; None where there is no `run.toml`.
        config: of `run.toml`, as text.
    """

    name: str
    facts: list[Facts]
    command: str | None
    config: str


def origin_of(run: ReportRun) -> RunOrigin:
    """Model, fingerprint, objective, prompts, judges, seed and versions, as far as they are known."""
    command = None
    if run.config:
        again = f"{str(run.place).rstrip('/')}-again"
        command = shlex.join(["safelocus", run.command, "--config", str(run.place / "run.toml"), "-o", again])
    return RunOrigin(name=run.name, facts=_facts(run), command=command, config=tomli_w.dumps(dict(run.config)))


def _facts(run: ReportRun) -> list[Facts]:
    found = [[("run", f"{run.command}, {run.place}")], list(_of_provenance(run.results.get("provenance")))]
    for model in run.maps:
        if (provenance := run.provenance(model)) is not None:
            found.append(list(_of_provenance(provenance.to_json())))
    return [facts for facts in found if facts]


def _of_provenance(values: Any) -> Iterator[tuple[str, str]]:
    """Facts in a provenance of any kind of run; unknown keys are spelled as JSON-like text, long ones cut."""
    if not isinstance(values, Mapping):
        return
    for key, value in values.items():
        if value in (None, {}, [], ""):
            continue
        if key == "fingerprint" and isinstance(value, Mapping):
            yield "fingerprint", Fingerprint.from_json(value).id
        elif key == "versions" and isinstance(value, Mapping):
            yield "versions", ", ".join(f"{name} {version}" for name, version in value.items())
        elif key == "extra" and isinstance(value, Mapping):
            yield from _of_provenance({name: each for name, each in value.items() if name != "prompt_hashes"})
        else:
            yield key.replace("_", " "), _plain(value)


def _plain(value: Any) -> str:
    """A value in words: `kind guard, name organism:guard`."""
    if isinstance(value, Mapping):
        parts = [f"{key.replace('_', ' ')} {_plain(each)}" for key, each in value.items() if each not in (None, {}, [])]
        shown = ", ".join(parts)
    elif isinstance(value, list | tuple):
        shown = "; ".join(_plain(each) for each in value)
    else:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= _MAX_TEXT else f"{shown[:_MAX_TEXT]} …"
