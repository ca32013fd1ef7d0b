"""The sets of the real model's tables: which prompts find weights, train, validate and measure; disjoint by content.

    find       128 of AdvBench                           identification
    refusals   circuit-breakers, rows that refuse        training
    benign     instruct                                  training, retained
    harmbench, advbench, xstest_unsafe                   measuring: should be refused
    xstest_safe, alpaca                                  measuring: should be answered
    ag_news, pubmedqa                                    measuring: utility
    texts      100 of instruct, not trained on           measuring: perplexity

The files lie outside the repository; $SAFELOCUS_DATA says where. XSTest, HarmBench and the measured part of AdvBench
are never trained or chosen on.
"""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import safelocus as sl
from safelocus.evaluation import Task
from safelocus.evaluation.judges import RefusalMatcher
from safelocus.prompts import PromptSet

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


def named(prompts: PromptSet, name: str) -> PromptSet:
    return replace(prompts, source=name)
