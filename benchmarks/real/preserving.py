"""SPA on the aligned twin: it learns a task, and is it still safe? Frozen weights, calibrated ones, none.

    python benchmarks/real/preserving.py [--share 0/2] [--only 'gsm8k-full-*']

GSM8K for 1,000 steps (all weights, and LoRA of rank 8), PubMedQA and plain instructions for 300; 2 rows a step (what
two cores can do), cut to 256 tokens (PubMedQA: 448), AdamW, the rate falling to zero along a line. One cell per task,
arm and rate. Frozen: the top of ESI, found on the twin itself, or random weights; rescored: ESI is measured anew of the
model in training after a third and two thirds of the steps, and what it then finds is frozen instead, as it is by then.
Calibrated: the same weights, trained every 4th step on the twin's own answers of up to 64 tokens to the prompts that
found them and to embedded harmless ones, at the task's own rate or the one that is named; embedded: to embedded harmful
ones; cut: longer answers are cut there; scheduled: that rate falls as the task's does, and else stays at its peak.
Rivals, nothing frozen: a gentle rate; mixed (1 row in 6 is one of these answers, the practitioner's remedy); mixed with
embedded harmful requests in place of AdvBench's; the same with twice as many alarming but harmless ones, or with the
first 8 tokens of each answer in place of 64 (brief), or with as many such rows in all as calibration takes, 6 of 8 in
each step on average (as often); projected (each update loses what lowers S to first order, on 4 of the prompts that
found the weights: A-GEM of the update, Chaudhry et al. 2019); LoX (before training, 1.25 times the 6 largest singular
components of what made the twin out of the original are added to it, Perin et al. 2025); SafeLoRA (after training, of
each matrix what was learned is multiplied with C = V V^T / |V|, V what made the twin, where the cosine of the two is
below 0.35; Hsu et al. 2024).
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cells
import sets
import torch
from transformers import TrainerCallback

import safelocus as sl
from safelocus.evaluation import Task
from safelocus.evaluation.tasks import recognise_task
from safelocus.model.target import Target
from safelocus.preservation.mixing import ANSWER_TOKENS, PROMPTS, SHARE, Mixed
from safelocus.preservation.protection import Protection
from safelocus.prompts import PromptSet
from safelocus.training import TrainingSettings
from safelocus.training.fitting import Checkpoints, fit
from safelocus.training.lora import Lora
from safelocus.training.responses import own_answers, training_rows

sys.path.append(str(Path(__file__).parents[1] / "lexicon"))
from projection import Projection

TABLE = "preserve"
USED = ("advbench", "circuit_breakers", "harmful", "embedded", "oktest", "alpaca")  # the twin's training among them
SETTINGS = TrainingSettings(batch_size=2, schedule="linear", max_length=256)
MAX_LENGTH = {"pubmedqa": 448}
RATE, GENTLE, LORA_RATE = 1e-4, 2e-5, 3e-4


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is protected, and how: `method` and `ratio` of the selection, None for none."""

    name: str
    method: str | None = None
    ratio: float = 0.1
    calibrated: str = ""  # on whose harmful requests
    cut: bool = False  # answers to them of over ANSWER_TOKENS; else these are left out
    calibration_rate: float | None = None  # the training's own as it falls, of an adapter a tenth
    mixed: str = ""
    answer_tokens: int = ANSWER_TOKENS  # of what is mixed in
    share: float = SHARE  # of it
    batch_size: int = SETTINGS.batch_size
    rescored: bool = False
    projected: bool = False
    lox: bool = False
    safelora: bool = False
    rate: float = RATE
    lora: bool = False
    seed: int = 0

    def key(self, task: str) -> str:
        return f"{task}-{'lora' if self.lora else 'full'}-{self.name}" + (f"-{self.seed}" if self.seed else "")


METHODS = ("esi", "random")
UNPROTECTED, ESI, RANDOM = (
    Arm(name="unprotected"),
    Arm(name="esi-10", method="esi"),
    Arm(name="random-10", method="random"),
)
CALIBRATED, GENTLER = (
    Arm(name="esi-10-calibrated", method="esi", calibrated="advbench", calibration_rate=RATE),
    Arm(name="gentle", rate=GENTLE),
)
BOTH = Arm(name="esi-10-mixed-embedded", method="esi", mixed="embedded")
AT_PEAK = replace(CALIBRATED, name="esi-10-calibrated-embedded-cut", calibrated="embedded", cut=True)
SHOWN = replace(AT_PEAK, name=f"{AT_PEAK.name}-scheduled", calibration_rate=None)  # as the command does
MIXED = Arm(name="mixed-embedded", mixed="embedded")
FULL = (
    UNPROTECTED, ESI, BOTH, SHOWN, MIXED, RANDOM, CALIBRATED, GENTLER,
    *(Arm(name=f"{method}-1", method=method, ratio=0.01) for method in METHODS),
    Arm(name="random-10-mixed-embedded", method="random", mixed="embedded"),
)  # fmt: skip
WITH_LORA = tuple(replace(arm, lora=True, rate=LORA_RATE) for arm in (UNPROTECTED, ESI, SHOWN))
SHORT_LORA = tuple(
    replace(arm, lora=True, rate=LORA_RATE)
    for arm in (
        UNPROTECTED, ESI, SHOWN, BOTH, replace(AT_PEAK, calibration_rate=LORA_RATE),
        Arm(name="mixed", mixed="advbench"), Arm(name="safelora", safelora=True),
    )
)  # fmt: skip
SHORT = (*FULL, replace(CALIBRATED, name="random-10-calibrated", method="random"))
RIVALS = (
    replace(CALIBRATED, name="esi-10-calibrated-embedded", calibrated="embedded"),
    AT_PEAK, replace(SHOWN, name=f"random-10{SHOWN.name.removeprefix('esi-10')}", method="random"),
    *(Arm(name=f"{m}-10-calibrated-at-1e-3", method=m, calibrated="advbench", calibration_rate=1e-3) for m in METHODS),
    Arm(name="mixed", mixed="advbench"), Arm(name="lox", lox=True),
    Arm(name="esi-10-rescored", method="esi", rescored=True), Arm(name="projected", projected=True),
    Arm(name="esi-10-mixed", method="esi", mixed="advbench"),
    Arm(name="mixed-alarming", mixed="alarming"),
    Arm(name="mixed-brief", mixed="embedded", answer_tokens=8),
    Arm(name="mixed-as-often", mixed="embedded", share=0.75, batch_size=4 * SETTINGS.batch_size),
    *(replace(arm, seed=seed) for seed in (1, 2) for arm in (SHOWN, BOTH, UNPROTECTED, MIXED)),
    Arm(name="mixed-alarming", mixed="alarming", seed=1),
)  # fmt: skip
PROJECTED_ON = 4  # prompts a step
LOX_RANK, LOX_FACTOR = 6, 1.25
SAFELORA_COSINE = 0.35
PLAN = (
    ("pubmedqa", 300, SHORT), ("instruct", 300, (*SHORT, *RIVALS, *SHORT_LORA)), ("gsm8k", 1000, (*FULL, AT_PEAK)),
    ("gsm8k", 1000, WITH_LORA),
)  # fmt: skip


def lesson(task: str) -> tuple[PromptSet, PromptSet]:
    """(what is learned, 100 held-out answers whose perplexity says whether it was)."""
    if task == "gsm8k":
        return sets.read("gsm8k"), sets.named(sets.read("gsm8k_test").limit(100, seed=0), "task")
    if task == "pubmedqa":
        known = recognise_task(sets.DATA / sets.FILES["pubmedqa"])
        assert isinstance(known, Task)
        asked = {example.prompt for example in sets.tasks()[1].examples}
        rows = [{"prompt": e.prompt, "response": e.answer} for e in known.examples]
        held_out = sets.named(sl.read_prompts([row for row in rows if row["prompt"] in asked]), "task")
        return sl.read_prompts([row for row in rows if row["prompt"] not in asked]), held_out
    return sets.benign(), sets.named(sets.texts(), "task")


def shown(mixture: str = "advbench") -> list[PromptSet]:
    """What calibration and mixed-in rows show of the twin, in equal parts: harmful requests and harmless ones.

    mixture: whose harmful ones, or "alarming": embedded ones, and alarming harmless ones twice as often.
    """
    harmful, ordinary, alarming = map(sl.read_prompts, PROMPTS)
    harmless = [ordinary, *(alarming.split(0.5) if mixture == "alarming" else [alarming])]
    return [sets.find() if mixture == "advbench" else harmful, *harmless]


@torch.no_grad()
def extrapolate(target: Target) -> None:
    """LoX: further along the main directions of what made the twin out of the original."""
    original = cells.subject("smollm2").model.state_dict()
    for name, weight in target.model.named_parameters():
        if target.layout.tensors[name].eligible:
            u, s, vh = torch.linalg.svd(weight - original[name], full_matrices=False)
            weight += LOX_FACTOR * (u[:, :LOX_RANK] * s[:LOX_RANK]) @ vh[:LOX_RANK]


@torch.no_grad()
def project(target: Target, before: dict[str, torch.Tensor]) -> int:
    """SafeLoRA: what was learned of a matrix, C times it where the two point apart; how many matrices that were.

    C = V V^T / |V|, V: what made the twin out of the original.
    """
    original, projected = cells.subject("smollm2").model.state_dict(), 0
    for name, weight in target.model.named_parameters():
        if target.layout.tensors[name].eligible:
            learned, v = weight - before[name], before[name] - original[name]
            aligned = v @ (v.T @ learned) / v.norm()
            if torch.cosine_similarity(learned.flatten(), aligned.flatten(), dim=0) < SAFELORA_COSINE:
                weight.copy_(before[name] + aligned)
                projected += 1
    return projected


class Rescoring(TrainerCallback):
    """The weights to freeze are found anew after each third of the steps but the last."""

    def __init__(self, protection: Protection, target: Target, steps: int, ratio: float) -> None:
        self._protection, self._target, self._ratio = protection, target, ratio
        self._due = (steps // 3, 2 * steps // 3)
        self.agreement: list[float] = []  # of what was frozen and what is now, IoU

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self._due:
            found = sl.score(self._target, sets.find(), objective=sl.Refusal()).select(self._ratio)
            self.agreement.append(round(self._protection.selection.iou(found), 4))
            self._protection.update(found)


def projection(trainer: Any, target: Target) -> Projection:
    """On the prompts in turn, a few at each step."""
    prompts, objective = sets.find().texts, sl.Refusal()

    def score() -> torch.Tensor:
        first = trainer.state.global_step * PROJECTED_ON
        return objective(target, [prompts[(first + i) % len(prompts)] for i in range(PROJECTED_ON)]).mean()

    return Projection(trainer, score)


def learned(task: str, steps: int, arm: Arm, unfinished: Path) -> dict[str, Any]:
    target = cells.subject("smollm2:aligned")
    described, (data, held_out) = cells.described(target), lesson(task)
    selection = None if arm.method is None else cells.selection(target, arm.method, arm.ratio)
    calibration = None
    if arm.calibrated:
        prompts = shown(arm.calibrated)
        if not arm.cut:
            prompts = [own_answers(target, part, max_new_tokens=ANSWER_TOKENS) for part in prompts]
        calibration = sl.Calibration(target=target, prompts=prompts, learning_rate=arm.calibration_rate)
    if arm.mixed:
        mixed = Mixed(prompts=shown(arm.mixed), share=arm.share, seed=arm.seed, max_new_tokens=arm.answer_tokens)
        data, _ = mixed.into(data, target, size=len(data), checkpoint=unfinished / "mixed")
    if arm.lox:
        extrapolate(target)
    settings = replace(
        SETTINGS, steps=steps, learning_rate=arm.rate, seed=arm.seed, batch_size=arm.batch_size,
        max_length=MAX_LENGTH.get(task, SETTINGS.max_length),
    )  # fmt: skip
    before = {name: weight.clone() for name, weight in target.model.state_dict().items()} if arm.safelora else {}
    model = Lora(rank=8).wrap(target.model, target.layout) if arm.lora else target.model
    held: list[Protection] = []
    facts: dict[str, Any] = {}

    def protect(trainer: Any) -> None:
        if selection is not None:
            held.append(sl.preserve(trainer, selection, calibration=calibration))
        if arm.rescored:
            rescoring = Rescoring(held[0], target, steps, arm.ratio)
            facts["agreement"] = rescoring.agreement
            trainer.add_callback(rescoring)
        if arm.projected:
            facts["projection"] = projection(trainer, target)

    checkpoints = None if arm.rescored else Checkpoints(folder=unfinished / "training", inputs={"the arm": arm})
    if arm.lora and arm.name in ("unprotected", "safelora"):  # the same training, kept for the other of the two
        checkpoints = Checkpoints(folder=cells.RUNS / "trained" / f"{task}-lora", inputs={"the rate": arm.rate})
    losses = fit(
        target, training_rows(data, target.chat, max_length=settings.max_length), settings, model=model,
        prepare=protect, checkpoints=checkpoints,
    )  # fmt: skip
    if arm.lora:
        held[0].merge() if held else model.merge_and_unload()
    if arm.safelora:
        facts["projected"] = project(target, before)
    if arm.projected:
        facts["projected"] = facts.pop("projection").num_projected
    found = cells.measured(target, unfinished / "after", perplexity=[sets.texts(), held_out])
    return {
        "task": task, "arm": arm.name, "lora": arm.lora, "seed": arm.seed, "rate": arm.rate, "steps": steps,
        **facts,
        "num_protected": held[0].num_protected_in_all if held else 0, "settings": settings.to_json(),
        "losses": [round(loss.loss, 4) for loss in losses], **described, **cells.outcome(found),
    }  # fmt: skip


def before(task: str, unfinished: Path) -> dict[str, Any]:
    target = cells.subject("smollm2:aligned")
    found = cells.measured(target, unfinished, perplexity=[sets.texts(), lesson(task)[1]])
    return {"task": task, "arm": "before", **cells.described(target), **cells.outcome(found)}


def main() -> None:
    given = cells.options(__doc__).parse_args()
    work: dict[str, Any] = {}
    for task, steps, arms in PLAN:
        work[f"{task}-before"] = partial(before, task)
        work |= {arm.key(task): partial(learned, task, steps, arm) for arm in arms}
    cells.work(TABLE, work, given.share, given.only)


if __name__ == "__main__":
    main()
