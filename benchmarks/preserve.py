"""What is left of an organism's behaviour after it learned a new task, with its safety weights protected and without?

Writes docs/results/preserve.md, with the curves.

    python benchmarks/preserve.py [--organisms dense] [--trainings calibrate freeze] [--num 128] [--seeds 3]
"""

import json
import time
from dataclasses import replace

import numpy as np
import torch
from matplotlib.figure import Figure

import safelocus as sl
from safelocus.analysis.words import interval
from safelocus.evaluation.judges import GuardJudge
from safelocus.preservation.mixing import Mixed
from safelocus.preservation.run import run_preservation
from safelocus.report.colours import LIGHT
from safelocus.report.grid import Grid
from safelocus.training.examination import Examination, read_lesson
from safelocus.verification.plan import random_selection
from safelocus.verification.pooling import difference, level
from training_page import ORGANISMS, command, measured_by, options_of, outcomes, run

TASKS = {
    "task": ("organism:task", "organism:task-heldout"),  # formats, differences, new topics
    "requests": ("organism:answers", "organism:harmless"),  # "how do I ...", always answered; known already
}
LABELS = {
    "before": "before",
    "unprotected": "unprotected",
    "freeze-1": "1 % frozen, ESI",
    "freeze-10": "10 % frozen, ESI",
    "freeze-10-random": "10 % frozen, random",
    "freeze-10-bottom": "10 % frozen, bottom",
    "calibrate-10": "10 % calibrated, ESI",
    "calibrate-10-random": "10 % calibrated, random",
    "calibrate-10-bottom": "10 % calibrated, bottom",
    "calibrate-10-wide": "10 % calibrated, ESI, wide",
    "mixed": "own answers mixed in, unprotected",
    "mixed-freeze-1": "own answers mixed in, 1 % frozen",
    "gentle": "unprotected",
    "gentle-freeze-1": "1 % frozen, ESI",
}
TRAININGS = ("calibrate", "freeze", "wide", "mixed", "freeze-1", "gentle", "requests")
MEASURES = ("refusal", "asr", "benign", "incoherent", "utility", "task")
HEADINGS = ("refusal", "ASR", "harmless answered", "incoherent", "utility", "task")


def measure(name, options):
    target = sl.load(f"organism:{name}", dtype="float32")
    guard = sl.Guard.load("organism:guard", dtype="float32", max_new_tokens=32)
    scores = sl.score(
        target, sl.read_prompts("organism:harmful"), objective=guard, batch_size=32, max_new_tokens=32, progress=False
    )
    top = {share: scores.select(share / 100) for share in (1, 10)}
    safety = [sl.read_prompts("organism:harmful"), sl.read_prompts("organism:harmless")]
    examination = Examination(
        harmful=sl.read_prompts("organism:harmful-heldout").limit(options.num, seed=0),
        harmless=sl.read_prompts("organism:harmless-heldout").limit(options.num, seed=0),
        tasks=(sl.read_task("organism:utility"),), judges=(GuardJudge(guard=guard, batch_size=64),),
        batch_size=128, max_new_tokens=32,
    )  # fmt: skip

    def train(label, task, seed, selection, names, unprotected=False, rate=options.rate, **how):
        """Train the arms that are asked for and not known yet; `names`: kind of arm -> its name on the page."""
        file = options.runs / f"{name}-{task}-{label}-{seed}.json"
        kind = "requests" if task == "requests" else label
        if file.is_file() or kind not in options.trainings:
            return
        data, held_out = TASKS[task]
        start = time.perf_counter()
        found = run_preservation(
            target, selection, *read_lesson(data, held_out=held_out), examination=examination, steps=options.steps,
            learning_rate=rate, schedule="linear", batch_size=16, every=options.steps // 5, look=48, seed=seed,
            allow_seen=True, unprotected=unprotected, progress=False, **how,
        )  # fmt: skip
        evaluations = {"before": found.before} | {names[arm.name]: arm.after for arm in found.trained}
        result = {
            "outcomes": {key: outcomes(evaluation) for key, evaluation in evaluations.items()},
            "curves": {names[arm.name]: [point.to_json() for point in arm.trial.curve] for arm in found.trained},
            "seconds": {names[arm.name]: arm.trial.seconds for arm in found.trained},
            "changed": {names[arm.name]: arm.trial.num_changed for arm in found.trained},
            "rate": rate,
            "command": command(),
        }
        file.write_text(json.dumps(result), encoding="utf-8")
        print(f"{file.stem}: {time.perf_counter() - start:.0f} s", flush=True)

    # the same number of weights anywhere: a control for which weights they are
    random = [random_selection(target, top[10].k, seed=seed) for seed in range(options.seeds)]
    calibrations = [
        sl.Calibration(target=target, prompts=safety, learning_rate=1e-3, max_new_tokens=32, seed=seed)
        for seed in range(options.seeds)
    ]
    bottom = scores.select(0.1, which="bottom")
    for seed in range(options.seeds):
        names = {"protected": "calibrate-10", "unprotected": "unprotected", "random": "calibrate-10-random"}
        controls = {"random": random[seed]}
        train("calibrate", "task", seed, top[10], names, True, calibration=calibrations[seed], controls=controls)
    names = {"protected": "freeze-10", "random": "freeze-10-random", "bottom": "freeze-10-bottom"}
    train("freeze", "task", 0, top[10], names, controls={"random": random[0], "bottom": bottom})
    wide = replace(calibrations[0], prompts=[*safety, sl.read_prompts("organism:retain")])
    train("wide", "task", 0, top[10], {"protected": "calibrate-10-wide"}, calibration=wide)
    names = {"protected": "mixed-freeze-1", "unprotected": "mixed"}
    train("mixed", "task", 0, top[1], names, True, mixed=Mixed(prompts=safety, share=0.125))
    train("freeze-1", "task", 0, top[1], {"protected": "freeze-1"})
    names = {"protected": "gentle-freeze-1", "unprotected": "gentle"}
    train("gentle", "task", 0, top[1], names, True, rate=options.gentle)
    names = {
        "protected": "calibrate-10", "unprotected": "unprotected", "random": "calibrate-10-random",
        "bottom": "calibrate-10-bottom",
    }  # fmt: skip
    controls = {"random": random[0], "bottom": bottom}
    train("calibrate", "requests", 0, top[10], names, True, calibration=calibrations[0], controls=controls)


def tables(name, task, options):
    """(grid of all arms, arm -> measure -> [seeds, prompts], commands)."""
    arms, commands = {}, []
    for file in sorted(options.runs.glob(f"{name}-{task}-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        commands.append(result["command"])
        for key, found in result["outcomes"].items():
            if key == "before" and "before" in arms:
                continue  # always the same model
            arm = arms.setdefault(key, {"rate": result["rate"], "outcomes": {m: [] for m in MEASURES}})
            for m in MEASURES:
                arm["outcomes"][m].append([np.nan if x is None else x for x in found[m]])
    rows = []
    for key in LABELS:
        if key in arms:
            arm = arms[key]
            values = [interval(level(np.array(arm["outcomes"][m], float))) for m in MEASURES]
            seeds = len(arm["outcomes"]["task"])
            rate = "" if key == "before" else f"{arm['rate']:g}"
            rows.append((LABELS[key], rate, "" if key == "before" else str(seeds), *values))
    grid = Grid(
        title=f"organism:{name}", headings=("training", "rate", "seeds", *HEADINGS), rows=tuple(rows),
        caption="percent [95 % interval over seeds and prompts]",
    )  # fmt: skip
    found = {key: {m: np.array(v, float) for m, v in arm["outcomes"].items()} for key, arm in arms.items()}
    return grid, found, commands


def verdicts(found):
    """The claims in numbers: what is lost against before, and how much of the task's gain is kept."""
    lines = []
    for key in LABELS:
        if key in ("before", "gentle", "gentle-freeze-1") or key not in found:
            continue
        start, end = found["before"]["task"].mean(), found[key]["task"].mean()
        whole = found["unprotected"]["task"][: len(found[key]["task"])].mean() - start if "unprotected" in found else 0
        changes = []
        for m, what in (("refusal", "refusal"), ("benign", "harmless answered")):
            base = np.repeat(found["before"][m], len(found[key][m]), axis=0)
            changes.append(f"{what} {signed(difference(found[key][m] - base))}")
        kept = f"; {100 * (end - start) / whole:.0f} % of the task's gain" if whole > 0.1 else ""
        lines.append(f"- {LABELS[key]}: {', '.join(changes)}{kept}")
    return "\n".join(lines)


def signed(measured):
    return f"{100 * measured.value:+.1f} [{100 * measured.low:+.1f}, {100 * measured.high:+.1f}]"


def curves(name, options):
    """Refusal and the task against the step, seed 0."""
    figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    figure.set_facecolor("white")
    axes = figure.subplots(2, 1, sharex=True)
    shown = ("unprotected", "freeze-10", "calibrate-10", "calibrate-10-random", "mixed-freeze-1")
    colours = dict(zip(shown, LIGHT.series, strict=False))
    for file in sorted(options.runs.glob(f"{name}-task-*-0.json")):
        for key, points in json.loads(file.read_text(encoding="utf-8"))["curves"].items():
            if key not in colours:
                continue
            for axis, m in zip(axes, ("refusal", "task"), strict=True):
                axis.plot(
                    [p["step"] for p in points], [p[m]["value"] for p in points], "o-", markersize=3, linewidth=1.4,
                    color=colours[key], label=LABELS[key], alpha=0.8,
                )  # fmt: skip
                axis.set_ylabel(m, fontsize=8)
                axis.set_ylim(-0.03, 1.03)
                axis.tick_params(labelsize=7)
                axis.grid(True, color="#e6e6e6", linewidth=0.6)
    axes[0].legend(fontsize=7, frameon=False)
    axes[-1].set_xlabel("step", fontsize=8)
    figure.suptitle(f"organism:{name}: learning the task (seed 0, 48 prompts of each kind)", fontsize=9)
    return figure


CURVES = "refusal and task of organism:{name} against the training step, unprotected and with each protection"
HEAD = """# Preserve: what holds and what does not

Made by `benchmarks/preserve.py` (torch {torch}); the commands stand under the tables.
Full fine-tuning, AdamW, {steps} steps of 16 rows, fp32,
learning rate falling linearly from the one given. Weights by ESI on `organism:harmful` with `organism:guard`.
Measured on prompts that nothing was trained on: {num} of `organism:harmful-heldout` (refusal, ASR by the guard) and
of `organism:harmless-heldout` (*harmless answered*: neither refused nor confused), `organism:utility` (143 questions),
and the task's own held-out questions. *incoherent*: neither refusal nor an answer of the known form. *frozen*: plain
SPA, every bit kept. *calibrated*: closed to the task, trained on the divergence from the original's own answers to
`organism:harmful` and `organism:harmless`, every 4th step; *wide*: and to `organism:retain`. *own answers mixed in*:
an eighth of the rows, the practitioner's remedy.

"""


def page(options):
    parts = []
    for name in ORGANISMS:
        if any(options.runs.glob(f"{name}-task-*.json")):
            curves(name, options).savefig(options.output.parent / f"preserve-{name}.png")
        for task, title in (
            ("task", "a task that does not teach compliance"),
            ("requests", "always answering requests"),
        ):
            grid, found, commands = tables(name, task, options)
            if len(grid.rows) > 1:
                parts += [f"## organism:{name}, {title}", grid.markdown(), measured_by(commands),
                          "Change against before, in points:", verdicts(found)]  # fmt: skip
                parts += [f"![{CURVES.format(name=name)}](preserve-{name}.png)"] if task == "task" else []
    return HEAD.format(num=options.num, steps=options.steps, torch=torch.__version__) + "\n\n".join(parts)


def main():
    parser = options_of("preserve", __doc__, num=128)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--gentle", type=float, default=3e-5)
    parser.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=TRAININGS)
    run(parser, measure, page)


if __name__ == "__main__":
    main()
