"""SET on the real model: 1 % of the weights, by every method and at every rate; three recipes, and other ratios.

    python benchmarks/real/enhancing.py [--recipe contrast] [--share 0/2] [--only 'esi-*']

AdamW, the rate falling to zero along a line. One cell per method, rate and seed, in this order: every method at every
rate with one seed, the paper's rate (plain), further seeds of what the claim compares.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import aligning
import cells
import preferring
import sets

from safelocus.enhancement.run import enhancer
from safelocus.model.target import Target
from safelocus.prompts import PromptSet
from safelocus.training import TrainingSettings
from safelocus.training.arm import Arm
from safelocus.training.examination import Examination

METHODS = ("esi", "random", "gradient", "snip", "magnitude", "lora", "full")
BACK, INTERPOLATED, HELD, BRIEFLY, BRIEF = " gone back", " interpolated", " held", " held briefly", " brief"
PREFERRED, APART = f"{BRIEF} preferred", cells.APART.removeprefix("esi")
WAYS = {  # of training with contrast
    INTERPOLATED: "on the straight line to the original, where the validation part, on which nothing was trained, "
    "finds best (`enhance --interpolate`)",
    HELD: "by 20 times the divergence from the original along these answers, in place of the loss on them, as "
    "`enhance` does with answers that are given",
    BRIEFLY: "by once the divergence, along 8 tokens",
    BRIEF: "own answers of 8 tokens",
    PREFERRED: "the same, and each answer is preferred to its opposite too (`preferring.py`)",
    APART: "the weights found by S of harmful requests less S of harmless ones, 128 of each, not trained on then",
    BACK: "on the straight line to the original, as far as 90 % of the validation part are still refused; the whole "
    "way is measured too",
}
RATIO = 0.01
RATIOS = {f" {100 * ratio:g} percent": ratio for ratio in cells.RATIOS if ratio != RATIO}
VARIANTS = tuple(f"{method}{how}" for how in (*WAYS, f"{BRIEF}{BACK}", *RATIOS) for method in ("esi", "random", "full"))
SHOWN = (*METHODS, *VARIANTS)
FLOOR = 0.9  # of the validation part: what is aimed at
PAPER_RATE = 3e-5
SETTINGS = TrainingSettings(steps=100, schedule="linear")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained on, and the rates that are tried.

    what: in words, after the number of steps.
    """

    what: str
    table: str
    rates: tuple[float, ...]
    methods: tuple[str, ...] = METHODS
    paper: tuple[str, ...] = ()
    batch_size: int
    max_length: int
    data: Callable[[], PromptSet]
    retain: Callable[[], list[PromptSet]]
    used: tuple[str, ...]  # sources that weights are found, trained or chosen with
    how: dict[str, Any]
    steps: int = 100
    warmup_steps: int = 0
    compared: tuple[str, ...] = METHODS[:2]  # with further seeds
    before: str = ""  # table of another recipe, where the model is measured before; default: its own

    def plan(self) -> list[tuple[str, float, int]]:
        """(method, rate, seed) of every cell."""
        first = [(method, rate, 0) for rate in self.rates for method in self.methods]
        paper = [(method, PAPER_RATE, 0) for method in self.paper]
        return [*first, *paper, *((m, rate, seed) for seed in (1, 2) for rate in self.rates for m in self.compared)]


RECIPES = {
    "plain": Recipe(
        what="of 4 refusals (circuit-breakers) and 4 benign rows (instruct), rows cut to 128 tokens, the loss on the "
        "responses of both",
        table="enhance", rates=(1e-4, 3e-4, 1e-3), paper=("esi", "random", "full"), batch_size=4, max_length=128,
        data=lambda: sets.refusals().limit(800, seed=0), retain=lambda: [sets.benign()], how={},
        used=("advbench", "circuit_breakers", "instruct"),
    ),
    "contrast": Recipe(
        what="of 6 refusals of one sentence, and 6 rows of the first 24 tokens of the model's own answers, two to one "
        "to alarming but harmless requests and to ordinary ones, cut to 112 tokens",
        table="contrast", rates=(1e-3, 3e-3, 3e-4),
        methods=(
            "esi", *(f"esi{how}" for how in (INTERPOLATED, HELD, BRIEFLY, BRIEF, PREFERRED, APART)),
            "random", *(f"random{how}" for how in (INTERPOLATED, BRIEF)),
            f"esi{BACK}", "full", "lora", "gradient", "snip",
        ),
        batch_size=6, max_length=112, data=sets.refused, retain=lambda: sets.answered(whole=False),
        how={"own_answers": True, "answer_tokens": 24},
        used=("advbench", "circuit_breakers", "harmful", "embedded", "oktest", "alpaca"),
        compared=(f"esi{BRIEF}", f"random{BRIEF}"),
    ),
}  # fmt: skip
RECIPES["contrast-long"] = replace(
    RECIPES["contrast"],
    what=f"{RECIPES['contrast'].what}; the first 20 warm up, as those of the aligned twin, which is \"all weights\"",
    table="contrast-long", before="contrast", rates=(1e-3,), steps=300, warmup_steps=20,
    methods=tuple(f"{method}{how}{BACK}" for how in ("", BRIEF) for method in ("esi", "random", "full")),
    compared=tuple(f"{method}{how}{BACK}" for how in ("", BRIEF) for method in METHODS[:2]),
)  # fmt: skip


RECIPES["ratios"] = replace(
    RECIPES["plain"], table="ratios", before="enhance", rates=(1e-4,), paper=(), compared=(),
    methods=tuple(f"{method}{ratio}" for ratio in RATIOS for method in METHODS[:2]),
)  # fmt: skip


def key(method: str, rate: float, seed: int) -> str:
    """Of a cell."""
    return f"{method.replace(' ', '-')}-{rate:g}-{seed}"


def training(recipe: Recipe, rate: float, seed: int = 0) -> dict[str, Any]:
    """What `enhance` and `enhancer` are called with."""
    settings = replace(
        SETTINGS, learning_rate=rate, seed=seed, batch_size=recipe.batch_size, max_length=recipe.max_length,
        steps=recipe.steps, warmup_steps=recipe.warmup_steps,
    )  # fmt: skip
    return {
        "data": recipe.data(), "retain": recipe.retain(), "retain_kl": 0.0, "retain_weight": 1.0, "retain_rows": 1,
        "settings": settings, **recipe.how,
    }  # fmt: skip


def trained(recipe: Recipe, target: Target, method: str, rate: float, seed: int, unfinished: Path) -> dict[str, Any]:
    if recipe.table == "contrast-long" and method == f"full{BACK}":
        return _twin(recipe, unfinished)
    how = training(recipe, rate, seed)
    chosen, space, way = method.partition(" ")
    chosen, ratio = method if method == cells.APART else chosen, RATIOS.get(space + way, RATIO)
    what: Any = chosen if chosen in ("lora", "full") else cells.selection(target, chosen, ratio, seed=seed)
    if method.endswith(INTERPOLATED):
        (harmful,), (harmless,) = sets.validation().values()
        looks = Examination(harmful=harmful, harmless=harmless, judges=(cells.JUDGE,), max_new_tokens=sets.NEW_TOKENS)
        how |= {"validation": looks, "every": recipe.steps, "interpolate": True}
    if method == cells.APART:
        how["retain"] = [part.without(sets.unalarming()) for part in how["retain"]]
    if BRIEF in method:  # or BRIEFLY
        how["answer_tokens"] = 8
    for name, strength in ((HELD, 20.0), (BRIEFLY, 1.0)):
        if method.endswith(name):
            how |= {"retain_kl": strength, "retain_weight": 0.0}
    runner = enhancer(target, checkpoint=unfinished, num_weights=int(ratio * target.layout.num_weights), **how)
    if PREFERRED in method:
        answers = cells.RUNS / "answers"
        runner = preferring.preferring(runner, how["data"], how["retain"], how["answer_tokens"], answers)
    arm = Arm(name="arm", what=what)
    trial = runner.train(arm, how["settings"])
    with runner.shown(arm, trial):
        back: dict[str, Any] = {}
        if method.endswith(BACK):
            back["whole"] = cells.outcome(cells.measured(target, unfinished / "whole", **_asked(recipe)))
            back |= aligning.gone_back(target, FLOOR)
        if trial.back:
            back = {"share_of_the_way": trial.share, "back": [point.to_json() for point in trial.back]}
        measured = cells.measured(target, unfinished / "after", **_asked(recipe))
    return {
        "method": method, "rate": rate, "seed": seed, "num_weights": trial.num_weights,
        "settings": how["settings"].to_json(), "training_seconds": round(trial.seconds),
        "losses": [round(loss.loss, 4) for loss in trial.losses], **cells.described(target),
        **back, **cells.outcome(measured),
    }  # fmt: skip


def _twin(recipe: Recipe, unfinished: Path) -> dict[str, Any]:
    """The aligned twin, gone back to the same floor; it lies at 0.8 of the way already."""
    target, made = cells.subject("smollm2:aligned"), aligning.record()
    back, settings = aligning.gone_back(target, FLOOR), made["settings"]
    back["share_of_the_way"] *= made["share_of_the_way"]
    measured = cells.measured(target, unfinished / "after", **_asked(recipe))
    return {
        "method": f"full{BACK}", "rate": settings["learning_rate"], "seed": settings["seed"],
        "num_weights": target.layout.num_weights, "settings": settings, "training_seconds": made["training_seconds"],
        "losses": [], **cells.described(target), **back, **cells.outcome(measured),
    }  # fmt: skip


def _asked(recipe: Recipe) -> dict[str, Any]:
    """The contrast recipe is chosen by its validation part, the plain one by nothing."""
    if not recipe.how:
        return {}
    more = sets.validation()
    return {"harmful": [*sets.harmful(), *more["harmful"]], "harmless": [*sets.harmless(), *more["harmless"]]}


def untrained(recipe: Recipe, target: Target, unfinished: Path) -> dict[str, Any]:
    found = cells.measured(target, unfinished, **_asked(recipe))
    return {"method": "before", **cells.described(target), **cells.outcome(found)}


def main() -> None:
    what = [f"{name}: {recipe.steps} steps {recipe.what}." for name, recipe in RECIPES.items()]
    parser = cells.options("\n\n".join([__doc__ or "", *what, *(f"{name[1:]}: {way}." for name, way in WAYS.items())]))
    parser.add_argument("--recipe", choices=RECIPES, default="plain")
    given = parser.parse_args()
    recipe, target = RECIPES[given.recipe], cells.subject("smollm2")
    work = {} if recipe.before else {"before": partial(untrained, recipe, target)}
    work |= {
        key(method, rate, seed): partial(trained, recipe, target, method, rate, seed)
        for method, rate, seed in recipe.plan()
    }
    cells.work(recipe.table, work, given.share, given.only)


if __name__ == "__main__":
    main()
