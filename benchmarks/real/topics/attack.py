"""Attacks on what was made safe."""

import attacking
import cells
from topics.outcomes import HEADINGS, SOURCES, outcomes, told

from safelocus.analysis.words import interval
from safelocus.report.grid import Grid
from safelocus.verification.pooling import difference, level

SUBJECTS = {"twin": "the aligned twin", "set": "SET, 1 % by ESI, contrast", "spa": "the twin after SPA"}


def page() -> str | None:
    found, rows = dict(cells.kept(attacking.TABLE)), []
    asked = [source for source in SOURCES if source not in ("ag_news", "pubmedqa")]
    for cell in sorted(found.values(), key=lambda cell: [*SUBJECTS].index(cell["subject"])):
        if (start := found.get(f"{cell['subject']}-none")) is None:
            continue
        left = difference(outcomes([cell], "advbench"), outcomes([start], "advbench"), paired="prompts")
        attack = cell["attack"]
        if attack in attacking.RATES:
            attack = f"trained, {'LoRA' if attack == 'lora' else 'all weights'}"
        rows.append(
            (
                SUBJECTS[cell["subject"]], attack, f"{cell['rate']:g}" if "rate" in cell else "",
                *(interval(level(outcomes([cell], each))) for each in asked),
                f"{100 * cell['incoherent']['alpaca']['value']:.0f}", interval(left) if cell is not start else "",
            )
        )  # fmt: skip
    if not rows:
        return None
    prompts = next(iter(found.values()))["outcomes"]
    n = ", ".join(f"{HEADINGS[SOURCES.index(each)]} {len(prompts[each])}" for each in asked)
    return "\n\n".join(
        [
            "# A real model made safe, under attack", told(attacking),
            Grid(
                title="",
                headings=(
                    "model", "attack", "rate", *(HEADINGS[SOURCES.index(each)] for each in asked),
                    "Alpaca incoherent", "AdvBench, change",
                ),
                rows=tuple(rows), num_labels=3,
                caption=f"percent refused [95 % interval]; last column: points, paired by prompt; one seed; n: {n}",
            ).markdown(),
        ]
    )  # fmt: skip
