"""`safelocus plan MODEL`: will every stage fit, with which settings, and roughly how long does it take."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from safelocus.cli.command import ConfigOptions, command, flag, load_config, option
from safelocus.cli.enhance import Enhance
from safelocus.cli.options import NONE, AnswerOption, DtypeOption, HubOptions, ModelArgument, OffloadOption, RatioOption
from safelocus.cli.output import note, print_json, results
from safelocus.cli.preserve import Preserve
from safelocus.enhancement.retained import GIVEN, OWN, RETAINED, settled
from safelocus.run.folder import read_config

if TYPE_CHECKING:
    from safelocus.report.grid import Grid
    from safelocus.resources import Answering, Choice, Device, Scoring, Subject, Training


STAGES = ("score", "evaluate", "enhance", "preserve", "preserve --lora")


def take_run(context: typer.Context, value: Path | None) -> Path | None:
    """Make the defaults those of a run of another command, as far as a plan depends on them; plan that stage alone."""
    values = {} if value is None else read_config(value)
    name = values.get("command")
    if name not in STAGES:
        load_config(context, value)
        return None
    if name == "evaluate":
        guards = [judge.removeprefix("guard:") for judge in values.get("judge", []) if judge.startswith("guard:")]
        values |= {"prompts": next(iter(values.get("prompts", [])), None), "guard": next(iter(guards), None)}
    if name == "enhance" and values.get("retain_rows") is None:
        values["retain_rows"] = _rows_retained(values)
    values["stage"] = f"{name} --lora" if values.get("lora") else name
    context.default_map = {
        p.name: values[p.name] for p in context.command.params if values.get(str(p.name)) is not None
    }
    return value


def _rows_retained(values: Mapping[str, Any]) -> int:
    """With each refusal, where the run of `enhance` does not say."""
    from safelocus.prompts import read_prompts

    sets = [read_prompts(each) for each in values.get("retain") or RETAINED if each != NONE]
    own_answers, lexicon = bool(values.get("own_answers")), bool(values.get("lexicon"))
    return int(settled(dict.fromkeys(OWN), sets, own_answers=own_answers, lexicon=lexicon)["retain_rows"])


@dataclass(frozen=True, kw_only=True)
class PlanOptions(ModelArgument, RatioOption, AnswerOption, OffloadOption, DtypeOption, HubOptions, ConfigOptions):
    config: Path | None = option(
        "Plan the run of this run.toml or recipe, of score, evaluate, enhance or preserve.",
        is_eager=True, callback=take_run,
    )  # fmt: skip
    stage: str | None = option(f"Plan this one alone: {', '.join(STAGES)}.", shown="all")
    device: str | None = option(
        "cpu, cuda:0, auto (this machine); H200, RTX 4090, 24GB, 2x80GB, ... (any).", shown="what models are loaded to"
    )
    guard: str | None = option("Guard to score and judge with.", shown="reader")
    lexicon: Path | None = option("Expressions to score and judge with.")
    prompts: str | None = option("Prompts to score with, counted.", "-p", shown="128")
    prompt_tokens: int = option("Tokens of a prompt in its template.", default=64, min=1)
    max_length: int = option("Tokens of a training row.", default=512, min=1)
    batch_size: int | None = option("Rows per optimizer step.", shown="8 enhance, 16 preserve", min=1)
    retain_rows: int | None = option(
        "Rows retained with each refusal (enhance).", min=1,
        shown=f"{OWN['retain_rows']}; with --lexicon {GIVEN['retain_rows']}, as enhance takes where answers are given",
    )  # fmt: skip
    steps: int | None = option("Optimizer steps.", shown="100 and 1000", min=1)
    shard: bool = flag("One process per device, the model in shards.")


@command
def plan(given: PlanOptions) -> None:
    """Say what memory and time each stage needs, from the configuration alone, and which settings fit."""
    from safelocus.errors import ModelError, SafelocusError
    from safelocus.model.quantised import Quantisation
    from safelocus.model.target import dtype_on
    from safelocus.resources import Subject, find_device

    if given.stage is not None and given.stage not in STAGES:
        raise SafelocusError(f"--stage {given.stage}: expected {', '.join(STAGES)}")
    where = find_device(given.device)
    dtype = dtype_on("cpu" if where.is_cpu else given.device, given.dtype)
    subject = Subject.load(given.model, dtype=dtype, **given.part(HubOptions))
    quantised = Quantisation.of(subject.config)
    if quantised is not None and quantised.problem:
        raise ModelError(f"{given.model}: {quantised.problem}")
    reader = None
    if given.guard and given.lexicon and given.config is None:  # a run may judge by both
        raise ModelError("--guard and --lexicon are two objectives to plan for; give one")
    if given.guard:
        reader = Subject.load(given.guard, dtype=dtype, trust_remote_code=given.trust_remote_code)
    found = _stages(given, subject, reader, where)
    if given.json:
        about = {"name": where.label, "count": where.count, "memory": where.memory, "free": where.free}
        stages = {stage.name: stage.to_json() for stage in found}
        said = None if quantised is None else quantised.sentence
        print_json(
            {"model": subject.name, "num_weights": subject.num_weights, "quantised": said, "device": about,
             "stages": stages}
        )  # fmt: skip
        return
    results.print(_grid(subject, where, found).rich())
    for stage in found:
        said = stage.problem or stage.choice.sentence
        results.print(f"[bold]{stage.name}[/]: {escape(said)}", highlight=False, soft_wrap=True)
        if not stage.problem:
            results.print(stage.command, markup=False, highlight=False, soft_wrap=True)
    if quantised is not None:
        note(f"{given.model}: {quantised.sentence}")
    note("Times are rough, within a factor of three; measuring before and after is not in them. docs/plan.md")


def _stages(given: PlanOptions, subject: "Subject", reader: "Subject | None", where: "Device") -> "list[_Planned]":
    from safelocus.prompts import read_prompts
    from safelocus.resources import Answering, Lengths, Scoring, Training, choose, choose_training

    model, guard = given.model, given.guard
    number = len(read_prompts(given.prompts)) if given.prompts else 128
    processes = where.count if given.shard else 1
    lengths = Lengths(prompt=given.prompt_tokens, response=given.max_new_tokens, row=given.max_length)
    common: dict[str, Any] = {"target": subject, "lengths": lengths}
    scoring = Scoring(guard=reader, answers=given.lexicon is not None, **common)
    answering = Answering(guards=(reader,) if reader else (), **common)
    placed: dict[str, Any] = {"sharded": given.shard, "offload": given.offload}
    most = max(number // processes, 1)
    asked = ["--prompts", given.prompts or "PROMPTS", "--max-new-tokens", str(given.max_new_tokens)]
    lexicon = ["--lexicon", str(given.lexicon)] if given.lexicon else []
    words = ["score", model, *asked, *(["--guard", guard] if guard else lexicon or ["--refusal"])]
    retained = given.retain_rows or (GIVEN if lexicon else OWN)["retain_rows"]
    rows_retained = ["--retain-rows", str(retained)] if given.retain_rows else []
    found: list[_Planned] = []

    def add(name: str, words: list[str], *how: Any) -> None:
        if given.stage in (None, name):
            found.append(_stage(name, [words[0], "--config", str(given.config)] if given.config else words, *how))

    add("score", words, scoring, number, lambda: choose(scoring, where, most=most, **placed))
    judge = f"guard:{guard}" if guard else f"lexicon:{given.lexicon}" if lexicon else None
    words = ["evaluate", model, *asked, *(["--judge", judge] if judge else [])]
    add("evaluate", words, answering, number, lambda: choose(answering, where, most=most, **placed))
    for name, kind, rows, num_steps, data in (
        ("enhance", "sparse", Enhance.rows, Enhance.steps, ["--data", "REFUSALS", *rows_retained]),
        ("preserve", "full", Preserve.rows, Preserve.steps, ["--data", "TASK"]),
        ("preserve --lora", "lora", Preserve.rows, Preserve.steps, ["--data", "TASK"]),
    ):
        size, times = given.batch_size or rows, given.steps or num_steps
        training = Training(
            num_selected=max(int(given.ratio * subject.num_weights), 1), kind=kind, guard=reader, most=size,  # type: ignore[arg-type]
            retained_rows=retained if kind == "sparse" else 0, processes=processes, **common,
        )  # fmt: skip
        command, *flags = name.split()
        words = [command, model, "--selection", "SELECTION", *data, *flags, "--steps", str(times)]
        choice = lambda training=training, size=size: choose_training(training, where, batch_size=size, **placed)  # noqa: E731
        add(name, [*words, "--max-length", str(given.max_length)], training, times, choice)
    return found


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A stage, what was chosen for it, and how to run it; `problem` says why nothing could be."""

    name: str
    choice: "Choice"
    seconds: float
    words: list[str]
    problem: str | None

    @property
    def command(self) -> str:
        chosen = self.choice.settings
        start = ["safelocus"]
        if chosen.sharded:
            start = ["torchrun", "--nproc-per-node", str(chosen.count), "-m", "safelocus"]
        steps = ["--accumulation", str(chosen.accumulation)] if self.name not in ("score", "evaluate") else []
        settings = ["--batch-size", str(chosen.batch_size), *steps, *(["--checkpointing"] * chosen.checkpointing)]
        return shlex.join([*start, *self.words, *settings, *chosen.options, "-o", str(Path("runs") / self.words[0])])

    def to_json(self) -> dict[str, Any]:
        chosen, need = self.choice.settings, self.choice.need
        return {
            "fits": self.problem is None, "placement": chosen.label, "batch_size": chosen.batch_size,
            "accumulation": chosen.accumulation, "checkpointing": chosen.checkpointing, "bytes": need.total,
            "host": sum(need.host.values()), "seconds": self.seconds, "problem": self.problem,
            "command": None if self.problem else self.command,
        }  # fmt: skip


def _stage(
    name: str, words: list[str], stage: "Scoring | Answering | Training", number: int, choose: "Callable[[], Choice]"
) -> _Planned:  # fmt: skip
    from safelocus.resources import DoesNotFit

    problem = None
    try:
        choice = choose()
    except DoesNotFit as error:
        choice, problem = error.smallest, str(error)
    seconds = stage.seconds(choice.settings, choice.device, number)
    return _Planned(name=name, choice=choice, seconds=seconds, words=words, problem=problem)


def _grid(subject: "Subject", where: "Device", found: list[_Planned]) -> "Grid":
    from safelocus.report.grid import Grid
    from safelocus.resources import in_bytes, in_words

    choices = [stage.choice for stage in found]
    several = f"{where.count} x " if where.count > 1 else ""
    return Grid(
        title=f"{subject.name}: {subject.num_weights:,} weights, {str(subject.dtype).removeprefix('torch.')}",
        headings=("", *(stage.name.replace(" --", " ") for stage in found)),
        rows=(
            ("bytes needed", *(in_bytes(choice.need.total) for choice in choices)),
            ("on the CPU", *(in_bytes(sum(choice.need.host.values())) for choice in choices)),
            ("fits", *("no" if stage.problem else "yes" for stage in found)),
            ("placement", *(choice.settings.label for choice in choices)),
            ("batch size", *(str(choice.settings.batch_size) for choice in choices)),
            ("passes per step", *(str(choice.settings.accumulation) for choice in choices)),
            ("checkpointing", *("yes" if choice.settings.checkpointing else "no" for choice in choices)),
            ("time", *(in_words(stage.seconds) for stage in found)),
        ),
        caption=f"{several}{where.label}: {in_bytes(where.free)} of {in_bytes(where.memory)} free, 90 % of it are used",
    )
