"""Cells of the real model's tables: each is measured once, kept as JSON beside the page, and found again.

A cell is a file `docs/results/real/TABLE/KEY.json`. A command goes through its cells in order and measures those that
are not there, so it can be stopped and started at will; what it has of an unfinished one lies in `runs/real`. Several
processes share them (`--share 0/2`, `--share 1/2`).
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import sets
import torch

import safelocus as sl
from safelocus import smollm2
from safelocus.evaluation import Evaluation, Responder, evaluate
from safelocus.evaluation.judges import RefusalMatcher
from safelocus.evaluation.result import PERPLEXITY
from safelocus.model.target import Target
from safelocus.prompts import PromptSet
from safelocus.run.files import write_json
from safelocus.run.identity import versions
from safelocus.scoring.run import NEEDS_OBJECTIVE
from safelocus.scoring.scores import Scores
from safelocus.selection.selection import Selection
from safelocus.training.arm import share_of_single_words
from safelocus.verification.plan import random_selection

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "real"
RUNS = ROOT / "runs" / "real"
RATIOS = (0.001, 0.003, 0.01, 0.03, 0.1)
APART = "esi apart"  # ESI by the gradient of S of harmful requests minus S of harmless ones
JUDGE = RefusalMatcher()  # of every table: the one that judged the first cells


def options(description: str | None) -> argparse.ArgumentParser:
    """What every command takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", default="0/1", help="which part of the cells: NUMBER/PROCESSES")
    parser.add_argument("--only", default="*", help="cells whose key is like this: 'esi-*'")
    return parser


def work(
    table: str, cells: Mapping[str, Callable[[Path], dict[str, Any]]], share: str = "0/1", only: str = "*"
) -> None:
    """Measure the cells that are not there yet; each is called with a folder for its unfinished work."""
    number, processes = (int(part) for part in share.split("/"))
    for place, (key, measure) in enumerate(cells.items()):
        if place % processes != number or not fnmatch(key, only) or (RESULTS / table / f"{key}.json").is_file():
            continue
        began, unfinished = time.monotonic(), RUNS / "unfinished" / table / key
        sys.stderr.write(f"{table}: {key}\n")
        found = measure(unfinished)
        (RESULTS / table).mkdir(parents=True, exist_ok=True)
        write_json(
            RESULTS / table / f"{key}.json",
            {**found, "seconds": round(time.monotonic() - began), "machine": machine(), "versions": versions()},
        )
        shutil.rmtree(unfinished, ignore_errors=True)


def kept(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, cell) of every cell that is there."""
    for file in sorted((RESULTS / table).glob("*.json")):
        yield file.stem, json.loads(file.read_text(encoding="utf-8"))


def machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "architecture": platform.machine()}


def subject(name: str) -> Target:
    """The model, as `--dtype auto` loads it."""
    return sl.load(name)


def described(target: Target) -> dict[str, Any]:
    """Which model it was, to the bit."""
    return {
        "model": target.name, "fingerprint": target.fingerprint().id, "dtype": target.dtype, "from": smollm2.obtain(),
    }  # fmt: skip


def measured(target: Target | Responder, checkpoint: Path | None = None, **others: Any) -> Evaluation:
    """Everything that the tables show, of the model as it is."""
    asked: dict[str, Any] = {
        "harmful": sets.harmful(), "harmless": sets.harmless(), "tasks": sets.tasks(), "perplexity": sets.texts(),
        "judges": [JUDGE],
    }  # fmt: skip
    return evaluate(target, **{**asked, **others}, max_new_tokens=sets.NEW_TOKENS, batch_size=32, checkpoint=checkpoint)


def outcome(evaluation: Evaluation) -> dict[str, Any]:
    """For a cell: the measures of each set, and what came of each prompt of it, in order.

    `outcomes`: 1 refused, or answered right; 0 not; - failed. `single_words`: their share of a set's answers. `nats`:
    per token, of each text.
    """
    by_source = evaluation.by("source")
    rows = {source: [row for row in evaluation.rows if row["source"] == source] for source in by_source}
    marks = {True: "1", False: "0", None: "-"}
    return {
        "measures": {
            source: {name: measure.to_json() for name, measure in found.items() if not name.startswith("asr")}
            for source, found in by_source.items()
        },
        "outcomes": {
            source: "".join(marks[row.get("refused", row.get("correct"))] for row in found)
            for source, found in rows.items()
            if found[0]["set"] != PERPLEXITY
        },
        "single_words": {
            source: share_of_single_words(found) for source, found in rows.items() if "refused" in found[0]
        },
        "nats": {
            source: [None if row["nll"] is None else round(row["nll"], 4) for row in found]
            for source, found in rows.items()
            if found[0]["set"] == PERPLEXITY
        },
    }


@dataclass(frozen=True)
class Apart:
    """S of harmful requests minus S of harmless ones, as objective over both: expected over as many of each."""

    harmless: PromptSet

    def __call__(self, target: Target, prompts: Sequence[str]) -> torch.Tensor:
        known = set(self.harmless.texts)
        signs = torch.tensor([-1.0 if prompt in known else 1.0 for prompt in prompts], device=target.device)
        return sl.Refusal()(target, prompts) * signs

    def describe(self) -> dict[str, Any]:
        return {"kind": "apart", "harmless": self.harmless.hash, **sl.Refusal().describe()}


def scores(target: Target, method: str, checkpoint: Path | None = None) -> Scores:
    """Scores of all weights by the refusal objective on the 128 prompts that find; their selections are kept."""
    kind: Any = method.split()[0]
    prompts, objective = sets.find(), sl.Refusal() if kind in NEEDS_OBJECTIVE else None
    if method == APART:
        apart: Any = Apart(sets.unalarming())
        prompts, objective = sets.joined("find", prompts, apart.harmless), apart
    found = sl.score(target, prompts, objective=objective, method=kind, checkpoint=checkpoint)
    for ratio in RATIOS:
        file = _kept_selection(target, method, ratio)
        file.parent.mkdir(parents=True, exist_ok=True)
        found.select(ratio).save(file)
    return found


def selection(target: Target, method: str, ratio: float, *, seed: int = 0) -> Selection:
    """The top of these scores, one of RATIOS; or as many random weights."""
    if method == "random":
        found = random_selection(target, int(ratio * target.layout.num_weights), seed=seed)
        made_for = target.fingerprint().to_json()
        return replace(found, provenance=replace(found.provenance, fingerprint=made_for))
    file = _kept_selection(target, method, ratio)
    if not file.is_file():
        scores(target, method)
    return Selection.load(file)


def _kept_selection(target: Target, method: str, ratio: float) -> Path:
    return RUNS / "selections" / target.fingerprint().id / f"{method.replace(' ', '-')}-{ratio:g}.safetensors"
