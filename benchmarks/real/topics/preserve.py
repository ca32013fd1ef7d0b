"""SPA: an arm per row, a table per task."""

from collections.abc import Iterable, Mapping

import cells
import preserving
from topics.card import card_run, cards
from topics.outcomes import HEADINGS, SOURCES, Cell, learned, numbers, outcomes, perplexity, rates, told

from safelocus.analysis.acceptance import CardRun
from safelocus.analysis.claims import kept_verdict
from safelocus.analysis.words import interval
from safelocus.report.grid import Grid
from safelocus.verification.pooling import difference

REFUSED = SOURCES[:5]


def page() -> str | None:
    found = dict(cells.kept(preserving.TABLE))
    parts = []
    for task in ("gsm8k", "pubmedqa", "instruct"):
        before = found.get(f"{task}-before")
        arms = [cell for cell in found.values() if cell["task"] == task and cell["arm"] != "before"]
        if before is None or not arms:
            continue
        groups = grouped(arms)
        bare = {(lora, rate): group for (arm, lora, rate), group in groups.items() if arm == "unprotected"}
        rows = [("before", "", "", "", *rates([before]), "", perplexity([before]), *_task([before], before, None), "")]
        for (arm, lora, rate), group in groups.items():
            alike = [bare[lora, rate]] if arm != "unprotected" and (lora, rate) in bare else []
            change, *controls = (
                difference(outcomes(seeds, "advbench"), outcomes([before], "advbench")) for seeds in (group, *alike)
            )
            rows.append(
                (
                    arm + (", LoRA" if lora else ""), f"{rate:g}", str(len(group)), f"{group[0]['num_protected']:,}",
                    *rates(group), _single_words(group), perplexity(group),
                    *_task(group, before, bare.get((lora, rate), bare.get((lora, preserving.RATE)))),
                    kept_verdict(change, controls, steps=group[0]["steps"]),
                )
            )  # fmt: skip
        headings = (
            "arm", "rate", "seeds", "protected", *HEADINGS[:-1], "single words", HEADINGS[-1], "task's perplexity",
            "task learned", "safety within 1 %",
        )  # fmt: skip
        parts += [
            f"## {task}: {arms[0]['steps']:,} steps",
            Grid(
                title="", headings=headings, rows=tuple(rows), caption=f"percent refused, or right [95 % interval over "
                f"prompts and seeds]; n: {numbers(before)}; single words: of AdvBench's answers, where "
                "counted; task learned: of the unprotected run's fall of log perplexity, of LoRA its own; the last "
                "column by AdvBench refusals",
            ).markdown(),
            _apart(groups, before),
        ]  # fmt: skip
    if not parts:
        return None
    return "\n\n".join(["# SPA on a real model's aligned twin", told(preserving), *parts, *_cards(found)])


PAIRS = (
    ("esi-1", "unprotected"), ("esi-1", "random-1"), ("esi-1", "random-10"), ("esi-10", "esi-1"),
    ("esi-10", "random-10"), ("mixed-embedded", "esi-10"), ("esi-10-mixed-embedded", "mixed-embedded"),
    ("esi-10-mixed-embedded", "random-10-mixed-embedded"), ("esi-10-calibrated", "mixed"),
    ("esi-10-calibrated", "mixed-embedded"), ("esi-10-calibrated-embedded", "mixed-embedded"),
    ("esi-10-calibrated", "esi-10-calibrated-at-1e-3"), ("esi-10-calibrated", "random-10-calibrated"),
    (preserving.SHOWN.name, "esi-10"), (preserving.SHOWN.name, "mixed-embedded"),
    (preserving.SHOWN.name, "mixed-as-often"), (preserving.SHOWN.name, preserving.AT_PEAK.name),
    (preserving.SHOWN.name, preserving.SHOWN.name.replace("esi", "random")),
    (preserving.SHOWN.name, "esi-10-mixed-embedded"),
    *((preserving.AT_PEAK.name, other) for other in ("esi-10", "mixed-embedded", "esi-10-mixed-embedded")),
    (preserving.AT_PEAK.name, "mixed-as-often"), (preserving.AT_PEAK.name, "esi-10-calibrated-embedded"),
    ("mixed-alarming", "mixed-embedded"),
)  # fmt: skip


def _apart(groups: Mapping[tuple[str, bool, float], list[Cell]], before: Cell) -> str:
    """What tells arms of full training apart."""
    found = {arm: group for (arm, lora, _), group in groups.items() if not lora}
    rows = tuple(
        (
            *pair, *(interval(difference(*(outcomes(found[arm], source) for arm in pair))) for source in REFUSED),
            interval(learned(found[pair[0]], found["unprotected"], before, than=found[pair[1]])),
        )
        for pair in PAIRS
        if all(arm in found for arm in ("unprotected", *pair))
    )  # fmt: skip
    caption = (
        "points refused, and learned of the task, more by the first than by the second, paired by prompt [95 % "
        "interval]"
    )
    headings = ("first", "second", *HEADINGS[:5], "task learned")
    return Grid(title="", headings=headings, rows=rows, caption=caption).markdown()


def _task(group: list[Cell], before: Cell, bare: list[Cell] | None) -> tuple[str, str]:
    """The task's perplexity, and how much of what training alone learns was learned."""
    share = "" if bare is None or bare is group else interval(learned(group, bare, before))
    return perplexity(group, "task").split()[0], share


def _single_words(group: list[Cell]) -> str:
    """How many of AdvBench's answers are that, which are neither a refusal nor help; percent."""
    return ", ".join(f"{100 * cell['single_words']['advbench']:.0f}" for cell in group if "single_words" in cell)


def grouped(arms: Iterable[Cell]) -> dict[tuple[str, bool, float], list[Cell]]:
    """(arm, with LoRA, rate) -> its seeds; the unprotected ones first."""
    groups: dict[tuple[str, bool, float], list[Cell]] = {}
    for cell in sorted(arms, key=lambda cell: (cell["lora"], cell["arm"] != "unprotected", cell["arm"])):
        groups.setdefault((cell["arm"], cell["lora"], cell["rate"]), []).append(cell)
    return groups


def _cards(found: dict[str, Cell]) -> list[str]:
    """Of every arm that protects ESI's weights or mixes rows in; the same arm on other tasks is its transfer."""
    runs: dict[tuple[str, bool], dict[str, list[CardRun]]] = {}
    for task in dict.fromkeys(cell["task"] for cell in found.values()):
        groups = grouped(cell for cell in found.values() if cell["task"] == task and cell["arm"] != "before")
        for (arm, lora, rate), group in groups.items():
            if arm.startswith(("esi", "mixed")):
                beside = {
                    name: groups.get((other, lora, rate), [])
                    for name, other in (("unprotected", "unprotected"), ("random", arm.replace("esi", "random")))
                    if other != arm
                }
                runs.setdefault((arm, lora), {})[task] = [
                    card_run(
                        "preserve", task, preserving.USED, cell, before=found.get(f"{task}-before"),
                        **{name: _alike(cell, others) for name, others in beside.items()},
                    )
                    for cell in group
                ]  # fmt: skip
    return cards(
        "task, arm",
        {
            f"{task}, {arm}{', LoRA' if lora else ''}": (
                seeds, [run for other, more in tasks.items() if other != task for run in more]
            )
            for (arm, lora), tasks in sorted(runs.items())
            for task, seeds in tasks.items()
        },
    )  # fmt: skip


def _alike(cell: Cell, others: list[Cell]) -> Cell | None:
    """Of other arms' seeds that of the cell, else the first; None where there are none."""
    seed = cell["settings"]["seed"]
    return next((other for other in others if other["settings"]["seed"] == seed), next(iter(others), None))
