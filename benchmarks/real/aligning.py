"""The aligned twin: SmolLM2-135M-Instruct, trained to refuse harmful requests and to answer all others as before.

    python benchmarks/real/aligning.py

Interrupted, the same command goes on; `make model-aligned` is the same.

All weights, on the first sentence of refusals and on the first tokens of the original's own answers to alarming but
harmless requests and to ordinary ones, two to one: plain refusals with ordinary rows alone would make it refuse
whatever sounds alarming, and in a longer answer the tokens that decide would weigh little. Then back along the
straight line to the original, as far as it still refuses 96 % of a validation part, which it was not trained on.
Nothing that the tables measure with is trained or chosen on. The twin lies in the cache, as `smollm2:aligned`, with
what was measured of it beside it (`twin.json`, and in docs/results/real).
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import cells
import sets
import torch

import safelocus as sl
from safelocus import smollm2
from safelocus.enhancement.run import enhancer
from safelocus.run.files import write_json
from safelocus.training import TrainingSettings
from safelocus.training.arm import Arm

SETTINGS = TrainingSettings(
    steps=300, learning_rate=4e-4, schedule="linear", warmup_steps=20, batch_size=6, max_length=112
)  # fmt: skip
RETAIN: dict[str, Any] = {
    "retain_kl": 0.0, "retain_weight": 1.0, "retain_rows": 1, "own_answers": True, "answer_tokens": 24,
}  # fmt: skip

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the way from the original to what was trained
FLOOR = 0.96  # of the validation part is refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="train it anew where it is there already")
    given = parser.parse_args()
    folder, unfinished = smollm2.folder("smollm2:aligned"), cells.RUNS / "unfinished" / "aligned"
    if (folder / "twin.json").is_file() and not given.again:
        raise SystemExit(f"smollm2:aligned is there already, in {folder}; --again trains it anew")
    smollm2.obtain(say=print)
    began, target = time.monotonic(), sl.load("smollm2")
    runner = enhancer(
        target, sets.refused(), retain=sets.answered(), settings=SETTINGS, checkpoint=unfinished, **RETAIN
    )  # fmt: skip
    arm = Arm(name="full", what="full")
    trial = runner.train(arm, SETTINGS)
    described = cells.described(target)
    with runner.shown(arm, trial):
        finish(target, unfinished, {
            "trained_from": described, "settings": SETTINGS.to_json(), **RETAIN,
            "training_seconds": round(time.monotonic() - began),
        })  # fmt: skip
    shutil.rmtree(unfinished, ignore_errors=True)


def finish(target: sl.Target, unfinished: Path, found: dict[str, Any]) -> None:
    """Go back as far as may be, measure, save and show."""
    found |= gone_back(target)
    found |= cells.outcome(cells.measured(target, unfinished / "after"))
    save(target, smollm2.folder("smollm2:aligned"), found)
    cells.RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(cells.RESULTS / "aligned.json", found)
    for name, measures in found["measures"].items():
        print(name, *(f"{what} {m['value']:.3f} (n={m['n']})" for what, m in measures.items()))


@torch.no_grad()
def gone_back(target: sl.Target, floor: float = FLOOR) -> dict[str, Any]:
    """Leaves the model at the least share of the way at which it refuses enough of the validation part, or whole."""
    original = dict(sl.load("smollm2").model.named_parameters())
    weights = dict(target.model.named_parameters())
    trained = {name: weight.clone() for name, weight in weights.items()}
    refused: dict[str, float] = {}
    for share in SHARES:
        for name, weight in weights.items():
            weight.copy_(torch.lerp(original[name], trained[name], share))
        harmful = sets.validation()["harmful"]
        found = sl.evaluate(
            target, harmful=harmful, judges=[cells.JUDGE], max_new_tokens=sets.NEW_TOKENS, progress=False
        )
        refused[f"{share:g}"] = float(found.measures["refusal"].value or 0.0)
        if refused[f"{share:g}"] < floor:
            break
    kept = min((float(share) for share, value in refused.items() if value >= floor), default=1.0)
    for name, weight in weights.items():
        weight.copy_(torch.lerp(original[name], trained[name], kept))
    return {"share_of_the_way": kept, "validation_refused": refused}


def record() -> dict[str, Any]:
    """What was measured of the twin, and how it was trained."""
    found: dict[str, Any] = json.loads((smollm2.folder("smollm2:aligned") / "twin.json").read_text(encoding="utf-8"))
    return found


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
