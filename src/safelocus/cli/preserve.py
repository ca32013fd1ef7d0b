"""`safelocus preserve MODEL`: fine-tune on a task with the selected weights protected, and show what was kept."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safelocus.cli import options, planning, sources
from safelocus.cli.output import note, print_json, results, shared_run, together

if TYPE_CHECKING:
    from safelocus.prompts import PromptSet
    from safelocus.selection.selection import Selection

ROWS = 16  # of an optimizer step


@together
def preserve(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            "--data", "-d", help="The task: prompts with responses. File, hub id, organism:NAME.", show_default=False
        ),
    ],
    output: options.Output,
    selection: options.SelectionFile = None,
    guard: options.ObjectiveGuard = None,
    guard_description: options.GuardDescription = None,
    refusal: options.Refusal = False,
    prompts: options.ScorePrompts = None,
    ratio: options.LocateRatio = None,
    task_heldout: Annotated[
        str | None,
        typer.Option(
            help="Questions that tell whether the task was learned.",
            show_default="a tenth of --data that is not trained on",
        ),
    ] = None,
    unprotected: Annotated[
        bool, typer.Option("--unprotected", help="Train without protection too, and show both side by side.")
    ] = False,
    controls: Annotated[
        str | None,
        typer.Option(
            help="What else to protect instead: random, bottom, snip, wanda, gradient, magnitude; with commas.",
            show_default=False,
        ),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA adapter instead of all weights.")] = False,
    lora_rank: Annotated[int, typer.Option(help="Its rank.", min=1)] = 16,
    lora_alpha: Annotated[int | None, typer.Option(help="Its alpha.", show_default="twice the rank")] = None,
    lora_modules: Annotated[
        str | None, typer.Option(help="Modules that get one, with commas.", show_default="all linear layers")
    ] = None,
    lora_mode: Annotated[
        Literal["exact", "patch"],
        typer.Option(help="Keep the effective weights while training (exact), or correct them afterwards (patch)."),
    ] = "exact",
    merge: Annotated[
        bool, typer.Option("--merge", help="Save the model with its adapter merged, not the adapter and its patch.")
    ] = False,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompts whose answers the protected weights are calibrated to keep, by small steps of their own: "
            "repeat it for harmful and harmless ones.",
            show_default=False,
        ),
    ] = None,
    calibrate_every: Annotated[int, typer.Option(help="Steps of the task between two such steps.", min=1)] = 4,
    calibrate_rate: Annotated[float, typer.Option(help="Their learning rate.", min=0)] = 1e-3,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompts to mix into the task's rows, with the model's own answers, in every arm. May be repeated.",
            show_default=False,
        ),
    ] = None,
    mix_share: Annotated[float, typer.Option(help="Their share of all rows.")] = 0.1,
    harmful: Annotated[
        str | None,
        typer.Option(help="Harmful prompts to measure with.", show_default="those that were not scored with"),
    ] = None,
    harmless: Annotated[
        str | None,
        typer.Option(help="Harmless prompts to measure with, for over-refusal.", show_default=False),
    ] = None,
    task: options.Tasks = None,
    judge: options.Judges = None,
    limit: options.EvaluationLimit = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between two looks.", min=1, show_default="none in between")
    ] = None,
    look: Annotated[int, typer.Option(help="Measure each look on at most this many of each set.", min=1)] = 48,
    steps: options.Steps = 1000,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate.", min=0, show_default="2e-5; with --lora 2e-4")
    ] = None,
    schedule: options.ScheduleOption = "constant",
    warmup: options.Warmup = 0,
    batch_size: options.TrainingBatch = None,
    accumulation: options.Accumulation = None,
    weight_decay: options.WeightDecay = 0.0,
    max_grad_norm: options.MaxGradNorm = 1.0,
    max_length: options.MaxLength = 1024,
    checkpointing: options.Checkpointing = None,
    score_batch_size: options.ScoreBatch = None,
    allow_seen: options.AllowSeen = False,
    allow_mismatch: options.AllowMismatch = False,
    max_new_tokens: options.MaxNewTokens = 256,
    system: options.System = None,
    template: options.Template = None,
    layout: options.LayoutFile = None,
    skip_unknown: options.SkipUnknown = False,
    dtype: options.DtypeOption = "auto",
    device: options.Device = None,
    shard: options.Shard = False,
    offload: options.Offload = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Fine-tune on a task with the selected weights protected, and measure what was kept and learned (SPA).

    Writes the model (or the adapter and its patch), results.json, responses, report.html and the curve. The model's
    own files are never touched. Interrupted with Ctrl-C, the same command resumes.
    """
    from safelocus import distributed
    from safelocus.errors import SafelocusError
    from safelocus.model.target import load
    from safelocus.preservation.calibration import Calibration
    from safelocus.preservation.run import Mixed, run_preservation
    from safelocus.preservation.trainee import ADAPTER, MODEL
    from safelocus.prompts import read_prompts
    from safelocus.report.page import write_outcome
    from safelocus.report.training import outcome_grid
    from safelocus.resources import Subject, Training
    from safelocus.run.folder import CHECKPOINT
    from safelocus.scoring.run import METHODS
    from safelocus.training import TrainingSettings
    from safelocus.training.examination import Examination, check_apart, read_lesson
    from safelocus.training.lora import Lora
    from safelocus.verification.run import check_unseen

    # everything that can be wrong with the input is found before the long work starts
    known = ("random", "bottom", *(method for method in METHODS if method != "random"))
    wanted = options.words(controls)
    if unknown := sorted(set(wanted) - set(known)):
        raise SafelocusError(f"--controls {', '.join(unknown)}: expected {', '.join(known)}")
    if learning_rate is None:
        learning_rate = 2e-4 if lora else 2e-5
    settings = TrainingSettings(
        steps=steps, learning_rate=learning_rate, schedule=schedule, warmup_steps=warmup, batch_size=batch_size or ROWS,
        accumulation=accumulation or 1, weight_decay=weight_decay, max_grad_norm=max_grad_norm or None,
        max_length=max_length, activation_checkpointing=bool(checkpointing), seed=seed,
    )  # fmt: skip
    sources.check_shard(shard, {"--lora": lora, "--controls wanda": "wanda" in wanted})
    sources.check_located(selection, guard, refusal, prompts, ratio)
    rows, learned = read_lesson(data, held_out=task_heldout)
    learned = learned if limit is None else learned.limit(limit, seed=seed)
    harmful_set = None if harmful is None else read_prompts(harmful)
    harmless_set = sources.harmless_prompts(harmless, limit, seed)
    tasks = sources.read_tasks(task, limit, seed)
    if learned.name in [other.name for other in tasks]:
        raise SafelocusError(f"--task {learned.name} is the task that is learned, which is measured anyway")
    replace(settings, learning_rate=calibrate_rate)  # refuses what is no rate
    calibrated = [read_prompts(source) for source in calibrate or []]
    mixed = Mixed(prompts=[read_prompts(source) for source in mix], share=mix_share) if mix else None
    if harmful_set is not None:
        examination = Examination(harmful=harmful_set, harmless=harmless_set)
        training = [rows, *calibrated, *(mixed.prompts if mixed else ())]
        check_apart(examination, training, allow_seen=allow_seen)
        sources.check_unscored(prompts, harmful_set, allow_seen=allow_seen)
    elif selection is None and not allow_seen:
        raise SafelocusError("the weights are found with all of --prompts; give others to measure with: --harmful")
    place = planning.Model(
        name=model, dtype=dtype, device=device, layout=layout, skip_unknown=skip_unknown, system=system,
        template=template, revision=revision, trust_remote_code=trust_remote_code, shard=shard, offload=offload,
    )  # fmt: skip

    def stage(subject: Subject, reader: Subject | None) -> Training:
        return Training(
            target=subject, num_selected=planning.num_selected(selection, ratio, subject),
            kind="lora" if lora else "full", lora_rank=lora_rank, guard=reader, batch=settings.batch_size,
            lengths=place.lengths(response=max_new_tokens, rows=[rows], max_length=max_length),
        )  # fmt: skip

    settings, score_batch_size, device = planning.settle(
        place, stage, settings, output=output, overwrite=overwrite, guard=guard,
        prompts=prompts if selection is None else None, max_new_tokens=max_new_tokens, rows=ROWS, quiet=json,
        batch_size=batch_size, accumulation=accumulation, checkpointing=checkpointing,
        score_batch_size=score_batch_size,
    )  # fmt: skip
    resolved = {
        "command": "preserve", "model": model, "data": data, "selection": str(selection) if selection else None,
        "guard": guard, "guard_description": str(guard_description) if guard_description else None,
        "refusal": refusal, "prompts": prompts, "ratio": ratio, "task_heldout": task_heldout,
        "unprotected": unprotected, "controls": controls, "lora": lora, "lora_rank": lora_rank,
        "lora_alpha": lora_alpha, "lora_modules": lora_modules, "lora_mode": lora_mode, "merge": merge,
        "calibrate": calibrate, "calibrate_every": calibrate_every, "calibrate_rate": calibrate_rate, "mix": mix,
        "mix_share": mix_share, "harmful": harmful, "harmless": harmless, "task": task, "judge": judge,
        "limit": limit, "eval_every": eval_every, "look": look, "steps": steps, "learning_rate": learning_rate,
        "schedule": schedule, "warmup": warmup, "batch_size": settings.batch_size,
        "accumulation": settings.accumulation,
        "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "max_length": max_length,
        "checkpointing": settings.activation_checkpointing, "score_batch_size": score_batch_size,
        "allow_seen": allow_seen, "allow_mismatch": allow_mismatch,
        "max_new_tokens": max_new_tokens, "system": system, "template": template,
        "layout": str(layout) if layout else None, "skip_unknown": skip_unknown, "dtype": dtype,
        "device": device, "revision": revision, "trust_remote_code": trust_remote_code, "shard": shard,
        "offload": offload, "seed": seed,
    }  # fmt: skip
    with shared_run(output, config=resolved, overwrite=overwrite) as folder:
        how: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        checkpoint = folder / CHECKPOINT
        target = load(
            model, layout=layout, skip_unknown=skip_unknown, system=system, template=template, revision=revision,
            shard=shard, offload=offload, **how,
        )  # fmt: skip
        located = sources.locate(
            target, selection=selection, guard=guard, guard_description=guard_description, refusal=refusal,
            prompts=prompts, ratio=ratio, batch_size=score_batch_size or 8, max_new_tokens=max_new_tokens,
            checkpoint=checkpoint / "scores", progress=not json, **how,
        )  # fmt: skip
        harmful_set = harmful_set or _unscored(located.selection, allow_seen)
        harmful_set = harmful_set if limit is None else harmful_set.limit(limit, seed=seed)
        remarks = [*check_unseen({"the selection": located.selection}, harmful_set, allow_seen=allow_seen)]
        if target.layout.left_out:
            remarks.append(target.layout.left_out)
        if harmless_set is None:
            remarks.append("over-refusal is not measured: nothing harmless was given (--harmless)")
        judges = tuple(sources.load_judges(None if judge else guard, guard_description, judge, **how))
        calibration = None
        if calibrated:
            calibration = Calibration(
                target=target, prompts=calibrated, every=calibrate_every, learning_rate=calibrate_rate,
                max_new_tokens=max_new_tokens, max_length=max_length, seed=seed,
            )  # fmt: skip
        adapter = Lora(
            rank=lora_rank, alpha=lora_alpha, modules=tuple(options.words(lora_modules)), mode=lora_mode
        )  # fmt: skip
        found = run_preservation(
            target, located.selection, rows, learned,
            examination=Examination(
                harmful=harmful_set, harmless=harmless_set, tasks=tuple(tasks), judges=judges,
                max_new_tokens=max_new_tokens,
            ),
            controls={name: located.control_later(target, name, seed=seed) for name in wanted}, unprotected=unprotected,
            lora=adapter if lora else None, calibration=calibration, mixed=mixed, settings=settings, every=eval_every,
            look=look, folder=folder, merge=merge, allow_seen=allow_seen, allow_mismatch=allow_mismatch,
            checkpoint=checkpoint, notes=remarks, progress=not json,
        )  # fmt: skip
        if distributed.is_main():
            written = write_outcome(found, folder, selection=located.selection, place=output)
    if not distributed.is_main():
        return
    if json:
        print_json({"output": str(output), **found.to_json()})
        return
    results.print(outcome_grid(found.to_json()).rich())
    for remark in [*found.notes, *found.protected.trial.notes]:
        note(f"[bold]mind:[/] {remark}")
    saved = f"{ADAPTER}/" if lora and not merge else f"{MODEL}/"
    parts = ["before/", "after/", *(["unprotected/"] if unprotected else [])]
    note(f"wrote {output}: {', '.join((saved, 'selection.safetensors', 'results.json', *parts, *written))}")


def _unscored(selection: "Selection", allow_seen: bool) -> "PromptSet":
    return sources.unscored_prompts(None, selection.provenance, allow_seen=allow_seen)
