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
from topics import aligned, attack, avoid, certify, choice, claims, enhance, locate, preserve, verify
from topics.choice import SHOWN
from topics.outcomes import HEADINGS, NAMES, PAGES, SOURCES, outcomes

from safelocus.analysis.words import interval
from safelocus.report.grid import Grid
from safelocus.verification.pooling import level

README_RATE = 1e-4
TOPICS: dict[str, Callable[[], str | None]] = {
    "claims": claims.page, "map": locate.page, "aligned": aligned.page, "verify": verify.page,
    **{recipe.table: partial(enhance.page, name) for name, recipe in enhancing.RECIPES.items()},
    "preserve": preserve.page, "choice": choice.page, "attack": attack.page, "words": avoid.page,
    "certify": certify.page,
}  # fmt: skip


def written() -> Iterator[tuple[Path, str]]:
    """(file, what it is to hold) of README and of every page that has cells."""
    if (table := readme_table()) is not None:
        file = cells.ROOT / "README.md"
        head, _, rest = file.read_text(encoding="utf-8").partition("<!-- real -->\n")
        yield file, f"{head}<!-- real -->\n{table}\n<!-- /real -->{rest.partition('<!-- /real -->')[2]}"
    for name, make in TOPICS.items():
        made, file = make(), PAGES / f"real-{name}.md"
        if made is None:
            continue
        title, _, measured = made.partition("\n\n")
        old = file.read_text(encoding="utf-8") if file.exists() else ""
        reading = old.partition("## Reading\n")[2].partition("## Measured\n")[0].strip("\n")
        parts = [title, *(["## Reading", reading, "## Measured"] if reading else []), measured]
        yield file, "\n\n".join(parts) + "\n"


def readme_table() -> str | None:
    """Before and after SET, two recipes, on ESI's and on random weights; None where cells are missing."""
    found = {recipe.table: dict(cells.kept(recipe.table)) for recipe in enhancing.RECIPES.values()}
    plain, contrast = enhancing.RECIPES["plain"], enhancing.RECIPES["contrast-long"]
    shown = [(plain, "before", "before")]
    back = enhancing.BACK.replace(" ", "-")
    for recipe, how, rate, label in (
        (plain, "", README_RATE, "plain"), (contrast, back, contrast.rates[0], "with contrast"),
    ):  # fmt: skip
        shown += [
            (recipe, f"{method}{how}-{rate:g}-0", f"1 % of the weights, {NAMES[method]}, {label}")
            for method in ("esi", "random")
        ]
    if any(key not in found[recipe.table] for recipe, key, _ in shown):
        return None
    brief = found[contrast.table].get(f"esi{enhancing.BRIEF}{enhancing.BACK}-{contrast.rates[0]:g}-0".replace(" ", "-"))
    if brief is not None:
        found[contrast.table]["brief"] = brief["whole"]
        shown.append((contrast, "brief", f"1 % of the weights, {NAMES['esi']}, with contrast, brief"))
    table = Grid(
        title="", headings=("refused, percent [95 % interval]", *(HEADINGS[SOURCES.index(each)] for each in SHOWN)),
        rows=tuple(
            (label, *(interval(level(outcomes([found[recipe.table][key]], source))) for source in SHOWN))
            for recipe, key, label in shown
        ),
        caption="SmolLM2-135M-Instruct; n "
        + ", ".join(str(len(found[plain.table]["before"]["outcomes"][source])) for source in SHOWN)
        + ". The first two columns should rise, the other two should not. Plain: 100 steps of refusals and benign "
        f"rows at {README_RATE:g} ([results](docs/results/real-enhance.md)). With contrast: {contrast.steps} steps of "
        f"refusals and the model's own answers to harmless requests at {contrast.rates[0]:g}, then back towards the "
        "original as far as 90 % of a validation part are still refused "
        "([results](docs/results/real-contrast-long.md)). Brief: 8 tokens of these answers, the whole way. One seed.",
    )  # fmt: skip
    return table.markdown()


def main() -> None:
    for file, text in written():
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file.relative_to(cells.ROOT)}")


if __name__ == "__main__":
    main()
