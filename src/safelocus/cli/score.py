"""`safelocus score MODEL`: from a model and prompts to scores, a selection and the map."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import typer

from safelocus.cli import options, planning, sources
from safelocus.cli.command import RunOptions, SeedOption, command, option
from safelocus.cli.output import mind, note, shared_run, show, together

if TYPE_CHECKING:
    from safelocus.objective import Objective
    from safelocus.objective.text import AnswerLog


@dataclass(frozen=True, kw_only=True)
class RelaxOptions(options.AnswerOption):
    """How an objective that reads answers is relaxed."""

    tau: float = option("Temperature of the relaxed answers.", default=0.3, min=0.01)
    gumbel_seed: int | None = option("Add Gumbel noise to the relaxation, from this seed.")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(options.AnswerOption, SeedOption):
    """What `score` of the library takes as it is given."""

    method: str = option("esi, gradient, snip, wanda, magnitude or random.", default="esi")
    checkpoint_seconds: float = option("Seconds between two savings of the sums to resume from.", default=600.0, min=0)
    batch_size: int | None = option("Prompts per forward and backward pass.", shown="what fits (safelocus plan)", min=1)
    accumulate_on: str | None = option(
        "Device of the fp32 sums and scores, e.g. cpu.", shown="the weights', or what fits"
    )


@dataclass(frozen=True, kw_only=True)
class Score(
    ScoreOptions,
    RelaxOptions,
    options.ObjectiveOptions,
    options.ShareOptions,
    options.PromptOptions,
    options.ModelOptions,
    RunOptions,
):
    classifier: str | None = option("Sequence classifier as objective.")
    unsafe_label: str | None = option("The classifier's unsafe label.")
    held_out: float = option(
        "Share of the prompts to leave out, by content hash, for verifying later.", default=0.0, min=0, max=0.95
    )
    transfer: Literal["identity", "character", "index"] | None = option(
        "How the guard's slopes come to the model's vocabulary.",
        shown="identity where vocabularies agree, else character",
    )
    save_scores: bool = option("Keep all scores (4 bytes per eligible weight).", default=True)


@command
@together
def score(given: Score) -> None:
    """Score every eligible weight of a model, select the top share, and draw the map.

    Writes scores/, selection.safetensors, results.json, report.html, map.svg and, where the objective reads answers,
    responses.jsonl. Interrupted with Ctrl-C, the same command resumes. Several processes (torchrun) share the prompts.
    """
    from safelocus import distributed
    from safelocus.analysis.map import safety_map
    from safelocus.errors import ModelError, PromptError
    from safelocus.model.target import check_device, load_config
    from safelocus.objective import Lexicon
    from safelocus.objective.text import AnswerLog
    from safelocus.report.maps import map_parts
    from safelocus.report.page import write_map
    from safelocus.run.folder import CHECKPOINT
    from safelocus.scoring.run import NEEDS_OBJECTIVE
    from safelocus.scoring.run import score as score_weights
    from safelocus.scoring.scores import Scores
    from safelocus.selection.ratio import count_for_ratio, exact_ratio

    # everything that can be wrong with the input is found before the long work starts
    _check_objective(given)
    exact_ratio(given.ratio)  # refuses what is none
    check_device(given.accumulate_on, "--accumulate-on")
    load_config(given.model, revision=given.revision, trust_remote_code=given.trust_remote_code)
    prompts, left_out = given.read(given.held_out)
    given = planning.resumed(given, "batch_size", "accumulate_on")
    batch_size, accumulate_on, device = planning.scoring_settings(
        planning.Model.of(given), prompts, method=given.method, guard=given.guard, classifier=given.classifier,
        answers=given.lexicon is not None, max_new_tokens=given.max_new_tokens, quiet=given.json,
        batch_size=given.batch_size, accumulate_on=given.accumulate_on,
    )  # fmt: skip
    given = replace(given, batch_size=batch_size, accumulate_on=accumulate_on, device=device)
    with shared_run(given) as folder:
        target = given.load()
        if target.layout.left_out and not given.json:
            mind([target.layout.left_out])
        count_for_ratio(target.layout, given.ratio, of=given.of)
        reads_answers = given.method == "wanda" or not given.refusal
        prompts = sources.fitting(prompts, target, given.max_new_tokens if reads_answers else 0, openings=given.refusal)
        log = AnswerLog(folder / "responses.jsonl")
        objective = _objective(given, log) if given.method in NEEDS_OBJECTIVE else None
        if not given.json:
            if isinstance(objective, Lexicon):
                note(f"{given.lexicon}: {objective.sequences_for(target).sentence}")
            note(f"{prompts.describe()}; {target.layout.num_eligible:,} eligible weights in {given.model}")
        scores = score_weights(
            target, prompts, objective=objective, checkpoint=folder / CHECKPOINT, progress=not given.json,
            **given.part(ScoreOptions),
        )  # fmt: skip
        answers = log.finish()
        unfinished = sum(answer.get("in_thought", False) for answer in answers)
        unread = sum(answer["safety"] is None for answer in answers)
        if answers and unfinished == len(answers):
            raise PromptError(
                f"all {unfinished} answers are thoughts that did not end, so there is nothing to score; give them room "
                "(--max-new-tokens), or let the model not think (--thinking off)"
            )
        if answers and unread == len(answers):
            raise ModelError(
                f"{given.guard}: it came to a verdict on none of {unread} answers, so there is nothing to score; "
                "describe how it is read (--guard-description), or take another guard"
            )
        scores.save(folder / "scores", tensors=given.save_scores, overwrite=True)  # that of an attempt that was killed
        selection = scores.select(given.ratio, of=given.of)
        if distributed.is_main():
            selection.save(folder / "selection.safetensors")
            # what is sharded in memory is whole on disk
            is_whole = not distributed.any_sharded(scores.tensors)
            drawn = safety_map(scores if is_whole else Scores.load(folder / "scores"), selection)
            written = write_map(folder, [(given.model, drawn)], place=given.output)
    if distributed.is_main():
        found = {"k": selection.k, "map": drawn.to_json()}
        remarks = [] if left_out is None else [f"{len(left_out)} prompts were left out for verifying"]
        remarks += selection.provenance.extra.get("remarks", ())
        if unfinished:
            remarks.append(
                f"{unfinished} answers are thoughts that did not end and add nothing; --max-new-tokens gives more room"
            )
        if unread:
            remarks.append(f"{unread} answers, on which the guard came to no verdict, add nothing")
        wrote = ["scores/", "selection.safetensors", *written]
        show(given, found, *map_parts(drawn), remarks=remarks, wrote=wrote)


def _check_objective(given: Score) -> None:
    from safelocus.model.target import load_config
    from safelocus.scoring.run import METHODS, NEEDS_OBJECTIVE

    if given.method not in METHODS:
        raise typer.BadParameter(f"{given.method!r} is not one of {', '.join(METHODS)}", param_hint="--method")
    if given.method in NEEDS_OBJECTIVE:
        sources.check_objective(given, also=("classifier",), what=f"method {given.method}")
    reads = given.guard is not None or given.classifier is not None
    for what, is_there, names in (
        ("--guard", given.guard is not None, ("guard_description",)),
        ("--classifier", given.classifier is not None, ("unsafe_label",)),
        ("--guard or --classifier", reads, ("tau", "gumbel_seed", "transfer")),
    ):
        options.only_with(given, what, is_there, *names)
    sources.check_whole(given, {"--method wanda": given.method == "wanda"})
    if given.guard is not None:
        sources.check_guard(given.guard, given.guard_description, trust_remote_code=given.trust_remote_code)
    if given.classifier is not None:
        load_config(given.classifier)


def _objective(given: Score, log: "AnswerLog") -> "Objective":
    from safelocus.objective import Classifier

    relaxed: dict[str, Any] = {"tau": given.tau, "gumbel_seed": given.gumbel_seed, "variant": given.transfer}
    reading: dict[str, Any] = {"max_new_tokens": given.max_new_tokens, "on_responses": log}
    if given.classifier is not None:
        return Classifier.load(
            given.classifier, unsafe=given.unsafe_label, dtype=given.dtype, device=given.device, **relaxed, **reading
        )  # fmt: skip
    objective = given.part(options.ObjectiveOptions)
    return sources.make_objective(**objective, load=given.guards, relaxed=relaxed, **reading)
