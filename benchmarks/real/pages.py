"""The pages of the real model, made from what its cells hold: docs/results/real-*.md and their pictures.

    python benchmarks/real/pages.py

Tables, verdicts and pictures are computed, in `topics/` one module a page; what stands under "## Reading" on one is
written by people, and kept.
"""

from collections.abc import Callable
from functools import partial

import cells
import enhancing
from topics import aligned, attack, avoid, certify, choice, claims, enhance, locate, preserve, verify
from topics.choice import SHOWN
from topics.outcomes import HEADINGS, NAMES, PAGES, SOURCES, outcomes

from safelocus.analysis.words import interval
from safelocus.report.grid import Grid
from safelocus.verification.pooling import level

README_RATE = 1e-4


def write(name: str, make: Callable[[], str | None]) -> None:
    made, file = make(), PAGES / f"real-{name}.md"
    if made is None:
        return
    title, _, measured = made.partition("\n\n")
    written = file.read_text(encoding="utf-8") if file.exists() else ""
    reading = written.partition("## Reading\n")[2].partition("## Measured\n")[0].strip("\n")
    parts = [title, *(["## Reading", reading, "## Measured"] if reading else []), measured]
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {file.relative_to(cells.ROOT)}")


def readme() -> None:
    """The table of README, between its marks: before and after SET, two recipes, on ESI's and on random weights."""
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
        return
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
    file = cells.ROOT / "README.md"
    head, _, rest = file.read_text(encoding="utf-8").partition("<!-- real -->\n")
    _, _, tail = rest.partition("<!-- /real -->")
    file.write_text(f"{head}<!-- real -->\n{table.markdown()}\n<!-- /real -->{tail}", encoding="utf-8")
    print("wrote the table of README.md")


def main() -> None:
    readme()
    for name, make in (
        ("claims", claims.page), ("map", locate.page), ("aligned", aligned.page), ("verify", verify.page),
        ("enhance", partial(enhance.page, "plain")), ("contrast", partial(enhance.page, "contrast")),
        ("contrast-long", partial(enhance.page, "contrast-long")),
        ("preserve", preserve.page), ("choice", choice.page), ("attack", attack.page), ("words", avoid.page),
        ("certify", certify.page),
    ):  # fmt: skip
        write(name, make)


if __name__ == "__main__":
    main()
