"""A preservation as a table and a figure: what the task cost with protection and without."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from safelocus.preservation.result import PROTECTED, UNPROTECTED, Preservation
from safelocus.report.colours import SERIES_LIGHT
from safelocus.report.figures import INK, finish_lines, new_figure, save_png
from safelocus.report.grid import Grid
from safelocus.report.text import MEASURES, UNKNOWN, count, kind_label
from safelocus.report.verification import interval
from safelocus.training.arm import TrainedArm

_ARMS = {PROTECTED: "protected", UNPROTECTED: "unprotected"}


def arm_label(kind: str) -> str:
    """ "protected", "unprotected", "random protected"."""
    return _ARMS.get(kind) or f"{kind_label(kind)} protected"


def outcome_grid(found: Preservation) -> Grid:
    """Before, and after each arm."""
    names = [name for name in MEASURES if name in found.before_measures]
    rows = [("before", "", *(interval(found.before_measures[name]) for name in names))]
    for arm in found.trained:
        rows.append(
            (
                arm_label(arm.name),
                count(arm.trial.num_weights) if arm.trial.num_weights else UNKNOWN,
                *(interval(arm.measures.get(name)) for name in names),
            )
        )
    changed = found.protected.trial.num_changed
    bits = "" if changed is None else f"; {count(changed)} of the protected weights have other bits than before"
    return Grid(
        title="Before and after",
        headings=("arm", "weights held", *(MEASURES[name] for name in names)),
        rows=tuple(rows),
        caption=f"percent [95 % interval], on prompts that nothing was trained on{bits}",
        sections=(1,),
    )


def write_figures(found: Preservation, folder: Path) -> list[str]:
    """curve.png; returns the names."""
    save_png(curve_figure(found), folder / "curve.png")
    return ["curve.png"]


def curve_figure(found: Preservation) -> Figure:
    """Refusal, harmless prompts not refused, and the task against the step, one line per arm."""
    panels = [name for name in ("refusal", "over_refusal", "incoherent", "task") if name in found.before_measures]
    figure = new_figure(5.2, 1.0 + 1.5 * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axis, name in zip(axes, panels, strict=True):
        for number, arm in enumerate(found.trained):
            steps, values = _series(arm, name)
            axis.plot(
                steps, values, "o-" if number == 0 else "o--", color=SERIES_LIGHT[number % len(SERIES_LIGHT)],
                markersize=3, linewidth=1.4, label=arm_label(arm.name),
            )  # fmt: skip
        axis.set_ylim(-0.03, 1.03)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        finish_lines(axis, "step" if axis is axes[-1] else "", MEASURES[name])
        if axis is not axes[0]:
            axis.get_legend().remove()
    model = Path(str(found.provenance.get("model", "model"))).name
    figure.suptitle(f"{model}: learning the task", fontsize=9, color=INK, wrap=True)
    return figure


def _series(arm: TrainedArm, name: str) -> tuple[list[int], list[float]]:
    points = [(p.step, p.measures[name].value) for p in arm.trial.curve if name in p.measures]
    return [step for step, _ in points], [float("nan") if value is None else value for _, value in points]
