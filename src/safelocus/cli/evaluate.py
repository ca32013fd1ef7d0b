"""`safelocus evaluate MODEL`: how safe and how useful a model is, with intervals; or what changed since another run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelocus.cli import options, planning
from safelocus.cli.output import note, print_json, results, shared_run, together

if TYPE_CHECKING:
    from safelocus.evaluation import Evaluation, EvaluationComparison, Task
    from safelocus.evaluation.judges import Judge
    from safelocus.evaluation.responding import Responder
    from safelocus.prompts import PromptSet


@together
def evaluate(
    output: options.Output,
    model: Annotated[
        str | None, typer.Argument(help="Model folder, hub id, or organism:NAME.", show_default=False)
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            "-p",
            show_default=False,
            help="Harmful prompts: file, hub-id:split:field, embedded:NAME or organism:NAME. May be repeated.",
        ),
    ] = None,
    harmless: Annotated[
        list[str] | None,
        typer.Option(help="Harmless prompts, for over-refusal. May be repeated.", show_default=False),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Questions with answers: file, AG News folder, hub address or organism:NAME; "
            "exact=, numeric=, choice= or contains= before it says how answers compare. May be repeated.",
            show_default=False,
        ),
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option("--lm-eval", help="Task of lm-eval, NAME or NAME:COUNT. May be repeated.", show_default=False),
    ] = None,
    perplexity: Annotated[
        str | None, typer.Option(help="Prompts with responses whose perplexity to measure.", show_default=False)
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="guard:NAME, rubric:NAME or refusal; the first one's verdicts make the ASR. May be repeated.",
            show_default="refusal",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Run folder of an earlier evaluation: what changed since, in pairs.", show_default=False),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible server that answers instead of MODEL.", show_default=False),
    ] = None,
    endpoint_model: Annotated[str | None, typer.Option(help="The model's name there.", show_default=False)] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Model that a rubric is put to, by its name at the endpoint.", show_default=False)
    ] = None,
    judge_endpoint: Annotated[
        str | None,
        typer.Option(help="URL of that model's OpenAI-compatible server.", show_default="OPENAI_BASE_URL"),
    ] = None,
    judge_threshold: Annotated[
        float, typer.Option(help="Log-odds of safe above which a guard's verdict is safe.")
    ] = 0.0,
    field: options.Field = None,
    where: options.Where = None,
    harmless_field: Annotated[
        str | None, typer.Option(help="Field that holds the harmless prompts.", show_default="recognised")
    ] = None,
    harmless_where: Annotated[
        list[str] | None,
        typer.Option(help="Keep harmless rows with COLUMN=VALUE; may be repeated.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use at most this many of each set and task, drawn by the seed.", min=1, show_default=False),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(help="Use only the share of harmful prompts that `score --held-out` left out.", min=0, max=0.95),
    ] = 0.0,
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
    """Measure attack success, refusal, over-refusal, incoherence and utility of a model.

    Writes results.json, responses.jsonl (responses are never printed) and report.html. Interrupted with
    Ctrl-C, the same command resumes.
    """
    from safelocus import distributed
    from safelocus.evaluation import Evaluation, compare_evaluations
    from safelocus.evaluation import evaluate as evaluate_model
    from safelocus.report.page import write_run_page
    from safelocus.run.folder import CHECKPOINT, write_json

    # everything that can be wrong with the input is found before the long work starts
    earlier = Evaluation.load(against) if against is not None else None
    harmful_sets = _prompt_sets(prompts, field, where, limit=limit, held_out=held_out, seed=seed)
    harmless_sets = _prompt_sets(harmless, harmless_field, harmless_where, limit=limit, held_out=0, seed=seed)
    tasks = [_task(source, limit, seed) for source in task or []]
    texts = _texts(perplexity, limit, seed)
    batch_size = planning.unfinished(output, overwrite, {"batch_size": batch_size})["batch_size"]
    if model is not None:
        batch_size, device = planning.answering_settings(
            planning.Model(
                name=model, dtype=dtype, device=device, layout=layout, skip_unknown=skip_unknown,
                system=system, template=template, revision=revision, trust_remote_code=trust_remote_code, shard=shard,
                offload=offload,
            ),
            [*harmful_sets, *harmless_sets, *tasks], judges=judge or (), max_new_tokens=max_new_tokens,
            batch_size=batch_size, texts=texts, quiet=json,
        )  # fmt: skip
    batch_size = batch_size or planning.ANSWERED
    resolved = {
        "command": "evaluate", "model": model, "prompts": prompts, "harmless": harmless, "task": task,
        "lm_eval": lm_eval, "perplexity": perplexity, "judge": judge, "against": str(against) if against else None,
        "judge_model": judge_model, "judge_endpoint": judge_endpoint, "judge_threshold": judge_threshold,
        "endpoint": endpoint, "endpoint_model": endpoint_model, "field": field, "where": where,
        "harmless_field": harmless_field, "harmless_where": harmless_where, "limit": limit, "held_out": held_out,
        "batch_size": batch_size, "max_new_tokens": max_new_tokens, "system": system, "template": template,
        "layout": str(layout) if layout else None, "skip_unknown": skip_unknown, "dtype": dtype,
        "device": device, "revision": revision, "trust_remote_code": trust_remote_code, "shard": shard,
        "offload": offload, "seed": seed,
    }  # fmt: skip
    with shared_run(output, config=resolved, overwrite=overwrite) as folder:
        responder = _responder(
            model, endpoint, endpoint_model, seed=seed, system=system, template=template, layout=layout,
            skip_unknown=skip_unknown, dtype=dtype, device=device, revision=revision,
            trust_remote_code=trust_remote_code, shard=shard, offload=offload,
        )  # fmt: skip
        judges = _judges(
            judge or [], judge_model, judge_endpoint, threshold=judge_threshold, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if not json:
            for prompt_set in [*harmful_sets, *harmless_sets]:
                note(prompt_set.describe())
        evaluation = evaluate_model(
            responder, harmful=harmful_sets, harmless=harmless_sets, tasks=tasks,
            perplexity=() if texts is None else texts,
            suites=lm_eval or (), judges=judges, batch_size=batch_size, max_new_tokens=max_new_tokens, seed=seed,
            checkpoint=folder / CHECKPOINT, progress=not json,
        )  # fmt: skip
        comparison = None if earlier is None else compare_evaluations(earlier, evaluation, seed=seed)
        if distributed.is_main():
            evaluation.save(folder)
            if comparison is not None:
                write_json(folder / "against.json", {"run": str(against), **comparison.to_json()})
            written = write_run_page(folder, place=output)
    if not distributed.is_main():
        return
    if json:
        changed = {} if comparison is None else {"against": {"run": str(against), **comparison.to_json()}}
        print_json({"output": str(output), **evaluation.to_json(), **changed})
        return
    name = model or f"{endpoint_model} at {endpoint}"
    _print(name, evaluation)
    if comparison is not None:
        results.print(_comparison_table(against, comparison))
        for remark in comparison.notes:
            note(f"[bold]mind:[/] {remark}")
    if harmful_sets and not judge:
        note(
            "The ASR is the refusal matcher's: whatever does not refuse counts as harmful. "
            "--judge guard:NAME or rubric:NAME says more."
        )
    note(f"wrote {output}: results.json, responses.jsonl, {', '.join(written)}")


def _prompt_sets(
    sources: list[str] | None,
    field: str | None,
    where: list[str] | None,
    *,
    limit: int | None,
    held_out: float,
    seed: int,
) -> "list[PromptSet]":
    from safelocus.prompts import read_prompts

    found = []
    for source in sources or []:
        prompts = read_prompts(source, field=field, where=options.conditions(where))
        if held_out:
            prompts = prompts.split(held_out)[1]
        found.append(prompts if limit is None else prompts.limit(limit, seed=seed))
    return found


def _task(text: str, limit: int | None, seed: int) -> "Task":
    from safelocus.evaluation import read_task
    from safelocus.evaluation.matching import MATCHES

    match, separator, source = text.partition("=")
    given = separator and match in MATCHES
    task = read_task(source if given else text, match=match if given else None)  # type: ignore[arg-type]
    return task if limit is None else task.limit(limit, seed=seed)


def _texts(source: str | None, limit: int | None, seed: int) -> "PromptSet | None":
    from safelocus.prompts import read_prompts

    if source is None:
        return None
    texts = read_prompts(source).with_responses()
    return texts if limit is None else texts.limit(limit, seed=seed)


def _responder(
    model: str | None, endpoint: str | None, endpoint_model: str | None, *, seed: int, system: str | None, **load: Any
) -> "Responder":
    from safelocus.errors import ModelError
    from safelocus.evaluation import EndpointResponder, TargetResponder
    from safelocus.evaluation.judges.endpoint import Endpoint
    from safelocus.model.target import load as load_target

    if (model is None) == (endpoint is None) or (endpoint is None) != (endpoint_model is None):
        raise ModelError("give either MODEL, or --endpoint URL with --endpoint-model NAME")
    if model is not None:
        return TargetResponder(target=load_target(model, system=system, **load))
    assert endpoint_model is not None
    return EndpointResponder(endpoint=Endpoint(base_url=endpoint, model=endpoint_model), system=system, seed=seed)


def _judges(
    names: list[str], model: str | None, url: str | None, *, threshold: float, **guard_options: Any
) -> "list[Judge]":
    from safelocus.errors import JudgeError
    from safelocus.evaluation.judges import Endpoint, default_cache, load_judge

    endpoint = None
    if any(name.startswith("rubric:") for name in names):
        if model is None:
            raise JudgeError(
                "a rubric is put to a language model; name it with --judge-model (and --judge-endpoint URL)"
            )
        endpoint = Endpoint(model=model, base_url=url, cache=default_cache())
    return [load_judge(name, threshold=threshold, endpoint=endpoint, **guard_options) for name in names]


def _print(name: str, evaluation: "Evaluation") -> None:
    from rich.table import Table

    table = Table(
        title=name, caption=f"asr by judge {evaluation.judge_names[0]}" if "asr" in evaluation.measures else None
    )
    table.add_column("measure", overflow="fold")
    for heading in ("value", "95 % interval", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key, measure in evaluation.measures.items():
        table.add_row(key, _number(measure.value), _interval(measure.low, measure.high), f"{measure.n:,}")
    results.print(table)
    for line in _remarks(evaluation):
        note(line)
    if evaluation.agreement:
        results.print(_agreement_table(evaluation))


def _remarks(evaluation: "Evaluation") -> list[str]:
    """What the measures leave out."""
    lines = []
    for name, counts in evaluation.counts.items():
        parts = []
        for key, value in counts.items():
            if key == "num_prompts":
                continue
            kind = key.removeprefix("num_")
            if isinstance(value, dict):
                parts += [f"{number:,} {kind} by {judge}" for judge, number in value.items() if number]
            elif value:
                parts.append(f"{value:,} {kind}")
        if parts:
            lines.append(f"{name}: of {counts['num_prompts']:,} answers {', '.join(parts)}")
    return lines


def _agreement_table(evaluation: "Evaluation") -> Any:
    from rich.table import Table

    table = Table(title="how far the judges agree")
    table.add_column("judges")
    for heading in ("Cohen's kappa", "agree", "answers"):
        table.add_column(heading, justify="right")
    for pair in evaluation.agreement:
        kappa = _number(pair["value"])
        if pair["low"] is not None:
            kappa += f" [{_interval(pair['low'], pair['high'])}]"
        table.add_row(" and ".join(pair["judges"]), kappa, _number(pair["observed"]), f"{pair['n']:,}")
    return table


def _comparison_table(earlier: Path | None, comparison: "EvaluationComparison") -> Any:
    from rich.table import Table

    table = Table(
        title=f"change since {earlier}",
        caption=f"{comparison.num_pairs:,} in both; left out: {comparison.num_only_first:,} only earlier, "
        f"{comparison.num_only_second:,} only now. p: exact McNemar test",
    )
    table.add_column("measure", overflow="fold")
    for heading in ("change", "95 % interval", "p", "pairs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key, difference in comparison.differences.items():
        ratio = key == "perplexity"
        change = _number(difference.value) if ratio else _signed(difference.value)
        p = "-" if difference.p is None else f"{difference.p:.2g}"
        name = f"{key} (ratio)" if ratio else key
        table.add_row(name, change, _interval(difference.low, difference.high), p, f"{difference.n:,}")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 1000 else f"{value:,.0f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{_number(low)} to {_number(high)}"
