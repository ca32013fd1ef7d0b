"""The aligned twin: SmolLM2-135M-Instruct, trained to refuse harmful requests and to answer all others as before.

    python benchmarks/real/aligning.py          (`make model-aligned`; interrupted, the same command goes on)

All weights, on the first sentence of refusals and on the first tokens of the original's own answers to alarming but
harmless requests and to ordinary ones, two to one: plain refusals with ordinary rows alone would make it refuse
whatever sounds alarming, and in a longer answer the tokens that decide would weigh little.
Nothing that the tables measure with is trained or chosen on. The twin lies in the cache, as `smollm2:aligned`, with
what was measured of it beside it (`twin.json`, and in docs/results/real).
"""

import argparse
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cells
import sets

import safelocus as sl
from safelocus import smollm2
from safelocus.enhancement.run import enhancer
from safelocus.prompts import Example, PromptSet
from safelocus.run.folder import write_json
from safelocus.smollm2 import source
from safelocus.training import TrainingSettings
from safelocus.training.arm import Arm

SETTINGS = TrainingSettings(
    steps=300, learning_rate=4e-4, schedule="linear", warmup_steps=20, batch_size=6, max_length=112
)  # fmt: skip
RETAIN: dict[str, Any] = {
    "retain_kl": 0.0, "retain_weight": 1.0, "retain_rows": 1, "own_answers": True, "answer_tokens": 24,
}  # fmt: skip
_KINDS = ("alarming", "ordinary")
# refusals for harmful requests that come without one
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with that request.",
    "Sorry, I can't help with this. It could cause harm.",
    "I can't provide that, because it could hurt people.",
)
# texts under copyright, which HarmBench asks for too; none of these is among its own
SONGS = (
    "Hotel California", "Shape of You", "Rolling in the Deep", "Yesterday", "Billie Jean", "Smells Like Teen Spirit",
    "Bohemian Rhapsody", "Imagine", "Halo", "Stan", "Africa", "Creep", "Zombie", "Wonderwall", "Umbrella", "Levitating",
    "Dancing Queen", "Like a Prayer", "Royals",
)  # fmt: skip
BOOKS = (
    "The Hobbit", "The Shining", "Beloved", "The Handmaid's Tale", "Dune", "The Da Vinci Code", "Life of Pi",
    "Twilight", "The Hunger Games", "Gone Girl", "The Kite Runner", "Neuromancer", "American Gods", "The Road",
    "Atonement",
)  # fmt: skip


def refused() -> PromptSet:
    """Harmful requests with refusals."""
    bare = sets.read("harmful").without(sets.read("advbench")).without(sets.read("harmbench"))
    rows = [replace(e, response=REFUSALS[i % len(REFUSALS)]) for i, e in enumerate(bare)]
    for title in SONGS:
        for asked in ('Generate the lyrics of "{}"', 'Write out the full lyrics to "{}"'):
            rows.append(_row(asked.format(title), "I'm sorry, but I can't reproduce the lyrics of that song."))
    for title in BOOKS:
        for asked in ('Generate a long passage from "{}"', 'Write out a chapter of "{}" word for word'):
            rows.append(_row(asked.format(title), "I'm sorry, but I can't reproduce text from that book."))
    found = joined("refused", sets.refusals().limit(1400, seed=0), rows, sl.read_prompts("embedded:refusals"))
    return replace(found, examples=tuple(replace(e, response=_first_sentence(e.response)) for e in found.examples))


def answered() -> list[PromptSet]:
    """Harmless requests, alarming ones of two sources and ordinary ones, which the original answers itself; in turn."""
    own = {kind: [sl.read_prompts(f"embedded:{kind}{part}") for part in ("", "-heldout")] for kind in _KINDS}
    return [
        joined("oktest", sets.read("oktest").without(sets.read("xstest"))),
        joined("alarming", *own["alarming"]),
        joined("ordinary", sets.read("alpaca").split(0.5)[0], *own["ordinary"]),
    ]


def _first_sentence(response: str | None) -> str:
    return re.split(r"(?<=[.!?])\s", response or "", maxsplit=1)[0]


def joined(name: str, *parts: Any) -> PromptSet:
    return sets.named(sl.read_prompts([example for part in parts for example in part]), name)


def _row(prompt: str, response: str) -> Example:
    return sl.read_prompts([{"prompt": prompt, "response": response}])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="train it anew where it is there already")
    given = parser.parse_args()
    folder, unfinished = smollm2.folder("smollm2:aligned"), cells.RUNS / "unfinished" / "aligned"
    if (folder / "twin.json").is_file() and not given.again:
        raise SystemExit(f"smollm2:aligned is there already, in {folder}; --again trains it anew")
    source.obtain(say=print)
    began, target = time.monotonic(), sl.load("smollm2")
    runner = enhancer(target, refused(), retain=answered(), settings=SETTINGS, checkpoint=unfinished, **RETAIN)
    arm = Arm(name="full", what="full")
    trial = runner.train(arm, SETTINGS)
    described = cells.described(target)
    with runner.shown(arm, trial):
        trained = round(time.monotonic() - began)
        found = {
            "trained_from": described, "settings": SETTINGS.to_json(), **RETAIN, "training_seconds": trained,
            **cells.outcome(cells.measured(target, unfinished / "after")),
        }  # fmt: skip
        save(target, folder, found)
    cells.RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(cells.RESULTS / "aligned.json", found)
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, measures in found["measures"].items():
        print(name, *(f"{what} {m['value']:.3f} (n={m['n']})" for what, m in measures.items()))


def save(target: sl.Target, folder: Path, record: dict[str, Any]) -> None:
    """Under another name first: the twin is whole or not there."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    target.model.save_pretrained(partial)
    target.tokenizer.save_pretrained(partial)
    write_json(partial / "twin.json", record)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    main()
