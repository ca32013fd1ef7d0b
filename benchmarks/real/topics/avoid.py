"""Words that must not come."""

import cells
import wording
from topics.outcomes import NAMES, outcomes, perplexity, told

from safelocus.analysis.words import interval
from safelocus.report.grid import Grid
from safelocus.verification.pooling import difference, level

ARMS = {
    "esi-10": "10 % by ESI frozen", "random-10": "10 % at random frozen", "mixed": "own answers mixed in",
    "masked": "listed words not learned", "unprotected": "nothing",
}  # fmt: skip


_TASKS = (("AG News", "ag_news"), ("PubMedQA", "pubmedqa"))


def page() -> str | None:
    found = dict(cells.kept(wording.TABLE))
    if "before" not in found:
        return None
    order, rows = ("before", "SET", "SPA"), []
    start = {"SET": found["before"], "SPA": found.get(f"set-esi-{wording.PATCH_RATE:g}")}
    for cell in sorted(found.values(), key=lambda cell: (order.index(cell["stage"]), cell.get("rate", 0.0))):
        before, said = start.get(cell["stage"]), []
        for name in wording.LISTS:
            now = outcomes([cell], name)
            fall = None if before is None else difference(now, outcomes([before], name), paired="prompts")
            said += [interval(level(now)), "" if fall is None else interval(fall), f"{cell['per_1000'][name]:g}"]
        method = cell.get("method", "")
        rows.append(
            (
                cell["stage"], ARMS.get(method, NAMES.get(method, "")), f"{cell['rate']:g}" if "rate" in cell else "",
                *said, f"{cell['tokens']:g}", interval(level(outcomes([cell], "alpaca"))),
                *(interval(level(outcomes([cell], task))) for _, task in _TASKS), perplexity([cell]),
            )
        )  # fmt: skip
    marks = found["before"]["outcomes"]
    counts = ", ".join(f"{label} {len(marks[key])}" for label, key in (("requests", "listed"), *_TASKS))
    table = Grid(
        title="", rows=tuple(rows), num_labels=2,
        headings=(
            "", "trained, or protected", "rate", "listed", "change", "of 1,000", "kin", "change", "of 1,000", "tokens",
            "refused", *(label for label, _ in _TASKS), "perplexity",
        ),
        caption="percent of answers that hold a word, and points since before (SPA: since SET by ESI) [95 % interval, "
        f"paired by request]; expressions among 1,000 words; one seed; n: {counts}, perplexity "
        f"{len(found['before']['nats']['texts'])} texts",
    )  # fmt: skip
    return "\n\n".join(["# Words that must not come, on a real model", told(wording), table.markdown()])
