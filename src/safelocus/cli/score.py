"""`safelocus score MODEL`: from a model and prompts to scores, a selection and the map."""

from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelocus.cli import options, planning
from safelocus.cli.output import note, print_json, results, shared_run, together

if TYPE_CHECKING:
    from safelocus.model.target import Target
    from safelocus.objective import Objective
    from safelocus.prompts import PromptSet


@together
def score(
    model: options.Model,
    prompts: options.Prompts,
    output: options.Output,
    guard: Annotated[str | None, typer.Option(help="Guard model: folder, hub id or organism:guard.")] = None,
    guard_description: Annotated[
        Path | None, typer.Option(help="TOML description of a guard unknown here (docs/guards.md).")
    ] = None,
    classifier: Annotated[str | None, typer.Option(help="Sequence classifier as objective.")] = None,
    unsafe_label: Annotated[str | None, typer.Option(help="The classifier's unsafe label.")] = None,
    refusal: Annotated[bool, typer.Option("--refusal", help="Objective without a guard: refusal openings.")] = False,
    method: Annotated[str, typer.Option(help="esi, gradient, snip, wanda, magnitude or random.")] = "esi",
    ratio: options.Ratio = 0.01,
    of: options.Of = "model",
    field: options.Field = None,
    where: options.Where = None,
    limit: options.Limit = None,
    held_out: Annotated[
        float,
        typer.Option(help="Share of the prompts to leave out, by content hash, for verifying later.", min=0, max=0.95),
    ] = 0.0,
    batch_size: options.PlannedBatch = None,
    max_new_tokens: options.MaxNewTokens = 256,
    tau: Annotated[float, typer.Option(help="Temperature of the relaxed answers.", min=0.01)] = 0.3,
    gumbel_seed: Annotated[int | None, typer.Option(help="Add Gumbel noise to the relaxation, from this seed.")] = None,
    transfer: Annotated[
        str | None,
        typer.Option(
            help="identity, character or index.",
            show_default="identity where vocabularies agree, else character",
        ),
    ] = None,
    accumulate_on: Annotated[
        str | None,
        typer.Option(help="Device of the fp32 sums, e.g. cpu.", show_default="the weights', or what fits"),
    ] = None,
    save_scores: Annotated[
        bool,
        typer.Option("--save-scores/--no-save-scores", help="Keep all scores (4 bytes per eligible weight)."),
    ] = True,
    system: options.System = None,
    template: options.Template = None,
    layout: options.LayoutFile = None,
    skip_unknown: options.SkipUnknown = False,
    dtype: options.DtypeOption = "auto",
    device: options.Device = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    shard: options.Shard = False,
    offload: options.Offload = False,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Score every eligible weight of a model, select the top share, and draw the map.

    Writes scores/, selection.safetensors, results.json, responses.jsonl, report.html and map.svg.
    Interrupted with Ctrl-C, the same command resumes. Several processes (torchrun) share the prompts.
    """
    from safelocus import distributed
    from safelocus.analysis.map import safety_map
    from safelocus.errors import ModelError
    from safelocus.model.target import load, load_config
    from safelocus.prompts import read_prompts
    from safelocus.report.maps import print_map
    from safelocus.report.page import write_map
    from safelocus.run.folder import CHECKPOINT
    from safelocus.scoring.run import METHODS, NEEDS_OBJECTIVE
    from safelocus.scoring.run import score as score_weights
    from safelocus.scoring.scores import Scores
    from safelocus.selection.ratio import count_for_ratio

    if method not in METHODS:
        raise typer.BadParameter(f"{method!r} is not one of {', '.join(METHODS)}", param_hint="--method")
    chosen = [
        name for name, given in (("--guard", guard), ("--classifier", classifier), ("--refusal", refusal)) if given
    ]
    if method in NEEDS_OBJECTIVE and len(chosen) != 1:
        found = " and ".join(chosen) or "none"
        raise ModelError(f"method {method} needs one objective: --guard G, --classifier C or --refusal; found {found}")

    # everything that can be wrong with the input is found before the long work starts
    load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    prompt_set = read_prompts(prompts, field=field, where=options.conditions(where))
    left_out = None
    if held_out:
        prompt_set, left_out = prompt_set.split(held_out)
    if limit is not None:
        prompt_set = prompt_set.limit(limit)
    settled = planning.unfinished(output, overwrite, {"batch_size": batch_size, "accumulate_on": accumulate_on})
    batch_size, accumulate_on, device = planning.scoring_settings(
        planning.Model(
            name=model, dtype=dtype, device=device, layout=layout, skip_unknown=skip_unknown, system=system,
            template=template, revision=revision, trust_remote_code=trust_remote_code, shard=shard, offload=offload,
        ),
        prompt_set, guard=guard, max_new_tokens=max_new_tokens, quiet=json, **settled,
    )  # fmt: skip
    resolved = {
        "command": "score", "model": model, "prompts": prompts, "guard": guard,
        "guard_description": str(guard_description) if guard_description else None, "classifier": classifier,
        "unsafe_label": unsafe_label, "refusal": refusal, "method": method, "ratio": ratio, "of": of, "field": field,
        "where": where, "limit": limit, "held_out": held_out, "batch_size": batch_size,
        "max_new_tokens": max_new_tokens, "tau": tau, "gumbel_seed": gumbel_seed, "transfer": transfer,
        "accumulate_on": accumulate_on, "save_scores": save_scores, "system": system, "template": template,
        "layout": str(layout) if layout else None, "skip_unknown": skip_unknown, "dtype": dtype,
        "device": device, "revision": revision, "trust_remote_code": trust_remote_code, "shard": shard,
        "offload": offload, "seed": seed,
    }  # fmt: skip
    writes = distributed.is_main()
    with shared_run(output, config=resolved, overwrite=overwrite) as folder:
        target = load(
            model, dtype=dtype, device=device, layout=layout, skip_unknown=skip_unknown, system=system,
            template=template, revision=revision, trust_remote_code=trust_remote_code, shard=shard, offload=offload,
        )  # fmt: skip
        if target.layout.left_out and not json:
            note(f"[bold]mind:[/] {target.layout.left_out}")
        count_for_ratio(target.layout, ratio, of=of)
        prompt_set = _fitting(prompt_set, target, 0 if refusal else max_new_tokens)
        objective: Objective | None = None
        answers = AnswerLog(folder / "responses.jsonl")
        if method in NEEDS_OBJECTIVE:
            objective = _objective(
                guard, guard_description, classifier, unsafe_label, dtype=dtype, device=device,
                trust_remote_code=trust_remote_code,
                text_options={
                    "max_new_tokens": max_new_tokens, "tau": tau, "gumbel_seed": gumbel_seed,
                    "variant": transfer, "on_responses": answers,
                },
            )  # fmt: skip
        if not json:
            note(f"{prompt_set.describe()}; {target.layout.num_eligible:,} eligible weights in {model}")
        scores = score_weights(
            target, prompt_set, objective=objective, method=method, batch_size=batch_size,  # type: ignore[arg-type]
            accumulate_on=accumulate_on, seed=seed, max_new_tokens=max_new_tokens, checkpoint=folder / CHECKPOINT,
            progress=not json,
        )  # fmt: skip
        answers.finish()
        selection = scores.select(ratio, of=of)
        scores.save(folder / "scores", tensors=save_scores)
        if writes:
            selection.save(folder / "selection.safetensors")
            # what is sharded in memory is whole on disk
            is_whole = not distributed.any_sharded(scores.tensors)
            drawn = safety_map(scores if is_whole else Scores.load(folder / "scores"), selection)
            written = write_map(folder, [(model, drawn)], place=output)
    if not writes:
        return
    if json:
        print_json({"output": str(output), "k": selection.k, "map": drawn.to_json()})
        return
    print_map(results, drawn)
    if left_out is not None:
        note(f"{len(left_out)} prompts were left out for verifying")
    note(f"wrote {output}: scores/, selection.safetensors, {', '.join(written)}")


def _fitting(prompt_set: "PromptSet", target: "Target", max_new_tokens: int) -> "PromptSet":
    """The prompts for which the model has positions enough; says how many were left out."""
    from dataclasses import replace

    from safelocus.errors import PromptError
    from safelocus.model.generation import longest_prompt

    room = longest_prompt(target, max_new_tokens)
    kept = tuple(e for e in prompt_set.examples if len(target.chat.encode_prompt(e.prompt, system=e.system)) <= room)
    if not kept:
        raise PromptError(
            f"{prompt_set.source}: no prompt fits; there is room for {room} tokens beside {max_new_tokens} new ones"
        )
    if len(kept) < len(prompt_set):
        note(f"left out {len(prompt_set) - len(kept)} prompts of more than {room} tokens: the model has no room")
    return replace(prompt_set, examples=kept)


class AnswerLog:
    """Keeps every answer and its score in a JSON-lines file; never printed.

    Unfinished, the file has a line for each batch of this process, as they come; `finish` makes one for each answer, of
    all processes, in the order of a single one. A batch that a resumed run repeats counts once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._batches = path.with_name(f"{path.name}.unfinished")

    def __call__(self, prompts: Any, responses: Any, scores: Any) -> None:
        import json

        rows = [
            {
                "prompt": prompt,
                **({"system": system} if (system := getattr(prompt, "system", None)) else {}),
                "response": response.text,
                "finished": response.finished,
                "safety": value,
            }
            for prompt, response, value in zip(prompts, responses, scores.tolist(), strict=True)
        ]
        with self._batches.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(rows)}")  # begins a line: another may have been cut off

    def finish(self) -> None:
        """Write the answers of all processes; every one of them calls this."""
        import json

        from safelocus import distributed
        from safelocus.run.folder import write_text

        batches: dict[Any, list[dict[str, Any]]] = {}
        for line in self._batches.read_text(encoding="utf-8").split("\n") if self._batches.is_file() else ():
            with suppress(json.JSONDecodeError):
                rows = json.loads(line)
                batches[tuple((row["prompt"], row.get("system")) for row in rows)] = rows
        self._batches.unlink(missing_ok=True)
        rounds = zip_longest(*distributed.gather_objects(list(batches.values())), fillvalue=[])
        answers = [json.dumps(row, ensure_ascii=False) + "\n" for each in rounds for rows in each for row in rows]
        if distributed.is_main() and answers:
            write_text(self._path, "".join(answers))


def _objective(
    guard: str | None,
    guard_description: Path | None,
    classifier: str | None,
    unsafe_label: str | None,
    *,
    dtype: Any,
    device: str | None,
    trust_remote_code: bool,
    text_options: dict[str, Any],
) -> "Objective":
    from safelocus.objective import Classifier, Guard, Refusal

    if guard is not None:
        return Guard.load(
            guard, description=guard_description, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
            **text_options,
        )  # fmt: skip
    if classifier is not None:
        return Classifier.load(classifier, unsafe=unsafe_label, dtype=dtype, device=device, **text_options)
    return Refusal()
