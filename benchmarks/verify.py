"""Do the weights that ESI finds carry refusals, and only those? Verification on both organisms.

Writes docs/results/verify.md: the operating range, scorers against one another, stability.

    python benchmarks/verify.py [-o docs/results/verify.md] [--num 48] [--seeds 5]
"""

import time
from dataclasses import replace

import torch

import safelocus as sl
from safelocus.evaluation.judges import GuardJudge
from safelocus.model.forcing import teacher_force
from safelocus.report.drawing import write_picture
from safelocus.report.grid import Grid
from safelocus.report.verification import (
    curves_charts,
    ranking_chart,
    ranking_grid,
    settings_grid,
    stability_grid,
)
from safelocus.scoring.gradients import named_weights
from safelocus.scoring.scores import matrix_statistics
from training_page import options_of, run

METHODS = ("esi", "snip", "wanda", "gradient", "magnitude", "random")
CONTRAST = "esi-contrast"
DIFFERENCE = "twin-difference"


def answers_likelihood(target, prompts):
    """An objective: mean log-likelihood of the known answers to harmless prompts."""
    encoded = [target.chat.encode_prompt(prompt) for prompt in prompts]
    answers = [target.tokenizer(ANSWERS[prompt], add_special_tokens=False)["input_ids"] for prompt in prompts]
    totals = teacher_force(target, encoded, answers).log_likelihood(len(answers))
    return totals / torch.tensor([len(answer) for answer in answers])


def contrast(safety, utility):
    """safety score minus utility score, each in units of its mean; not below zero."""
    means = [sum(float(t.sum()) for t in s.tensors.values()) / s.layout.num_eligible for s in (safety, utility)]
    tensors = {
        name: (value / means[0] - utility.tensors[name] / means[1]).clamp_(min=0)
        for name, value in safety.tensors.items()
    }
    statistics = [s for name, t in tensors.items() for s in matrix_statistics(safety.layout.tensors[name], t)]
    provenance = replace(safety.provenance, method=CONTRAST)
    return sl.Scores(tensors=tensors, layout=safety.layout, statistics=statistics, provenance=provenance)


def twin_difference(like, target, twin):
    """The control of transplanting: how much each weight differs between the twins, whatever it does."""
    pairs = [named_weights(each.model, list(like.tensors)) for each in (target, twin)]
    tensors = {name: (pairs[0][name] - pairs[1][name]).detach().abs() for name in like.tensors}
    statistics = [s for name, t in tensors.items() for s in matrix_statistics(like.layout.tensors[name], t)]
    provenance = replace(like.provenance, method=DIFFERENCE)
    return sl.Scores(tensors=tensors, layout=like.layout, statistics=statistics, provenance=provenance)


def sets(num):
    return {
        "prompts": sl.read_prompts("organism:harmful-heldout").limit(num, seed=0),
        "harmless": sl.read_prompts("organism:harmless-heldout").limit(num, seed=0),
        "tasks": [
            sl.read_task("organism:utility").limit(num, seed=0),
            sl.read_task("organism:harmless-heldout", name="benign answers").limit(num, seed=0),
        ],
    }


def measure(name, options):
    """Everything that takes time, saved so that tables and verdicts can be made again from it."""
    start = time.perf_counter()
    target = sl.load(f"organism:{name}", dtype="float32")
    unaligned = sl.load(f"organism:{name}-unaligned", dtype="float32")
    guard = sl.Guard.load("organism:guard", dtype="float32", max_new_tokens=32)
    harmful = sl.read_prompts("organism:harmful").limit(64, seed=0)
    scores = {
        method: sl.score(
            target, harmful, objective=guard, method=method, batch_size=32, max_new_tokens=32, progress=False
        )
        for method in METHODS
    }
    known = sl.read_prompts("organism:answers").limit(64, seed=0)
    ANSWERS.update({example.prompt: example.response for example in known})
    useful = sl.score(target, known, objective=answers_likelihood, batch_size=16, progress=False)
    scores[CONTRAST] = contrast(scores["esi"], useful)
    common = {
        **sets(options.num), "judges": GuardJudge(guard=guard, batch_size=64), "seeds": options.seeds,
        "batch_size": 64, "max_new_tokens": 32, "progress": False,
    }  # fmt: skip
    noise = sl.verify(target, scores["esi"], ratios=(0.01, 0.03), noises=(0.38, 1.0, 1.5, 2.0, 3.0), **common)
    transplant = {"ratios": (0.03, 0.1, 0.2), "transplant_from": unaligned}
    swap = sl.verify(target, scores["esi"], interventions=("transplant", "zero"), **transplant, **common)
    controls = {**common, "selections": ("top", "random")}
    compared = sl.verify(target, scores, ratios=(0.01, 0.03), noises=(1.0, 1.5, 2.0), **controls)
    scores[DIFFERENCE] = twin_difference(scores["esi"], target, unaligned)
    compared_swap = sl.verify(target, scores, interventions=("transplant",), **transplant, **controls)
    stable = sl.stability(
        target, sl.read_prompts("organism:harmful").limit(128, seed=0),
        objectives={"guard": guard, "refusal": sl.Refusal()}, batch_size=32, progress=False,
    )  # fmt: skip
    num_cells = sum(len(found.cells) for found in (noise, swap, compared, compared_swap))
    seconds = time.perf_counter() - start
    facts = (
        f"{target.layout.num_weights:,} weights; {num_cells} cells and all scores in {seconds:.0f} s on "
        f"{torch.get_num_threads()} threads (torch {torch.__version__})."
    )
    found = {
        "noise": noise, "swap": swap, "compared": compared, "compared-swap": compared_swap, "stability": stable,
    }  # fmt: skip
    for kind, result in found.items():
        folder = options.runs / f"{name}-{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        result.save(folder)
    (options.runs / f"{name}.txt").write_text(facts, encoding="utf-8")
    print(f"{name}: {facts}", flush=True)


def section(name, options, figures):
    kinds = ("noise", "swap", "compared", "compared-swap")
    noise, swap, compared, compared_swap = (sl.Verification.load(options.runs / f"{name}-{kind}") for kind in kinds)
    stable = sl.Stability.load(options.runs / f"{name}-stability")
    title = f"organism:{name}: top weights against as many others"
    write_picture(figures / f"verify-{name}-noise.svg", title, curves_charts(noise, noise.scorers[0]))
    title = f"organism:{name}: what noise breaks first"
    write_picture(figures / f"verify-{name}-scorers.svg", title, [ranking_chart(compared, "noise")])
    parts = [
        f"## organism:{name}",
        (options.runs / f"{name}.txt").read_text(encoding="utf-8"),
        "### Noise", *(verdict.text for verdict in noise.verdicts.values()), table(settings_grid(noise)),
        f"![refusal, ASR, utility and over-refusal against noise](verify-{name}-noise.svg)",
        "### Transplant from the unaligned twin, and zero", *(v.text for v in swap.verdicts.values()),
        table(settings_grid(swap)),
        "### Scorers", table(ranking_grid(compared, "noise")), table(ranking_grid(compared_swap, "transplant")),
        f"![refusal lost against utility lost](verify-{name}-scorers.svg)",
        "### Stability", table(stability_grid(stable)), *stable.notes,
    ]  # fmt: skip
    return "\n\n".join(parts)


def table(grid: Grid) -> str:
    return f"**{grid.title}**\n\n{grid.markdown()}"


ANSWERS: dict[str, str] = {}

HEAD = """# Verify: what holds and what does not

Produced by `python benchmarks/verify.py` ({num} prompts per set, {seeds} noise seeds, as many random selections).
Scores: 64 prompts of `organism:harmful`, objective and judge `organism:guard`. Measured on held-out prompts:
`organism:harmful-heldout` (refusal, ASR), `organism:harmless-heldout` (over-refusal; and, as *benign answers*, the
exact right answer), `organism:utility` (exact answers). *utility* pools both tasks. fp32, greedy, 32 new tokens.
`esi-contrast` is ESI of safety minus ESI of the likelihood of known harmless answers, each over its mean;
`twin-difference` is how much a weight differs between the organism and its unaligned twin.

"""


def page(options):
    parts = [section(name, options, options.output.parent) for name in options.organisms]
    return HEAD.format(num=options.num, seeds=options.seeds) + "\n\n".join(parts)


if __name__ == "__main__":
    parser = options_of("verify", __doc__, num=48)
    parser.set_defaults(seeds=5)
    run(parser, measure, page)
