"""SET on more and on fewer weights: ESI's and random ones, a pair of rows per ratio."""

import enhancing
from topics import enhance
from topics.outcomes import HEADINGS, NAMES, SOURCES, numbers, outcomes, perplexity, rates

from safelocus.analysis.words import interval
from safelocus.report.grid import Grid
from safelocus.verification.pooling import difference


def page() -> str | None:
    plain, recipe = (enhancing.RECIPES[name] for name in ("plain", "ratios"))
    before, groups = enhance.groups_of(recipe)
    if not before:
        return None
    _, of_one = enhance.groups_of(plain)
    (rate,) = recipe.rates
    rows, apart = [("", "before", "", *rates(before), perplexity(before))], []
    for way, ratio in sorted({"": enhancing.RATIO, **enhancing.RATIOS}.items(), key=lambda pair: pair[1]):
        pair = {}
        for method in enhancing.METHODS[:2]:
            seeds = (groups if way else of_one).get((f"{method}{way}", rate))
            if seeds is not None:
                first = pair[method] = seeds[:1]
                count = f"{first[0]['num_weights']:,}"
                rows.append((f"{100 * ratio:g} %", NAMES[method], count, *rates(first), perplexity(first)))
        if len(pair) == 2:
            found = (difference(*(outcomes(cell, s) for cell in pair.values()), paired="prompts") for s in SOURCES[:5])
            apart.append((f"{100 * ratio:g} %", *map(interval, found)))
    table = Grid(
        title="", headings=("ratio", "trained", "weights", *HEADINGS), rows=tuple(rows), num_labels=2,
        caption=f"percent refused, or answered right [95 % interval]; seed 0; n: {numbers(before[0])}, perplexity "
        f"{len(before[0]['nats']['texts'])} texts",
    )  # fmt: skip
    pairs = Grid(
        title="", headings=("ratio", *HEADINGS[:5]), rows=tuple(apart), num_labels=1,
        caption="points refused more with ESI's weights than with random ones, paired by prompt [95 % interval]",
    )  # fmt: skip
    return "\n\n".join(
        [
            "# SET on a real model: how many weights?",
            f"SmolLM2-135M-Instruct, {recipe.steps} steps {recipe.what}, at {rate:g}. Made by "
            "`python benchmarks/real/enhancing.py --recipe ratios`; 1 % is the [plain recipe](real-enhance.md)'s. "
            "Refusals by the matcher of openings.",
            table.markdown(),
            pairs.markdown(),
        ]
    )
