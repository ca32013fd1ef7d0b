"""`safelocus plan MODEL`: will every stage fit, with which settings, and roughly how long does it take."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from safelocus.cli import planning, sources
from safelocus.cli.command import ConfigOptions, Options, command, flag, load_config, option
from safelocus.cli.enhance import Enhance
from safelocus.cli.evaluate import Evaluate
from safelocus.cli.options import (
    NONE,
    AnswerOption,
    DtypeOption,
    HubOptions,
    ModelArgument,
    OffloadOption,
    PromptOptions,
    words,
)
from safelocus.cli.output import note, print_json, results
from safelocus.cli.preserve import Preserve, calibrated_on
from safelocus.cli.score import Score
from safelocus.enhancement.retained import GIVEN, OWN, RETAINED, settled
from safelocus.run.folder import read_config

if TYPE_CHECKING:
    from safelocus.model.target import Dtype
    from safelocus.report.grid import Grid
    from safelocus.resources import Answering, Choice, Device, Scoring, Subject, Training


COMMANDS: dict[str, type[Options]] = {"score": Score, "evaluate": Evaluate, "enhance": Enhance, "preserve": Preserve}
STAGES = (*COMMANDS, "preserve --lora")
# what is the plan's own, or comes back with the settings that it chooses
_NOT_PASSED_ON = ("model", "config", "json", "device", "batch_size", "offload", "shard")


def take_run(context: typer.Context, value: Path | None) -> Path | None:
    """Make the defaults those of a run of another command, as far as a plan depends on them; plan that stage alone."""
    run = read_run(value)
    if not run:
        load_config(context, value)
        return None
    values = {**run, "max_length": usual(COMMANDS[run["command"]], run).get("max_length")}
    if run["command"] == "evaluate":
        guards = sources.guards_named(run.get("judge", []))
        values |= {"prompts": next(iter(run.get("prompts", [])), None), "guard": next(iter(guards), None)}
    values["stage"] = f"{run['command']} --lora" if run.get("lora") else run["command"]
    context.default_map = {
        p.name: values[p.name] for p in context.command.params if values.get(str(p.name)) is not None
    }
    return value


def read_run(config: Path | None) -> dict[str, Any]:
    """What a run.toml or recipe says, where it is of a command that is planned for; else nothing."""
    values = {} if config is None else read_config(config)
    if values.get("command") not in COMMANDS:
        return {}
    if values["command"] == "enhance" and values.get("retain_rows") is None and values.get("retain") != [NONE]:
        values["retain_rows"] = _rows_retained(values)
    return values


def usual(kind: type[Options], run: Mapping[str, Any]) -> dict[str, Any]:
    """What a command takes where its command line says nothing: of a run's file, else its defaults."""
    return {f.name: run.get(f.name, None if f.default is MISSING else f.default) for f in fields(kind)}


def _rows_retained(values: Mapping[str, Any]) -> int:
    """With each refusal, where the run of `enhance` does not say."""
    from safelocus.prompts import read_prompts

    sets = [read_prompts(each) for each in values.get("retain") or RETAINED]
    own_answers, lexicon = bool(values.get("own_answers")), bool(values.get("lexicon"))
    return int(settled(dict.fromkeys(OWN), sets, own_answers=own_answers, lexicon=lexicon)["retain_rows"])


@dataclass(frozen=True, kw_only=True)
class PlanOptions(ModelArgument, AnswerOption, OffloadOption, DtypeOption, HubOptions, ConfigOptions):
    config: Path | None = option(
        "Plan the run of this run.toml or recipe, of score, evaluate, enhance or preserve.",
        is_eager=True, callback=take_run,
    )  # fmt: skip
    stage: str | None = option(f"Plan this one alone: {', '.join(STAGES)}.", shown="all")
    device: str | None = option(
        "cpu, cuda:0, auto (this machine); H200, RTX 4090, 24GB, 2x80GB, ... (any).", shown="what models are loaded to"
    )
    ratio: float | None = option("Share of the weights to select, in (0, 1].", "-r", shown="0.01; preserve: 0.1")
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
    if given.guard and given.lexicon and given.config is None:  # a run may judge by both
        raise ModelError("--guard and --lexicon are two objectives to plan for; give one")
    run = read_run(given.config)
    if run and given.stage and given.stage.split()[0] != run["command"]:
        raise SafelocusError(f"--stage {given.stage}: {given.config} is of `{run['command']}`; leave one out")
    found = _stages(given, run, subject, dtype, where)
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


def _stages(
    given: PlanOptions, run: Mapping[str, Any], subject: "Subject", dtype: "Dtype", where: "Device"
) -> "list[_Planned]":
    from safelocus.resources import (
        Answering,
        Lengths,
        Scoring,
        Subject,
        Training,
        choose,
        choose_training,
        classifier_bytes,
    )

    load = cache(partial(Subject.load, dtype=dtype, trust_remote_code=given.trust_remote_code))
    lexicon, guards = given.lexicon is not None, sources.guards_named(run.get("judge", []))
    if given.guard not in guards and (not guards or run["command"] == "evaluate"):
        guards = [given.guard] if given.guard else []
    judging = tuple(map(load, guards))
    processes = where.count if given.shard else 1
    lengths = Lengths(prompt=given.prompt_tokens, response=given.max_new_tokens, row=given.max_length)
    common: dict[str, Any] = {"target": subject, "lengths": lengths}
    placed: dict[str, Any] = {"sharded": given.shard, "offload": given.offload}
    classifier, original = run.get("classifier"), run.get("kl_to")
    scoring = Scoring(
        method=run.get("method", Score.method), guard=load(given.guard) if given.guard else None,
        answers=lexicon or classifier is not None,
        classifier=classifier_bytes(classifier, dtype=dtype) if classifier else 0, **common,
    )  # fmt: skip
    answering = Answering(
        guards=judging, reads_rows=bool(run.get("perplexity")), source=load(original) if original else None, **common
    )
    retained = given.retain_rows or (GIVEN if lexicon else OWN)["retain_rows"]
    if run.get("retain") == [NONE]:
        retained = 0
    is_spread = given.shard or (given.offload and not where.is_cpu)
    sums = run.get("accumulate_on") or ("the weights'" if is_spread else None)
    device = None if is_spread else _device(given, run, where)
    found: list[_Planned] = []
    for name in (given.stage,) if given.stage else STAGES:
        command, *flags = name.split()
        line = _line(given, run, command, flags)
        refused = _refused(given, run, flags) if is_spread else None
        if command in ("score", "evaluate"):
            stage = scoring if command == "score" else answering
            number = _number(given, run, command)
            most = max(number // processes, 1)
            on: dict[str, Any] = {"accumulate_on": sums} if command == "score" else {}
            choice = partial(choose, stage, where, most=most, **on, **placed)
            found.append(_stage(name, line, stage, number, choice, device, refused))
            continue
        options: Any = COMMANDS[command]
        size, times = given.batch_size or options.rows, given.steps or options.steps
        kind: Any = "sparse" if command == "enhance" else "lora" if flags else "full"
        training = Training(
            num_selected=_num_trained(given, run, subject, options.usual_ratio), kind=kind,
            lora_rank=run.get("lora_rank", Preserve.lora_rank), guards=judging, most=size,
            retained_rows=retained if command == "enhance" else 0, processes=processes,
            calibrated=_num_calibrated(run) if command == "preserve" else 0,
            calibrated_every=run.get("calibrate_every", Preserve.calibrate_every), **common,
        )  # fmt: skip
        passes = run.get("accumulation") or 1 if given.batch_size == run.get("batch_size") else 1
        choice = partial(
            choose_training, training, where, batch_size=size, accumulation=passes,
            checkpointing=run.get("checkpointing") or None, **placed,
        )  # fmt: skip
        found.append(_stage(name, line, training, times, choice, device, refused))
    return found


def _device(given: PlanOptions, run: Mapping[str, Any], where: "Device") -> str | None:
    """That the command has to name, as it would take another one by itself or by the run's file."""
    asked = given.device if where.is_here else "cuda" if run.get("device") else None
    return None if asked == (run.get("device") or "auto") else asked


def _refused(given: PlanOptions, run: Mapping[str, Any], flags: list[str]) -> str | None:
    """Why a command would not take a model that is spread, whether it fits or not."""
    asked = words(run.get("controls"))
    whole = [*flags, *(["--method wanda"] if run.get("method") == "wanda" else [])]
    whole += [f"--controls {name}" for name in ("lora", "wanda") if name in asked]
    whole += [f"{name} = {run[name]!r} in {given.config}" for name in ("device", "accumulate_on") if run.get(name)]
    spread = "--shard" if given.shard else "--offload"
    return f"{', '.join(whole)}: not with {spread}; leave one of them out" if whole else None


def _line(given: PlanOptions, run: Mapping[str, Any], command: str, flags: list[str]) -> list[str]:
    """The command as it would be given: by the run's file, where there is one, and what it would not take by itself."""
    is_training = command in ("enhance", "preserve")
    expected = usual(COMMANDS[command], run)
    left_out = {*_NOT_PASSED_ON, *(("prompts", "ratio") if is_training and (not run or run.get("selection")) else ())}
    line = [command]
    if not run or given.model != run.get("model"):
        line.append(given.model)
    if run:
        line += ["--config", str(given.config)]
    elif is_training:
        line += ["--selection", "SELECTION", "--data", "REFUSALS" if command == "enhance" else "TASK"]
    line += [] if run.get("lora") else flags
    if given.prompts is None and (command == "score" or (command == "evaluate" and not run)):
        line += ["--prompts", "PROMPTS"]
    if not run and command == "score" and given.guard is None and given.lexicon is None:
        line.append("--refusal")
    for field in fields(PlanOptions):
        value, name = getattr(given, field.name), field.name
        if name in ("guard", "lexicon") and name not in expected and value is not None:
            judge = f"{name}:{value}"
            line += [] if judge in (expected["judge"] or ()) else ["--judge", judge]
        if name in left_out or name not in expected or value in (None, False):
            continue
        if not _same(value, field.default if expected[name] is None else expected[name]):
            line += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return line


def _same(value: Any, other: Any) -> bool:
    return str(value) == str(other[0] if isinstance(other, list) and other else other)  # of several the plan has one


def _number(given: PlanOptions, run: Mapping[str, Any], command: str) -> int:
    """Of prompts that are scored or answered, as far as it is known."""
    from safelocus.prompts import read_prompts

    if given.prompts is None:
        return 128
    if not run:
        return len(read_prompts(given.prompts))
    asked = usual(COMMANDS[command], run)
    held_out: float = asked["held_out"]
    if command == "score":
        named = {field.name: asked[field.name] for field in fields(PromptOptions)} | {"prompts": given.prompts}
        return len(PromptOptions(**named).read(held_out)[0])
    of_each: dict[str, Any] = {"limit": asked["limit"], "seed": asked["seed"]}
    harmful = asked["prompts"] if _same(given.prompts, asked["prompts"]) else [given.prompts]
    sets = sources.read_sets(harmful, asked["field"], asked["where"], held_out=held_out, **of_each)
    harmless = sources.read_sets(asked["harmless"], asked["harmless_field"], asked["harmless_where"], **of_each)
    return sum(map(len, (*sets, *harmless, *sources.read_tasks(asked["task"], **of_each)))) or 128


def _num_trained(given: PlanOptions, run: Mapping[str, Any], subject: "Subject", usual: float) -> int:
    """K, or more where a control trains more."""
    ratio = usual if given.ratio is None else given.ratio
    selection = Path(run["selection"]).expanduser() if run.get("selection") else None
    if selection is not None and not selection.exists():
        note(f"{selection}: not there yet; the plan is of {ratio:.3g} of the weights")
        selection = None
    is_full = "full" in words(run.get("controls"))
    return subject.num_weights if is_full else planning.num_selected(selection, ratio, subject)


def _num_calibrated(run: Mapping[str, Any]) -> int:
    """Prompts of a step of calibration, as `preserve` takes them."""
    from safelocus.preservation.calibration import Calibration

    return Calibration.batch_size * len(calibrated_on(run.get("calibrate"), run.get("lora_mode")))


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A stage, what was chosen for it, and how to run it; `problem` says why nothing could be."""

    name: str
    choice: "Choice"
    seconds: float
    words: list[str]
    device: str | None
    problem: str | None

    @property
    def command(self) -> str:
        chosen = self.choice.settings
        start = ["safelocus"]
        if chosen.sharded:
            start = ["torchrun", "--nproc-per-node", str(chosen.count), "-m", "safelocus"]
        steps = ["--accumulation", str(chosen.accumulation)] if self.name not in ("score", "evaluate") else []
        settings = ["--batch-size", str(chosen.batch_size), *steps, *(["--checkpointing"] * chosen.checkpointing)]
        settings += chosen.options
        settings += ["--device", self.device] if self.device and "--device" not in settings else []
        return shlex.join([*start, *self.words, *settings, "-o", str(Path("runs") / self.words[0])])

    def to_json(self) -> dict[str, Any]:
        chosen, need = self.choice.settings, self.choice.need
        return {
            "fits": self.problem is None, "placement": chosen.label, "batch_size": chosen.batch_size,
            "accumulation": chosen.accumulation, "checkpointing": chosen.checkpointing, "bytes": need.total,
            "host": sum(need.host.values()), "seconds": self.seconds, "problem": self.problem,
            "command": None if self.problem else self.command,
        }  # fmt: skip


def _stage(
    name: str, words: list[str], stage: "Scoring | Answering | Training", number: int, choose: "Callable[[], Choice]",
    device: str | None, problem: str | None,
) -> _Planned:  # fmt: skip
    from safelocus.resources import DoesNotFit

    try:
        choice = choose()
    except DoesNotFit as error:
        choice, problem = error.smallest, problem or str(error)
    seconds = stage.seconds(choice.settings, choice.device, number)
    return _Planned(name=name, choice=choice, seconds=seconds, words=words, device=device, problem=problem)


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
