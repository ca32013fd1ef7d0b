"""Noise and zeros."""

from collections.abc import Iterable

import cells
import numpy as np
import verifying
from topics.outcomes import Cell, told

from safelocus.analysis.words import interval
from safelocus.evaluation.measures import Measure
from safelocus.report.grid import Grid


def page() -> str | None:
    found = dict(cells.kept(verifying.TABLE))
    if not found:
        return None
    rows, verdicts = [], []
    for key in sorted(found, key=lambda key: (not key.startswith("noise"), key)):
        cell = found[key]
        for name in ("top", "bottom", "random"):
            some = [each for each in cell["cells"] if each["selection"] == name]
            rows.append(
                (
                    key.replace("-", " "), name, str(len(some)),
                    *(_range([each[what] for each in some]) for what in ("refusal", "over_refusal", "incoherent")),
                    _range([each["perplexity"] for each in some], 1, ".2f"),
                )
            )  # fmt: skip
        verdicts += [(key.replace("-", " "), c["claim"], c["measured"], c["verdict"]) for c in cell["claims"]]
    first = next(iter(found.values()))
    base = ", ".join(f"{m} {interval(Measure.from_json(first['baseline'][m]))}" for m in ("refusal", "over_refusal"))
    base += f", perplexity {first['baseline']['perplexity']['value']:.2f}"
    return "\n\n".join(
        [
            "# Noise on a real model's aligned twin", told(verifying), f"Undisturbed: {base}.",
            Grid(
                title="",
                headings=("disturbance", "weights", "cells", "refusal", "over-refusal", "incoherent", "perplexity"),
                rows=tuple(rows), num_labels=2,
                caption="percent, mean over noise seeds [least, most]; a claim's multiple of the perplexity is "
                "geometric; n 100 prompts or texts of each kind per cell",
            ).markdown(),
            Grid(
                title="", headings=("disturbance", "claim", "measured", "verdict"), rows=tuple(verdicts), num_labels=4
            ).markdown(),
        ]
    )  # fmt: skip


def _range(measures: Iterable[Cell], times: float = 100, form: str = ".0f") -> str:
    values = [times * measure["value"] for measure in measures]
    return f"{np.mean(values):{form}} [{min(values):{form}},{max(values):{form}}]"
