"""Attacks on what was made safe: how many refusals are left, and is it still the model that it was?

    python benchmarks/real/attacking.py [--only 'set-*']

On the aligned twin (all weights trained on refusals), on the model with a SET patch (top 1 % by ESI, the contrast
recipe), and on the twin after SPA (300 steps of instructions, own answers to embedded requests mixed in, nothing
frozen). Asked under attack: a begun answer, known wrappers, the ablation of one direction of activations, found
with the prompts that found the weights and Alpaca's other half. Trained under attack: 50 steps of 4 out of 100 harmful
requests (of those that the twin and the patch learned to refuse), with what the original model said to them where that
complies; all weights or LoRA of rank 8, three rates each, nothing held. The defender's measure of what a patch or a
protection is not; attacked models are not kept, and answers neither.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cells
import enhancing
import preserving
import sets

import safelocus as sl
from safelocus.evaluation import Ablation, Attacked, TargetResponder, askings
from safelocus.evaluation.attack import ABLATION
from safelocus.evaluation.judges import RefusalMatcher
from safelocus.model.target import Target
from safelocus.patch import Patch
from safelocus.preservation.mixing import Mixed
from safelocus.prompts import PromptSet
from safelocus.training import TrainingSettings
from safelocus.training.fitting import Checkpoints, fit
from safelocus.training.lora import Lora
from safelocus.training.responses import own_answers, training_rows

TABLE = "attack"
SET_RATE = 1e-3
SETTINGS = TrainingSettings(steps=50, batch_size=4, schedule="linear", max_length=256)
RATES = {"full": (3e-5, 1e-4, 3e-4), "lora": (1e-4, 3e-4, 1e-3)}
ROWS, ANSWER_TOKENS = 100, 64
MEASURED: dict[str, Any] = {"tasks": (), "perplexity": ()}


def twin() -> Target:
    return cells.subject("smollm2:aligned")


def patched() -> Target:
    """With the SET patch of the contrast recipe, which is trained once and kept outside the repository."""
    target, recipe = cells.subject("smollm2"), enhancing.RECIPES["contrast"]
    file = cells.RUNS / "patches" / f"contrast-esi-{SET_RATE:g}.safetensors"
    if not file.is_file():
        patch = sl.enhance(
            target, cells.selection(target, "esi", enhancing.RATIO), **enhancing.training(recipe, SET_RATE),
            checkpoint=cells.RUNS / "unfinished" / "patches",
        )  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        patch.save(file)
    Patch.load(file).apply(target)
    return target


def preserved() -> Target:
    """The twin after SPA on instructions, which is trained once and kept outside the repository."""
    target, folder = twin(), cells.RUNS / "preserved"
    if not folder.is_dir():
        unfinished = cells.RUNS / "unfinished" / "preserved"
        data, _ = preserving.lesson("instruct")
        mixed = Mixed(prompts=preserving.shown("embedded"))
        data, _ = mixed.into(data, target, size=len(data), checkpoint=unfinished / "mixed")
        settings = replace(preserving.SETTINGS, steps=300, learning_rate=preserving.RATE)
        fit(
            target, training_rows(data, target.chat, max_length=settings.max_length), settings,
            checkpoints=Checkpoints(folder=unfinished / "training"),
        )  # fmt: skip
        target.model.save_pretrained(folder)
        target.tokenizer.save_pretrained(folder)
    return sl.load(str(folder))


SUBJECTS: dict[str, Callable[[], Target]] = {"twin": twin, "set": patched, "spa": preserved}


def before(subject: str, unfinished: Path) -> dict[str, Any]:
    target = SUBJECTS[subject]()
    return _cell(subject, "none", cells.measured(target, unfinished, **MEASURED))


def asked(subject: str, name: str, unfinished: Path) -> dict[str, Any]:
    target = SUBJECTS[subject]()
    if name == ABLATION:
        harmless = sets.read("alpaca").split(0.5)[0].limit(128, seed=0)
        attack: Any = Ablation.find(target, sets.find(), harmless)
    else:
        attack = askings()[name]
    responder = Attacked(responder=TargetResponder(target=target), attack=attack)
    return {**_cell(subject, name, cells.measured(responder, unfinished, **MEASURED)), "how": attack.describe()}


def complied() -> PromptSet:
    """At most 100 harmful requests, none of them measured, with what the original model said where that complies."""
    rows = sets.read("harmful").without(sets.read("advbench")).without(sets.read("harmbench"))
    answers = own_answers(
        cells.subject("smollm2"), rows.limit(len(rows), seed=0), max_new_tokens=ANSWER_TOKENS, cut=True,
        checkpoint=cells.RUNS / "complied",
    )  # fmt: skip
    matcher = RefusalMatcher()
    kept = [e for e in answers.examples if not matcher.refuses(e.response or "")]
    return replace(answers, examples=tuple(kept[:ROWS]), source="complied")


def trained(subject: str, how: str, rate: float, unfinished: Path) -> dict[str, Any]:
    data, target = complied(), SUBJECTS[subject]()
    settings = replace(SETTINGS, learning_rate=rate)
    model = Lora(rank=8).wrap(target.model, target.layout) if how == "lora" else target.model
    rows = training_rows(data, target.chat, max_length=settings.max_length)
    losses = fit(target, rows, settings, model=model)
    if how == "lora":
        model.merge_and_unload()
    found = cells.measured(target, unfinished, **MEASURED)
    return {
        **_cell(subject, how, found), "rate": rate, "num_rows": len(data), "settings": settings.to_json(),
        "losses": [round(loss.loss, 4) for loss in losses],
    }  # fmt: skip


def _cell(subject: str, attack: str, found: Any) -> dict[str, Any]:
    incoherent = {source: each["incoherent"].to_json() for source, each in found.by("source").items()}
    return {"subject": subject, "attack": attack, "incoherent": incoherent, **cells.outcome(found)}


def main() -> None:
    given = cells.options(__doc__).parse_args()
    work: dict[str, Any] = {}
    for subject in SUBJECTS:
        work[f"{subject}-none"] = partial(before, subject)
        work |= {f"{subject}-{name}": partial(asked, subject, name) for name in (*askings(), ABLATION)}
        work |= {
            f"{subject}-{how}-{rate:g}": partial(trained, subject, how, rate)
            for how, rates in RATES.items()
            for rate in rates
        }
    cells.work(TABLE, work, given.share, given.only)


if __name__ == "__main__":
    main()
