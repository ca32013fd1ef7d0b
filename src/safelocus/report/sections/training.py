"""`enhance` and `preserve` on the page: before and after, against controls, and along the way.

Reads `results.json` as far as it goes: `before`, `after` (and `unprotected`) hold measures; `controls` the same per
control, with its `learning_rate`; `curve` measures per training step; `losses` a number per step; `sweep` measures
per learning rate; `selection.safetensors`, the weights that were used. What is missing is left out, and named.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelocus.report.blocks import Cell, Figure, Part, Section, Table
from safelocus.report.runs import ReportRun
from safelocus.report.sections.map import selection_parts
from safelocus.report.sections.measures import curves, dots, in_words, listing, measures_in, proportions_in
from safelocus.report.text import capital, kind_label

_CLAUSES = (
    ("asr", "harmful answers"),
    ("refusal", "refusals of harmful prompts"),
    ("over_refusal", "refusals of harmless prompts"),
    ("task", "right answers in the task learned"),
    ("utility", "right answers to other tasks"),
    ("incoherent", "incoherent answers"),
)


def training_sections(run: ReportRun) -> list[Section]:
    """One section: what training did."""
    results = run.results
    protected = run.kind == "preserve"
    after = "protected" if protected else "after"
    states = {"before": results.get("before"), after: results.get("after")}
    if protected and results.get("unprotected") is not None:
        states["unprotected"] = _after(results["unprotected"])
    states = {name: values for name, values in states.items() if measures_in(values)}
    controls = _controls(results)
    parts = [
        _states(states, "Before and after"),
        _against(run, controls),
        _along(run, after),
        _losses(results),
        _sweep(results),
    ]
    missing = [key for key in ("before", "after", "curve", *_expected(run)) if results.get(key) is None]
    notes = [*_texts(results.get("notes"))]
    if missing:
        notes.append(f"results.json holds no {', '.join(missing)}, so the page shows nothing of them.")
    return [
        Section(
            title=run.name,
            what=_what(run),
            summary=[*_summary(states, after), *_texts(results.get("verdict"))],
            tiles=_tiles(states, after),
            parts=[*(part for part in parts if part is not None), *_where(run)],
            notes=notes,
        )
    ]


def _where(run: ReportRun) -> list[Part]:
    """Where the weights lie that were trained, or protected."""
    if run.used is None:
        return []
    did = "protected" if run.kind == "preserve" else "trained"
    return selection_parts(run.used, run.selection(), title=f"Where the {did} weights lie")


def _expected(run: ReportRun) -> tuple[str, ...]:
    return ("controls", "losses") if run.kind == "enhance" else ()


def _what(run: ReportRun) -> str:
    model = run.config.get("model") or (run.results.get("provenance") or {}).get("model") or "the model"
    return f"{'Fine-tuning' if run.kind == 'preserve' else 'Enhancing'} {model}"


def _texts(value: Any) -> list[str]:
    """Sentences, however they are kept: one string, a list of them, or an object with `text`."""
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, str):
        return [value]
    return [str(line) for line in value] if isinstance(value, Sequence) else []


def _after(control: Any) -> Any:
    """The measures of a control: under `after`, or the control's own values."""
    if isinstance(control, Mapping) and isinstance(control.get("after"), Mapping):
        return control["after"]
    return control


def _controls(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found = results.get("controls")
    if not isinstance(found, Mapping):
        return {}
    return {str(name): c for name, c in found.items() if isinstance(c, Mapping) and measures_in(_after(c))}


def _summary(states: Mapping[str, Any], after: str) -> list[str]:
    """A sentence per measure."""
    first, second = (proportions_in(states.get(name)) for name in ("before", after))
    other = proportions_in(states.get("unprotected"))
    said = []
    for name, words in _CLAUSES:
        if name in first and name in second:
            before = f"{100 * first[name]['value']:.0f} %"
            clause = f"{capital(words)} went from {before} to {in_words(second[name])}"
            said.append(clause + (f"; without protection to {in_words(other[name])}." if name in other else "."))
    return said


def _tiles(states: Mapping[str, Any], after: str) -> list[tuple[str, str]]:
    first, second = (proportions_in(states.get(name)) for name in ("before", after))
    return [
        (f"{100 * first[name]['value']:.0f} → {100 * second[name]['value']:.0f} %", words)
        for name, words in _CLAUSES[:4]
        if name in first and name in second
    ]


def _states(states: Mapping[str, Any], title: str) -> Part | None:
    figure = dots(title, states)
    return None if figure is None else Part(title=title, blocks=[figure, listing(states, heading="state")])


def _against(run: ReportRun, controls: Mapping[str, Mapping[str, Any]]) -> Part | None:
    if not controls:
        return None
    results, did = run.results, "protected" if run.kind == "preserve" else "trained"
    own = results.get("training") or results.get("after") or {}
    found = {"selection": {**own, "after": results.get("after")}, **controls}
    found = {kind: values for kind, values in found.items() if measures_in(_after(values))}
    compared = {kind_label(kind): _after(values) for kind, values in found.items()}
    figure = dots("Against controls", compared, series=did)
    if figure is None:
        return None
    extra = {
        heading: texts
        for heading, key in (
            ("weights", "num_weights"), ("weights", "num_protected"), ("rate", "learning_rate"), ("step", "step"),
        )
        if any(texts := [_number(values.get(key)) for values in found.values()])
    }  # fmt: skip
    return Part(
        title="Against controls",
        notes=[f"The same data and steps; other weights {did}."],
        blocks=[figure, listing(compared, heading=did, extra=extra)],
    )


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _along(run: ReportRun, after: str) -> Part | None:
    """Measures along the training: of the run, of the unprotected one, of controls."""
    points = list(_points(after if run.kind == "preserve" else kind_label("selection"), run.results.get("curve")))
    unprotected = run.results.get("unprotected")
    if isinstance(unprotected, Mapping):
        points += _points("unprotected", unprotected.get("curve"))
    for name, control in _controls(run.results).items():
        points += _points(kind_label(name), control.get("curve"))
    figures = curves(points, x="step", x_title="training step")
    return Part(title="Along the training", blocks=figures, side_by_side=True) if figures else None


def _points(series: str, curve: Any) -> Iterator[tuple[str, float, Any]]:
    """Points of `[{step, measures}]`, of `[{step, asr, ...}]`, or of several such lists by name."""
    if isinstance(curve, Mapping):
        for name, inner in curve.items():
            yield from _points(str(name), inner)
        return
    for point in curve if isinstance(curve, Sequence) and not isinstance(curve, str) else []:
        if isinstance(point, Mapping) and isinstance(point.get("step"), int | float):
            yield str(point.get("run", series)), point["step"], point.get("measures", point)


def _losses(results: Mapping[str, Any]) -> Part | None:
    losses = results.get("losses")
    rows: list[list[Cell]] = []
    for number, entry in enumerate(losses if isinstance(losses, Sequence) and not isinstance(losses, str) else []):
        loss = entry.get("loss") if isinstance(entry, Mapping) else entry
        step = entry.get("step", number + 1) if isinstance(entry, Mapping) else number + 1
        if isinstance(loss, int | float):
            rows.append(["loss", step, loss])
    if not rows:
        return None
    figure = Figure(
        kind="lines",
        title="Training loss",
        table=Table(columns={"curve": "text", "step": "number", "loss": "number"}, rows=rows),
        options={"series": "curve", "x": "step", "value": "loss", "x_type": "linear", "x_title": "training step",
                 "plain": True},
        wide=True,
    )  # fmt: skip
    return Part(title="Training loss", blocks=[figure])


def _sweep(results: Mapping[str, Any]) -> Part | None:
    """Measures against the learning rate, where there was more than one."""
    points: list[tuple[str, float, Any]] = []
    sweep = results.get("sweep")
    for entry in sweep if isinstance(sweep, Sequence) and not isinstance(sweep, str) else []:
        if isinstance(entry, Mapping) and isinstance(entry.get("learning_rate"), int | float):
            kind = kind_label(str(entry.get("kind", "selection")))
            points.append((kind, entry["learning_rate"], entry.get("measures", entry)))
    if len({rate for _, rate, _ in points}) < 2:
        return None
    figures = curves(points, x="learning rate", x_title="learning rate", x_type="log")
    note = "On the validation part that the rate was chosen by."
    return Part(title="Learning rates", notes=[note], blocks=figures, side_by_side=True) if figures else None
