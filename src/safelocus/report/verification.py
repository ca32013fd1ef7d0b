"""A verification, and the stability of selections, as tables and curves.

Every table is first made of plain text (`Grid`), so that the terminal, the page and Markdown print the same one.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safelocus.evaluation.measures import Measure
from safelocus.report import colours
from safelocus.report.figures import INK, MUTED, finish, finish_lines, new_figure, save_png
from safelocus.report.grid import Grid
from safelocus.report.text import MEASURES, method_label
from safelocus.verification import Stability, Verification
from safelocus.verification.ranking import Rank
from safelocus.verification.verification import Pooled, Setting

_COLOURS = {role: colours.SERIES_LIGHT[number] for role, number in colours.ROLES.items()}


def settings_grid(found: Verification, scorer: str | None = None, *, measures: Sequence[str] = ()) -> Grid:
    """Levels of every measure at every setting: baseline, then top, random and bottom."""
    scorer = scorer or found.scorers[0]
    names = [name for name in (*MEASURES, *measures) if name in found.measure_names]
    rows = [("baseline", "", *(interval(found.baseline.measures[name]) for name in names), "1")]
    sections = []
    for setting in found.settings:
        pooled = [found.pool(selection, scorer, setting) for selection in ("top", "random", "bottom")]
        if pooled[0] is None:
            continue
        sections.append(len(rows))
        for entry in pooled:
            if entry is not None:
                cells = (interval(entry.measures[name]) for name in names)
                rows.append(
                    (
                        str(setting) if entry is pooled[0] else "",
                        entry.selection,
                        *cells,
                        str(entry.num_cells),
                    )
                )
    return Grid(
        title=f"Disturbing the top weights by {method_label(scorer)}, and as many others",
        headings=("change", "selection", *(MEASURES.get(name, name.partition("@")[2]) for name in names), "cells"),
        rows=tuple(rows),
        caption="percent [95 % interval over seeds and prompts]; sigma: standard deviation of a weight's own matrix",
        sections=tuple(sections),
        num_labels=2,
    )


def ranking_grid(found: Verification, intervention: str) -> Grid:
    """One line per scorer, best first."""
    rows = []
    for entry in found.rankings[intervention]:
        effect = entry.effect
        rows.append(
            (
                method_label(entry.scorer),
                _quotient(entry),
                "yes" if entry.has_contrast else "no",
                str(effect.setting),
                interval(effect.fall),
                interval(effect.beyond_random),
                interval(effect.utility_fall),
                interval(effect.net),
            )
        )
    return Grid(
        title=f"Scorers under {intervention}: how much refusal breaks per utility lost",
        headings=(
            "scorer", "refusal lost per utility lost", "beyond controls", "at", "refusal falls", "more than random",
            "utility falls", "refusal minus utility",
        ),
        rows=tuple(rows),
        caption="first number and last column: lost as shares of the baseline; the first number is over all "
        "shared settings, the others, in percent, are at each scorer's own operating point",
    )  # fmt: skip


def stability_grid(found: Stability) -> Grid:
    """Agreement of selections beside chance."""
    rows = [
        (
            str(row["kind"]),
            str(row["what"]),
            f"{100 * row['ratio']:g} %",
            str(row["num_pairs"]),
            f"{row['iou']:.3f}" + (f" ({row['lowest']:.3f} to {row['highest']:.3f})" if row["num_pairs"] > 1 else ""),
            f"{row['chance']:.4f}",
            "-" if row["rho"] is None else f"{row['rho']:.3f}",
        )
        for row in found.summary()
    ]
    return Grid(
        title="Stability of the top weights",
        headings=("differs in", "what", "ratio", "pairs", "IoU (lowest to highest)", "chance", "rank correlation"),
        rows=tuple(rows),
        caption="chance: IoU of two random selections of these sizes",
        num_labels=2,
    )


def curves_figure(found: Verification, scorer: str | None = None) -> Figure:
    """Levels against the strength of the disturbance: a column per ratio, a row per measure."""
    scorer = scorer or found.scorers[0]
    groups = by_size([s for s in found.settings if found.pool("top", scorer, s)])
    names = [name for name in ("refusal", "asr", "utility", "over_refusal") if name in found.measure_names]
    figure = new_figure(max(3.6, 1.2 + 2.6 * len(groups)), 0.9 + 1.75 * len(names))
    all_axes = figure.subplots(len(names), len(groups), squeeze=False, sharey=True, sharex="col")
    for column, (size, settings) in enumerate(groups):
        labels = [_short(setting) for setting in settings]
        for row, name in enumerate(names):
            axes: Axes = all_axes[row, column]
            base = found.baseline.measures[name].value
            axes.axhline(base or 0.0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
            for selection, colour in _COLOURS.items():
                points = [(x, found.pool(selection, scorer, setting)) for x, setting in enumerate(settings)]
                _curve(axes, [(x, entry) for x, entry in points if entry is not None], name, colour, selection)
            axes.set_ylim(-0.03, 1.03)
            is_last = row == len(names) - 1
            finish(axes, "noise in sigma" if is_last else "", "" if column else MEASURES[name], grid=True)
            if row == 0:
                axes.set_title(size, fontsize=8, color=INK)
        all_axes[-1, column].set_xticks(range(len(settings)), labels)
    handles, texts = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3, fontsize=7.5, frameon=False, labelcolor=INK)
    figure.suptitle(
        f"{found.provenance.get('model', '')}: top weights by {method_label(scorer)} against controls of equal size",
        fontsize=9, color=INK, wrap=True,
    )  # fmt: skip
    return figure


def ranking_figure(found: Verification, intervention: str) -> Figure | None:
    """Refusal lost against utility lost, one path per scorer. None for one scorer or without utility."""
    if len(found.scorers) < 2 or "utility" not in found.measure_names:
        return None
    settings = [setting for setting in found.settings if setting.intervention == intervention]
    figure = new_figure(4.4, 3.9)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), label="as much as utility")
    for number, scorer in enumerate(found.scorers):
        falls = [
            (-(entry.changes["utility"].value or 0.0), -(entry.changes["refusal"].value or 0.0))
            for setting in settings
            if (entry := found.pool("top", scorer, setting)) is not None
        ]
        x, y = zip((0.0, 0.0), *sorted(falls), strict=True)
        colour = colours.SERIES_LIGHT[number % len(colours.SERIES_LIGHT)]
        axes.plot(x, y, "o-", color=colour, markersize=3, linewidth=1.3, label=method_label(scorer))
    finish_lines(axes, "utility lost", "refusal lost")
    figure.suptitle(f"{found.provenance.get('model', '')}: what {intervention} breaks first", fontsize=9, color=INK)
    return figure


def write_figures(found: Verification, folder: Path) -> list[str]:
    """curves.png (one per scorer) and, of several scorers, ranking-INTERVENTION.png; returns the names."""
    written = []
    for scorer in found.scorers:
        name = "curves.png" if scorer == found.scorers[0] else f"curves-{_stem(scorer)}.png"
        save_png(curves_figure(found, scorer), folder / name)
        written.append(name)
    for intervention in found.verdicts:
        if (figure := ranking_figure(found, intervention)) is not None:
            written.append(f"ranking-{intervention}.png")
            save_png(figure, folder / written[-1])
    return written


def interval(measure: Measure | None) -> str:
    """In percent: "67 [51,83]"; a dash where it is unknown."""
    if measure is None or measure.value is None:
        return "-"
    value = f"{100 * measure.value:.0f}"
    if measure.low is not None and measure.high is not None:
        value += f" [{100 * measure.low:.0f},{100 * measure.high:.0f}]"
    return re.sub(r"-0(?![0-9])", "0", value)


def _quotient(entry: Rank) -> str:
    if entry.mean_utility_fall is None or not entry.has_contrast:
        return "-"
    if entry.keeps_utility or entry.per_utility is None:
        return "utility kept"
    return f"{entry.per_utility:.2f} [{entry.low or 0.0:.2f}, {entry.high or 0.0:.2f}]"


def by_size(settings: Sequence[Setting]) -> list[tuple[str, list[Setting]]]:
    """(size in words, its settings: noise by strength, then the others)."""
    sizes = dict.fromkeys((setting.ratio, setting.k) for setting in settings)
    found = []
    for ratio, k in sizes:
        members = [s for s in settings if (s.ratio, s.k) == (ratio, k)]
        members.sort(key=lambda s: (s.noise is None, s.noise or 0.0, s.intervention))
        found.append((f"{k:,} weights" + (f" ({100 * ratio:g} %)" if ratio is not None else ""), members))
    return found


def _short(setting: Setting) -> str:
    return setting.intervention if setting.noise is None else f"{setting.noise:g}"


def _curve(axes: Axes, points: Sequence[tuple[int, Pooled]], name: str, colour: str, label: str) -> None:
    """A line with its band through the noises; what has no strength stands alone."""
    for is_line, members in _runs(points):
        x = np.array([place for place, _ in members], dtype=float)
        measures = [entry.measures[name] for _, entry in members]
        y, low, high = (
            np.array([np.nan if (v := getattr(m, end)) is None else v for m in measures], dtype=float)
            for end in ("value", "low", "high")
        )
        axes.plot(x, y, "o-" if is_line else "o", color=colour, markersize=3, linewidth=1.5, label=label)
        if is_line:
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        else:
            axes.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.6)
        label = "_nolegend_"


def _runs(points: Sequence[tuple[int, Pooled]]) -> Iterator[tuple[bool, list[tuple[int, Pooled]]]]:
    for is_line in (True, False):
        members = [(x, entry) for x, entry in points if (entry.setting.noise is not None) == is_line]
        if members:
            yield is_line, members


def _stem(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name).strip("-").lower()
