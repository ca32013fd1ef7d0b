"""Verify: disturb the selected weights, and as many others, and see what the model still does.

    baseline                                                     measured first
    for each ratio, intervention, noise and seed:
        top-K and bottom-K of each scorer, and random-K draws    all of exactly the same K

all through one loaded model, whose exact bits come back after each cell (`sparse.restoring`). Its fingerprint
is taken before and after; a single differing bit is an error.

Random draws are uniform over the eligible weights, without replacement, and shared by all scorers. Noise
belongs to the weight and the seed, so a weight in several selections gets the same noise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from safelocus import distributed
from safelocus.errors import PromptError
from safelocus.evaluation import evaluate
from safelocus.evaluation.judges import Judge
from safelocus.evaluation.responding import TargetResponder
from safelocus.evaluation.result import Evaluation, outcomes
from safelocus.evaluation.tasks import Task
from safelocus.model.fingerprint import check_made_for
from safelocus.model.target import Target
from safelocus.progress import track
from safelocus.prompts import PromptSet, read_prompts
from safelocus.run.resume import Journal, claim
from safelocus.scoring.scores import Scores
from safelocus.selection.selection import Selection
from safelocus.verification.cells import SELECTIONS, Cell, Observation, Setting
from safelocus.verification.interventions import Intervention, Sigmas, intervening, make_interventions
from safelocus.verification.plan import Plan, Scorer
from safelocus.verification.result import Verification


def verify(
    target: Target,
    scores: Scorer | Mapping[str, Scorer],
    *,
    prompts: PromptSet | Iterable[object] | str | Path,
    judges: Sequence[Judge] | Judge = (),
    harmless: PromptSet | None = None,
    tasks: Sequence[Task] | Task = (),
    perplexity: PromptSet | Sequence[PromptSet] = (),
    ratios: Sequence[float] = (0.01,),
    interventions: Sequence[str | Intervention] = ("noise",),
    noises: Sequence[float] = (1.0, 2.0, 3.0, 4.0),
    transplant_from: Target | nn.Module | None = None,
    selections: Sequence[str] = SELECTIONS,
    seeds: int = 5,
    random_draws: int = 1,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    allow_seen: bool = False,
    allow_mismatch: bool = False,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Verification:
    """Show by intervention whether the selected weights carry the target's safety.

    Args:
        target: the model under study; it comes back as it was, bit for bit.
        scores: what to verify: scores (top and bottom are selected at every ratio), a selection (taken as
            it is; it has no bottom), or several of them by name, compared with one another.
        prompts: harmful prompts, other than those that the scores were made with; whatever `read_prompts` takes.
        judges: of the responses; the first makes the `asr`. Default: the refusal reader.
        harmless: prompts that should be answered, for over-refusal.
        tasks: questions with answers, for utility. Without them nothing shows that damage is limited to safety.
        perplexity: prompts with responses, whose perplexity is measured in every cell beside all that.
        ratios: shares of all the model's weights.
        interventions: "noise", "zero", "transplant", or objects of your own (`Intervention`).
        noises: strengths of "noise", in standard deviations of each weight's matrix.
        transplant_from: model whose weights "transplant" takes: a Target or module of the same shape.
        selections: which of top, bottom and random to disturb.
        seeds: of the noise, per setting.
        random_draws: random selections per seed, each another one.
        batch_size, max_new_tokens: of the answers.
        allow_seen: verify on prompts that the scores were made with, all the same.
        allow_mismatch: verify on another model than the scores were made for (a fine-tuned sibling, say).
        checkpoint: folder in which finished cells are kept; an interrupted verification resumes from it. Of
            several processes each has its own, and as many resume.
        progress: show a progress bar.

    Raises:
        PromptError: prompts that the scores were made with.
        SelectionError: a selection that does not fit the model, wholly or in part.
        RunError: a checkpoint of another verification; weights that did not come back.

    Example:
        >>> import safelocus as sl
        >>> verification = sl.verify(                                       # doctest: +SKIP
        ...     target, scores, prompts=sl.read_prompts("organism:harmful-heldout"), noises=(3.0,)
        ... )
        >>> print(verification.verdict.text)                                # doctest: +SKIP
    """
    prompts = read_prompts(prompts)
    scorers: dict[str, Scorer] = {_label(scores): scores} if isinstance(scores, Scores | Selection) else dict(scores)
    plan = Plan(
        scorers=scorers,
        ratios=tuple(dict.fromkeys(ratios)),
        interventions=tuple(make_interventions(tuple(interventions), tuple(dict.fromkeys(noises)), transplant_from)),
        selections=tuple(selections),
        num_seeds=seeds,
        random_draws=random_draws,
    )
    notes = [
        *check_unseen(scorers, prompts, allow_seen=allow_seen),
        *check_scorers(scorers, target, allow_mismatch=allow_mismatch),
        *([target.layout.left_out] if target.layout.left_out else []),
    ]
    before = target.fingerprint()
    responder = TargetResponder(target=target)  # keeps the encoded prompts

    def observe() -> Evaluation:
        return evaluate(
            responder, harmful=prompts, harmless=() if harmless is None else harmless, tasks=tasks,
            perplexity=perplexity, judges=asked, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=False,
        )  # fmt: skip

    asked = (judges,) if isinstance(judges, Judge) else tuple(judges)
    inputs = {
        "the model": target, **{f"the scores of {name}": scorer for name, scorer in scorers.items()},
        "--prompts": prompts, "--harmless": harmless, "the tasks": tasks, "the texts": perplexity, "the judges": asked,
        "ratios": plan.ratios,
        "the interventions": [(each.name, each.noise, each) for each in plan.interventions],
        "selections": plan.selections, "seeds": seeds, "random_draws": random_draws, "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    claim(checkpoint, inputs)
    journal = Journal(checkpoint, "cells")
    evaluation = observe()
    found = outcomes(evaluation.rows, evaluation.judge_names)
    order = {name: list(values) for name, values in found.items()}
    baseline = _observed(evaluation, order)
    cells = _disturbed(target, plan, lambda: _observed(observe(), order), journal, progress=progress)
    before.came_back(target.fingerprint(), after="verification")
    return Verification(
        baseline=baseline,
        cells=cells,
        notes=tuple(notes),
        provenance={
            "model": target.name,
            "fingerprint": before.id,
            "scorers": {name: _describe(scorer) for name, scorer in scorers.items()},
            "judges": evaluation.judges,
            "ratios": list(plan.ratios),
            "interventions": [{"name": i.name, "noise": i.noise} for i in plan.interventions],
            "seeds": seeds,
            "random_draws": random_draws,
            **evaluation.provenance,
        },
    )


def _disturbed(
    target: Target, plan: Plan, observe: Callable[[], Observation], journal: Journal, *, progress: bool
) -> list[Cell]:
    """Every cell of the plan: found in the journal, or measured with the weights disturbed."""
    sigmas = Sigmas(target)
    cells: list[Cell] = []
    selection, made_for = None, None
    for step in track(list(plan.steps()), "verifying", enabled=progress and distributed.is_main()):
        if (step.key,) in journal:
            cells.append(Cell.from_line(journal[(step.key,)]))
            continue
        if step.made_by != made_for:  # a selection serves all its interventions and seeds
            selection, made_for = plan.select(target, step), step.made_by
        assert selection is not None
        with intervening(target, selection, step.intervention, seed=step.seed, sigmas=sigmas):
            observed = observe()
        setting = Setting(
            ratio=step.ratio, k=selection.k, intervention=step.intervention.name, noise=step.intervention.noise
        )
        cells.append(
            Cell(
                selection=step.selection, scorer=step.scorer, setting=setting, seed=step.seed, draw=step.draw,
                observed=observed,
            )
        )  # fmt: skip
        journal.add([((step.key,), cells[-1].to_line())])
    return cells


def check_scorers(scorers: Mapping[str, Scorer], target: Target, *, allow_mismatch: bool) -> Iterator[str]:
    """Refuse what was made for another model; yields remarks where that is allowed."""
    for name, scorer in scorers.items():
        # made by hand or in memory it says nothing: `selection.require` still checks names and shapes
        if (known := scorer.provenance.fingerprint) is not None:
            yield from check_made_for(known, target.fingerprint(like=known), name, allow_mismatch=allow_mismatch)


def check_unseen(scorers: Mapping[str, Scorer], prompts: PromptSet, *, allow_seen: bool = False) -> Iterator[str]:
    """Refuse prompts that weights were identified with; yields remarks where that is allowed or unknown.

    Raises:
        PromptError: some of the prompts were used for scoring.
    """
    hashes = set(prompts.prompt_hashes)
    for name, scorer in scorers.items():
        provenance = scorer.provenance
        if provenance.prompts_hash is None:
            continue
        used = provenance.extra.get("prompt_hashes")
        if used is None:
            yield (
                f"The scores of {name} do not say which prompts they were made with (an earlier version wrote them), "
                "so some of these may be among them."
            )
            continue
        num_seen = len(hashes & set(used))
        if num_seen and not allow_seen:
            raise PromptError(
                f"{prompts.source}: {num_seen} of {len(prompts)} prompts were used to find the weights of {name}; "
                "verifying with them would flatter it. Give held-out prompts (score --held-out leaves some), or "
                "allow it: --allow-seen, allow_seen=True"
            )
        if num_seen:
            yield f"{num_seen} of {len(prompts)} prompts were used to find the weights of {name}: this flatters it."


def _observed(evaluation: Evaluation, order: dict[str, list[Any]]) -> Observation:
    found = outcomes(evaluation.rows, evaluation.judge_names)
    characters = {True: "1", False: "0", None: "-"}
    return Observation(
        measures=evaluation.measures,
        outcomes={
            name: "".join(characters[found[name][identity]] for identity in identities)
            for name, identities in order.items()
        },
    )


def _label(scorer: Scorer) -> str:
    method = scorer.provenance.method
    return method if method != "manual" else "selection"


def _describe(scorer: Scorer) -> dict[str, Any]:
    values = replace(scorer.provenance, fingerprint=None).to_json()
    values["extra"] = {key: value for key, value in values["extra"].items() if key != "prompt_hashes"}
    return {**values, **({"selection": scorer.describe()} if isinstance(scorer, Selection) else {})}
