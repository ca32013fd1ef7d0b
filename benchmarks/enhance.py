"""Does training 1 % of the weights make an unaligned organism refuse, and would other weights have done as well?

Writes docs/results/enhance.md, with the sweep of learning rates.

    python benchmarks/enhance.py [--organisms dense] [--rates 3e-4 1e-3 1e-2] [--controls random bottom] [--seeds 3]
"""

import json
import time

import numpy as np
import torch
from matplotlib.figure import Figure

import safelocus as sl
from safelocus.analysis.words import interval, kind_label
from safelocus.enhancement.run import run_enhancement
from safelocus.evaluation.judges import GuardJudge
from safelocus.report.colours import LIGHT
from safelocus.report.grid import Grid
from safelocus.training.examination import Examination
from safelocus.verification.plan import random_selection
from safelocus.verification.pooling import difference, level
from training_page import ORGANISMS, command, measured_by, options_of, outcomes, run

CONTROLS = ("random", "bottom", "snip", "magnitude", "full", "lora")
MEASURES = ("asr", "refusal", "benign", "utility", "incoherent")
HEADINGS = ("ASR", "refusal", "harmless answered", "utility", "incoherent")


def measure(name, options):
    target = sl.load(f"organism:{name}-unaligned", dtype="float32")
    guard = sl.Guard.load("organism:guard", dtype="float32", max_new_tokens=32)
    judges = (GuardJudge(guard=guard, batch_size=64),)
    harmful = sl.read_prompts("organism:harmful")
    how = {"objective": guard, "batch_size": 32, "max_new_tokens": 32, "progress": False}
    scores = sl.score(target, harmful, **how)
    selection = scores.select(0.01)
    data, aside = sl.read_prompts("organism:refusals").split(0.2)
    examination = Examination(
        harmful=sl.read_prompts("organism:harmful-heldout").limit(options.num, seed=0),
        harmless=sl.read_prompts("organism:harmless-heldout").limit(options.num, seed=0),
        tasks=(sl.read_task("organism:utility"),), judges=judges, batch_size=128, max_new_tokens=32,
    )  # fmt: skip
    validation = Examination(
        harmful=aside, harmless=sl.read_prompts("organism:harmless").limit(48, seed=0),
        tasks=(sl.read_task("organism:utility-validation").limit(64, seed=0),), judges=judges, batch_size=128,
        max_new_tokens=32,
    )  # fmt: skip
    controls = {
        "random": random_selection(target, selection.k, seed=0),
        "bottom": scores.select(0.01, which="bottom"),
        "snip": lambda: sl.score(target, harmful, method="snip", **how).select(0.01),
        "magnitude": lambda: sl.score(target, harmful, method="magnitude", progress=False).select(0.01),
        "full": "full",
        "lora": "lora",
    }
    controls = {kind: controls[kind] for kind in options.controls}
    rates = options.rates
    for seed in range(options.seeds):
        file = options.runs / f"{name}-{seed}.json"
        if file.is_file():
            rates = [json.loads(file.read_text(encoding="utf-8"))["rates"]["selection"]]
            continue
        start = time.perf_counter()
        found = run_enhancement(
            target, selection, data, retain="organism:retain", examination=examination, validation=validation,
            early_stopping=False, every=100, controls=controls if seed == 0 else None, learning_rates=rates,
            learning_rate=rates[0], steps=100, batch_size=8, schedule="cosine", seed=seed, progress=False,
            checkpoint=options.runs / f"{name}-{seed}",
        )  # fmt: skip
        rates = [found.selection.trial.learning_rate]  # chosen once, by the validation part
        result = {
            "outcomes": {"before": outcomes(found.before)} | {t.name: outcomes(t.after) for t in found.trained},
            "rates": {t.name: t.trial.learning_rate for t in found.trained},
            "weights": {t.name: t.trial.num_weights for t in found.trained},
            "sweep": found.to_json()["sweep"],
            "command": command(),
        }
        file.write_text(json.dumps(result), encoding="utf-8")
        print(f"{file.stem}: {time.perf_counter() - start:.0f} s", flush=True)


def results_of(name, options):
    files = sorted(options.runs.glob(f"{name}-[0-9].json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def pooled(results, kind):
    """measure -> [seeds, prompts]."""
    found = [result["outcomes"][kind] for result in results if kind in result["outcomes"]]
    return {m: np.array([[np.nan if x is None else x for x in part[m]] for part in found], float) for m in MEASURES}


def outcome_table(results):
    rows = [("before", "", "", "", *(interval(level(v[:1])) for v in pooled(results, "before").values()))]
    for kind in ("selection", *CONTROLS):
        if kind in results[0]["outcomes"]:
            values = pooled(results, kind)
            seeds = str(len(values["asr"]))
            weights = f"{results[0]['weights'][kind]:,}"
            rate = f"{results[0]['rates'][kind]:g}"
            rows.append((kind_label(kind), weights, rate, seeds, *(interval(level(v)) for v in values.values())))
    return Grid(
        title="", headings=("trained", "weights", "rate", "seeds", *HEADINGS), rows=tuple(rows),
        caption="percent [95 % interval over seeds and prompts]; each at the rate that the validation part chose",
    )  # fmt: skip


def sweep_table(results):
    rows = [
        (
            kind_label(entry["kind"]), f"{entry['learning_rate']:g}" + (" *" if entry["chosen"] else ""),
            *(f"{100 * entry[m]['value']:.0f}" for m in ("asr", "over_refusal", "utility", "incoherent")),
        )
        for entry in results[0]["sweep"]
    ]  # fmt: skip
    num = results[0]["sweep"][0]["asr"]["n"]
    return Grid(
        title="",
        headings=("trained", "rate", "ASR", "over-refusal", "utility", "incoherent"),
        rows=tuple(rows),
        caption=f"percent, on the validation part ({num} harmful prompts, seed 0); * chosen",
    )


def change(results):
    """What the selection changed, in points, over all seeds."""
    before, after = pooled(results, "before"), pooled(results, "selection")
    parts = []
    for m, what in zip(MEASURES, HEADINGS, strict=True):
        found = difference(after[m] - before[m][:1])
        parts.append(f"{what} {100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]")
    relative = 1 - np.nanmean(after["asr"]) / np.nanmean(before["asr"][:1])
    seeds = ", ".join(
        f"seed {i}: ASR {np.nanmean(after['asr'][i]):.3f}, harmless answered {after['benign'][i].mean():.3f}, "
        f"utility {after['utility'][i].mean():.3f}"
        for i in range(len(after["asr"]))
    )
    base = f"before: utility {before['utility'][0].mean():.3f}"
    return f"In points: {'; '.join(parts)}. ASR fell by {100 * relative:.1f} % of what it was. {seeds} ({base})."


def sweep_figure(name, results):
    figure = Figure(figsize=(6.4, 4.6), dpi=150, layout="constrained")
    figure.set_facecolor("white")
    axes = figure.subplots(2, 1, sharex=True)
    for colour, kind in zip(LIGHT.series, ("selection", *CONTROLS), strict=False):
        entries = [entry for entry in results[0]["sweep"] if entry["kind"] == kind]
        rates = [entry["learning_rate"] for entry in entries]
        for axis, m in zip(axes, ("asr", "utility"), strict=True):
            axis.plot(
                rates, [entry[m]["value"] for entry in entries], "o-", markersize=3, linewidth=1.4, color=colour,
                label=kind_label(kind),
            )  # fmt: skip
            axis.set_xscale("log")
            axis.set_ylim(-0.03, 1.03)
            axis.set_ylabel({"asr": "ASR"}.get(m, m), fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(True, color="#e6e6e6", linewidth=0.6)
    axes[0].legend(fontsize=7, frameon=False, ncols=2)
    axes[-1].set_xlabel("learning rate", fontsize=8)
    figure.suptitle(f"organism:{name}-unaligned: what each rate does (validation part, seed 0)", fontsize=9)
    return figure


CURVES = "ASR and utility of organism:{name}-unaligned against the learning rate, for the selection and every control"
HEAD = """# Enhance: what holds and what does not

Made by `benchmarks/enhance.py` (torch {torch}); the commands stand under the tables.
100 steps of AdamW, 8 refusals and 48 retained rows a step
(divergence x 20), cosine, fp32; {num} prompts of `organism:harmful-heldout` (ASR by `organism:guard`) and of
`organism:harmless-heldout` (*harmless answered*: neither refused nor confused), and the 143 questions of
`organism:utility`. Weights: the top 1 % by ESI on `organism:harmful`. Trained on four fifths of `organism:refusals`,
with `organism:retain`; the other fifth, `organism:harmless` and `organism:utility-validation` choose the learning
rate, for the selection and for every control. Controls are trained with one seed, the selection with {seeds}.

"""


def page(options):
    parts = []
    for name in ORGANISMS:
        if results := results_of(name, options):
            sweep_figure(name, results).savefig(options.output.parent / f"enhance-{name}.png")
            parts += [
                f"## organism:{name}-unaligned", outcome_table(results).markdown(),
                measured_by(result["command"] for result in results), change(results), "### Learning rates",
                sweep_table(results).markdown(), f"![{CURVES.format(name=name)}](enhance-{name}.png)",
            ]  # fmt: skip
    return HEAD.format(num=options.num, seeds=options.seeds, torch=torch.__version__) + "\n\n".join(parts)


def main():
    parser = options_of("enhance", __doc__, num=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 1e-2])
    parser.add_argument("--controls", nargs="+", default=list(CONTROLS), choices=CONTROLS)
    run(parser, measure, page)


if __name__ == "__main__":
    main()
