"""`safelocus enhance MODEL`: train the selected weights on refusals, and show what that changed, beside controls."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from shlex import join
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safelocus.cli import locating, options, planning, sources
from safelocus.cli.command import command, flag, option
from safelocus.cli.output import mind, note, shared_run, show, together
from safelocus.enhancement.retained import GIVEN, OWN, RETAINED, settled

if TYPE_CHECKING:
    from safelocus.prompts import PromptSet
    from safelocus.resources import Subject, Training
    from safelocus.training.examination import Division

MEASURED = "embedded:harmless-heldout"
LARGE = 10**9  # weights, beyond which the default rate says nothing


def _either(name: str) -> str:
    return f"{GIVEN[name]:g}; of its own answers, without --lexicon, {OWN[name]:g}"


@dataclass(frozen=True, kw_only=True)
class RetainOptions(options.AllowOptions):
    """What `run_enhancement` takes as it is given."""

    retain_kl: float | None = option(
        "Weight of the divergence from the original model on these answers.", min=0, shown=_either("retain_kl")
    )
    retain_weight: float | None = option("Weight of the ordinary loss on them.", min=0, shown=_either("retain_weight"))
    retain_rows: int | None = option("How many of them go with each refusal.", min=1, shown=_either("retain_rows"))
    own_answers: bool = flag("Retain the model's own answers in place of those given.")
    answer_tokens: int | None = option(
        "New tokens of its own answers; longer ones are cut.",
        min=1,
        shown=f"{OWN['answer_tokens']}; beside given ones, or with --lexicon, {GIVEN['answer_tokens']}",
    )
    early_stopping: bool = option("Keep the best look; stop when more would not help.", default=False)
    interpolate: bool = flag(
        "Then go back along the straight line to the original weights, as far as the validation part finds best."
    )


@dataclass(frozen=True, kw_only=True)
class Enhance(RetainOptions, options.TrainOptions):
    rows: ClassVar[int] = 8

    data: str = option(
        "Harmful prompts with refusals: file, hub id, embedded:refusals. With --lexicon without answers too: the model "
        "then answers itself, without these expressions.", "-d",
    )  # fmt: skip
    retain: list[str] | None = option(
        "Harmless prompts with answers, which the model should go on giving. Without answers its own are taken. May be "
        "repeated: they take turns. none: nothing.",
        shown="embedded:ordinary, embedded:alarming",
    )
    harmful: str | None = option("Harmful prompts to measure with.", shown="a share of --data that is not trained on")
    harmless: str | None = option(
        "Harmless prompts to measure over-refusal with. none: it is not measured.",
        shown="a share of the first --retain that is not trained on; without one embedded:harmless-heldout",
    )
    held_out: float = option("That share, by content.", default=0.25, min=0.01, max=0.95)
    validation: float = option(
        "Share of all sets that is left for looks at the training, by content. 0: none.", default=0.15, max=0.95, min=0
    )
    validation_task: list[str] | None = option(
        "Questions for these looks. May be repeated.", shown="that share of each --task"
    )
    eval_every: int = option("Steps between two looks.", default=10, min=1)
    controls: str | None = option(
        "What else to train the same way: random, bottom, snip, wanda, gradient, magnitude, full, lora; with commas."
    )
    sweep: str | None = option(
        "Learning rates to try for the selection and every control, with commas; the best by the validation "
        "part counts."
    )
    learning_rate: float | None = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"


@command
@together
def enhance(given: Enhance) -> None:
    """Train the selected weights on refusals, and measure what that changed (SET).

    Writes the patch, a model card, results.json, the responses before and after, report.html and figures. The
    model's files are never touched: `safelocus patch apply` does that. Interrupted with Ctrl-C, the same command
    resumes.
    """
    from safelocus import distributed
    from safelocus.analysis.acceptance import accepted
    from safelocus.enhancement.result import PATCH
    from safelocus.enhancement.run import run_enhancement
    from safelocus.errors import SafelocusError
    from safelocus.report.page import write_outcome
    from safelocus.report.training import effect, outcome_grid, sweep_grid
    from safelocus.report.verdicts import acceptance_grid
    from safelocus.run.folder import CHECKPOINT
    from safelocus.verification.run import check_unseen

    # everything that can be wrong with the input is found before the long work starts
    wanted, rates = locating.check_training(given, "full", "lora"), options.numbers(given.sweep, "--sweep")
    for rate in rates:
        replace(given, learning_rate=rate).settings()
    if rates and given.learning_rate not in (Enhance.learning_rate, *rates):
        raise SafelocusError(
            f"--learning-rate {given.learning_rate:g}, and --sweep without it: give one of them, or add the rate"
        )
    if len(rates) == 1:
        given = replace(given, learning_rate=rates[0])
    others = sources.runs_for_card(given)
    given = _with_defaults(given)
    divided = _divide(given)
    how = settled(
        vars(given), divided.retained, own_answers=given.own_answers, lexicon=given.lexicon is not None
    )  # fmt: skip
    if not divided.retained:
        _check_nothing_retained(given, how)
    given = replace(given, **how)
    choosing = [name for name, chooses in {
        "--sweep": len(rates) > 1, "--interpolate": given.interpolate, "--early-stopping": given.early_stopping,
        "--validation-task": given.validation_task,
    }.items() if chooses]  # fmt: skip
    if choosing and divided.validation is None:
        raise SafelocusError(
            f"{' and '.join(choosing)}: the validation part is what chooses; leave one (--validation 0.15)"
        )
    given = planning.settle(given, _stage(given, divided, full="full" in wanted))
    with shared_run(given) as folder:
        target = given.load()
        if target.layout.num_weights > LARGE and given.learning_rate == Enhance.learning_rate and not rates:
            mind([
                f"a rate of {given.learning_rate:g} suited models of up to 135 million weights, and this one has "
                f"{target.layout.num_weights:,}; larger ones may want less: --sweep 3e-5,1e-4,3e-4, as their recipes do"
            ])  # fmt: skip
        judges = sources.judges_for(given)
        located = locating.locate_for(given, target, folder, judges)
        harmful, selection = divided.examination.harmful, located.selection
        seen = [*check_unseen({"the selection": selection}, harmful, allow_seen=given.allow_seen)]
        controls: dict[str, Any] = {
            name: name if name in ("full", "lora") else partial(located.control, target, name, seed=given.seed)
            for name in wanted
        }
        found = run_enhancement(
            target, selection, divided.data, retain=divided.retained, controls=controls,
            examination=replace(divided.examination, judges=judges),
            validation=divided.validation and replace(divided.validation, judges=judges), every=given.eval_every,
            learning_rates=rates, settings=given.settings(), lexicon=sources.lexicon_for(given),
            checkpoint=folder / CHECKPOINT, progress=not given.json, **given.part(RetainOptions),
        )  # fmt: skip
        found = accepted(replace(found, notes=(*divided.remarks, *seen, *found.notes)), others)
        if distributed.is_main():
            written = write_outcome(found, folder, selection=selection, place=given.output)
    if distributed.is_main():
        told = found.to_json()
        show(
            given, told, outcome_grid(told), sweep_grid(told), effect(told), acceptance_grid(told), notes=found.notes,
            wrote=[PATCH, "selection.safetensors", "README.md", "results.json", "before/", "after/", *written],
            then=f"apply it: {join(['safelocus', 'patch', 'apply', str(given.output / PATCH), given.model])} -o FOLDER",
        )  # fmt: skip


def _with_defaults(given: Enhance) -> Enhance:
    """What is retained and what over-refusal is measured with: as given, else what is embedded; said either way.

    A share of what is retained is measured with only where that was given.
    """
    retain, harmless = given.retain, given.harmless
    options.check_none(retain, "--retain")
    if harmless is None and (retain is None or retain == [options.NONE]):
        harmless = MEASURED
        note(f"no --harmless: over-refusal is measured with {MEASURED}; --harmless {options.NONE} for none of it")
    if retain is None:
        retain = list(RETAINED)
        note(
            f"no --retain: how the model itself answers {' and '.join(RETAINED)} is retained, and generated first; "
            f"--retain {options.NONE} for none of it"
        )
    return replace(given, retain=retain, harmless=harmless)


def _check_nothing_retained(given: Enhance, how: dict[str, Any]) -> None:
    """Refuse what says how to retain where nothing is, but for what a run.toml says of it by default."""
    default = settled(dict.fromkeys(how), (), own_answers=False, lexicon=given.lexicon is not None)
    as_ever: dict[str, Any] = {name: None for name in how if how[name] == default[name]}
    about = ["retain_kl", "retain_weight", "retain_rows", "own_answers"]
    if given.lexicon is None:  # with it, the answers to --data may be the model's own
        about.append("answer_tokens")
    options.only_with(replace(given, **as_ever), "what is retained (--retain)", False, *about)


def _divide(given: Enhance) -> "Division":
    """What is trained on, and what is measured with."""
    from safelocus.prompts import read_prompts
    from safelocus.training.examination import check_apart, divide

    divided = divide(
        _data(given), [read_prompts(each) for each in given.retain or () if each != options.NONE],
        harmful=None if given.harmful is None else read_prompts(given.harmful),
        harmless=None if given.harmless in (None, options.NONE) else read_prompts(given.harmless),
        over_refusal=given.harmless != options.NONE, tasks=sources.read_tasks(given.task, None, given.seed),
        validation_tasks=sources.read_tasks(given.validation_task, None, given.seed), held_out=given.held_out,
        validation=given.validation, limit=given.limit, seed=given.seed, max_new_tokens=given.max_new_tokens,
    )  # fmt: skip
    chosen_by = divided.validation.parts if divided.validation else []
    check_apart(divided.examination, [divided.data, *divided.retained, *chosen_by], allow_seen=given.allow_seen)
    sources.check_unscored(given.prompts, divided.examination.harmful, allow_seen=given.allow_seen)
    return divided


def _data(given: Enhance) -> "PromptSet":
    """What is trained on; with a list of expressions the model may answer itself."""
    from safelocus.prompts import read_prompts

    data = read_prompts(given.data)
    if given.lexicon and not data.is_answered:
        return data
    answered = data.with_responses()
    if without := len(data) - len(answered):
        mind([f"{without} of {len(data)} prompts of {data.source} have no response and are left out"])
    return answered


def _stage(given: Enhance, divided: "Division", *, full: bool) -> "Callable[[Subject, tuple[Subject, ...]], Training]":
    def stage(subject: "Subject", guards: "tuple[Subject, ...]") -> "Training":
        from safelocus import distributed
        from safelocus.resources import Training

        assert given.answer_tokens is not None
        assert given.retain_rows is not None
        answered = [part for part in divided.retained if part.is_answered]
        by_itself = [part for part in divided.retained if given.own_answers or not part.is_answered]
        if not divided.data.is_answered:  # as long as what is retained, and answered with it
            by_itself.append(divided.data)
        lengths = planning.Model.of(given).lengths(
            [example for part in by_itself for example in part], response=given.answer_tokens,
            rows=[divided.data, *(part.with_responses() for part in answered)], max_length=given.max_length,
        )  # fmt: skip
        if by_itself:
            lengths = replace(lengths, retained=max(lengths.retained or 0, lengths.both))
        if not divided.data.is_answered:
            lengths = replace(lengths, row=min(max(lengths.row, lengths.both), given.max_length), answer=None)
        k = subject.num_weights if full else planning.num_selected(given.selection, given.share, subject)
        return Training(
            target=subject, num_selected=k, kind="sparse", guards=guards, lengths=lengths,
            most=given.batch_size or given.rows, processes=distributed.world_size(),
            retained_rows=given.retain_rows if divided.retained else 0,
        )  # fmt: skip

    return stage
