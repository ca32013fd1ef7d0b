"""The map of both models."""

import cells
import locating
from topics.outcomes import NAMES, PAGES, Cell, told

from safelocus.analysis import words
from safelocus.analysis.claims import Claim, locate_claims
from safelocus.analysis.map import SafetyMap
from safelocus.analysis.patterns import Pattern
from safelocus.report.drawing import write_picture
from safelocus.report.grid import Grid
from safelocus.report.maps import layers_chart


def claims_of(cell: Cell) -> list[Claim]:
    """Of where the weights lie, by the patterns that were tested."""
    return locate_claims([Pattern(**pattern) for pattern in cell["patterns"]])


def page() -> str | None:
    found = dict(cells.kept(locating.TABLE))
    parts = []
    for model in locating.MODELS:
        name = model.replace(":", "-")
        located = {m: found[f"{name}-{m}"] for m in locating.METHODS if f"{name}-{m}" in found}
        if "esi" not in located:
            continue
        esi = located["esi"]
        shown = SafetyMap.from_json(esi["map"])
        write_picture(PAGES / f"real-map-{name}.svg", words.title(shown), [layers_chart(shown)])
        tested = {m: {p["name"]: p for p in cell["patterns"]} for m, cell in located.items()}
        rows = [
            (pattern, *(_fold(tested[m][pattern]) if m in tested else "-" for m in locating.METHODS))
            for pattern in tested["esi"]
        ]
        held = f"{100 * shown.selected_mass:.1f} % of all ESI" if shown.selected_mass else "an unknown share"
        gini = "" if shown.concentration is None else f", Gini {shown.concentration.gini:.2f}"
        halves, others = found.get(f"{name}-halves"), (*locating.METHODS[1:], cells.APART)
        agreement = [f"two halves of the prompts {_iou(halves)}"] if halves else []
        agreement += [
            f"{NAMES[method]} {_iou(other)}"
            for method in others
            if (other := found.get(f"{name}-esi-{method.replace(' ', '-')}"))
        ]
        parts += [
            f"## {model}",
            f"![Where the top 1 % of the weights by ESI lie in {model}, per layer and component](real-map-{name}.svg)",
            Grid(
                title="", headings=("times what size gives", *(NAMES[m] for m in locating.METHODS)), rows=tuple(rows),
                caption="fold [95 % interval over layers], p by permutation (Holm); p turned: with neighbours kept",
            ).markdown(),
            " ".join(
                [
                    f"The top 1 % hold {held}{gini}.",
                    *([f"Overlap of the selections (IoU): {', '.join(agreement)}."] if agreement else []),
                ]
            ),
            Grid(
                title="", headings=("claim", "measured", "verdict"),
                rows=tuple((c.claim, c.measured, c.verdict) for c in claims_of(esi)), num_labels=3,
            ).markdown(),
        ]  # fmt: skip
    if not parts:
        return None
    if models := found.get("models"):
        parts.append(f"The model and its aligned twin: overlap {_iou(models)}.")
    return "\n\n".join(["# The map of a real model", told(locating), *parts])


def _fold(pattern: Cell) -> str:
    ends = "" if pattern["low"] is None else f" [{pattern['low']:.2f},{pattern['high']:.2f}]"
    turned = "" if pattern["p_rotation"] is None else f", turned {pattern['p_rotation']:.2g}"
    return f"{pattern['fold']:.2f}{ends}, p {pattern['p_holm']:.2g}{turned}"


def _iou(compared: Cell) -> str:
    overlap = compared.get("top", compared)["overall"]
    return f"{overlap['iou']:.3f} (chance {overlap['expected_iou']:.3f})"
