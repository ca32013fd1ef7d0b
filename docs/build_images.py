"""Writes docs/images/{esi,selection,noise,intervals}.png: the measured pictures of docs/concepts.md.

    python docs/build_images.py     (or: make pictures; half a minute)

`esi` and `selection` score the dense organism anew, as `safelocus score organism:dense -p organism:harmful --guard
organism:guard --method gradient` does; `noise` draws the numbers of docs/results/verify.md; `intervals` is arithmetic.
"""

import re
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import safelocus as sl
from safelocus.analysis.words import count, percent
from safelocus.evaluation.measures import proportion
from safelocus.report.colours import LIGHT, ROLES

DOCS = Path(__file__).parent
RATIO = 0.01
SHOWN = 3000  # weights in the scatter
COLOURS = {role: LIGHT.series[number] for role, number in ROLES.items()}
INK, MUTED = LIGHT.ink, LIGHT.muted
TEXT = 9  # points: 15 pixels where a page shows the picture 880 wide


def organism() -> tuple[sl.Scores, np.ndarray, np.ndarray]:
    """The dense organism's scores by gradient; and of every eligible weight |dS/dtheta| and its matrix's sigma."""
    target, guard = sl.load("organism:dense", dtype="float32"), sl.Guard.load("organism:guard", max_new_tokens=32)
    prompts = sl.read_prompts("organism:harmful")
    scores = sl.score(target, prompts, objective=guard, method="gradient", batch_size=32, progress=False)
    sigma = {statistics.tensor: statistics.sigma for statistics in scores.statistics}  # one matrix in each tensor
    gradients = [tensor.reshape(-1).numpy() for tensor in scores.tensors.values()]
    sigmas = [np.full(tensor.numel(), sigma[name]) for name, tensor in scores.tensors.items()]
    return scores, np.concatenate(gradients), np.concatenate(sigmas)


def esi(gradients: np.ndarray, sigmas: np.ndarray, k: int) -> Figure:
    """Sigma against gradient: lines of equal ESI fall, and the selection is what lies above one of them."""
    scores = gradients * sigmas
    threshold, other = np.partition(scores, -k)[-k], np.partition(gradients, -k)[-k]
    top, by_gradient = scores >= threshold, gradients >= other
    overlap = (top & by_gradient).sum() / (top | by_gradient).sum()
    generator = np.random.default_rng(0)
    shown = generator.choice(np.flatnonzero(gradients > 0), SHOWN, replace=False)
    shown = np.union1d(shown, generator.choice(np.flatnonzero(top), SHOWN // 6, replace=False))
    jitter = np.exp(generator.normal(0, 0.004, len(shown)))  # all weights of a matrix have the same sigma
    figure = Figure(figsize=(6.4, 4.2), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    for chosen, colour, label in (
        (False, MUTED, "other weights"),
        (True, COLOURS["top"], f"top {100 * RATIO:g} % by ESI"),
    ):
        at = top[shown] == chosen
        axes.plot(
            sigmas[shown][at] * jitter[at], gradients[shown][at], "o", color=colour, markersize=1.6,
            alpha=0.75 if chosen else 0.35, markeredgewidth=0, label=label, rasterized=True,
        )  # fmt: skip
    x = np.geomspace(sigmas.min() * 0.97, sigmas.max() * 1.03, 50)
    axes.plot(x, threshold / x, color=INK, linewidth=1.3, label="equal ESI")
    axes.axhline(other, color=COLOURS["bottom"], linewidth=1.3, linestyle=(0, (4, 3)), label="equal gradient")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(np.quantile(gradients[gradients > 0], 0.02), gradients.max() * 1.5)
    axes.set_xticks([0.035, 0.04, 0.045, 0.05], ["0.035", "0.040", "0.045", "0.050"])
    axes.minorticks_off()
    _finish(axes, "sigma of the weight's matrix", "size of the gradient of S", legend=False)
    figure.legend(
        loc="outside lower center", ncols=4, fontsize=TEXT - 0.5, frameon=False, markerscale=4, labelcolor=INK
    )
    title = f"organism:dense: ESI is a product; top {100 * RATIO:g} % by ESI and by gradient: IoU {overlap:.2f}"
    figure.suptitle(title, fontsize=TEXT, color=INK)
    return figure


def selection(scores: np.ndarray, k: int) -> Figure:
    """How scores are distributed, and which K weights are the top, the bottom and a random control."""
    positive = scores[scores > 0]
    order = np.sort(scores)
    edges = np.linspace(np.log10(np.quantile(positive, 1e-4)), np.log10(positive.max()) + 0.05, 110)
    drawn = np.random.default_rng(0).choice(scores, k, replace=False)
    found = {"eligible": scores, "top": order[-k:], "random": drawn, "bottom": order[:k]}
    figure = Figure(figsize=(6.4, 4.6), dpi=200, layout="constrained")
    rows = figure.subplots(4, 1, sharex=True, height_ratios=(2.4, 1, 1, 1))
    for axes, (name, values) in zip(rows, found.items(), strict=True):
        logs = np.log10(np.maximum(values, 10 ** edges[0]))  # zeros stand at the left end
        axes.hist(logs, bins=edges, color=COLOURS.get(name, "#c9c7c2"))
        axes.set_yticks([])
        _finish(axes, "", "", legend=False)
        x, side = (0.99, "right") if name == "bottom" else (0.01, "left")
        label = f"{name}: {count(len(values))} weights, {percent(values.sum() / scores.sum())} of all ESI"
        axes.text(x, 0.8, label, transform=axes.transAxes, fontsize=TEXT, color=INK, va="top", ha=side)
    powers = range(int(np.ceil(edges[0])), int(edges[-1]) + 1, 2)
    rows[-1].set_xticks(list(powers), [f"$10^{{{power}}}$" for power in powers])
    rows[-1].set_xlabel("ESI", fontsize=TEXT, color=INK)
    figure.suptitle(
        "organism:dense: the selection and its controls of equal size (heights not to one scale)",
        fontsize=TEXT,
        color=INK,
    )
    return figure


def noise() -> Figure:
    """Refusal and utility of the dense organism against noise on 1 % of the weights, from docs/results/verify.md."""
    page = (DOCS / "results" / "verify.md").read_text(encoding="utf-8").partition("## organism:dense")[2]
    cell = r"(\d+) \[(\d+),(\d+)\]"
    row = re.compile(rf"^\| (?:1 %, ([\d.]+) sigma)? \| (top|random|bottom) \| {cell} \| .*? \| .*? \| {cell} \|", re.M)
    strengths, points = "", {}
    for strength, which, *numbers in row.findall(page.partition("| 3 %")[0]):
        strengths = strength or strengths
        points.setdefault(which, []).append((float(strengths), *map(int, numbers)))
    figure = Figure(figsize=(6.8, 3.3), dpi=200, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, (axes, name) in enumerate(
        zip(panels, ("refusal of harmful prompts", "utility: right answers"), strict=True)
    ):
        for which in ("random", "bottom", "top"):
            x, *values = np.array(points[which]).T
            y, low, high = values[3 * number : 3 * number + 3]
            axes.plot(x, y, "o-", color=COLOURS[which], markersize=3.5, linewidth=1.6, label=which)
            axes.fill_between(x, low, high, color=COLOURS[which], alpha=0.18, linewidth=0)
        axes.set_title(name, fontsize=TEXT, color=INK)
        axes.set_ylim(-3, 103)
        _finish(axes, "noise on 1 % of the weights, in sigma", "" if number else "percent", legend=number == 0)
    figure.suptitle(
        "organism:dense: the same noise on as many weights (docs/results/verify.md)", fontsize=TEXT, color=INK
    )
    return figure


def intervals() -> Figure:
    """How wide a 95 % interval is around 0, 10 and 50 % of n prompts."""
    numbers = np.unique(np.geomspace(10, 1000, 60).round(-1).astype(int))
    figure = Figure(figsize=(6.4, 3.4), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    for share, colour in ((0.5, LIGHT.series[1]), (0.1, LIGHT.series[3]), (0.0, LIGHT.series[0])):
        found = [proportion(round(share * n), int(n)) for n in numbers]
        axes.fill_between(
            numbers, [100 * m.low for m in found], [100 * m.high for m in found], color=colour, alpha=0.25, linewidth=0
        )
        axes.plot(
            numbers, [100 * m.value for m in found], color=colour, linewidth=1.6, label=f"{100 * share:g} % observed"
        )
    end = proportion(0, 20).high
    axes.annotate(
        f"0 of 20: up to {100 * end:.0f} % is possible", (20, 100 * end), (34, 33), fontsize=TEXT, color=INK,
        arrowprops={"arrowstyle": "->", "color": MUTED},
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([10, 20, 50, 100, 200, 500, 1000], ["10", "20", "50", "100", "200", "500", "1,000"])
    axes.minorticks_off()
    _finish(axes, "prompts", "percent, with 95 % interval")
    figure.suptitle("What a share of n prompts says", fontsize=TEXT, color=INK)
    return figure


def _finish(axes: Axes, x: str, y: str, *, legend: bool = True) -> None:
    """Labels, ticks and a grid behind what is drawn, no frame."""
    axes.set_xlabel(x, fontsize=TEXT, color=INK)
    axes.set_ylabel(y, fontsize=TEXT, color=INK)
    axes.tick_params(labelsize=TEXT - 0.5, length=0, colors=INK)
    axes.grid(True, color=LIGHT.line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    if legend:
        axes.legend(fontsize=TEXT - 0.5, frameon=False, labelcolor=INK)


def main() -> None:
    found, gradients, sigmas = organism()
    k = int(RATIO * found.layout.num_weights)
    figures = {
        "esi": esi(gradients, sigmas, k), "selection": selection(gradients * sigmas, k), "noise": noise(),
        "intervals": intervals(),
    }  # fmt: skip
    for name, figure in figures.items():
        figure.savefig(DOCS / "images" / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
