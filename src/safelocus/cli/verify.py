"""`safelocus verify MODEL`: disturb the selected weights, and as many others, and see what breaks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safelocus.cli import locating, options, planning, sources
from safelocus.cli.command import RunOptions, command, option
from safelocus.cli.output import mind, note, shared_run, show, together

if TYPE_CHECKING:
    from safelocus.run.identity import Provenance
    from safelocus.scoring.scores import Scores
    from safelocus.selection.selection import Selection


@dataclass(frozen=True, kw_only=True)
class DisturbOptions(options.AllowOptions, options.BatchOptions):
    """What `verify` of the library takes as it is given."""

    seeds: int = option("Seeds of the noise per setting.", default=5, min=1)
    random_draws: int = option("Random selections per seed.", default=1, min=1)


@dataclass(frozen=True, kw_only=True)
class Verify(
    DisturbOptions,
    options.LexiconOption,
    options.GuardOptions,
    options.MeasureOptions,
    options.PerplexityOption,
    options.FieldOptions,
    options.ModelOptions,
    RunOptions,
):
    scores: list[Path] = option(
        "Run folder of `score`, its scores folder, or a selection file. May be repeated: compared."
    )
    prompts: str | None = option(
        "Harmful prompts that were not scored with.", "-p", shown="those of the scores' source that were left out"
    )
    guard: str | None = option("Guard that judges: folder, hub id or organism:guard.", shown="the scores'")
    lexicon: Path | None = option("File of expressions that judges.", shown="the scores'")
    judge: list[str] | None = option(
        "guard:NAME, lexicon:FILE, reader or refusal, instead of --guard or beside it. May be repeated."
    )
    ratios: str = option("Shares of the weights, with commas.", default="0.01")
    interventions: str = option("noise, zero, transplant; with commas.", "--intervention", default="noise")
    noise: str = option("Strengths of noise in sigma, with commas.", default="0.38,1,2,3")
    transplant_from: str | None = option("Model whose weights `transplant` takes.")
    scorers: str | None = option(
        "Further scores to make and compare: snip, wanda, gradient, magnitude, random, esi; with commas."
    )
    bottom: bool = option("Disturb the bottom weights too.", default=True)


@command
@together
def verify(given: Verify) -> None:
    """Show by intervention whether the selected weights carry safety, and whether only that.

    Disturbs the top weights, the bottom ones and random ones of exactly the same number, and measures
    refusal, ASR, over-refusal, utility and perplexity each time. Writes results.json, cells.jsonl, report.html and
    figures. Interrupted with Ctrl-C, the same command resumes; the model's files are never touched.
    """
    from torch.nn import Module

    from safelocus import distributed
    from safelocus.report.page import write_outcome
    from safelocus.report.verification import ranking_grid, settings_grid
    from safelocus.run.folder import CHECKPOINT
    from safelocus.scoring.run import METHODS
    from safelocus.verification import verify as verify_selections
    from safelocus.verification.interventions import make_interventions
    from safelocus.verification.run import check_scorers, check_unseen

    # everything that can be wrong with the input is found before the long work starts
    named = _load(given.scores)
    provenance = next(iter(named.values())).provenance
    prompts = sources.unscored_prompts(
        given.prompts, provenance, field=given.field, where=options.conditions(given.where),
        allow_seen=given.allow_seen,
    ).limit(given.limit, seed=given.seed)  # fmt: skip
    mind(check_unseen(named, prompts, allow_seen=given.allow_seen))
    harmless = sources.harmless_prompts(given.harmless, given.limit, given.seed)
    tasks = sources.read_tasks(given.task, given.limit, given.seed)
    texts = sources.texts(given.perplexity, given.limit, given.seed)
    wanted = options.words(given.scorers, "--scorers", METHODS)
    sources.check_whole(given, {"--scorers wanda": "wanda" in wanted})
    ratios, noises = options.numbers(given.ratios, "--ratios"), options.numbers(given.noise, "--noise")
    transplants = "transplant" in options.words(given.interventions)
    options.only_with(given, "--intervention transplant", transplants, "transplant_from")
    make_interventions(options.words(given.interventions), noises, Module() if given.transplant_from else None)
    missing = [method for method in wanted if method not in named]
    for method in missing:
        locating.check_like(
            method, provenance, given.scores[0], guard=given.guard, guard_description=given.guard_description,
            trust_remote_code=given.trust_remote_code,
        )  # fmt: skip
    given, asked = _judging(given, provenance)
    given = planning.resumed(given, "batch_size")
    batch_size, device = planning.answering_settings(
        planning.Model.of(given), [prompts, *([harmless] if harmless else []), *tasks],
        judges=asked, texts=texts[0] if texts else None, max_new_tokens=given.max_new_tokens,
        batch_size=given.batch_size, num_scores=len(missing), source=given.transplant_from, quiet=given.json,
        num_disturbed=max(_num_disturbed(artefact, ratios) for artefact in named.values()),
    )  # fmt: skip
    given = replace(given, batch_size=batch_size, device=device)
    with shared_run(given) as folder:
        target = given.load()
        if missing:  # before others are made like these
            list(check_scorers(named, target, allow_mismatch=given.allow_mismatch))
        source = None
        if given.transplant_from is not None:
            source = replace(given, model=given.transplant_from, revision=None).load()
        judges = sources.load_judges(asked, **given.described, **given.guards)
        if not given.json:
            note(prompts.describe())
        for method in missing:
            named[method] = locating.score_like(
                target, method, provenance, beside=given.scores[0], guard=given.guard,
                guard_description=given.guard_description, progress=not given.json, device=given.device,
                trust_remote_code=given.trust_remote_code,
                reader=sources.guard_among(judges, given.guard, given.guard_description),
                checkpoint=folder / CHECKPOINT / f"scores-{method}",
            )  # fmt: skip
        found = verify_selections(
            target, named, prompts=prompts, judges=judges, harmless=harmless, tasks=tasks, perplexity=texts,
            ratios=ratios, noises=noises, interventions=options.words(given.interventions), transplant_from=source,
            selections=("top", "bottom", "random") if given.bottom else ("top", "random"),
            checkpoint=folder / CHECKPOINT, progress=not given.json, **given.part(DisturbOptions),
        )  # fmt: skip
        if distributed.is_main():
            written = write_outcome(found, folder, place=given.output)
    if distributed.is_main():
        rankings = found.rankings if len(found.scorers) > 1 else ()
        show(
            given, found, settings_grid(found), *(ranking_grid(found, each) for each in rankings),
            *(verdict.text for verdict in found.verdicts.values()), notes=found.notes,
            wrote=["results.json", "cells.jsonl", *written],
        )  # fmt: skip


def _judging(given: Verify, provenance: "Provenance") -> tuple[Verify, list[str]]:
    """(options with the scores' own judges where none are given, the judges' names)"""
    if not (given.judge or given.guard or given.lexicon):
        given = replace(
            given, guard=sources.guard_of(provenance), lexicon=sources.lexicon_of(provenance),
            guard_description=given.guard_description or locating.description_of(given.scores[0]),
        )  # fmt: skip
    names = sources.judge_names(given.guard, given.lexicon, given.judge or ())
    sources.check_judges(names, **given.described, trust_remote_code=given.trust_remote_code)
    return given, names


def _num_disturbed(artefact: "Scores | Selection", ratios: Sequence[float]) -> int:
    """K of the largest selection."""
    from safelocus.selection.ratio import count_for_ratio
    from safelocus.selection.selection import Selection

    if isinstance(artefact, Selection):
        return artefact.k
    return max((count_for_ratio(artefact.layout, ratio) for ratio in ratios), default=0)


def _load(paths: Sequence[Path]) -> "dict[str, Scores | Selection]":
    """Artefacts by method, or by path where methods repeat."""
    loaded = [(path, sources.read_artefact(path)) for path in paths]
    methods = [artefact.provenance.method for _, artefact in loaded]
    return {
        method if methods.count(method) == 1 and method != "manual" else str(path): artefact
        for method, (path, artefact) in zip(methods, loaded, strict=True)
    }
