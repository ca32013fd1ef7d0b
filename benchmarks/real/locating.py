"""The map of the real model: where the top 1 % by ESI lie, by gradient and SNIP too, and how stable that is.

    python benchmarks/real/locating.py [--only smollm2-esi]

S by refusal openings on 128 prompts of AdvBench. One cell per model and score, one per model for two halves of the
prompts, one per overlap of two selections ("apart": by S of harmful requests minus S of harmless ones, 128 of each).
"""

from functools import partial
from pathlib import Path
from typing import Any

import cells
import sets

import safelocus as sl
from safelocus.analysis.map import safety_map
from safelocus.analysis.patterns import patterns
from safelocus.scoring.comparison import compare
from safelocus.scoring.scores import Scores

TABLE = "map"
METHODS = ("esi", "gradient", "snip")
MODELS = ("smollm2", "smollm2:aligned")
RATIO = 0.01


def located(model: str, method: str, unfinished: Path) -> dict[str, Any]:
    target = cells.subject(model)
    found = cells.scores(target, method, checkpoint=unfinished)
    return {"method": method, "prompts": len(sets.find()), **cells.described(target), **of(found)}


def of(found: Scores) -> dict[str, Any]:
    """The map of scores, the patterns tested on it, and the overlap with what else was selected for this model."""
    selection = found.select(RATIO)
    shown = safety_map(found, selection)
    return {"map": shown.to_json(), "patterns": [pattern.to_json() for pattern in patterns(shown)]}


def halves(model: str, unfinished: Path) -> dict[str, Any]:
    """ESI from two halves of the prompts: do they agree?"""
    target, prompts = cells.subject(model), sets.find()
    first, second = (
        sl.score(target, prompts[start::2], objective=sl.Refusal(), checkpoint=unfinished / str(start))
        for start in (0, 1)
    )
    compared = compare(first, second, ratio=RATIO)
    return {"prompts": [len(prompts[0::2]), len(prompts[1::2])], **cells.described(target), **compared.to_json()}


def between(first: tuple[str, str], second: tuple[str, str], _: Path) -> dict[str, Any]:
    """Overlap of two selections of (model, method): scores of one model, or one score of both."""
    a, b = (cells.selection(cells.subject(model), method, RATIO) for model, method in (first, second))
    return {"first": first, "second": second, **compare(a, b).to_json()}


def main() -> None:
    given = cells.options(__doc__).parse_args()
    work: dict[str, Any] = {}
    for model in MODELS:
        name = model.replace(":", "-")
        work |= {f"{name}-{method}": partial(located, model, method) for method in METHODS}
        work[f"{name}-halves"] = partial(halves, model)
        work |= {f"{name}-esi-{other}": partial(between, (model, "esi"), (model, other)) for other in METHODS[1:]}
    work[f"{MODELS[0]}-esi-{cells.APART.replace(' ', '-')}"] = partial(
        between, (MODELS[0], "esi"), (MODELS[0], cells.APART)
    )
    work["models"] = partial(between, (MODELS[0], "esi"), (MODELS[1], "esi"))
    cells.work(TABLE, work, given.share, given.only)


if __name__ == "__main__":
    main()
