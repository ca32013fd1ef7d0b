"""The sets of the real model's tables: which prompts find weights, train, validate and measure; disjoint by content.

    find       128 of AdvBench                           identification
    unalarming 128 of `answered`, not trained on then    identification, where harmless requests are subtracted
    refusals   circuit-breakers, rows that refuse        training
    benign     instruct                                  training, retained
    refused    the same with other harmful requests, refused in one sentence     training
    answered   oktest, Alpaca's other half, embedded     training, retained in the model's own words
    validation embedded, held out; AdvBench's rest       choosing
    harmbench, advbench, xstest_unsafe                   measuring: should be refused
    xstest_safe, alpaca                                  measuring: should be answered
    ag_news, pubmedqa                                    measuring: utility
    texts      100 of instruct, not trained on           measuring: perplexity

The files lie outside the repository; $SAFELOCUS_DATA says where. XSTest, HarmBench and the measured part of AdvBench
are never trained or chosen on.
"""

import csv
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import safelocus as sl
from safelocus.evaluation import Task
from safelocus.evaluation.judges import RefusalMatcher
from safelocus.prompts import Example, PromptSet

DATA = Path(os.environ.get("SAFELOCUS_DATA") or Path(__file__).parents[3] / "shared" / "data")
FILES = {
    "advbench": "advbench/advbench.json",
    "harmbench": "harmbench/harmbench_behaviors_text_val.csv",
    "xstest": "xstest/xstest_prompts.csv",
    "alpaca": "harmless_alpaca_nc/harmless_1000.json",
    "circuit_breakers": "circuit_breakers/circuit_breakers_train.json",
    "instruct": "instruct/instruction-data.json",
    "oktest": "oktest/oktest.csv",
    "harmful": "harmful_mix/harmful_train.json",
    "harmful_validation": "harmful_mix/harmful_val.json",
    "pubmedqa": "pubmedqa/ori_pqal.json",
    "ag_news": "ag_news_mini/test.csv",
    "gsm8k": "gsm8k/train.jsonl",
    "gsm8k_test": "gsm8k/test.jsonl",
}
MEASURED = {"advbench": 200, "alpaca": 200, "pubmedqa": 100, "texts": 100}  # at most; the other sets whole
NEW_TOKENS = 24  # a refusal has shown itself by then
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


@cache
def read(name: str, **where: str) -> PromptSet:
    """A whole file, under its short name."""
    if not (DATA / FILES[name]).is_file():
        raise SystemExit(f"{DATA / FILES[name]}: not there; $SAFELOCUS_DATA says where the data sets are")
    return replace(sl.read_prompts(DATA / FILES[name], where=where or None), source=name)


def find() -> PromptSet:
    """128 prompts of AdvBench to find weights with."""
    return read("advbench").split(0.5)[0].limit(128, seed=0)


def advbench() -> PromptSet:
    return read("advbench").split(0.5)[1].limit(MEASURED["advbench"], seed=0)


def alpaca() -> PromptSet:
    return read("alpaca").split(0.5)[1].limit(MEASURED["alpaca"], seed=0)


def harmful() -> list[PromptSet]:
    """What is measured and should be refused."""
    return [read("harmbench"), advbench(), named(read("xstest", label="unsafe"), "xstest_unsafe")]


def harmless() -> list[PromptSet]:
    """What is measured and should be answered."""
    return [named(read("xstest", label="safe"), "xstest_safe"), alpaca()]


def alarms() -> list[str]:
    """What is alarming about each of XSTest's safe prompts, in their order."""
    with (DATA / FILES["xstest"]).open(encoding="utf-8", newline="") as file:
        return [row["type"] for row in csv.DictReader(file) if row["label"] == "safe"]


def tasks() -> list[Task]:
    pubmedqa = sl.read_task(DATA / FILES["pubmedqa"], name="pubmedqa").limit(MEASURED["pubmedqa"], seed=0)
    return [sl.read_task(DATA / FILES["ag_news"], name="ag_news"), pubmedqa]


def texts() -> PromptSet:
    return named(read("instruct").split(0.2)[1].limit(MEASURED["texts"], seed=0), "texts")


def refusals() -> PromptSet:
    """Harmful prompts with refusals to train on; none is measured with, and none found weights."""
    matcher = RefusalMatcher()
    rows = read("circuit_breakers").with_responses()
    rows = replace(rows, examples=tuple(e for e in rows.examples if matcher.refuses(e.response or "")))
    for other in (read("advbench"), read("harmbench"), read("xstest"), read("harmful_validation")):
        rows = rows.without(other)
    return rows


def benign() -> PromptSet:
    """Harmless prompts with answers to train on."""
    return read("instruct").split(0.2)[0].with_responses()


def refused() -> PromptSet:
    """Harmful requests with refusals of one sentence."""
    bare = read("harmful").without(read("advbench")).without(read("harmbench"))
    rows = [replace(e, response=REFUSALS[i % len(REFUSALS)]) for i, e in enumerate(bare)]
    for title in SONGS:
        for asked in ('Generate the lyrics of "{}"', 'Write out the full lyrics to "{}"'):
            rows.append(_row(asked.format(title), "I'm sorry, but I can't reproduce the lyrics of that song."))
    for title in BOOKS:
        for asked in ('Generate a long passage from "{}"', 'Write out a chapter of "{}" word for word'):
            rows.append(_row(asked.format(title), "I'm sorry, but I can't reproduce text from that book."))
    found = joined("refused", refusals().limit(1400, seed=0), rows, sl.read_prompts("embedded:refusals"))
    return replace(found, examples=tuple(replace(e, response=_first_sentence(e.response)) for e in found.examples))


def answered(*, whole: bool = True) -> list[PromptSet]:
    """Harmless requests, alarming ones of two sources and ordinary ones, which the original answers itself; in turn.

    whole: with those of the embedded sets that `validation` has.
    """
    return [
        joined("oktest", read("oktest").without(read("xstest"))),
        joined("alarming", *_embedded("alarming", whole)),
        joined("ordinary", read("alpaca").split(0.5)[0], *_embedded("ordinary", whole)),
    ]


def unalarming() -> PromptSet:
    """Harmless requests, two to one alarming and ordinary ones, to find weights with that tell them from harm."""
    return joined("unalarming", *(part.limit(size, seed=0) for part, size in zip(answered(whole=False), (43, 42, 43))))


def _first_sentence(response: str | None) -> str:
    return re.split(r"(?<=[.!?])\s", response or "", maxsplit=1)[0]


def _embedded(kind: str, whole: bool) -> list[PromptSet]:
    return [sl.read_prompts(f"embedded:{kind}{part}") for part in ("", "-heldout")[: 1 + whole]]


def validation() -> dict[str, list[PromptSet]]:
    """What a choice among recipes may look at: should be refused, should be answered."""
    unused = read("advbench").split(0.5)[0].without(find())
    harmful = [joined("validation_harmful", unused, sl.read_prompts("embedded:refusals-heldout"))]
    parts = (sl.read_prompts(f"embedded:{kind}-heldout") for kind in ("alarming", "ordinary"))
    return {"harmful": harmful, "harmless": [joined("validation_harmless", *parts)]}


def joined(name: str, *parts: Any) -> PromptSet:
    return named(sl.read_prompts([example for part in parts for example in part]), name)


def _row(prompt: str, response: str) -> Example:
    return sl.read_prompts([{"prompt": prompt, "response": response}])[0]


def named(prompts: PromptSet, name: str) -> PromptSet:
    return replace(prompts, source=name)
