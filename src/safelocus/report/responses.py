"""What models answered, prompt by prompt, one column per run and state. Only ever made on request.

Reads every `responses.jsonl` of a run: `prompt`, `response`, and where given `set`, `system`, `refused`,
`incoherent`, `correct`, `judgements`, `safety`. Answers to the same prompt stand side by side.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from safelocus.report.runs import ReportRun

_ALIKE = ("set", "system", "prompt")


def responses_json(runs: Sequence[ReportRun]) -> dict[str, Any]:
    """`columns`: runs and states; `rows`: set, prompt, and per column the answer with its tags, or None."""
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
