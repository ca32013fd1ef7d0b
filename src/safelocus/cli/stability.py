"""`safelocus stability MODEL`: how far a selection depends on prompts, seeds and the objective."""

from typing import Annotated, Any

import typer

from safelocus.cli import options
from safelocus.cli.output import note, print_json, results


def stability(
    model: options.Model,
    prompts: options.Prompts,
    output: options.Output,
    guard: Annotated[
        list[str] | None,
        typer.Option(help="Guard: folder, hub id or organism:guard. May be repeated: compared.", show_default=False),
    ] = None,
    also_refusal: Annotated[
        bool, typer.Option("--also-refusal", help="Compare with the refusal objective, which needs no guard.")
    ] = False,
    method: Annotated[str, typer.Option(help="esi, gradient or snip.")] = "esi",
    ratios: Annotated[str, typer.Option(help="Sizes of the selections compared, with commas.")] = "0.003,0.01,0.03",
    splits: Annotated[int, typer.Option(help="Random halvings of the prompts.", min=0)] = 3,
    seeds: Annotated[int, typer.Option(help="Seeds of the relaxation's Gumbel noise; 0 for none.", min=0)] = 3,
    field: options.Field = None,
    where: options.Where = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 8,
    max_new_tokens: options.MaxNewTokens = 256,
    system: options.System = None,
    template: options.Template = None,
    layout: options.LayoutFile = None,
    skip_unknown: options.SkipUnknown = False,
    dtype: options.DtypeOption = "auto",
    device: options.Device = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Compare selections made from other prompts, seeds and objectives, beside the level of chance.

    Writes results.json and report.html. Interrupted with Ctrl-C, the same command resumes.
    """
    from safelocus.errors import SafelocusError
    from safelocus.model.target import load
    from safelocus.objective import Guard, Objective, Refusal
    from safelocus.prompts import read_prompts
    from safelocus.report.page import write_run_page
    from safelocus.report.verification import stability_grid
    from safelocus.run.folder import CHECKPOINT, run_folder
    from safelocus.scoring.run import NEEDS_OBJECTIVE
    from safelocus.verification import stability as measure_stability

    if method not in NEEDS_OBJECTIVE:
        raise typer.BadParameter(f"{method!r} is not one of {', '.join(NEEDS_OBJECTIVE)}", param_hint="--method")
    if not guard and not also_refusal:
        raise SafelocusError("nothing to score with: give --guard G (twice, to compare two), --also-refusal, or both")
    sizes = options.numbers(ratios, "--ratios")
    prompt_set = read_prompts(prompts, field=field, where=options.conditions(where))
    if limit is not None:
        prompt_set = prompt_set.limit(limit)
    resolved = {
        "command": "stability", "model": model, "prompts": prompts, "guard": guard, "also_refusal": also_refusal,
        "method": method, "ratios": ratios, "splits": splits, "seeds": seeds, "field": field, "where": where,
        "limit": limit, "batch_size": batch_size, "max_new_tokens": max_new_tokens, "system": system,
        "template": template, "layout": str(layout) if layout else None, "skip_unknown": skip_unknown,
        "dtype": dtype, "device": device,
        "revision": revision, "trust_remote_code": trust_remote_code, "seed": seed,
    }  # fmt: skip
    with run_folder(output, config=resolved, overwrite=overwrite) as folder:
        target = load(
            model, dtype=dtype, device=device, layout=layout, skip_unknown=skip_unknown, system=system,
            template=template, revision=revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        how: dict[str, Any] = {
            "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "max_new_tokens": max_new_tokens,
        }  # fmt: skip
        objectives: dict[str, Objective] = {f"guard {name}": Guard.load(name, **how) for name in guard or []}
        if also_refusal:
            objectives["refusal"] = Refusal()
        found = measure_stability(
            target, prompt_set, objectives=objectives, ratios=sizes, method=method, splits=splits, seeds=seeds,  # type: ignore[arg-type]
            seed=seed, batch_size=batch_size, checkpoint=folder / CHECKPOINT, progress=not json,
        )  # fmt: skip
        found.save(folder)
        written = write_run_page(folder, place=output)
    if json:
        print_json({"output": str(output), **found.to_json()})
        return
    results.print(stability_grid(found).rich())
    for remark in found.notes:
        note(f"[bold]mind:[/] {remark}")
    note(f"wrote {output}: results.json, {', '.join(written)}")
