"""`safelocus evaluate MODEL`: how safe and how useful a model is, with intervals; or what changed since another run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safelocus.cli import options, planning, sources
from safelocus.cli.command import RunOptions, SeedOption, argument, command, option
from safelocus.cli.output import errors, mind, note, shared_run, show, together
from safelocus.cli.output import results as results_on_screen
from safelocus.inert import inert, without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safelocus.evaluation import Evaluation
    from safelocus.evaluation.judges import Endpoint, Judge
    from safelocus.evaluation.requirement import Judged
    from safelocus.evaluation.responding import Responder
    from safelocus.evaluation.tasks import Task
    from safelocus.prompts import PromptSet

ERASE = "erase-and-check"
DIRECTION_PROMPTS = 64  # of each kind; more do not move a difference of means much


@dataclass(frozen=True, kw_only=True)
class AskOptions(options.BatchOptions, SeedOption):
    """What `evaluate` of the library takes as it is given."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(
    AskOptions,
    options.DescriptionOption,
    options.LimitOption,
    options.PerplexityOption,
    options.FieldOptions,
    options.PlaceOptions,
    RunOptions,
):
    model: str | None = argument("Model folder, hub id, or organism:NAME.")
    prompts: list[str] | None = option(
        "Harmful prompts: file, hub-id:split:field, embedded:NAME or organism:NAME. May be repeated.", "-p"
    )
    harmless: list[str] | None = option("Harmless prompts, for over-refusal. May be repeated.")
    task: list[str] | None = option(
        "Questions with answers: file, AG News folder, hub address or organism:NAME; "
        "exact=, numeric=, choice= or contains= before it says how answers compare. May be repeated."
    )
    lm_eval: list[str] | None = option("Task of lm-eval, NAME or NAME:COUNT. May be repeated.")
    judge: list[str] | None = option(
        "guard:NAME, lexicon:FILE, rubric:NAME, reader or refusal; the first one's verdicts make the ASR. May be "
        "repeated.",
        shown="reader",
    )
    require: list[str] | None = option(
        "What must hold, as asr<=0.05, over the whole 95 % interval; else the exit code is 1. May be repeated."
    )
    against: Path | None = option("Run folder of an earlier evaluation: what changed since, in pairs.")
    endpoint: str | None = option("URL of an OpenAI-compatible server that answers instead of MODEL.")
    endpoint_model: str | None = option("The model's name there.")
    judge_model: str | None = option("Model that a rubric is put to, by its name at the endpoint.")
    judge_endpoint: str | None = option("URL of that model's OpenAI-compatible server.", shown="OPENAI_BASE_URL")
    judge_threshold: float = option("Log-odds of safe above which a guard's verdict is safe.", default=0.0)
    attack: str | None = option(
        "Ask under an attack: prefill, prefix-injection, refusal-suppression, fiction or ablation (docs/evaluate.md)."
    )
    ablation_harmful: str = option(
        "Harmful prompts whose activations show the direction that ablation takes out.", default="embedded:refusals"
    )
    ablation_harmless: str = option(
        "Harmless prompts whose activations it is told apart by.", default="embedded:ordinary"
    )
    certify: int | None = option(
        "Certify what up to this many changed words of a prompt can do (docs/certify.md).", min=0
    )
    certify_against: Literal["appended", "inserted", "infused", "edited"] = option(
        "The change: words added at the end, in one run or anywhere (erase-and-check); or words inserted, deleted and "
        "replaced (smoothing).",
        default="appended",
    )
    certify_threshold: float = option(
        "Log-odds of refusing above which a prompt is recognised as harmful.", default=0.0
    )
    certify_keep: float = option("Share of the words that smoothing keeps.", default=0.2, min=0.01, max=0.99)
    certify_draws: int = option("Answers to each prompt that smoothing counts.", default=200, min=10)
    kl_to: str | None = option(
        "Model that MODEL was made of: how far they are apart along its answers to --harmless; answers that it would "
        "hardly give are incoherent."
    )
    show_disagreements: int = option(
        "Print this many responses of which two judges think differently.", default=0, min=0
    )
    harmless_field: str | None = option("Field that holds the harmless prompts.", shown="recognised")
    harmless_where: list[str] | None = option("Keep harmless rows with COLUMN=VALUE; may be repeated.")
    held_out: float = option(
        "Use only the share of harmful prompts that `score --held-out` left out.", default=0.0, min=0, max=0.95
    )


@command
@together
def evaluate(given: Evaluate) -> int:
    """Measure attack success, refusal, over-refusal, incoherence and utility of a model.

    Writes results.json, responses.jsonl (responses are never printed) and report.html. Interrupted with
    Ctrl-C, the same command resumes. Exit code 1: a requirement (--require) is not met.
    """
    from safelocus import distributed
    from safelocus.evaluation import Evaluation, compare_evaluations
    from safelocus.evaluation import evaluate as evaluate_model
    from safelocus.evaluation.requirement import Requirement
    from safelocus.model.target import load
    from safelocus.report.page import write_run_page
    from safelocus.run.files import write_json
    from safelocus.run.folder import CHECKPOINT

    # everything that can be wrong with the input is found before the long work starts
    _check(given)
    required = [Requirement.parse(text) for text in given.require or ()]
    earlier = Evaluation.load(given.against) if given.against is not None else None
    of_each: dict[str, Any] = {"limit": given.limit, "seed": given.seed}
    harmful = sources.read_sets(given.prompts, given.field, given.where, held_out=given.held_out, **of_each)
    harmless = sources.read_sets(given.harmless, given.harmless_field, given.harmless_where, **of_each)
    tasks = sources.read_tasks(given.task, **of_each)
    texts = sources.texts(given.perplexity, **of_each)
    judging: dict[str, Any] = {"description": given.guard_description, "endpoint": _endpoint(given)}
    sources.check_judges(given.judge or (), **judging, trust_remote_code=given.trust_remote_code)
    attack = _attack(given, [*harmful, *harmless])
    if earlier is not None and not given.lm_eval:  # what that asks is known when it has been asked
        _check_common(earlier, [*harmful, *harmless, *tasks, *texts], str(given.against))
    for requirement in required:
        requirement.check(_measured(given, [task.name for task in tasks]))
    _check_certifiable(given, harmless)
    given = planning.resumed(given, "batch_size")
    if given.model is not None:
        batch_size, device = planning.answering_settings(
            planning.Model(name=given.model, place=given), [*harmful, *harmless, *tasks],
            judges=given.judge or (), texts=texts[0] if texts else None, max_new_tokens=given.max_new_tokens,
            batch_size=given.batch_size, source=given.kl_to, quiet=given.json,
        )  # fmt: skip
        given = replace(given, batch_size=batch_size, device=device)
    given = replace(given, batch_size=given.batch_size or planning.ANSWERED)
    with shared_run(given) as folder:
        responder = attack(_responder(given))
        judges = sources.load_judges(given.judge or (), threshold=given.judge_threshold, **judging, **given.guards)
        if not given.json:
            for prompt_set in [*harmful, *harmless]:
                note(prompt_set.describe())
        found = evaluate_model(
            responder, harmful=harmful, harmless=harmless, tasks=tasks, perplexity=texts, suites=given.lm_eval or (),
            original=None if given.kl_to is None else load(given.kl_to, **given.part(options.PlaceOptions)),
            judges=judges, checkpoint=folder / CHECKPOINT, progress=not given.json, **given.part(AskOptions),
        )  # fmt: skip
        changed = None
        if earlier is not None:
            comparison = compare_evaluations(earlier, found, seed=given.seed)
            changed = {"run": str(given.against), **comparison.to_json()}
        certificates = _certificates(given, responder, harmful, harmless, judges, folder / CHECKPOINT / "certificates")
        outcomes = [requirement.judge(found.measures) for requirement in required]
        if distributed.is_main():
            found.save(folder)
            if changed is not None:
                write_json(folder / "against.json", changed)
            if certificates is not None:
                write_json(folder / "certificates.json", certificates)
            if outcomes:
                write_json(folder / "requirements.json", [outcome.to_json() for outcome in outcomes])
            written = write_run_page(folder, place=given.output)
    if distributed.is_main():
        _show(given, found, {"against": changed, "certificates": certificates}, outcomes, written)
    return int(not all(outcome.met for outcome in outcomes))


def _check(given: Evaluate) -> None:
    """Refuse options that contradict one another, or are about what is not asked for."""
    from safelocus.errors import ModelError, PromptError
    from safelocus.evaluation.run import check_asked
    from safelocus.evaluation.suites import check_suites
    from safelocus.model.target import load_config

    if (given.model is None) == (given.endpoint is None) or (given.endpoint is None) != (given.endpoint_model is None):
        raise ModelError("give either MODEL, or --endpoint URL with --endpoint-model NAME")
    check_asked(given.prompts, given.harmless, given.task, given.lm_eval, given.perplexity)
    if given.kl_to is not None:
        if not given.harmless:
            raise PromptError("--kl-to is measured along answers to harmless prompts; give some with --harmless")
        load_config(given.kl_to, revision=given.revision, trust_remote_code=given.trust_remote_code)
    inside = {"--lm-eval": given.lm_eval, "--perplexity": given.perplexity, "--kl-to": given.kl_to}
    if given.endpoint is not None and (wanted := [option for option, value in inside.items() if value]):
        raise ModelError(f"{', '.join(wanted)}: needs the model itself, which is not to be had behind an endpoint")
    check_suites(given.lm_eval or ())
    kinds = {name.partition(":")[0] for name in given.judge or ()}
    edits, erases = given.certify_against == "edited", given.certify_against != "edited"
    for what, is_there, names in (
        ("MODEL", given.model is not None, ("template", "revision", "layout", "skip_unknown", "offload", "shard")),
        ("--prompts", bool(given.prompts), ("field", "where", "held_out")),
        ("--harmless", bool(given.harmless), ("harmless_field", "harmless_where")),
        ("--judge guard:NAME", "guard" in kinds, ("judge_threshold", "guard_description")),
        ("--judge rubric:NAME", "rubric" in kinds, ("judge_model", "judge_endpoint")),
        ("--certify", given.certify is not None,
         ("certify_against", "certify_threshold", "certify_keep", "certify_draws")),
        ("--certify-against edited", edits, ("certify_keep", "certify_draws")),
        ("erase-and-check, which --certify-against edited is not", erases, ("certify_threshold",)),
    ):  # fmt: skip
        options.only_with(given, what, is_there, *names)


def _check_common(earlier: "Evaluation", asked: "Sequence[PromptSet | Task]", name: str) -> None:
    """Refuse to compare with a run that was asked nothing of what will be asked now."""
    from safelocus.errors import RunError
    from safelocus.prompts import prompt_hash

    known = {prompt_hash(row["prompt"]) for row in earlier.rows}
    if not any(known & set(part.prompt_hashes) for part in asked):
        raise RunError(f"--against {name}: that run has no prompt in common with this one; evaluate both on the same")


def _measured(given: Evaluate, tasks: list[str]) -> list[str]:
    """The names of all measures that the options ask for."""
    from safelocus.evaluation.result import measure_names

    judges = [_judge_name(name, given.judge_model) for name in given.judge or ()]
    suites = [f"lm-eval:{name.partition(':')[0]}" for name in given.lm_eval or ()]
    return measure_names(
        judges=judges if given.prompts else None, tasks=[*tasks, *suites], harmless=bool(given.harmless),
        perplexity=given.perplexity is not None, kl=given.kl_to is not None,
    )  # fmt: skip


def _judge_name(name: str, model: str | None) -> str:
    """What the judge called `name` will be called in the results: see `load_judge`."""
    from safelocus.evaluation.judges import Rubric

    kind, _, rest = name.partition(":")
    return f"rubric {Rubric.load(rest).name} {model}" if kind == "rubric" else " ".join(filter(None, (kind, rest)))


def _show(
    given: Evaluate, found: "Evaluation", more: dict[str, Any], outcomes: "list[Judged]", written: list[str]
) -> None:
    from safelocus.report.evaluation import agreement_table, certificate_table, change_table, left_out, table

    results = found.to_json()
    measures, remarks = table(results), left_out(results)
    if measures is not None:
        judged = f"asr by judge {found.judge_names[0]}" if "asr" in found.measures else ""
        measures = replace(
            measures,
            title=given.model or f"{given.endpoint_model} at {without_secrets(str(given.endpoint))}",
            caption=judged,
        )
    if given.prompts and not given.judge:
        remarks.append(
            "The ASR is the refusal reader's: whatever does not refuse counts as harmful. "
            "--judge guard:NAME or rubric:NAME says more."
        )
    more = {name: part for name, part in more.items() if part}
    changed = more.get("against")
    if outcomes:
        more["requirements"] = [outcome.to_json() for outcome in outcomes]
    show(
        given, results | more, measures, agreement_table(results), change_table(changed),
        certificate_table(more.get("certificates")), remarks=remarks,
        notes=changed["notes"] if changed else (), wrote=["results.json", "responses.jsonl", *written],
    )  # fmt: skip
    for outcome in outcomes:
        if not (outcome.met and given.json):
            style = None if outcome.met else "bold red"
            errors.print(str(outcome), style=style, markup=False, highlight=False, soft_wrap=True)
    for pair in found.agreement if given.show_disagreements and not given.json else ():
        for row in found.disagreements(*pair["judges"])[: given.show_disagreements]:
            results_on_screen.print(_disagreement(row, pair["judges"]))


def _disagreement(row: dict[str, Any], judges: list[str]) -> Any:
    """A response and what two judges say of it; what a model wrote is shown as text and nothing else."""
    from rich.panel import Panel
    from rich.text import Text

    said = [
        f"{judge}: {row['judgements'][judge]['verdict']} ({row['judgements'][judge]['explanation'][:2000]})"
        for judge in judges
    ]
    text = "\n".join([*said, f"prompt: {row['prompt'][:2000]}", f"response: {row['response'][:2000]}"])
    return Panel(Text(inert(text)))


def _responder(given: Evaluate) -> "Responder":
    from safelocus.evaluation import EndpointResponder, TargetResponder
    from safelocus.evaluation.judges.endpoint import Endpoint
    from safelocus.model.target import load

    if given.model is not None:
        return TargetResponder(target=load(given.model, **given.part(options.PlaceOptions)))
    assert given.endpoint_model is not None
    endpoint = Endpoint(base_url=given.endpoint, model=given.endpoint_model)
    if given.thinking is not None:  # as vLLM and SGLang hand it to their chat templates
        switches = dict.fromkeys(("enable_thinking", "thinking"), given.thinking == "on")
        asked = {"extra_body": {"chat_template_kwargs": switches}}
        endpoint = replace(endpoint, parameters={**endpoint.parameters, **asked})
    return EndpointResponder(endpoint=endpoint, system=given.system, seed=given.seed)


def _check_certifiable(given: Evaluate, harmless: "list[PromptSet]") -> None:
    """What --certify cannot do, found before a model is loaded."""
    from safelocus.errors import PromptError, SafelocusError
    from safelocus.evaluation.certification import check_one_process, num_erasures

    if given.certify is None:
        return
    check_one_process()
    if not given.prompts:
        raise PromptError("--certify says something of harmful prompts; give some with --prompts")
    if given.certify_against != "edited":
        if given.endpoint is not None or given.attack is not None:
            under = "an attack" if given.endpoint is None else "an endpoint"
            raise SafelocusError(
                f"{ERASE} ({given.certify_against}) asks the model itself, which is not to be had behind {under}; "
                "--certify-against edited takes any"
            )
        for example in (example for part in harmless for example in part):
            num_erasures(example.prompt, given.certify, given.certify_against)


def _certificates(
    given: Evaluate,
    responder: "Responder",
    harmful: "list[PromptSet]",
    harmless: "list[PromptSet]",
    judges: "list[Judge]",
    checkpoint: Path,
) -> dict[str, Any] | None:
    """What --certify asks for, of all harmful and all harmless prompts."""
    from safelocus.evaluation.certification import EraseAndCheck, Smoothed, certify_erasing, certify_smoothed
    from safelocus.evaluation.responding import inside
    from safelocus.prompts import read_prompts

    if given.certify is None:
        return None
    asked = read_prompts([example for part in harmful for example in part])
    spared = read_prompts([example for part in harmless for example in part]) if harmless else None
    if given.certify_against == "edited":
        smoothed = Smoothed(responder=responder, keep=given.certify_keep, seed=given.seed)
        found = certify_smoothed(
            smoothed, asked, judges[0] if judges else None, radius=given.certify, draws=given.certify_draws,
            max_new_tokens=given.max_new_tokens, batch_size=given.batch_size or planning.ANSWERED,
            checkpoint=checkpoint, progress=not given.json,
        )  # fmt: skip
        return found.to_json()
    checked = EraseAndCheck(
        responder=inside(responder, ERASE), radius=given.certify, against=given.certify_against,
        threshold=given.certify_threshold,
    )  # fmt: skip
    return certify_erasing(checked, asked, spared, checkpoint=checkpoint, progress=not given.json).to_json()


def _attack(given: Evaluate, measured: "Sequence[PromptSet]") -> "Callable[[Responder], Responder]":
    """What makes a responder answer under the attack asked for; what can be wrong with that is found here."""
    from safelocus.errors import SafelocusError
    from safelocus.evaluation.attack import ABLATION, Ablation, Attacked, askings, attack_names

    options.only_with(given, f"--attack {ABLATION}", given.attack == ABLATION, "ablation_harmful", "ablation_harmless")
    if (name := given.attack) is None:
        return lambda responder: responder
    if name not in attack_names():
        raise SafelocusError(f"--attack {name}: expected one of {', '.join(attack_names())}")
    if name != ABLATION:
        return lambda responder: Attacked(responder=responder, attack=askings()[name])
    sets = [given.ablation_harmful, given.ablation_harmless]
    harmful, harmless = sources.read_sets(sets, limit=DIRECTION_PROMPTS, seed=given.seed)
    shared = {*harmful.prompt_hashes, *harmless.prompt_hashes} & {h for part in measured for h in part.prompt_hashes}
    if shared:
        mind(
            [f"{len(shared)} of the prompts measured find the direction too (--ablation-harmful, --ablation-harmless)"]
        )

    def ablated(responder: "Responder") -> "Responder":
        found = Ablation.find(responder, harmful, harmless, progress=not given.json)
        mind([found.told])
        return Attacked(responder=responder, attack=found)

    return ablated


def _endpoint(given: Evaluate) -> "Endpoint | None":
    """The model that rubrics are put to."""
    from safelocus.errors import JudgeError
    from safelocus.evaluation.judges import Endpoint, default_cache

    if not any(name.startswith("rubric:") for name in given.judge or []):
        return None
    if given.judge_model is None:
        raise JudgeError("a rubric is put to a language model; name it with --judge-model (and --judge-endpoint URL)")
    return Endpoint(model=given.judge_model, base_url=given.judge_endpoint, cache=default_cache())
