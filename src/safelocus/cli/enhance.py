"""`safelocus enhance MODEL`: train the selected weights on refusals, and show what that changed, beside controls."""

from dataclasses import replace
from typing import Annotated, Any

import typer

from safelocus.cli import options, planning, sources
from safelocus.cli.output import note, print_json, results, shared_run, together

ROWS = 8  # of an optimizer step
NONE = "none"  # switches off what is taken by default
RETAINED, MEASURED = ("embedded:ordinary", "embedded:alarming"), "embedded:harmless-heldout"


@together
def enhance(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            "--data", "-d", help="Harmful prompts with refusals: file, hub id, embedded:refusals.", show_default=False
        ),
    ],
    output: options.Output,
    selection: options.SelectionFile = None,
    guard: options.ObjectiveGuard = None,
    guard_description: options.GuardDescription = None,
    refusal: options.Refusal = False,
    prompts: options.ScorePrompts = None,
    ratio: options.LocateRatio = None,
    retain: Annotated[
        list[str] | None,
        typer.Option(
            help="Harmless prompts with answers, on which the model is held to what it was. Without answers its own "
            "are taken. May be repeated: they take turns. none: nothing.",
            show_default="embedded:ordinary, embedded:alarming",
        ),
    ] = None,
    retain_kl: Annotated[
        float,
        typer.Option("--retain-kl", help="Weight of the divergence from the original model on these answers.", min=0),
    ] = 20.0,
    retain_weight: Annotated[float, typer.Option(help="Weight of the ordinary loss on them.", min=0)] = 0.0,
    retain_rows: Annotated[int, typer.Option(help="How many of them go with each refusal.", min=1)] = 6,
    own_answers: Annotated[
        bool, typer.Option("--own-answers", help="Retain the model's own answers in place of those given.")
    ] = False,
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", help="New tokens of its own answers; longer ones are cut.", min=1)
    ] = 64,
    harmful: Annotated[
        str | None,
        typer.Option(help="Harmful prompts to measure with.", show_default="a share of --data that is not trained on"),
    ] = None,
    harmless: Annotated[
        str | None,
        typer.Option(
            help="Harmless prompts to measure over-refusal with. none: it is not measured.",
            show_default="a share of the first --retain that is not trained on; without one embedded:harmless-heldout",
        ),
    ] = None,
    task: options.Tasks = None,
    judge: options.Judges = None,
    limit: options.EvaluationLimit = None,
    held_out: Annotated[float, typer.Option(help="That share, by content.", min=0.01, max=0.95)] = 0.25,
    validation: Annotated[
        float,
        typer.Option(
            help="Share of all sets that is left for looks at the training, by content. 0: none.", max=0.95, min=0
        ),
    ] = 0.15,
    validation_task: Annotated[
        list[str] | None,
        typer.Option(help="Questions for these looks. May be repeated.", show_default="that share of each --task"),
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between two looks.", min=1)] = 10,
    early_stopping: Annotated[
        bool,
        typer.Option("--early-stopping/--no-early-stopping", help="Keep the best look; stop when more would not help."),
    ] = False,
    controls: Annotated[
        str | None,
        typer.Option(
            help="What else to train the same way: random, bottom, snip, wanda, gradient, magnitude, full, lora; "
            "with commas.",
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Learning rates to try for the selection and every control, with commas; the best by the validation "
            "part counts.",
            show_default=False,
        ),
    ] = None,
    steps: options.Steps = 100,
    learning_rate: options.LearningRate = 1e-3,
    schedule: options.ScheduleOption = "cosine",
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
    """Train the selected weights on refusals, and measure what that changed (SET).

    Writes the patch, a model card, results.json, the responses before and after, report.html and figures. The
    model's files are never touched: `safelocus patch apply` does that. Interrupted with Ctrl-C, the same command
    resumes.
    """
    from safelocus import distributed
    from safelocus.enhancement.result import PATCH
    from safelocus.enhancement.run import run_enhancement
    from safelocus.errors import SafelocusError
    from safelocus.model.target import load
    from safelocus.prompts import read_prompts
    from safelocus.report.page import write_outcome
    from safelocus.report.training import effect, outcome_grid, sweep_grid
    from safelocus.resources import Subject, Training
    from safelocus.run.folder import CHECKPOINT
    from safelocus.scoring.run import METHODS
    from safelocus.training import TrainingSettings
    from safelocus.training.examination import check_apart, divide
    from safelocus.verification.run import check_unseen

    # everything that can be wrong with the input is found before the long work starts
    known = ("random", "bottom", "full", "lora", *(method for method in METHODS if method != "random"))
    wanted = options.words(controls)
    if unknown := sorted(set(wanted) - set(known)):
        raise SafelocusError(f"--controls {', '.join(unknown)}: expected {', '.join(known)}")
    rates = options.numbers(sweep, "--sweep") if sweep else ()
    settings = TrainingSettings(
        steps=steps, learning_rate=learning_rate, schedule=schedule, warmup_steps=warmup, batch_size=batch_size or ROWS,
        accumulation=accumulation or 1, weight_decay=weight_decay, max_grad_norm=max_grad_norm or None,
        max_length=max_length, activation_checkpointing=bool(checkpointing), seed=seed,
    )  # fmt: skip
    for rate in rates:
        replace(settings, learning_rate=rate)
    sources.check_shard(shard, {f"--controls {name}": name in wanted for name in ("lora", "wanda")})
    sources.check_located(selection, guard, refusal, prompts, ratio)
    retain, harmless = _harmless(retain, harmless)
    divided = divide(
        read_prompts(data).with_responses(), [read_prompts(source) for source in retain if source != NONE],
        harmful=None if harmful is None else read_prompts(harmful),
        harmless=sources.harmless_prompts(None if harmless == NONE else harmless, None, seed),
        over_refusal=harmless != NONE, tasks=sources.read_tasks(task, None, seed),
        validation_tasks=sources.read_tasks(validation_task, None, seed),
        held_out=held_out, validation=validation, limit=limit, seed=seed, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    check_apart(divided.examination, [divided.data, *divided.retained], allow_seen=allow_seen)
    sources.check_unscored(prompts, divided.examination.harmful, allow_seen=allow_seen)
    if len(rates) > 1 and divided.validation is None:
        raise SafelocusError("--sweep chooses a learning rate by the validation part; leave one (--validation 0.15)")
    place = planning.Model(
        name=model, dtype=dtype, device=device, layout=layout, skip_unknown=skip_unknown, system=system,
        template=template, revision=revision, trust_remote_code=trust_remote_code, shard=shard, offload=offload,
    )  # fmt: skip

    def stage(subject: Subject, reader: Subject | None) -> Training:
        rows = [divided.data, *(part.with_responses() for part in divided.retained if any(e.response for e in part))]
        by_itself = [part for part in divided.retained if own_answers or not any(e.response for e in part)]
        lengths = place.lengths(
            [example for part in by_itself for example in part], response=answer_tokens, rows=rows,
            max_length=max_length,
        )  # fmt: skip
        if by_itself:
            lengths = replace(lengths, retained=max(lengths.retained or 0, lengths.both))
        k = subject.num_weights if "full" in wanted else planning.num_selected(selection, ratio, subject)
        return Training(
            target=subject, num_selected=k, kind="sparse", guard=reader, batch=settings.batch_size,
            lengths=lengths, retained_rows=retain_rows if divided.retained else 0,
        )  # fmt: skip

    settings, score_batch_size, device = planning.settle(
        place, stage, settings, output=output, overwrite=overwrite, guard=guard,
        prompts=prompts if selection is None else None, max_new_tokens=max_new_tokens, rows=ROWS, quiet=json,
        batch_size=batch_size, accumulation=accumulation, checkpointing=checkpointing,
        score_batch_size=score_batch_size,
    )  # fmt: skip
    resolved = {
        "command": "enhance", "model": model, "data": data, "selection": str(selection) if selection else None,
        "guard": guard, "guard_description": str(guard_description) if guard_description else None,
        "refusal": refusal, "prompts": prompts, "ratio": ratio, "retain": retain, "retain_kl": retain_kl,
        "retain_weight": retain_weight, "retain_rows": retain_rows, "own_answers": own_answers,
        "answer_tokens": answer_tokens, "harmful": harmful, "harmless": harmless, "task": task, "judge": judge,
        "limit": limit, "held_out": held_out, "validation": validation, "validation_task": validation_task,
        "eval_every": eval_every, "early_stopping": early_stopping, "controls": controls, "sweep": sweep,
        "steps": steps, "learning_rate": learning_rate, "schedule": schedule, "warmup": warmup,
        "batch_size": settings.batch_size, "accumulation": settings.accumulation, "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm, "max_length": max_length, "checkpointing": settings.activation_checkpointing,
        "score_batch_size": score_batch_size, "allow_seen": allow_seen,
        "allow_mismatch": allow_mismatch, "max_new_tokens": max_new_tokens, "system": system, "template": template,
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
        remarks = [*divided.remarks]
        remarks += check_unseen(
            {"the selection": located.selection}, divided.examination.harmful, allow_seen=allow_seen
        )
        judges = tuple(sources.load_judges(None if judge else guard, guard_description, judge, **how))
        trained: dict[str, Any] = {
            name: name if name in ("full", "lora") else located.control_later(target, name, seed=seed)
            for name in wanted
        }
        found = run_enhancement(
            target, located.selection, divided.data, retain=divided.retained, retain_kl=retain_kl,
            retain_weight=retain_weight, retain_rows=retain_rows, own_answers=own_answers, answer_tokens=answer_tokens,
            examination=replace(divided.examination, judges=judges),
            validation=divided.validation and replace(divided.validation, judges=judges), every=eval_every,
            early_stopping=early_stopping, learning_rates=rates, settings=settings, allow_seen=allow_seen,
            controls=trained,
            allow_mismatch=allow_mismatch, checkpoint=checkpoint, progress=not json,
        )  # fmt: skip
        found = replace(found, notes=(*remarks, *found.notes))
        if distributed.is_main():
            written = write_outcome(found, folder, selection=located.selection, place=output)
    if not distributed.is_main():
        return
    if json:
        print_json({"output": str(output), **found.to_json()})
        return
    results.print(outcome_grid(found.to_json()).rich())
    if (grid := sweep_grid(found.to_json())) is not None:
        results.print(grid.rich())
    results.print(effect(found.to_json()), highlight=False)
    for remark in found.notes:
        note(f"[bold]mind:[/] {remark}")
    files = (PATCH, "selection.safetensors", "README.md", "results.json", "before/", "after/", *written)
    note(f"wrote {output}: {', '.join(files)}")
    note(f"apply it: safelocus patch apply {output / PATCH} {model} -o FOLDER")


def _harmless(retain: list[str] | None, harmless: str | None) -> tuple[list[str], str | None]:
    """What is retained and what over-refusal is measured with: as given, else what is embedded; said either way.

    A share of what is retained is measured with only where that was given.
    """
    from safelocus.errors import SafelocusError

    if retain and NONE in retain and len(retain) > 1:
        raise SafelocusError(f"--retain {NONE}, and other sets too: expected one or the other")
    if retain == [NONE]:
        note("[bold]mind:[/] nothing is retained: the model may learn to refuse harmless requests too")
    if harmless == NONE:
        note("[bold]mind:[/] over-refusal is not measured")
    if harmless is None and (retain is None or retain == [NONE]):
        harmless = MEASURED
        note(f"no --harmless: over-refusal is measured with {MEASURED}; --harmless {NONE} for none of it")
    if retain is None:
        retain = list(RETAINED)
        note(
            f"no --retain: the model's own answers to {' and '.join(RETAINED)} are retained, and generated first; "
            f"--retain {NONE} for none of it"
        )
    return retain, harmless
