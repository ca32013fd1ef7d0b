"""`safelocus preserve MODEL`: fine-tune on a task with the selected weights protected, and show what was kept."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safelocus.cli import locating, options, planning, sources
from safelocus.cli.command import command, flag, option
from safelocus.cli.output import mind, note, shared_run, show, together

if TYPE_CHECKING:
    from safelocus.evaluation import Task
    from safelocus.evaluation.judges import Judge
    from safelocus.model.target import Target
    from safelocus.preservation.calibration import Calibration
    from safelocus.preservation.mixing import Mixed
    from safelocus.prompts import PromptSet
    from safelocus.resources import Subject, Training
    from safelocus.selection.selection import Selection
    from safelocus.training.examination import Examination


@dataclass(frozen=True, kw_only=True)
class ProtectOptions(options.AllowOptions):
    """What `run_preservation` takes as it is given."""

    unprotected: bool = flag("Train without protection too, and show both side by side.")
    merge: bool = flag("Save the model with its adapter merged, not the adapter and its patch.")
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "Type of the weights in the model that is saved.", shown="that of its files"
    )
    look: int = option("Measure each look on at most this many of each set.", default=48, min=1)


@dataclass(frozen=True, kw_only=True)
class Preserve(ProtectOptions, options.TrainOptions):
    rows: ClassVar[int] = 16
    usual_ratio: ClassVar[float] = 0.1

    ratio: float | None = option("Share of the weights to select, in (0, 1].", "-r", shown="0.1")
    data: str = option("The task: prompts with responses. File, hub id, organism:NAME.", "-d")
    task_heldout: str | None = option(
        "Questions that tell whether the task was learned.", shown="a tenth of --data that is not trained on"
    )
    controls: str | None = option(
        "What else to protect instead: random, bottom, snip, wanda, gradient, magnitude; with commas."
    )
    lora: bool = flag("Train a LoRA adapter instead of all weights.")
    lora_rank: int = option("Its rank.", default=16, min=1)
    lora_alpha: int | None = option("Its alpha.", shown="twice the rank")
    lora_modules: str | None = option("Modules that get one, with commas.", shown="all linear layers")
    lora_mode: Literal["exact", "patch"] = option(
        "Keep the effective weights while training (exact), or correct them afterwards (patch).", default="exact"
    )
    calibrate: list[str] | None = option(
        "Harmful and harmless prompts: between the task's steps the protected weights are trained to keep what the "
        "original model answers to them. May be repeated. none: the weights are frozen, bit for bit.",
        shown="embedded:refusals, embedded:ordinary, embedded:alarming",
    )
    calibrate_every: int = option("Steps of the task between two such steps.", default=4, min=1)
    calibrate_rate: float | None = option(
        "Their learning rate.", shown="that of the training; with --lora a tenth of it", min=0
    )
    mix: list[str] | None = option(
        "Prompts to mix into the task's rows, with the model's own answers, in every arm but the unprotected one. May "
        "be repeated."
    )
    mix_share: float = option("Their share of all rows.", default=1 / 6, shown="1/6")
    mask_listed: bool = flag("With --lexicon: where the task's answers say a listed expression, it is not learned.")
    harmful: str | None = option("Harmful prompts to measure with.", shown="those that were not scored with")
    eval_every: int | None = option("Steps between two looks.", shown="none in between", min=1)
    steps: int = 1000
    learning_rate: float | None = option("Peak learning rate.", shown="2e-5; with --lora 2e-4", min=0)


@command
@together
def preserve(given: Preserve) -> None:
    """Fine-tune on a task with the selected weights protected, and measure what was kept and learned (SPA).

    Writes the model (or the adapter and its patch), results.json, responses, report.html and the curve. The model's
    own files are never touched. Interrupted with Ctrl-C, the same command resumes.
    """
    from safelocus import distributed
    from safelocus.analysis.acceptance import accepted
    from safelocus.errors import SafelocusError
    from safelocus.preservation.run import run_preservation
    from safelocus.preservation.trainee import ADAPTER, MODEL
    from safelocus.report.page import write_outcome
    from safelocus.report.training import outcome_grid
    from safelocus.report.verdicts import acceptance_grid
    from safelocus.run.folder import CHECKPOINT
    from safelocus.training.lora import Lora

    # everything that can be wrong with the input is found before the long work starts
    if given.learning_rate is None:
        given = replace(given, learning_rate=2e-4 if given.lora else 2e-5)
    of_adapter = ("lora_rank", "lora_alpha", "lora_modules", "lora_mode", "merge")
    options.only_with(given, "an adapter (--lora)", given.lora, *of_adapter)
    options.check_none(given.calibrate, "--calibrate")
    is_calibrated = bool(calibrated_on(given.calibrate, given.lora_mode))
    options.only_with(given, "calibration (--calibrate)", is_calibrated, "calibrate_every", "calibrate_rate")
    options.only_with(given, "rows that are mixed in (--mix)", bool(given.mix), "mix_share")
    if given.mask_listed and given.lexicon is None:
        raise SafelocusError("--mask-listed needs the list of expressions: --lexicon FILE")
    if is_calibrated and given.lora_mode == "patch":
        raise SafelocusError("--calibrate needs --lora-mode exact: in patch the adapter changes the same weights")
    if given.save_dtype and given.lora and not given.merge:
        raise SafelocusError("--save-dtype is the type of a model that is saved; with --lora give --merge too")
    sources.check_whole(given, {"--lora": given.lora})
    wanted = locating.check_training(given)
    others = sources.runs_for_card(given)
    material = _read(given)
    given = planning.settle(given, _stage(given, material))
    with shared_run(given) as folder:
        target = given.load()
        judges = sources.judges_for(given)
        located = locating.locate_for(given, target, folder, judges)
        examination, remarks = _examination(given, material, located.selection, judges)
        adapter = Lora(
            rank=given.lora_rank, alpha=given.lora_alpha, modules=options.words(given.lora_modules),
            mode=given.lora_mode,
        )  # fmt: skip
        found = run_preservation(
            target, located.selection, material.rows, material.learned, examination=examination,
            controls={name: partial(located.control, target, name, seed=given.seed) for name in wanted},
            lora=adapter if given.lora else None, calibration=_calibration(given, material, examination, target),
            mixed=_mixed(given, material, target),
            unlearned=sources.lexicon_for(given) if given.mask_listed else None, settings=given.settings(),
            every=given.eval_every, folder=folder, checkpoint=folder / CHECKPOINT, notes=remarks,
            progress=not given.json, **given.part(ProtectOptions),
        )  # fmt: skip
        found = accepted(found, others)
        if distributed.is_main():
            written = write_outcome(found, folder, selection=located.selection, place=given.output)
    if distributed.is_main():
        saved = [f"{ADAPTER}/" if given.lora and not given.merge else f"{MODEL}/", "selection.safetensors"]
        states = ["before/", "after/", *(["unprotected/"] if given.unprotected else [])]
        told = found.to_json()
        show(
            given, told, outcome_grid(told), acceptance_grid(told), notes=[*found.notes, *found.protected.trial.notes],
            wrote=[*saved, "results.json", *states, *written],
        )  # fmt: skip


def calibrated_on(calibrate: list[str] | None, lora_mode: str | None) -> list[str]:
    """Sources of prompts, from what the options say: what is embedded, unless an adapter is corrected afterwards."""
    from safelocus.preservation.mixing import PROMPTS

    usual = () if lora_mode == "patch" else PROMPTS
    return [each for each in calibrate or usual if each != options.NONE]


@dataclass(frozen=True, kw_only=True)
class _Material:
    """What is learned, kept and measured; harmful prompts are None where they are those that found the weights."""

    rows: "PromptSet"
    learned: "Task"
    harmful: "PromptSet | None"
    harmless: "PromptSet | None"
    tasks: "list[Task]"
    calibrated: "list[PromptSet]"
    mixed: "list[PromptSet]"


def _read(given: Preserve) -> _Material:
    from safelocus.errors import SafelocusError
    from safelocus.preservation.mixing import Mixed
    from safelocus.prompts import read_prompts
    from safelocus.selection.selection import Selection
    from safelocus.training.examination import Examination, check_apart, read_lesson

    rows, learned = read_lesson(given.data, held_out=given.task_heldout)
    learned = learned.limit(given.limit, seed=given.seed)
    harmful = None if given.harmful is None else read_prompts(given.harmful)
    if harmful is None and given.selection is not None:  # refuses a source that has none left
        provenance = Selection.load(locating.selection_file(given.selection)).provenance
        harmful = sources.unscored_prompts(None, provenance, allow_seen=given.allow_seen, option="--harmful")
        harmful = harmful.limit(given.limit, seed=given.seed)
    harmless = sources.harmless_prompts(given.harmless, given.limit, given.seed)
    tasks = sources.read_tasks(given.task, given.limit, given.seed)
    if learned.name in [other.name for other in tasks]:
        raise SafelocusError(f"--task {learned.name} is the task that is learned, which is measured anyway")
    if given.calibrate_rate is not None:
        replace(given, learning_rate=given.calibrate_rate).settings()  # refuses what is no rate
    calibrated = [read_prompts(each) for each in calibrated_on(given.calibrate, given.lora_mode)]
    mixed = [read_prompts(each) for each in given.mix or []]
    if mixed:
        Mixed(prompts=mixed, share=given.mix_share)  # refuses what is no share
    if harmful is not None:
        examination = Examination(harmful=harmful, harmless=harmless)
        trained = [rows, *mixed, *(calibrated if given.calibrate else ())]
        check_apart(examination, trained, allow_seen=given.allow_seen)
        sources.check_unscored(given.prompts, harmful, allow_seen=given.allow_seen)
    elif not given.allow_seen:
        raise SafelocusError("the weights are found with all of --prompts; give others to measure with: --harmful")
    return _Material(
        rows=rows, learned=learned, harmful=harmful, harmless=harmless, tasks=tasks, calibrated=calibrated, mixed=mixed
    )  # fmt: skip


def _stage(given: Preserve, material: _Material) -> "Callable[[Subject, tuple[Subject, ...]], Training]":
    def stage(subject: "Subject", guards: "tuple[Subject, ...]") -> "Training":
        from safelocus import distributed
        from safelocus.preservation.calibration import Calibration
        from safelocus.preservation.mixing import ANSWER_TOKENS
        from safelocus.resources import Training

        model = planning.Model.of(given)
        kept = [e for part in material.calibrated for e in part]
        lengths = model.lengths(kept, response=given.max_new_tokens, rows=[material.rows], max_length=given.max_length)
        if material.mixed:
            added = model.lengths([e for part in material.mixed for e in part], response=ANSWER_TOKENS).both
            lengths = replace(lengths, row=min(max(lengths.row, added), given.max_length), answer=None)
        return Training(
            target=subject, num_selected=planning.num_selected(given.selection, given.share, subject),
            kind="lora" if given.lora else "full", lora_rank=given.lora_rank, guards=guards,
            calibrated=len(material.calibrated) * Calibration.batch_size, calibrated_every=given.calibrate_every,
            most=given.batch_size or given.rows, processes=distributed.world_size(),
            lengths=lengths,
        )  # fmt: skip

    return stage


def _examination(
    given: Preserve, material: _Material, selection: "Selection", judges: "tuple[Judge, ...]"
) -> "tuple[Examination, list[str]]":
    """What is measured, and what to mind about it."""
    from safelocus.training.examination import Examination
    from safelocus.verification.run import check_unseen

    harmful = material.harmful or sources.unscored_prompts(
        None, selection.provenance, allow_seen=given.allow_seen, option="--harmful"
    )  # fmt: skip
    harmful = harmful.limit(given.limit, seed=given.seed)
    remarks = [*check_unseen({"the selection": selection}, harmful, allow_seen=given.allow_seen)]
    if selection.layout.left_out:
        remarks.append(selection.layout.left_out)
    if material.harmless is None:
        remarks.append("over-refusal is not measured: nothing harmless was given (--harmless)")
    examination = Examination(
        harmful=harmful, harmless=material.harmless, tasks=tuple(material.tasks), judges=judges,
        max_new_tokens=given.max_new_tokens,
    )  # fmt: skip
    return examination, remarks


def _calibration(
    given: Preserve, material: _Material, examination: "Examination", target: "Target"
) -> "Calibration | None":
    """On what is given, else on what is embedded, but for what is measured with."""
    from safelocus.preservation.calibration import Calibration

    prompts = material.calibrated
    if prompts and given.calibrate is None:
        for part in filter(None, (examination.harmful, examination.harmless)):
            prompts = [each.without(part) for each in prompts]
        sets = ", ".join(f"{each.source} ({len(each)})" for each in prompts)
        note(
            f"no --calibrate: the protected weights are trained to keep the model's own answers to {sets}, which are "
            f"generated first; --calibrate {options.NONE} leaves them their bits"
        )
        if gone := [each.source for each in prompts if not len(each)]:
            mind([f"nothing of {', '.join(gone)} is calibrated on: all of it is measured with (--calibrate: others)"])
        prompts = [each for each in prompts if len(each)]
    if not prompts:
        return None
    return Calibration(
        target=target, prompts=prompts, every=given.calibrate_every, learning_rate=given.calibrate_rate,
        max_new_tokens=_tokens(given, target), max_length=given.max_length, seed=given.seed,
    )  # fmt: skip


def _mixed(given: Preserve, material: _Material, target: "Target") -> "Mixed | None":
    from safelocus.preservation.mixing import Mixed

    how: dict[str, Any] = {"share": given.mix_share, "max_new_tokens": _tokens(given, target), "seed": given.seed}
    return Mixed(prompts=material.mixed, **how) if material.mixed else None


def _tokens(given: Preserve, target: "Target") -> int:
    """Of the model's own answers, which come after a thought where it thinks."""
    from safelocus.evaluation.responding import TargetResponder, thinks
    from safelocus.preservation.mixing import ANSWER_TOKENS

    return max(ANSWER_TOKENS, given.max_new_tokens) if thinks(TargetResponder(target=target)) else ANSWER_TOKENS
