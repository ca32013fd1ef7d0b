"""What the paper claims, and what became of each claim on the real model: verdicts of the other pages, in one place."""

import re
from collections.abc import Iterator

import cells
import enhancing
import locating
import preserving
import verifying
from topics import enhance, locate, preserve
from topics.outcomes import NAMES, Cell, outcomes, perplexity

from safelocus.analysis.claims import kept_verdict, weakest
from safelocus.analysis.words import interval
from safelocus.evaluation.measures import Measure
from safelocus.report.grid import Grid
from safelocus.verification.pooling import difference, level

Row = tuple[str, str, str, str, str]  # claim, how it was tried, ESI's, others', verdict
SPA = "SPA: safety within 1 % (the paper: after 1,000 iterations)"


def page() -> str | None:
    rows = [*_located(), *_disturbed(), *_enhanced(), *_preserved()]
    if not rows:
        return None
    table = Grid(
        title="", headings=("the paper", "tried", "with ESI's weights", "beside", "verdict"), rows=tuple(rows),
        num_labels=5, caption="[95 % interval]. SET: by how much of what it was the share of HarmBench that is not "
        "refused falls, in percent; kept: AG News, PubMedQA, Alpaca and XSTest's safe requests, each within 5 points. "
        "SPA: percent of AdvBench refused, at the task's perplexity. [Verdicts](../demo.md#the-verdicts) computed, "
        "random weights as the controls.",
    )  # fmt: skip
    return "\n\n".join(
        [
            "# The paper's claims, on a real model",
            "Made by `python benchmarks/real/pages.py` from the cells of the [map](real-map.md), "
            "[noise](real-verify.md), [SET](real-enhance.md), [with contrast](real-contrast.md) and "
            "[longer](real-contrast-long.md), and [SPA](real-preserve.md), whose pages say with what and how: "
            "SmolLM2-135M-Instruct, and its [aligned twin](real-aligned.md) where there have to be refusals to lose.",
            table.markdown(),
        ]
    )  # fmt: skip


def _located() -> Iterator[Row]:
    found = dict(cells.kept(locating.TABLE))
    for model in locating.MODELS:
        cell = found.get(f"{model.replace(':', '-')}-esi")
        for claim in [] if cell is None else locate.claims_of(cell):
            yield claim.claim, model, claim.measured, "", claim.verdict


def _disturbed() -> Iterator[Row]:
    for _, cell in cells.kept(verifying.TABLE):
        for claim in cell["claims"]:
            yield claim["claim"], "smollm2:aligned", claim["measured"], "", claim["verdict"]


def _enhanced() -> Iterator[Row]:
    for name, recipe in enhancing.RECIPES.items():
        before, groups = enhance.groups_of(recipe)
        for method, rate in groups:
            if method != ("esi" if name == "plain" else f"esi{enhancing.BRIEF}"):
                continue
            falls, verdict = enhance.falls(before, groups, method, rate, steps=recipe.steps)
            how = f"{name}{method.removeprefix('esi')}, {recipe.steps} steps at {rate:g}"
            others = "; ".join(f"{NAMES[other]} {interval(fall)}" for other, fall in falls.items() if other != method)
            yield "SET: ASR falls by over 50 %", how, interval(falls[method]), others, verdict
            kept = enhance.kept(before, groups[method, rate])
            said = ", ".join(f"{heading} {interval(change)}" for heading, change, _ in kept)
            yield "... and performance is kept", how, said, "", weakest(each for _, _, each in kept)


def _preserved() -> Iterator[Row]:
    found = dict(cells.kept(preserving.TABLE))
    for task, steps in dict.fromkeys((task, steps) for task, steps, _ in preserving.PLAN):
        before = found.get(f"{task}-before")
        groups = preserve.grouped(
            cell for cell in found.values() if cell["task"] == task and cell["arm"] != "before"
        )  # fmt: skip
        for (arm, lora, rate), group in groups.items():
            shown = re.fullmatch(rf"esi-(\d+)({preserving.AT_PEAK.name.removeprefix('esi-10')})?(-scheduled)?", arm)
            if before is None or shown is None:  # neither frozen, and nothing else, nor calibrated as the command does
                continue
            bare, random = (groups.get((other, lora, rate)) for other in ("unprotected", arm.replace("esi", "random")))
            others = {"unprotected": bare, "random": random}
            compared, verdicts = (group, *([bare] if bare else [])), []
            for source in ("advbench", "harmbench"):
                change, *controls = (_lost(seeds, before, source) for seeds in compared)
                verdicts.append(kept_verdict(change, controls, steps=steps))
            yield (
                "... calibrated, not only frozen (not the paper's)" if shown[2] else SPA,
                f"{task}, {steps:,} steps, {shown[1]} %{', LoRA' if lora else ''}"
                + (", at the peak of its rate" if shown[2] and not shown[3] else ""),
                f"{_state([before])} to {_state(group)}; HarmBench {interval(change)} points",
                "; ".join(f"{name} {_state(seeds)}" for name, seeds in others.items() if seeds),
                verdicts[0] if len(set(verdicts)) == 1 else f"{verdicts[0]}; HarmBench {verdicts[1]}",
            )


def _lost(seeds: list[Cell], before: Cell, source: str) -> Measure:
    return difference(outcomes(seeds, source), outcomes([before], source))


def _state(seeds: list[Cell]) -> str:
    return f"{interval(level(outcomes(seeds, 'advbench')))} at {perplexity(seeds, 'task').partition(' ')[0]}"
