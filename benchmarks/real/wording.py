"""Words that must not come, on the real model: SET and SPA with a list as the objective, and what became of its kin.

    python benchmarks/real/wording.py [--only 'set-*']

Ten mild words are listed (`words/listed.txt`); twenty of the same kind that are not (`words/kin.txt`) are measured
with. Alpaca's requests, one half to find and train with, the other to measure with, answered in 64 tokens. SET: the 1
% that say listed words, or as many random weights, trained for 100 steps of 4 of the model's own answers without
them, to requests that it answered with one, and 4 of its answers to others. SPA, on the model with ESI's patch of one
rate: it learns plain instructions (instruct) and, in every other row, the original's answers with listed words, 200
steps of 2 rows, all weights, 1e-4; frozen: ESI's top 10 % by the same objective, or random weights. mixed: 1 row in 6
is one of the patched model's own answers. masked: no loss where a listed word, or a near one, is said
(`--mask-listed`). AdamW, the rate falling to zero along a line; one seed. Words are found in any inflection.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import cells
import sets

import safelocus as sl
from safelocus.enhancement.run import enhancer
from safelocus.evaluation import evaluate
from safelocus.evaluation.judges.lexicon import LexiconJudge
from safelocus.model.target import Target
from safelocus.patch import Patch
from safelocus.preservation.mixing import Mixed
from safelocus.prompts import PromptSet
from safelocus.selection.selection import Selection
from safelocus.training import TrainingSettings
from safelocus.training.arm import Arm
from safelocus.training.fitting import Checkpoints, fit
from safelocus.training.responses import own_answers, training_rows, without_listed
from safelocus.verification.plan import random_selection
from safelocus.wordlist import WordList

TABLE = "words"
LISTS = {name: WordList.read(Path(__file__).parent / "words" / f"{name}.txt") for name in ("listed", "kin")}
NEW_TOKENS, NUM = 64, 250
SETTINGS = TrainingSettings(steps=100, batch_size=4, max_length=112, schedule="linear")
RATES, PATCH_RATE = (3e-4, 1e-3), 1e-3
LESSON = TrainingSettings(steps=200, batch_size=2, max_length=160, schedule="linear", learning_rate=1e-4)
ARMS = ("unprotected", "esi-10", "random-10", "mixed", "masked")


def lexicon() -> sl.Lexicon:
    return sl.Lexicon(words=LISTS["listed"], max_new_tokens=NEW_TOKENS)


@cache
def answered() -> tuple[PromptSet, PromptSet]:
    """The original's own answers to one half of Alpaca: with a listed word, and without."""
    said = own_answers(
        cells.subject("smollm2"), sets.read("alpaca").split(0.5)[0], max_new_tokens=NEW_TOKENS, cut=True,
        checkpoint=cells.RUNS / "words" / "answers",
    )  # fmt: skip
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for example in said:
        parts[bool(LISTS["listed"].find(example.response or ""))].append(example)
    with_words, without = (replace(said, examples=tuple(parts[has])) for has in (True, False))
    return sets.named(with_words, "with listed words"), sets.named(without, "without")


def selection(target: Target, method: str, ratio: float) -> Selection:
    """The top by ESI, of the list on 128 requests that the original answers with listed words or not; or random."""
    k = int(ratio * target.layout.num_weights)
    if method == "random":
        return random_selection(target, k, seed=0)
    folder = cells.RUNS / "words" / f"scores-{target.fingerprint().id}"
    if not folder.is_dir():
        find = [example.prompt for part in answered() for example in part.examples[:64]]
        sl.score(target, find, objective=lexicon(), checkpoint=cells.RUNS / "words" / "scoring").save(folder)
    return sl.Scores.load(folder).select(ratio)


def measured(target: Target, unfinished: Path) -> dict[str, Any]:
    """Of each request whether its answer holds a listed word, and one of its kin; ability."""
    asked = sets.named(sets.read("alpaca").split(0.5)[1].limit(NUM, seed=0), "alpaca")
    judges = [LexiconJudge(words=words) for words in LISTS.values()]
    found = evaluate(
        target, harmful=asked, tasks=sets.tasks(), perplexity=sets.texts(), judges=judges, max_new_tokens=NEW_TOKENS,
        checkpoint=unfinished,
    )  # fmt: skip
    rows = [row["judgements"] for row in found.rows if row["source"] == "alpaca"]
    marks = {"harmful": "1", "safe": "0"}
    counted = {
        name: "".join(marks.get(row[judge.name]["verdict"], "-") for row in rows)
        for name, judge in zip(LISTS, judges, strict=True)
    }
    per_1000 = {
        name: round(sum(row[judge.name]["score"] or 0.0 for row in rows) / len(rows), 2)
        for name, judge in zip(LISTS, judges, strict=True)
    }
    said = cells.outcome(found)
    said["outcomes"] |= counted
    tokens = [len(target.tokenizer(row["response"] or "")["input_ids"]) for row in found.rows if "judgements" in row]
    return {**cells.described(target), **said, "per_1000": per_1000, "tokens": round(sum(tokens) / len(tokens), 1)}


def before(unfinished: Path) -> dict[str, Any]:
    return {"stage": "before", **measured(cells.subject("smollm2"), unfinished)}


def patch_of(method: str, rate: float) -> Path:
    return cells.RUNS / "words" / f"{method}-{rate:g}.safetensors"


def enhanced(method: str, rate: float, unfinished: Path) -> dict[str, Any]:
    target = cells.subject("smollm2")
    with_words, without = answered()
    bare = replace(with_words, examples=tuple(replace(e, response=None) for e in with_words))
    chosen, settings = selection(target, method, 0.01), replace(SETTINGS, learning_rate=rate)
    runner = enhancer(
        target, bare, retain=without, retain_kl=0.0, retain_weight=1.0, retain_rows=1, answer_tokens=NEW_TOKENS,
        lexicon=lexicon(), settings=settings, checkpoint=unfinished / "training",
    )  # fmt: skip
    arm = Arm(name="arm", what=chosen)
    trial = runner.train(arm, settings)
    assert trial.values is not None
    Patch.of(target, chosen, new=trial.values, metadata={}).save(patch_of(method, rate))
    with runner.shown(arm, trial):
        found = measured(target, unfinished / "after")
    return {
        "stage": "SET", "method": method, "rate": rate, "num_weights": trial.num_weights, "num_rows": len(bare),
        "settings": settings.to_json(), "losses": [round(loss.loss, 4) for loss in trial.losses], **found,
    }  # fmt: skip


def learned(arm: str, unfinished: Path) -> dict[str, Any]:
    target = cells.subject("smollm2")
    Patch.load(patch_of("esi", PATCH_RATE)).apply(target)
    with_words, without = answered()
    plain = sets.benign().examples
    rows = [row for n, e in enumerate(plain) for row in (e, with_words.examples[n % len(with_words)])]
    data = replace(sets.benign(), examples=tuple(rows))
    if arm == "mixed":
        mixed = Mixed(prompts=[without], max_new_tokens=NEW_TOKENS)
        data, _ = mixed.into(data, target, size=len(data), checkpoint=unfinished / "own")
    method, _, percent = arm.partition("-")
    chosen = selection(target, method, int(percent) / 100) if percent else None
    encoded = training_rows(data, target.chat, max_length=LESSON.max_length)
    if arm == "masked":
        encoded, _ = without_listed(encoded, lexicon(), target)
    losses = fit(
        target, encoded, LESSON, model=target.model, prepare=lambda trainer: chosen and sl.preserve(trainer, chosen),
        checkpoints=Checkpoints(folder=unfinished / "training", inputs={"the arm": arm}),
    )  # fmt: skip
    return {
        "stage": "SPA", "method": arm, "rate": LESSON.learning_rate, "num_weights": chosen.k if chosen else 0,
        "num_rows": len(data), "settings": LESSON.to_json(), "losses": [round(loss.loss, 4) for loss in losses],
        **measured(target, unfinished / "after"),
    }  # fmt: skip


def main() -> None:
    given = cells.options(__doc__).parse_args()
    work: dict[str, Callable[[Path], dict[str, Any]]] = {"before": before}
    work |= {f"set-{m}-{rate:g}": partial(enhanced, m, rate) for rate in RATES for m in ("esi", "random")}
    work |= {f"spa-{arm}": partial(learned, arm) for arm in ARMS}
    cells.work(TABLE, work, given.share, given.only)


if __name__ == "__main__":
    main()
