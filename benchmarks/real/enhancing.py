"""SET on the real model: 100 steps on 1 % of the weights, by every method and at every rate; the plain recipe.

    python benchmarks/real/enhancing.py [--share 0/2] [--only 'esi-*']

Each step has 4 refusals (circuit-breakers) and 4 benign rows (instruct), rows cut to 128 tokens, the loss on the
responses of both; AdamW, the rate falling to zero along a line. One cell per method, rate and seed, in this order:
every method at every rate with one seed, the paper's rate, further seeds of what the claim compares.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cells
import sets

from safelocus.enhancement.run import enhancer
from safelocus.model.target import Target
from safelocus.training import TrainingSettings
from safelocus.training.arm import Arm

TABLE = "enhance"
METHODS = ("esi", "random", "gradient", "snip", "magnitude", "lora", "full")
RATES = (1e-4, 3e-4, 1e-3)
PAPER_RATE = 3e-5
RATIO = 0.01
SETTINGS = TrainingSettings(steps=100, batch_size=4, schedule="linear", max_length=128)


def plan() -> list[tuple[str, float, int]]:
    """(method, rate, seed) of every cell."""
    first = [(method, rate, 0) for rate in RATES for method in METHODS]
    paper = [(method, PAPER_RATE, 0) for method in ("esi", "random", "full")]
    return [*first, *paper, *((method, rate, seed) for seed in (1, 2) for rate in RATES for method in METHODS[:2])]


def trained(target: Target, method: str, rate: float, seed: int, unfinished: Path) -> dict[str, Any]:
    settings = replace(SETTINGS, learning_rate=rate, seed=seed)
    k = int(RATIO * target.layout.num_weights)
    what: Any = method if method in ("lora", "full") else cells.selection(target, method, RATIO, seed=seed)
    runner = enhancer(
        target, sets.refusals().limit(800, seed=0), retain=[sets.benign()], retain_kl=0.0, retain_weight=1.0,
        retain_rows=1, settings=settings, checkpoint=unfinished, num_weights=k,
    )  # fmt: skip
    arm = Arm(name="arm", what=what)
    trial = runner.train(arm, settings)
    with runner.shown(arm, trial):
        evaluation = cells.measured(target, unfinished / "after")
    return {
        "method": method, "rate": rate, "seed": seed, "num_weights": trial.num_weights,
        "settings": settings.to_json(), "training_seconds": round(trial.seconds),
        "losses": [round(loss.loss, 4) for loss in trial.losses], **cells.described(target),
        **cells.outcome(evaluation),
    }  # fmt: skip


def untrained(target: Target, unfinished: Path) -> dict[str, Any]:
    found = cells.measured(target, unfinished)
    return {"method": "before", **cells.described(target), **cells.outcome(found)}


def main() -> None:
    given = cells.options(__doc__).parse_args()
    target = cells.subject("smollm2")
    work = {"before": partial(untrained, target)} | {
        f"{method}-{rate:g}-{seed}": partial(trained, target, method, rate, seed) for method, rate, seed in plan()
    }
    cells.work(TABLE, work, given.share, given.only)


if __name__ == "__main__":
    main()
