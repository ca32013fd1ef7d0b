"""The pages of the real model, made from what its cells hold: docs/results/real-*.md and their pictures.

    python benchmarks/real/pages.py

Tables, verdicts and pictures are computed, in `topics/` one module a page; what stands under "## Reading" on one is
written by people, and kept.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cells
import enhancing
import preserving
from topics import aligned, attack, avoid, certify, choice, claims, enhance, locate, preserve, ratios, verify
from topics.choice import SHOWN
from topics.outcomes import HEADINGS, NAMES, PAGES, SOURCES, Cell, outcomes, perplexity

from safelocus.analysis.words import interval
from safelocus.report.grid import Grid
from safelocus.verification.pooling import level

README_RATE = 1e-4
TOPICS: dict[str, Callable[[], str | None]] = {
    "claims": claims.page, "map": locate.page, "aligned": aligned.page, "verify": verify.page,
    **{recipe.table: partial(enhance.page, name) for name, recipe in enhancing.RECIPES.items() if name != "ratios"},
    "ratios": ratios.page, "preserve": preserve.page, "choice": choice.page, "attack": attack.page, "words": avoid.page,
    "certify": certify.page,
}  # fmt: skip


def written() -> Iterator[tuple[Path, str]]:
    """(file, what it is to hold) of README and of every page that has cells."""
    readme = cells.ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for mark, table in (("SET", enhanced_table()), ("SPA", preserved_table())):
        if table is not None:
            head, _, rest = text.partition(f"<!-- {mark} -->\n")
            text = f"{head}<!-- {mark} -->\n{table}\n<!-- /{mark} -->{rest.partition(f'<!-- /{mark} -->')[2]}"
    yield readme, text
    for name, make in TOPICS.items():
        made, file = make(), PAGES / f"real-{name}.md"
        if made is None:
            continue
        title, _, measured = made.partition("\n\n")
        old = file.read_text(encoding="utf-8") if file.exists() else ""
        reading = old.partition("## Reading\n")[2].partition("## Measured\n")[0].strip("\n")
        parts = [title, *(["## Reading", reading, "## Measured"] if reading else []), measured]
        yield file, "\n\n".join(parts) + "\n"


def preserved_table() -> str | None:
    """Before and after two tasks, nothing protected and by several ways; None where cells are missing."""
    found, ways = dict(cells.kept(preserving.TABLE)), {
        "before": "before", "full-unprotected": "after, nothing protected",
        "full-gentle": "the same, at the command's own 2e-5",
        "full-random-10": "after, 10 % at random frozen", "full-esi-1": "after, 1 % by ESI frozen",
        "full-esi-10": "after, 10 % by ESI frozen", "full-mixed-embedded": "after, own answers mixed in",
        "full-esi-10-mixed-embedded": "after, 10 % by ESI frozen, and own answers mixed in",
        f"full-{preserving.SHOWN.name}": "after, 10 % by ESI calibrated (the default)",
        f"full-{preserving.AT_PEAK.name}": "the same, at the peak of the training's rate throughout",
    }  # fmt: skip
    asked, tasks = ("harmbench", "advbench", "xstest_safe"), {"gsm8k": "GSM8K", "instruct": "instructions"}
    ways = {way: label for way, label in ways.items() if any(f"{task}-{way}" in found for task in tasks)}
    if not ways or not all(f"{task}-before" in found for task in tasks):
        return None
    headings = ["refused, percent [95 % interval]"]
    for name in tasks.values():
        headings += [f"{name}: HarmBench", *(HEADINGS[SOURCES.index(each)] for each in asked[1:]), "its perplexity"]
    rows = []
    for way, label in ways.items():
        row = [label]
        for task in tasks:
            cell = found.get(f"{task}-{way}")
            row += ["" if cell is None else interval(level(outcomes([cell], each))) for each in asked]
            row.append("" if cell is None else perplexity([cell], "task").split()[0])
        rows.append(tuple(row))
    steps = (f"{found[f'{task}-full-unprotected']['steps']:,} steps of {name}" for task, name in tasks.items())
    return Grid(
        title="", headings=tuple(headings), rows=tuple(rows),
        caption=f"The aligned twin after {' or '.join(steps)}; n 78, 200, 250. The first two columns should stay, the "
        "third not rise, and the task's perplexity fall. Own answers: one row in six is the twin's own to an embedded "
        "request; calibrated: these weights alone are trained to keep such answers, every 4th step. At "
        "1e-4 where nothing else is said ([SPA and its rivals]"
        "(docs/results/real-preserve.md)). Seed 0.",
    ).markdown()  # fmt: skip


def enhanced_table() -> str | None:
    """Before and after SET, two recipes, on ESI's and on random weights; None where cells are missing."""
    found = {recipe.table: dict(cells.kept(recipe.table)) for recipe in enhancing.RECIPES.values()}
    plain, contrast = enhancing.RECIPES["plain"], enhancing.RECIPES["contrast-long"]
    before = found[plain.table].get("before")
    if before is None:
        return None
    shown: list[tuple[str, list[Cell]]] = [("before", [before])]
    back = enhancing.BACK.replace(" ", "-")
    for recipe, how, methods, rate, label in (
        (plain, "", ("esi", "random"), README_RATE, "plain"),
        (plain, "", ("random",), plain.rates[-1], f"plain, at {plain.rates[-1]:g}"),
        (contrast, back, ("esi", "random"), contrast.rates[0], "with contrast"),
    ):  # fmt: skip
        for method in methods:
            seeds = [f"{method}{how}-{rate:g}-{seed}" for seed in range(3)]
            there = [found[recipe.table][seed] for seed in seeds if seed in found[recipe.table]]
            shown.append((f"1 % of the weights, {NAMES[method]}, {label}", there))
    brief = found[contrast.table].get(f"esi{enhancing.BRIEF}{enhancing.BACK}-{contrast.rates[0]:g}-0".replace(" ", "-"))
    if brief is not None:
        shown.append((f"1 % of the weights, {NAMES['esi']}, with contrast, brief", [brief["whole"]]))
    if not all(seeds for _, seeds in shown):
        return None
    table = Grid(
        title="",
        headings=(
            "refused, percent [95 % interval]", *(HEADINGS[SOURCES.index(each)] for each in SHOWN), HEADINGS[-1],
            "seeds",
        ),
        rows=tuple(
            (
                label, *(interval(level(outcomes(seeds, source))) for source in SHOWN), perplexity(seeds).split()[0],
                str(len(seeds)) * bool(number),
            )
            for number, (label, seeds) in enumerate(shown)
        ),
        caption="SmolLM2-135M-Instruct; n "
        + ", ".join(str(len(before["outcomes"][source])) for source in SHOWN)
        + ", told by [openings](docs/judges.md) of refusals. The first three columns should rise, the others (the "
        f"last on benign texts) should not. Plain: 100 steps of refusals and benign rows at {README_RATE:g} "
        f"([results](docs/results/real-enhance.md)). With contrast: {contrast.steps} steps of refusals and the model's "
        f"own answers to harmless requests at {contrast.rates[0]:g}, then back towards the original as far as 90 % of "
        "a validation part are still refused, which is no option of the command "
        "([results](docs/results/real-contrast-long.md)). Brief: 8 tokens of these answers, the whole way.",
    )  # fmt: skip
    return table.markdown()


def main() -> None:
    for file, text in written():
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file.relative_to(cells.ROOT)}")


if __name__ == "__main__":
    main()
