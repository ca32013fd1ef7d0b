"""`safelocus verify MODEL`: disturb the selected weights, and as many others, and see what breaks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelocus.cli import options, planning, sources
from safelocus.cli.output import note, print_json, results, shared_run, together

if TYPE_CHECKING:
    from safelocus.scoring.scores import Scores
    from safelocus.selection.selection import Selection


@together
def verify(
    model: options.Model,
    scores: Annotated[
        list[Path],
        typer.Option(
            help="Run folder of `score`, its scores folder, or a selection file. May be repeated: compared.",
            show_default=False,
        ),
    ],
    output: options.Output,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            "-p",
            help="Harmful prompts that were not scored with.",
            show_default="those of the scores' source that were left out",
        ),
    ] = None,
    guard: Annotated[
        str | None,
        typer.Option(help="Guard that judges: folder, hub id or organism:guard.", show_default="the scores'"),
    ] = None,
    guard_description: Annotated[
        Path | None, typer.Option(help="TOML description of a guard unknown here (docs/guards.md).")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="guard:NAME or refusal, instead of --guard or beside it. May be repeated.", show_default=False
        ),
    ] = None,
    harmless: Annotated[
        str | None, typer.Option(help="Harmless prompts, for over-refusal.", show_default=False)
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Questions with answers, for utility. May be repeated.", show_default=False),
    ] = None,
    ratios: Annotated[str, typer.Option(help="Shares of the weights, with commas.")] = "0.01",
    interventions: Annotated[
        str, typer.Option("--intervention", help="noise, zero, transplant; with commas.")
    ] = "noise",
    noise: Annotated[str, typer.Option(help="Strengths of noise in sigma, with commas.")] = "0.38,1,2,3",
    transplant_from: Annotated[
        str | None, typer.Option(help="Model whose weights `transplant` takes.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of the noise per setting.", min=1)] = 5,
    random_draws: Annotated[int, typer.Option(help="Random selections per seed.", min=1)] = 1,
    scorers: Annotated[
        str | None,
        typer.Option(
            help="Further scores to make and compare: snip, wanda, gradient, magnitude, random, esi; with commas.",
            show_default=False,
        ),
    ] = None,
    bottom: Annotated[bool, typer.Option("--bottom/--no-bottom", help="Disturb the bottom weights too.")] = True,
    field: options.Field = None,
    where: options.Where = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use at most this many of each set, drawn by the seed.", min=1, show_default=False),
    ] = None,
    allow_seen: Annotated[
        bool, typer.Option("--allow-seen", help="Verify on prompts that were scored with, all the same.")
    ] = False,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Verify on another model than was scored (a fine-tuned sibling).")
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Prompts answered, and answers judged, at a time.", min=1, show_default="what fits"),
    ] = None,
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
    """Show by intervention whether the selected weights carry safety, and whether only that.

    Disturbs the top weights, the bottom ones and random ones of exactly the same number, and measures
    refusal, ASR, over-refusal and utility each time. Writes results.json, cells.jsonl, report.html and figures.
    Interrupted with Ctrl-C, the same command resumes; the model's files are never touched.
    """
    from safelocus import distributed
    from safelocus.errors import SafelocusError
    from safelocus.model.target import load
    from safelocus.report.page import write_outcome
    from safelocus.report.verification import ranking_grid, settings_grid
    from safelocus.run.folder import CHECKPOINT
    from safelocus.scoring.run import METHODS
    from safelocus.verification import verify as verify_selections
    from safelocus.verification.run import check_unseen

    # everything that can be wrong with the input is found before the long work starts
    named = {name: artefact for name, artefact, _ in _load(scores)}
    provenance = next(iter(named.values())).provenance
    prompt_set = sources.unscored_prompts(
        prompts, provenance, field=field, where=options.conditions(where), allow_seen=allow_seen
    )
    prompt_set = prompt_set if limit is None else prompt_set.limit(limit, seed=seed)
    for remark in check_unseen(named, prompt_set, allow_seen=allow_seen):
        note(f"[bold]mind:[/] {remark}")
    harmless_set = sources.harmless_prompts(harmless, limit, seed)
    tasks = sources.read_tasks(task, limit, seed)
    wanted = options.words(scorers)
    if unknown := sorted(set(wanted) - set(METHODS)):
        raise SafelocusError(f"--scorers {', '.join(unknown)}: expected {', '.join(METHODS)}")
    sources.check_shard(shard, {"--scorers wanda": "wanda" in wanted})
    numbers = {"ratios": options.numbers(ratios, "--ratios"), "noises": options.numbers(noise, "--noise")}
    guard = guard or (sources.guard_of(provenance) if not judge else None)
    batch_size, device = planning.answering_settings(
        planning.Model(
            name=model, dtype=dtype, device=device, layout=layout, skip_unknown=skip_unknown, system=system,
            template=template, revision=revision, trust_remote_code=trust_remote_code, shard=shard, offload=offload,
        ),
        [prompt_set, *([harmless_set] if harmless_set else []), *tasks],
        judges=[*([f"guard:{guard}"] if guard else []), *(judge or [])], max_new_tokens=max_new_tokens,
        batch_size=planning.unfinished(output, overwrite, {"batch_size": batch_size})["batch_size"],
        num_disturbed=max(_num_disturbed(artefact, numbers["ratios"]) for artefact in named.values()),
        num_scores=len(set(wanted) - set(named)), source=transplant_from, quiet=json,
    )  # fmt: skip
    resolved = {
        "command": "verify", "model": model, "scores": [str(path) for path in scores], "prompts": prompts,
        "guard": guard, "guard_description": str(guard_description) if guard_description else None, "judge": judge,
        "harmless": harmless, "task": task, "ratios": ratios, "interventions": interventions, "noise": noise,
        "transplant_from": transplant_from, "seeds": seeds, "random_draws": random_draws, "scorers": scorers,
        "bottom": bottom, "field": field, "where": where, "limit": limit, "allow_seen": allow_seen,
        "allow_mismatch": allow_mismatch, "batch_size": batch_size, "max_new_tokens": max_new_tokens,
        "system": system, "template": template, "layout": str(layout) if layout else None,
        "skip_unknown": skip_unknown, "dtype": dtype, "device": device, "revision": revision,
        "trust_remote_code": trust_remote_code, "shard": shard, "offload": offload, "seed": seed,
    }  # fmt: skip
    with shared_run(output, config=resolved, overwrite=overwrite) as folder:
        how: dict[str, Any] = {
            "dtype": dtype, "device": device, "layout": layout, "skip_unknown": skip_unknown, "system": system,
            "template": template, "revision": revision, "trust_remote_code": trust_remote_code, "shard": shard,
            "offload": offload,
        }  # fmt: skip
        target = load(model, **how)
        source = load(transplant_from, **{**how, "revision": None}) if transplant_from else None
        judges = sources.load_judges(
            guard, guard_description, judge, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        if not json:
            note(prompt_set.describe())
        for method in wanted:
            if method not in named:
                named[method] = sources.score_like(
                    target, method, provenance, beside=scores[0], guard=guard, guard_description=guard_description,
                    progress=not json, device=device, trust_remote_code=trust_remote_code,
                )  # fmt: skip
        found = verify_selections(
            target, named, prompts=prompt_set, judges=judges, harmless=harmless_set, tasks=tasks, **numbers,
            interventions=options.words(interventions), transplant_from=source,
            selections=("top", "bottom", "random") if bottom else ("top", "random"), seeds=seeds,
            random_draws=random_draws, batch_size=batch_size, max_new_tokens=max_new_tokens, allow_seen=allow_seen,
            allow_mismatch=allow_mismatch, checkpoint=folder / CHECKPOINT, progress=not json,
        )  # fmt: skip
        if distributed.is_main():
            written = write_outcome(found, folder, place=output)
    if not distributed.is_main():
        return
    if json:
        print_json({"output": str(output), **found.to_json()})
        return
    results.print(settings_grid(found).rich())
    if len(found.scorers) > 1:
        for intervention in found.rankings:
            results.print(ranking_grid(found, intervention).rich())
    for verdict in found.verdicts.values():
        results.print(verdict.text, highlight=False, markup=False, soft_wrap=True)
    for remark in found.notes:
        note(f"[bold]mind:[/] {remark}")
    note(f"wrote {output}: results.json, cells.jsonl, {', '.join(written)}")


def _num_disturbed(artefact: "Scores | Selection", ratios: Sequence[float]) -> int:
    """K of the largest selection."""
    from safelocus.selection.ratio import count_for_ratio
    from safelocus.selection.selection import Selection

    if isinstance(artefact, Selection):
        return artefact.k
    return max((count_for_ratio(artefact.layout, ratio) for ratio in ratios), default=0)


def _load(paths: Sequence[Path]) -> "list[tuple[str, Scores | Selection, Path]]":
    """(name, artefact, path): named by method, or by path where methods repeat."""
    from safelocus.cli.select import scores_folder
    from safelocus.errors import RunError
    from safelocus.scoring.scores import Scores
    from safelocus.selection.selection import Selection

    loaded: list[tuple[Path, Scores | Selection]] = []
    for path in paths:
        if not path.exists():
            raise RunError(f"{path}: does not exist; expected a run folder of `score`, or a selection file")
        loaded.append((path, Scores.load(scores_folder(path)) if path.is_dir() else Selection.load(path)))
    methods = [artefact.provenance.method for _, artefact in loaded]
    names = [m if methods.count(m) == 1 and m != "manual" else str(p) for m, (p, _) in zip(methods, loaded)]
    return [(name, artefact, path) for name, (path, artefact) in zip(names, loaded, strict=True)]
