"""`safelocus plan MODEL`: bytes and rough time of every stage on given devices, and the commands that fit."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelocus.cli.command import ConfigOptions, command, flag, option
from safelocus.cli.enhance import Enhance
from safelocus.cli.options import AnswerOption, DtypeOption, HubOptions, ModelArgument, OffloadOption, RatioOption
from safelocus.cli.output import note, print_json, results
from safelocus.cli.preserve import Preserve

if TYPE_CHECKING:
    from safelocus.report.grid import Grid
    from safelocus.resources import Choice, Device, Duration, Peak, Subject


@dataclass(frozen=True, kw_only=True)
class Plan(ModelArgument, RatioOption, AnswerOption, OffloadOption, DtypeOption, HubOptions, ConfigOptions):
    device: str | None = option(
        "cpu, cuda:0, auto (this machine); H200, RTX 4090, 24GB, 2x80GB, ... (any).", shown="what models are loaded to"
    )
    devices: int | None = option("How many of them.", shown="1", min=1)
    guard: str | None = option("Guard to score and judge with.", shown="reader")
    prompts: str | None = option("Prompts to score with, counted.", "-p")
    num_prompts: int = option("How many prompts, where none are given.", default=128, min=1)
    prompt_tokens: int = option("Tokens of a prompt in its template.", default=64, min=1)
    max_length: int = option("Tokens of a training row.", default=512, min=1)
    batch_size: int | None = option("Rows per optimizer step.", shown="8 enhance, 16 preserve", min=1)
    steps: int | None = option("Optimizer steps.", shown="100 and 1000", min=1)
    retain_rows: int = option("Rows to retain with each refusal (enhance).", default=6, min=0)
    lora_rank: int = option("Of preserve --lora.", default=16, min=1)
    shard: bool = flag("One process per device, the model in shards.")


@command
def plan(given: Plan) -> None:
    """Say what memory and time each stage needs, from the configuration alone, and which settings fit."""
    from safelocus.model.target import dtype_on
    from safelocus.resources import Subject, find_device

    where = find_device(given.device, count=given.devices)
    dtype = dtype_on("cpu" if where.is_cpu else given.device, given.dtype)
    subject = Subject.load(given.model, dtype=dtype, **given.part(HubOptions))
    reader = None
    if given.guard:
        reader = Subject.load(given.guard, dtype=dtype, trust_remote_code=given.trust_remote_code)
    found = _stages(given, subject, reader, where)
    if given.json:
        print_json(_document(subject, where, found))
        return
    results.print(_grid(subject, where, found).rich())
    for stage in found:
        results.print(f"[bold]{stage.name}[/]: {stage.settings}", highlight=False, soft_wrap=True)
        if stage.problem is None:
            results.print(stage.command, markup=False, highlight=False, soft_wrap=True)
    note("Times are rough, within a factor of three; measuring before and after is not in them. docs/plan.md")


def _stages(given: Plan, subject: "Subject", reader: "Subject | None", where: "Device") -> "list[_Stage]":
    from safelocus import resources
    from safelocus.prompts import read_prompts
    from safelocus.resources import Answering, Lengths, Scoring, Training

    model, guard, shard, offload = given.model, given.guard, given.shard, given.offload
    prompts, unusual = given.prompts or "PROMPTS", _unusual(given.max_new_tokens)
    number = len(read_prompts(given.prompts)) if given.prompts else given.num_prompts
    lengths = Lengths(prompt=given.prompt_tokens, response=given.max_new_tokens, row=given.max_length)
    selected = max(int(given.ratio * subject.num_weights), 1)
    processes = where.count if shard else 1

    scoring = Scoring(target=subject, guard=reader, lengths=lengths)
    objective = ["--guard", guard] if guard else ["--refusal"]
    answering = Answering(target=subject, guards=(reader,) if reader else (), lengths=lengths)
    judge = ["--judge", f"guard:{guard}"] if guard else []
    found = [
        _stage(
            "score", ["score", model, "--prompts", prompts, *objective, *unusual],
            lambda: resources.choose_scoring(
                scoring, where, most=max(number // processes, 1), sharded=shard, offload=offload
            ),
            lambda choice: resources.scoring_duration(scoring, choice, number),
        ),
        _stage(
            "evaluate", ["evaluate", model, "--prompts", prompts, *judge, *unusual],
            lambda: resources.choose_answering(
                answering, where, most=-(-number // processes), sharded=shard, offload=offload
            ),
            lambda choice: resources.answering_duration(answering, choice, number),
        ),
    ]  # fmt: skip
    for name, kind, rows, num_steps, words in (
        ("enhance", "sparse", Enhance.rows, Enhance.steps, ["--data", "REFUSALS", "--retain", "HARMLESS"]),
        ("preserve", "full", Preserve.rows, Preserve.steps, ["--data", "TASK"]),
        ("preserve --lora", "lora", Preserve.rows, Preserve.steps, ["--data", "TASK"]),
    ):
        rows, num_steps = given.batch_size or rows, given.steps or num_steps
        training = Training(
            target=subject, num_selected=selected, kind=kind, lengths=lengths, lora_rank=given.lora_rank, guard=reader,
            retained_rows=given.retain_rows if kind == "sparse" else 0, batch=rows,
        )  # fmt: skip
        command = [*name.split()[:1], model, "--selection", "SELECTION", *words, *name.split()[1:]]
        found.append(
            _stage(
                name, [*command, "--steps", str(num_steps), "--max-length", str(given.max_length)],
                lambda stage=training, rows=rows: resources.choose_training(  # type: ignore[misc]
                    stage, where, batch_size=rows, sharded=shard, offload=offload, processes=processes
                ),
                lambda choice, stage=training, number=num_steps: resources.training_duration(  # type: ignore[misc]
                    stage, choice, number
                ),
                trains=True,
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A stage, what was chosen for it, and how to run it; `problem` says why nothing could be. Only some take steps."""

    name: str
    choice: "Choice"
    duration: "Duration"
    words: list[str]
    problem: str | None
    trains: bool

    @property
    def settings(self) -> str:
        return f"{self.choice.sentence}; {self.duration}" if self.problem is None else self.problem

    @property
    def command(self) -> str:
        choice = self.choice
        chosen = ["--batch-size", str(choice.batch_size)]
        chosen += ["--accumulation", str(choice.accumulation)] if self.trains else []
        chosen += ["--checkpointing"] if choice.checkpointing else []
        start = ["safelocus"]
        if choice.placement.sharded:
            start = ["torchrun", "--nproc-per-node", str(choice.placement.count), "-m", "safelocus"]
        output = ["-o", str(Path("runs") / self.name.split()[0])]
        return shlex.join([*start, *self.words, *chosen, *choice.placement.options, *output])

    def to_json(self) -> dict[str, Any]:
        choice = self.choice
        return {
            "fits": self.problem is None,
            "placement": choice.placement.label,
            "batch_size": choice.batch_size,
            "accumulation": choice.accumulation,
            "checkpointing": choice.checkpointing,
            "bytes": choice.need.total,
            "standing": dict(choice.need.standing),
            "phases": {name: peak.total for name, peak in choice.need.phases.items()},
            "host": dict(choice.need.host),
            "seconds": self.duration.seconds,
            "command": self.command if self.problem is None else None,
            "problem": self.problem,
        }


def _stage(
    name: str,
    words: list[str],
    choose: "Callable[[], Choice]",
    time: "Callable[[Choice], Duration]",
    *,
    trains: bool = False,
) -> _Stage:
    from safelocus.resources import DoesNotFit

    problem = None
    try:
        choice = choose()
    except DoesNotFit as error:
        choice, problem = error.smallest, str(error)
    return _Stage(name=name, choice=choice, duration=time(choice), words=words, problem=problem, trains=trains)


def _unusual(max_new_tokens: int) -> list[str]:
    return [] if max_new_tokens == 256 else ["--max-new-tokens", str(max_new_tokens)]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _bytes(part: "Mapping[str, int | Peak]") -> dict[str, int]:
    return {name: size if isinstance(size, int) else size.total for name, size in part.items()}


def _grid(subject: "Subject", device: "Device", stages: list[_Stage]) -> "Grid":
    from safelocus.report.grid import Grid
    from safelocus.resources import in_bytes
    from safelocus.resources.duration import in_words

    def cells(kind: str) -> list[tuple[str, ...]]:
        parts = [_bytes(getattr(stage.choice.need, kind)) for stage in stages]
        names = list(dict.fromkeys(name for part in parts for name in part))
        mark = {"standing": "", "phases": "then ", "host": "on the CPU: "}[kind]
        return [(f"{mark}{name}", *(in_bytes(part[name]) if name in part else "" for part in parts)) for name in names]

    rows = [*cells("standing"), *cells("phases")]
    sections = (len(rows),)
    rows += [
        ("needed", *(in_bytes(stage.choice.need.total) for stage in stages)),
        ("fits", *(_yes(stage.problem is None) for stage in stages)),
        ("placement", *(stage.choice.placement.label for stage in stages)),
        ("batch size", *(str(stage.choice.batch_size) for stage in stages)),
        ("passes per step", *(str(stage.choice.accumulation) if stage.trains else "" for stage in stages)),
        ("checkpointing", *(_yes(stage.choice.checkpointing) if stage.trains else "" for stage in stages)),
        ("time", *(in_words(stage.duration.total) for stage in stages)),
        *cells("host"),
    ]
    several = f"{device.count} x " if device.count > 1 else ""
    active = f", {subject.num_active:,} per token" if subject.num_routed else ""
    return Grid(
        title=f"{subject.name}: {subject.num_weights:,} weights{active}, {str(subject.dtype).removeprefix('torch.')}",
        headings=("bytes", *(stage.name.replace(" --", " ") for stage in stages)),
        rows=tuple(rows),
        caption=f"{several}{device.label}: {in_bytes(device.free)} of {in_bytes(device.memory)} free, of which 90 % "
        'are used. "then": one after another, so the largest counts',
        sections=sections,
    )


def _document(subject: "Subject", device: "Device", stages: list[_Stage]) -> dict[str, Any]:
    return {
        "model": subject.name,
        "num_weights": subject.num_weights,
        "num_active": subject.num_active,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": {"name": device.label, "count": device.count, "memory": device.memory, "free": device.free},
        "stages": {stage.name: stage.to_json() for stage in stages},
    }
