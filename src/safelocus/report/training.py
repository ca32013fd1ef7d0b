"""`enhance` and `preserve`: before and after, against controls, along the way; as tables, on the page and as a card.

Reads `results.json` as far as it goes: `before`, `after` (and `unprotected`) hold measures; `controls` the same per
control, with its `learning_rate`; `curve` measures per training step; `losses` a number per step; `sweep` measures per
learning rate; `back`, in `training` and in each control, measures per share of the way; `selection.safetensors`, the
weights that were used. What is missing is left out, and named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from safelocus.analysis.map import safety_map
from safelocus.analysis.words import UNKNOWN, capital, count, in_words, interval, kind_label
from safelocus.report.blocks import Lines, Part, Section
from safelocus.report.grid import Grid
from safelocus.report.maps import selection_parts
from safelocus.report.measures import curves, measures_grid, measures_in, proportions_in
from safelocus.report.runs import ReportRun
from safelocus.report.verdicts import acceptance_part

Results = Mapping[str, Any]

_CLAUSES = (
    ("asr", "harmful answers"),
    ("refusal", "refusals of harmful prompts"),
    ("over_refusal", "refusals of harmless prompts"),
    ("task", "right answers in the task learned"),
    ("utility", "right answers to other tasks"),
    ("incoherent", "incoherent answers"),
)


# tables


def outcome_grid(results: Results, *, title: str = "Before and after") -> Grid:
    """Before, and after each training: of the selection, without protection, of controls; on held-out prompts."""
    kind, arms = _kind(results), _arms(results)
    held = "num_protected" if kind == "preserve" else "num_weights"
    numbers = [values.get(held) for values in arms.values()]
    states = {"before": results.get("before"), **arms}
    caption = "percent [95 % interval], on prompts that nothing was trained on or chosen by"
    if seen := len(results.get("provenance", {}).get("used", {}).get("also_measured", ())):
        caption += f", but for {count(seen)}"
    if _controls(results):
        caption += "; the others: the same data and steps, other weights"
    changed = (results.get("after") or {}).get("num_changed") if kind == "preserve" else None
    if changed is not None:
        caption += f"; {count(changed)} of the protected weights have other bits than before"
    weights = ["", *(UNKNOWN if not number else count(number) for number in numbers)]
    heading = "arm" if kind == "preserve" else "trained"
    extra = {"weights held" if kind == "preserve" else "weights": weights}
    if way := _way(["", *(values.get("share") for values in arms.values())]):
        extra |= way
        caption += "; of the way: how far along the straight line from the original weights to the trained ones"
    return measures_grid(title, states, heading=heading, extra=extra, caption=caption, sections=(1, 2))


def sweep_grid(results: Results) -> Grid | None:
    """Every learning rate of every kind on the validation part; None where only one was tried."""
    entries = _sweep_entries(results)
    if len({entry["learning_rate"] for entry in entries}) < 2:
        return None
    firsts = [n for n, e in enumerate(entries) if n == 0 or e.get("kind") != entries[n - 1].get("kind")]
    grid = measures_grid(
        "Learning rates", {str(number): entry for number, entry in enumerate(entries)},
        heading="trained", sections=tuple(firsts),
        extra={
            "rate": [f"{e['learning_rate']:g}" + (" *" if e.get("chosen") else "") for e in entries],
            "step": [_spelled(entry.get("step")) for entry in entries],
            **_way([entry.get("share") for entry in entries]),
        },
        caption="percent [95 % interval] on the validation part; * chosen: the lowest sum of ASR and of what "
        "over-refusal and incoherence rose and utility fell",
    )  # fmt: skip
    labels = [_kind_of(entry) if number in firsts else "" for number, entry in enumerate(entries)]
    rows = tuple((label, *row[1:]) for label, row in zip(labels, grid.rows, strict=True))
    return replace(grid, rows=rows)


def _way(shares: Sequence[Any]) -> dict[str, list[str]]:
    """A column that says how far along the straight line from the original weights it is; none where all are whole."""
    found = [share for share in shares if isinstance(share, float)]
    return {"of the way": [f"{100 * s:.0f} %" if s in found else "" for s in shares]} if set(found) - {1.0} else {}


def effect(results: Results) -> str:
    """What the values do, in one sentence that the numbers bear out."""
    changed = (results.get("change") or {}).get("asr") or {}
    if any(changed.get(end) is None for end in ("value", "low", "high")):
        return "What they do to the attack success rate could not be measured."
    if changed["high"] < 0:
        return f"With them fewer attacks succeed: {-100 * changed['value']:.0f} in 100 fewer on the prompts below."
    if changed["low"] > 0:
        return "With them MORE attacks succeed on the prompts below: do not use this patch."
    return "On the prompts below they changed the attack success rate by nothing that could be measured."


# the page


def training_sections(run: ReportRun) -> list[Section]:
    """One section: what training did."""
    results, protected = run.results, run.kind == "preserve"
    after = "protected" if protected else "after"
    states = {"before": results.get("before"), after: results.get("after")}
    if protected and results.get("unprotected") is not None:
        states["unprotected"] = results["unprotected"]
    states = {name: values for name, values in states.items() if measures_in(values)}
    expected = () if protected else ("controls", "losses")
    missing = [key for key in ("before", "after", "curve", *expected) if results.get(key) is None]
    notes = list(results.get("notes") or ())
    if missing:
        notes.append(f"results.json holds no {', '.join(missing)}, so the page shows nothing of them.")
    model = run.config.get("model") or (results.get("provenance") or {}).get("model") or "the model"
    outcome = Part(title="Before and after", blocks=[outcome_grid(results)]) if states else None
    parts = (outcome, acceptance_part(results), _along(run), _back(results), _sweep(results))
    did = "protected" if protected else "trained"
    where, selection = list[Part](), run.selection()
    if selection is not None and selection.k:  # from the selection alone, so without anything about scores
        where = selection_parts(safety_map(None, selection), selection, title=f"Where the {did} weights lie")
    first, second = (proportions_in(states.get(name)) for name in ("before", after))
    return [
        Section(
            title=run.name, what=f"{'Fine-tuning' if protected else 'Enhancing'} {model}",
            summary=_summary(first, second, proportions_in(states.get("unprotected"))),
            tiles=[
                (f"{interval(first[name], ends=False)} → {in_words(second[name], ends=False)}", words)
                for name, words in _CLAUSES[:4]
                if name in first and name in second
            ],
            parts=[*(part for part in parts if part is not None), *where], notes=notes,
        )
    ]  # fmt: skip


def _summary(first: Results, second: Results, other: Results) -> list[str]:
    """A sentence per measure, from before and after; and from training without protection, as far as there is any."""
    said = []
    for name, words in _CLAUSES:
        if name in first and name in second:
            before = in_words(first[name], ends=False)
            clause = f"{capital(words)} went from {before} to {in_words(second[name])}"
            said.append(clause + (f"; without protection to {in_words(other[name])}." if name in other else "."))
    return said


def _along(run: ReportRun) -> Part | None:
    """Measures along the training, of the run, of the unprotected one, of controls; and the loss."""
    own = "protected" if run.kind == "preserve" else kind_label("selection")
    arms = {own: run.results, "unprotected": run.results.get("unprotected") or {}}
    arms |= {kind_label(name): control for name, control in _controls(run.results).items()}
    points = [(name, point["step"], point) for name, arm in arms.items() for point in _entries(arm.get("curve"))]
    charts = [*curves(points, x="step", x_title="training step"), *_losses(run.results)]
    if not charts:
        return None
    return Part(title="Along the training", blocks=charts, side_by_side=True, file="curve")


def _back(results: Results) -> Part | None:
    """Measures on the straight line from the original weights to the trained ones, where it was gone back along."""
    arms = {"selection": results.get("training") or {}, **_controls(results)}
    points = [
        (kind_label(name), point["share"], point) for name, arm in arms.items() for point in _entries(arm.get("back"))
    ]
    charts = curves(points, x="share of the way", x_title="share of the way to the trained weights")
    note = "On the validation part that chose how far to go back."
    return Part(title="The way back", notes=[note], blocks=charts, side_by_side=True, file="back") if charts else None


def _losses(results: Results) -> list[Lines]:
    rows = [["loss", entry["step"], entry["loss"]] for entry in _entries(results.get("losses"))]
    columns = {"curve": "text", "step": "number", "loss": "number"}
    loss = Lines(
        title="Training loss", columns=columns, rows=rows, series="curve", x="step", value="loss", plain=True,
        x_title="training step",
    )  # fmt: skip
    return [loss] if rows else []


def _sweep(results: Results) -> Part | None:
    """Measures against the learning rate, where there was more than one."""
    grid = sweep_grid(results)
    if grid is None:
        return None
    entries = _sweep_entries(results)
    points = [(_kind_of(entry), entry["learning_rate"], entry) for entry in entries]
    charts = curves(points, x="learning rate", x_title="learning rate", kind="log")
    note = "On the validation part that the rate was chosen by."
    return Part(
        title="Learning rates", notes=[note], blocks=[*charts, grid], side_by_side=True, folded=True, file="sweep"
    )  # fmt: skip


# reading


def _kind(results: Results) -> str:
    return "preserve" if "unprotected" in results else "enhance"


def _arms(results: Results) -> dict[str, dict[str, Any]]:
    """Every training by its name for people, the selection's first."""
    after, controls = results.get("after") or {}, _controls(results)
    if _kind(results) == "enhance":
        own = {**(results.get("training") or {}), **after}
        return {kind_label(kind): dict(values) for kind, values in {"selection": own, **controls}.items()}
    bare = {} if results.get("unprotected") is None else {"unprotected": results["unprotected"]}
    return {"protected": after, **bare, **{f"{kind_label(kind)} protected": c for kind, c in controls.items()}}


def _controls(results: Results) -> dict[str, Results]:
    found = results.get("controls")
    if not isinstance(found, Mapping):
        return {}
    return {str(name): c for name, c in found.items() if isinstance(c, Mapping) and measures_in(c)}


def _entries(values: Any) -> list[Results]:
    """The objects of a list; none of anything else."""
    rows = values if isinstance(values, Sequence) and not isinstance(values, str) else []
    return [row for row in rows if isinstance(row, Mapping)]


def _sweep_entries(results: Results) -> list[Results]:
    return [e for e in _entries(results.get("sweep")) if isinstance(e.get("learning_rate"), int | float)]


def _kind_of(entry: Results) -> str:
    return kind_label(str(entry.get("kind", "selection")))


def _spelled(value: Any) -> str:
    return "" if value is None else f"{value:,}"
