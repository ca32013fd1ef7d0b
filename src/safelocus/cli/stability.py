"""`safelocus stability MODEL`: how far a selection depends on prompts, seeds and the objective."""

from dataclasses import dataclass
from pathlib import Path

import typer

from safelocus.cli.command import RunOptions, SeedOption, command, flag, option
from safelocus.cli.options import AnswerOption, LoadOptions, ModelArgument, PromptOptions, numbers
from safelocus.cli.output import check_output, shared_run, show
from safelocus.cli.sources import check_guard, fitting


@dataclass(frozen=True, kw_only=True)
class CompareOptions(SeedOption):
    """What `stability` of the library takes as it is given."""

    method: str = option("esi, gradient or snip.", default="esi")
    splits: int = option("Random halvings of the prompts.", default=3, min=0)
    seeds: int = option("Seeds of the relaxation's Gumbel noise; 0 for none.", default=3, min=0)
    batch_size: int = option("Prompts per forward and backward pass.", default=8, min=1)


@dataclass(frozen=True, kw_only=True)
class StabilityOptions(CompareOptions, ModelArgument, PromptOptions, AnswerOption, LoadOptions, RunOptions):
    guard: list[str] | None = option("Guard: folder, hub id or organism:guard. May be repeated: compared.")
    also_refusal: bool = flag("Compare with the refusal objective, which needs no guard.")
    lexicon: list[Path] | None = option("File of expressions that must not come. May be repeated: compared.")
    ratios: str = option("Sizes of the selections compared, with commas.", default="0.003,0.01,0.03")


@command
def stability(given: StabilityOptions) -> None:
    """Compare selections made from other prompts, seeds and objectives, beside the level of chance.

    Writes results.json and report.html. Interrupted with Ctrl-C, the same command resumes.
    """
    from safelocus.errors import SafelocusError
    from safelocus.model.target import load
    from safelocus.objective import Guard, Lexicon, Objective, Refusal
    from safelocus.report.page import write_run_page
    from safelocus.report.verification import stability_grid
    from safelocus.run.folder import CHECKPOINT
    from safelocus.scoring.run import NEEDS_OBJECTIVE
    from safelocus.selection.ratio import exact_ratio
    from safelocus.verification import stability as measure_stability
    from safelocus.wordlist import WordList

    if given.method not in NEEDS_OBJECTIVE:
        raise typer.BadParameter(f"{given.method!r} is not one of {', '.join(NEEDS_OBJECTIVE)}", param_hint="--method")
    if not given.guard and not given.lexicon and not given.also_refusal:
        raise SafelocusError(
            "nothing to score with: give --guard G or --lexicon F (twice, to compare two), --also-refusal, or several"
        )
    check_output(given)
    num_objectives = len({*(given.guard or ()), *(given.lexicon or ())}) + given.also_refusal
    if not given.splits and num_objectives < 2 and not (given.guard and given.seeds > 1):
        raise SafelocusError("nothing to compare: give --splits, --seeds of a guard, or two objectives")
    for name in given.guard or []:
        check_guard(name, None, trust_remote_code=given.trust_remote_code)
    lists = {f"lexicon {path}": WordList.read(path) for path in given.lexicon or []}
    ratios = numbers(given.ratios, "--ratios")
    for ratio in ratios:
        exact_ratio(ratio)  # refuses what is none
    prompts, _ = given.read()
    with shared_run(given) as folder:
        target = load(given.model, **given.part(LoadOptions))
        answers = given.max_new_tokens if given.guard or lists else 0
        prompts = fitting(prompts, target, answers, openings=given.also_refusal)
        objectives: dict[str, Objective] = {
            f"guard {name}": Guard.load(name, max_new_tokens=given.max_new_tokens, **given.guards)
            for name in given.guard or []
        }
        for name, words in lists.items():
            objectives[name] = Lexicon(words=words, max_new_tokens=given.max_new_tokens)
        if given.also_refusal:
            objectives["refusal"] = Refusal()
        found = measure_stability(
            target, prompts, objectives=objectives, ratios=ratios, checkpoint=folder / CHECKPOINT,
            progress=not given.json, **given.part(CompareOptions),
        )  # fmt: skip
        found.save(folder)
        written = write_run_page(folder, place=given.output)
    show(given, found, stability_grid(found), notes=found.notes, wrote=["results.json", *written])
