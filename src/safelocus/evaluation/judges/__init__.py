"""Judges: what turns a prompt and a response into harmful, safe, partial or unscorable, with evidence.

`load_judge` takes a judge by name: `reader` (does it refuse?), `refusal` (the same by opening phrases alone),
`guard:NAME` (a folder, hub id or `organism:guard`), `lexicon:FILE` (does it hold a listed expression?) or
`rubric:NAME` (a shipped rubric or a .toml file, asked of a model behind an endpoint).
"""

from pathlib import Path
from typing import Any

from safelocus.errors import JudgeError
from safelocus.evaluation.judges.cache import default_cache
from safelocus.evaluation.judges.endpoint import Endpoint, Usage
from safelocus.evaluation.judges.guard import GuardJudge
from safelocus.evaluation.judges.lexicon import LexiconJudge
from safelocus.evaluation.judges.reader import RefusalReader
from safelocus.evaluation.judges.refusal import RefusalMatcher
from safelocus.evaluation.judges.rubric import Rubric, RubricJudge, shipped_rubrics
from safelocus.evaluation.judges.verdict import Judge, Judgement, ScreeningJudge, Verdict
from safelocus.wordlist import WordList

__all__ = [
    "Endpoint",
    "GuardJudge",
    "Judge",
    "Judgement",
    "LexiconJudge",
    "RefusalMatcher",
    "RefusalReader",
    "Rubric",
    "RubricJudge",
    "ScreeningJudge",
    "Usage",
    "Verdict",
    "default_cache",
    "load_judge",
    "shipped_rubrics",
]


def load_judge(
    name: str,
    *,
    threshold: float = 0.0,
    endpoint: Endpoint | None = None,
    **guard_options: Any,
) -> Judge:
    """The judge called `name`.

    Args:
        name: `reader`, `refusal`, `guard:NAME`, `lexicon:FILE` or `rubric:NAME`.
        threshold: of a guard: log-odds of safe above which a response is safe.
        endpoint: the model that a rubric is put to.
        **guard_options: for `Guard.load` (`description`, `dtype`, `device`, ...).

    Raises:
        JudgeError: no such judge or rubric, or a rubric without an endpoint.
        ModelError: the guard cannot be loaded.
        WordListError: the list of expressions cannot be read.

    Example:
        >>> load_judge("reader").name
        'reader'
    """
    kind, _, rest = name.partition(":")
    if name == "reader":
        return RefusalReader()
    if name == "refusal":
        return RefusalMatcher()
    if kind == "guard" and rest:
        from safelocus.objective import Guard  # only who asks for a guard waits for torch

        return GuardJudge(guard=Guard.load(rest, **_path(guard_options)), threshold=threshold)
    if kind == "lexicon" and rest:
        return LexiconJudge(words=WordList.read(rest))
    if kind == "rubric" and rest:
        rubric = Rubric.load(rest)
        if endpoint is None:
            raise JudgeError(
                f"{name}: a rubric is put to a language model; give an endpoint and its model, e.g. "
                'Endpoint(base_url="http://localhost:8000/v1", model="...")'
            )
        return RubricJudge(endpoint=endpoint, rubric=rubric)
    raise JudgeError(
        f"no judge {name!r}; expected `reader`, `refusal`, `guard:NAME` (e.g. guard:organism:guard), "
        f"`lexicon:FILE` (a list of expressions) or `rubric:NAME` with one of {', '.join(shipped_rubrics())}"
    )


def _path(options: dict[str, Any]) -> dict[str, Any]:
    description = options.get("description")
    return {**options, "description": Path(description)} if description else options
