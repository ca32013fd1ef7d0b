"""Certificates."""

import cells
import certifying
from topics.outcomes import told

from safelocus.analysis.words import interval
from safelocus.evaluation.measures import Measure
from safelocus.report.grid import Grid


def page() -> str | None:
    found = dict(cells.kept(certifying.TABLE))
    order = {f"{against}-{radius}": n for n, (against, radius) in enumerate(certifying.ERASED)}
    rows, bounds = [], []
    for key in sorted(found, key=lambda key: (order.get(key, 99), key)):
        for name, each in found[key]["found"].items():
            certified = [Measure.from_json(measure) for measure in each["certified"]]
            if each["harmful"] is None:
                flagged, whole = (Measure.from_json(each[what]) for what in ("flagged", "flagged_whole"))
                rows.append(
                    (
                        each["against"], f"{len(certified) - 1}", name, interval(certified[-1]), interval(whole),
                        interval(flagged), f"{each['checks']:,.0f}", f"{each['seconds']:.1f}",
                    )
                )  # fmt: skip
            else:
                bounds += [
                    (f"{found[key]['keep']:g}", f"{radius}", interval(certified[radius]), f"{100 * bound:.0f}")
                    for radius, bound in enumerate(each["harmful"])
                ]
    if not rows and not bounds:
        return None
    erased = Grid(
        title="", rows=tuple(rows), num_labels=3,
        headings=(
            "words", "at most", "harmful, harmless", "harmful: certified", "harmless recognised", "with words left out",
            "checks", "seconds",
        ),
        caption="percent [95 % interval, Clopper-Pearson]; checks and seconds per harmless prompt, one core",
    )  # fmt: skip
    deleted = Grid(
        title="", rows=tuple(bounds), num_labels=2,
        headings=("kept", "words changed", "surely refuses more often than not", "does not refuse, at most"),
        caption="percent of prompts [95 % interval], and percent of answers on average, with 95 % confidence in all",
    )  # fmt: skip
    tables = [each.markdown() for each, some in ((erased, rows), (deleted, bounds)) if some]
    return "\n\n".join(["# Certificates for a real model's aligned twin", told(certifying), *tables])
