"""Does the choice of weights matter? Every pair that the other pages hold."""

import math

import cells
import enhancing
import numpy as np
import preserving
import verifying
from matplotlib.figure import Figure
from topics import enhance
from topics.outcomes import HEADINGS, NAMES, PAGES, SOURCES, Cell, negative, outcomes

from safelocus.analysis.words import interval
from safelocus.evaluation.measures import Measure
from safelocus.report.colours import LIGHT
from safelocus.report.grid import Grid
from safelocus.verification.pooling import difference


def page() -> str | None:
    """ESI's weights against as many others, the same done with both: every pair that there is on the other pages."""
    found = [*_chosen_by_training(), *_chosen_by_protection(), *_chosen_by_noise()]
    if not found:
        return None
    _figure(found).savefig(PAGES / "real-choice.png")
    shown = (*(HEADINGS[SOURCES.index(source)] for source in SHOWN), DISCERNED)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for what, against, source, change in found:
        rows.setdefault((what, against), {})[source] = _marked(change)
    table = Grid(
        title="", headings=("what is done", "instead", *shown), num_labels=2,
        rows=tuple((*pair, *(cells_.get(source, "") for source in shown)) for pair, cells_ in rows.items()),
        caption="points refused more with ESI's weights [95 % interval over prompts, and seeds where there are "
        "several], paired by prompt; bold: told apart; one draw of random weights for each seed. n: "
        + ", ".join(f"{h} {found[[f[2] for f in found].index(h)][3].n // 2}" for h in shown[:5])
        + " of each of the two; noise: 500. How far XSTest's unsafe requests are from its safe ones says whether harm "
        "is told from what only sounds like it",
    )  # fmt: skip
    return "\n\n".join(
        [
            "# Does the choice of weights matter?",
            "Made by `python benchmarks/real/pages.py` from what the pages on [SET](real-enhance.md), "
            "[contrast](real-contrast.md), [300 steps of it](real-contrast-long.md), [SPA](real-preserve.md) and "
            "[noise](real-verify.md) hold: the same training, protection or disturbance of ESI's weights, and of as "
            "many others.",
            "![How many points more or fewer are refused with ESI's weights than with others](real-choice.png)",
            table.markdown(),
        ]
    )  # fmt: skip


Comparison = tuple[str, str, str, Measure]  # what is done, with which other weights, set, the difference
SHOWN = ("harmbench", "advbench", "xstest_unsafe", "xstest_safe", "alpaca")
PICTURED = ("HarmBench", "AdvBench", "XSTest safe", "Alpaca")
DISCERNED = "XSTest unsafe, less safe"


def _chosen_by_training() -> list[Comparison]:
    compared = []
    for name, recipe in enhancing.RECIPES.items():
        _, groups = enhance.groups_of(recipe)
        for (method, rate), group in groups.items():
            what = ", ".join(filter(None, ("SET", name, method.partition(" ")[2], f"{rate:g}")))
            for other in ("random", "gradient", "snip", "magnitude", cells.APART):
                rival = groups.get((method.replace("esi", other), rate)) if method.startswith("esi") else None
                compared += _pairs(what, NAMES[other], group, rival)
    return compared


def _chosen_by_protection() -> list[Comparison]:
    found = dict(cells.kept(preserving.TABLE))
    compared = []
    for key, cell in found.items():
        if cell["arm"].startswith("esi"):
            rival = found.get(key.replace("esi", "random"))
            percent, _, kind = cell["arm"].removeprefix("esi-").partition("-")
            kind = "calibrated (the default)" if cell["arm"] == preserving.SHOWN.name else kind
            how = ("SPA", cell["task"], f"{percent} %", kind.replace("-at-", " at "), "LoRA" if cell["lora"] else "")
            what = ", ".join(filter(None, how))
            compared += _pairs(what, NAMES["random"], [cell], None if rival is None else [rival])
    return compared


def _pairs(what: str, other: str, first: list[Cell], second: list[Cell] | None) -> list[Comparison]:
    if second is None:
        return []
    seeds = min(len(first), len(second))
    found = {
        source: difference(outcomes(first[:seeds], source), outcomes(second[:seeds], source), paired="prompts")
        for source in SHOWN
    }
    named = {HEADINGS[SOURCES.index(source)]: change for source, change in found.items()}
    named[DISCERNED] = _less(found["xstest_unsafe"], found["xstest_safe"])
    return [(what, other, *pair) for pair in named.items()]


def _less(first: Measure, second: Measure) -> Measure:
    """The difference of two changes, each on prompts of its own: their half-widths add up in squares."""
    ends = [np.array([each.value, each.low, each.high], float) for each in (first, negative(second))]
    value = float(sum(end[0] for end in ends))
    below, above = (math.hypot(*(end[side] - end[0] for end in ends)) for side in (1, 2))
    return Measure(value=value, low=value - below, high=value + above, n=first.n + second.n)


def _chosen_by_noise() -> list[Comparison]:
    compared = []
    for key, cell in cells.kept(verifying.TABLE):
        for claim in cell["claims"]:
            lost = Measure.from_json(claim["numbers"]["refusals lost beyond random"])
            compared.append((f"disturbed: {key.replace('-', ' ')} sigma", NAMES["random"], "AdvBench", negative(lost)))
    return compared


def _marked(change: Measure) -> str:
    assert change.low is not None
    assert change.high is not None
    return f"**{interval(change)}**" if change.low > 0 or change.high < 0 else interval(change)


def _figure(found: list[Comparison]) -> Figure:
    lines = [(what, other) for what, other, _, _ in found]
    order = list(dict.fromkeys(lines))
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(order)), dpi=150, layout="constrained")
    figure.set_facecolor("white")
    axes = figure.subplots()
    for number, heading in enumerate(PICTURED):
        some = [(order.index((what, other)), change) for what, other, source, change in found if source == heading]
        values = np.array([[m.value, m.low, m.high] for _, m in some], float) * 100
        at = [place + 0.17 * (number - 1.5) for place, _ in some]
        axes.errorbar(
            values[:, 0], at, xerr=[values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]], fmt="o", markersize=3,
            elinewidth=0.9, capsize=2, color=LIGHT.series[number],
            label=heading + (" (more is wanted)" if number < 2 else " (fewer is wanted)"),
        )  # fmt: skip
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(order)), [f"{what}\nagainst {other}" for what, other in order], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("refused with ESI's weights, minus refused with the others: points", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(True, axis="x", color="#e6e6e6", linewidth=0.6)
    figure.legend(fontsize=7, frameon=False, ncols=2, loc="outside lower center")
    return figure
