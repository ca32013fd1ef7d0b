"""From a short list of words, keep a model from learning all their kind: trained, measured, certified and attacked.

    python benchmarks/lexicon/run.py [--seeds 3] [--only 'train/*']

Each cell (`docs/results/lexicon/TABLE/WAY-SEED.json`) is measured once, on one core, and found again, so the command
can be stopped and started at will. Tables: train (what the model does on held-out inputs), certify (its smoothed
model), attack (tries to break the certificate). Then it writes `docs/results/lexicon.md`. What stands there under
"## Reading" is written by people, and kept.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import Any

import casual
import measuring
import tables
import torch
import training

import safelocus as sl
from safelocus.run.files import write_json

RUNS = tables.ROOT / "runs" / "lexicon"
WAYS = (
    "plain", "filtered", "masked", "widened", "weighted", "projected", "eliminated", "plain+deletion",
    "widened+deletion", "eliminated+deletion",
)  # fmt: skip
CERTIFIED = ("plain", "widened", "eliminated", "plain+deletion", "widened+deletion", "eliminated+deletion")


def model(way: str, seed: int) -> sl.Target:
    """The trained model, which is kept with the facts of its training."""
    folder = RUNS / f"{way}-{seed}"
    if not (folder / "facts.json").is_file():
        scouted = way.startswith(("widened", "weighted", "projected", "eliminated"))
        found = training.pattern(model("plain", seed)) if scouted else None
        began = time.process_time()
        target, facts = training.train(way, seed, found)
        target.model.save_pretrained(folder)
        facts |= {"cpu_seconds": round(time.process_time() - began)}
        if found is not None:
            facts["pattern"] = {
                "similarity": found.similarity, "neighbours": len(found.words) - len(casual.LISTED),
                "unlisted": sum(word in casual.UNLISTED for word in found.words),
                "innocent": [word for word in found.words if word not in casual.MILD],
            }  # fmt: skip
        write_json(folder / "facts.json", facts)
    return training.load(folder)


def trained(way: str, seed: int) -> dict[str, Any]:
    target = model(way, seed)
    facts = json.loads((RUNS / f"{way}-{seed}" / "facts.json").read_text(encoding="utf-8"))
    return {"training": facts, "outcomes": measuring.conduct(sl.TargetResponder(target=target))}


def certified(way: str, seed: int) -> dict[str, Any]:
    return {"keep": training.KEEP, **measuring.certificates(model(way, seed), training.KEEP)}


def attacked(way: str, seed: int) -> dict[str, Any]:
    return {"keep": training.KEEP, **measuring.attack(model(way, seed), training.KEEP)}


TABLES = {"train": trained, "certify": certified, "attack": attacked}


def cells(seeds: int) -> Iterator[str]:
    """TABLE/WAY-SEED, in the order in which they are of use."""
    for seed in range(seeds):
        ways = {"train": dict.fromkeys((*CERTIFIED, *WAYS)), "certify": CERTIFIED, "attack": CERTIFIED}
        yield from (f"{table}/{way}-{seed}" for table in TABLES for way in ways[table])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="*", help="cells whose key is like this: 'train/*-0'")
    given = parser.parse_args()
    torch.set_num_threads(1)
    work(key for key in cells(given.seeds) if fnmatch(key, given.only))
    tables.write()


def work(keys: Iterable[str]) -> None:
    """Measure these cells, as far as they are not there."""
    for key in keys:
        file = tables.RESULTS / f"{key}.json"
        if file.is_file():
            continue
        sys.stderr.write(f"{key}\n")
        began = time.process_time()
        table, _, rest = key.partition("/")
        way, _, seed = rest.rpartition("-")
        found = TABLES[table](way, int(seed))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**found, "cpu_seconds": round(time.process_time() - began)})


if __name__ == "__main__":
    main()
