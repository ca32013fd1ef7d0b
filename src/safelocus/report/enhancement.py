"""An enhancement as tables, figures and a model card.

Tables are plain text first (`Grid`), so that the terminal and the card print the same ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safelocus.enhancement.result import PATCH, Enhancement
from safelocus.report.colours import SERIES_LIGHT
from safelocus.report.figures import INK, MUTED, finish_lines, new_figure, save_png
from safelocus.report.grid import Grid
from safelocus.report.text import MEASURES, count, kind_label
from safelocus.report.verification import interval
from safelocus.run import write_text
from safelocus.training.arm import TrainedArm


def outcome_grid(found: Enhancement) -> Grid:
    """Before, after, and every control, on held-out prompts."""
    names = [name for name in MEASURES if name in found.before.measures]
    rows = [("before", "", *(interval(found.before.measures[name]) for name in names))]
    for arm in found.trained:
        rows.append(
            (
                kind_label(arm.name),
                count(arm.trial.num_weights),
                *(interval(arm.after.measures.get(name)) for name in names),
            )
        )
    return Grid(
        title="Before and after",
        headings=("trained", "weights", *(MEASURES[name] for name in names)),
        rows=tuple(rows),
        caption="percent [95 % interval], on prompts that nothing was trained on or chosen by",
        sections=(1, 2),
    )


def sweep_grid(found: Enhancement) -> Grid | None:
    """Every learning rate of every kind on the validation part; None where only one was tried."""
    if len(found.selection.trials) < 2:
        return None
    names = [name for name in MEASURES if name in found.selection.trial.point.measures]
    rows: list[tuple[str, ...]] = []
    sections = []
    for arm in found.trained:
        sections.append(len(rows))
        for number, trial in enumerate(arm.trials):
            rows.append(
                (
                    kind_label(arm.name) if number == 0 else "",
                    f"{trial.learning_rate:g}" + (" *" if number == arm.chosen else ""),
                    str(trial.step),
                    *(interval(trial.point.measures.get(name)) for name in names),
                )
            )
    return Grid(
        title="Learning rates",
        headings=("trained", "rate", "step", *(MEASURES[name] for name in names)),
        rows=tuple(rows),
        caption="on the validation part; * chosen: the lowest sum of ASR and of what over-refusal and incoherence rose "
        "and utility fell",
        sections=tuple(sections),
    )


def write_figures(found: Enhancement, folder: Path) -> list[str]:
    """curve.png (losses, and looks where there were some) and, of a sweep, sweep.png; returns the names."""
    save_png(curve_figure(found), folder / "curve.png")
    if len(found.selection.trials) < 2:
        return ["curve.png"]
    save_png(sweep_figure(found), folder / "sweep.png")
    return ["curve.png", "sweep.png"]


def curve_figure(found: Enhancement) -> Figure:
    """Losses of all kinds, and above them the looks at the selection's training."""
    looks = found.selection.trial.curve
    figure = new_figure(5.2, 4.6 if looks else 2.6)
    axes = figure.subplots(2 if looks else 1, 1, squeeze=False, sharex=True)[:, 0]
    if looks:
        names = [name for name in MEASURES if name in looks[0].measures]
        for number, name in enumerate(names):
            values = [point.measures[name].value for point in looks]
            axes[0].plot(
                [point.step for point in looks], [float("nan") if v is None else v for v in values], "o-",
                color=SERIES_LIGHT[number % len(SERIES_LIGHT)], markersize=3, linewidth=1.4, label=MEASURES[name],
            )  # fmt: skip
        axes[0].axvline(found.selection.trial.step, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axes[0].set_ylim(-0.03, 1.03)
        finish_lines(axes[0], "", "validation part")
    for number, arm in enumerate(found.trained):
        losses = arm.trial.losses
        axes[-1].plot(
            [loss.step for loss in losses], [loss.loss for loss in losses], linewidth=1.2,
            color=SERIES_LIGHT[number % len(SERIES_LIGHT)], label=kind_label(arm.name),
        )  # fmt: skip
    axes[-1].set_yscale("log")
    finish_lines(axes[-1], "step", "loss")
    figure.suptitle(f"{_model(found)}: training the selected weights", fontsize=9, color=INK, wrap=True)
    return figure


def sweep_figure(found: Enhancement) -> Figure:
    """ASR, and harmless prompts that are not refused, against the learning rate, per kind."""
    has_harmless = "over_refusal" in found.selection.trial.point.measures
    figure = new_figure(5.2, 4.6 if has_harmless else 2.6)
    axes = figure.subplots(2 if has_harmless else 1, 1, squeeze=False, sharex=True)[:, 0]
    for number, arm in enumerate(found.trained):
        _line(axes[0], arm, "asr", number)
        if has_harmless:
            _line(axes[1], arm, "over_refusal", number, complement=True)
    for axis, label in zip(axes, ("ASR", "harmless not refused"), strict=False):
        axis.set_xscale("log")
        axis.set_ylim(-0.03, 1.03)
        finish_lines(axis, "learning rate" if axis is axes[-1] else "", label)
    figure.suptitle(f"{_model(found)}: what each learning rate does (validation part)", fontsize=9, color=INK)
    return figure


def write_card(found: Enhancement, path: Path) -> None:
    """A model card for the patch: what it is, how it was made, what it changed, its limits."""
    write_text(path, card(found))


def card(found: Enhancement) -> str:
    """The card's Markdown."""
    model, dtype = _model(found), found.provenance["dtype"]
    sections = [
        f"# Safety patch for {model}",
        f"New values for {count(found.patch.k)} weights of `{model}` and no others. {effect(found)} Without them it is "
        "what it was, bit for bit.",
        "## Before and after",
        outcome_grid(found).markdown(),
        "Refusal, ASR and incoherence on harmful prompts (incoherence also on harmless ones), over-refusal on harmless "
        f"ones. ASR by: {', '.join(found.before.judge_names)}. " + _evaluated(found),
    ]
    if found.controls:
        sections.append(
            "The other rows are controls: the same data, steps and settings on other weights. Only what the selected "
            "weights do beyond those of equal number says that their choice mattered."
        )
    sections += [
        "## How it was made",
        "\n".join(f"- {line}" for line in _making(found)),
        "## How to apply and revert",
        f"```\nsafelocus patch apply {PATCH} {model} -o patched\n"
        f"safelocus patch revert {PATCH} patched -o original\n```",
        f'```python\nimport safelocus as sl\n\ntarget = sl.load("{model}", dtype="{dtype}")\n'
        f'patch = sl.Patch.load("{PATCH}")\npatch.apply(target)\npatch.revert(target)\n```',
        f"Its values are {dtype}; for a folder with weights of another type add that: `--dtype`.",
        "It fits this model only; on any other it is refused.",
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(found)),
        "## Licence",
        f"The patch is a derivative of `{model}`: that model's licence applies to it, and the terms of the data it was "
        "trained on. Add them here before you share it.",
    ]
    front = f"---\nlibrary_name: safelocus\ntags:\n- safety\n- patch\nbase_model: {model}\n---\n"
    return front + "\n" + "\n\n".join(sections) + "\n"


def effect(found: Enhancement) -> str:
    """What the values do, in one sentence that the numbers bear out."""
    changed = found.comparison.differences["asr"]
    if changed.value is None or changed.low is None or changed.high is None:
        return "What they do to the attack success rate could not be measured."
    if changed.high < 0:
        return f"With them fewer attacks succeed: {-100 * changed.value:.0f} in 100 fewer on the prompts below."
    if changed.low > 0:
        return "With them MORE attacks succeed on the prompts below: do not use this patch."
    return "On the prompts below they changed the attack success rate by nothing that could be measured."


def _making(found: Enhancement) -> list[str]:
    """How the patch was made, line by line."""
    trial, settings, made = found.selection.trial, found.settings, found.provenance
    selection = made["selection"]
    how_found = " ".join(str(selection[key]) for key in ("which", "method") if selection.get(key))
    retained = " and ".join(_set(part) for part in made["retained"])
    if retained:
        weights = f"divergence x {made['retain_kl']:g}, loss x {made['retain_weight']:g}"
        by_itself = ", answered by the model itself" if made["own_answers"] else ""
        retained += f"{by_itself}; {made['retain_rows']} with each refusal, {weights}"
    return [
        f"weights: {count(found.patch.k)}, {how_found or 'given by hand'}",
        f"refusals: {_set(made['data'])}",
        f"retained: {retained or 'nothing'}",
        f"AdamW on fp32 copies of the selected weights, rate {trial.learning_rate:g} ({settings.schedule}), step "
        f"{trial.step} of {settings.steps}, {settings.batch_size * settings.accumulation} refusals a step, "
        f"seed {settings.seed}",
        *([f"ended early: {trial.stopped}"] if trial.stopped else []),
        f"versions: {', '.join(f'{name} {version}' for name, version in made['versions'].items())}",
    ]


def _set(part: dict[str, Any]) -> str:
    return f"{part['source']} ({part['num_prompts']} prompts)"


def _limits(found: Enhancement) -> list[str]:
    lines = [
        "Training on few weights brings back refusals that the model has in it; it does not teach a model that never "
        "learned to refuse.",
        "Measured on the prompts above, with greedy answers; not on other phrasings, languages, attacks or sampling.",
        "The patch can be reverted by anyone who has it, and trained away by anyone who has the weights.",
    ]
    lines += [f"{remark[0].upper()}{remark[1:]}." for remark in found.notes]
    return lines


def _evaluated(found: Enhancement) -> str:
    parts = found.before.provenance.get("prompts", []) + found.before.provenance.get("tasks", [])
    words = [f"{p['source']} ({p.get('num_prompts', p.get('num_examples'))})" for p in parts]
    return f"Measured with {', '.join(words)}."


def _model(found: Enhancement) -> str:
    return str(found.provenance.get("model", "model"))


def _line(axes: Axes, arm: TrainedArm, name: str, number: int, *, complement: bool = False) -> None:
    points: Sequence[tuple[float, float]] = sorted(
        (trial.learning_rate, 1 - value if complement else value)
        for trial in arm.trials
        if (measure := trial.point.measures.get(name)) is not None and (value := measure.value) is not None
    )
    axes.plot(
        [x for x, _ in points], [y for _, y in points], "o-", color=SERIES_LIGHT[number % len(SERIES_LIGHT)],
        linewidth=max(1.2, 4.5 - number), markersize=max(2.5, 6 - number),  # equal curves stay visible beneath
        label=kind_label(arm.name),
    )  # fmt: skip
