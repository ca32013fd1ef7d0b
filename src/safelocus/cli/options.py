"""Options that several commands share: one name, one help text, one meaning."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from safelocus.errors import RunError
from safelocus.run.folder import read_config


def _load_config(context: typer.Context, value: Path | None) -> Path | None:
    """Make the values of a run.toml the defaults of this command; options given beside it win."""
    if value is None:
        return None
    values = read_config(value)
    file = value / "run.toml" if value.is_dir() else value
    command = values.pop("command", context.info_name)
    if command != context.info_name:
        raise RunError(f"{file}: is the configuration of `safelocus {command}`, not of `{context.info_name}`")
    known = {parameter.name for parameter in context.command.params}
    if unknown := sorted(set(values) - known):
        raise RunError(f"{file}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(map(str, known)))}")
    context.default_map = values
    return value


Config = Annotated[
    Path | None,
    typer.Option(
        help="Take options from a run.toml (or the run folder that holds one).",
        is_eager=True,
        callback=_load_config,
    ),
]
Model = Annotated[str, typer.Argument(help="Model folder, hub id, or organism:NAME.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write the run into.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
LayoutFile = Annotated[
    Path | None,
    typer.Option("--layout", help="TOML description of an architecture unknown here.", show_default=False),
]
SkipUnknown = Annotated[
    bool,
    typer.Option(
        "--skip-unknown",
        help="Leave tensors that are not understood out of everything, instead of stopping; what is left out is said.",
    ),
]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Type of the weights in memory."),
]
Device = Annotated[
    str | None,
    typer.Option(help="cuda, cpu, ...; auto places over several devices.", show_default="the accelerator"),
]
Shard = Annotated[
    bool, typer.Option("--shard", help="Under torchrun: spread the model over the processes (docs/distributed.md).")
]
Offload = Annotated[
    bool,
    typer.Option(
        "--offload",
        help="Keep the weights in the host's memory, from where layers come to the accelerator one by one: for models "
        "larger than that (docs/distributed.md).",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model.")]
System = Annotated[str | None, typer.Option(help="System prompt before every request.", show_default=False)]
Template = Annotated[
    str | None,
    typer.Option(help="Plain template with {prompt}, instead of the tokenizer's chat template.", show_default=False),
]
Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        "-p",
        help="File (json, jsonl, csv, tsv, txt, parquet), hub-id:split:field, embedded:NAME or organism:NAME.",
        show_default=False,
    ),
]
Field = Annotated[str | None, typer.Option(help="Field that holds the prompts.", show_default="recognised")]
Where = Annotated[
    list[str] | None, typer.Option(help="Keep rows with COLUMN=VALUE; may be repeated.", show_default=False)
]
Limit = Annotated[int | None, typer.Option(help="Use at most this many prompts.", min=1, show_default=False)]
Ratio = Annotated[float, typer.Option("--ratio", "-r", help="Share of the weights to select, in (0, 1].")]
Of = Annotated[Literal["model", "eligible"], typer.Option(help="What the ratio is a share of.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
BatchSize = Annotated[int, typer.Option(help="Prompts per forward and backward pass.", min=1)]
PlannedBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size", help="Prompts per forward and backward pass.", min=1, show_default="what fits (safelocus plan)"
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Length of the model's answers.", min=1)]

# which weights to act on: see `sources`
SelectionFile = Annotated[
    Path | None,
    typer.Option("--selection", help="Selection file, or the run folder of `score` it is in.", show_default=False),
]
ObjectiveGuard = Annotated[
    str | None,
    typer.Option("--guard", help="Guard to find the weights with, and to judge: folder, hub id or organism:guard."),
]
GuardDescription = Annotated[
    Path | None, typer.Option(help="TOML description of a guard unknown here (docs/guards.md).", show_default=False)
]
Refusal = Annotated[bool, typer.Option("--refusal", help="Find the weights without a guard: by refusal openings.")]
ScorePrompts = Annotated[
    str | None, typer.Option("--prompts", "-p", help="Harmful prompts to find the weights with.", show_default=False)
]
LocateRatio = Annotated[
    float | None,
    typer.Option("--ratio", "-r", help="Share of the weights to select, in (0, 1].", show_default="0.01"),
]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-mismatch", help="The selection was made for another model (a fine-tuned sibling).")
]
AllowSeen = Annotated[
    bool, typer.Option("--allow-seen", help="Measure with prompts that were trained or scored with, all the same.")
]

# what is measured
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help="guard:NAME or refusal; the first one's verdicts make the ASR. May be repeated.",
        show_default="the guard where --guard names one, else refusal",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", help="Questions with answers, for utility. May be repeated.", show_default=False),
]
EvaluationLimit = Annotated[
    int | None,
    typer.Option(
        "--limit", help="Measure on at most this many of each set, drawn by the seed.", min=1, show_default=False
    ),
]

# how to train
Steps = Annotated[int, typer.Option(help="Optimizer steps.", min=1)]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate.", min=0)]
TrainingBatch = Annotated[int | None, typer.Option("--batch-size", help="Rows per forward and backward pass.", min=1)]
Accumulation = Annotated[
    int | None, typer.Option(help="Passes per optimizer step.", min=1, show_default="1, or what the batch needs to fit")
]
ScoreBatch = Annotated[
    int | None,
    typer.Option(
        "--score-batch-size", help="Prompts at a time when weights are scored.", min=1, show_default="what fits"
    ),
]
ScheduleOption = Annotated[
    Literal["constant", "linear", "cosine"],
    typer.Option("--schedule", help="What the learning rate does after the warm-up."),
]
Warmup = Annotated[int, typer.Option(help="Steps in which the learning rate rises.", min=0)]
WeightDecay = Annotated[float, typer.Option(help="Of AdamW.", min=0)]
MaxGradNorm = Annotated[float, typer.Option(help="Clip gradients to this norm; 0 leaves them.", min=0)]
MaxLength = Annotated[int, typer.Option(help="Tokens of a row; longer responses are cut.", min=1)]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--checkpointing/--no-checkpointing",
        help="Compute activations twice and store few: less memory, slower.",
        show_default="where it is needed",
    ),
]


def conditions(where: list[str] | None) -> dict[str, str]:
    """`COLUMN=VALUE` strings as a mapping."""
    pairs = {}
    for text in where or []:
        column, separator, value = text.partition("=")
        if not separator or not column:
            raise RunError(f"--where {text!r}: expected COLUMN=VALUE")
        pairs[column] = value
    return pairs


def words(text: str | None) -> tuple[str, ...]:
    """`a, b` as ("a", "b"), each once."""
    return tuple(dict.fromkeys(word for part in (text or "").split(",") if (word := part.strip())))


def numbers(text: str, option: str) -> tuple[float, ...]:
    """`0.01, 0.03` as numbers; RunError for anything else, naming the option."""
    try:
        return tuple(float(word) for word in words(text))
    except ValueError as error:
        raise RunError(f"{option} {text!r}: expected numbers with commas between them, such as 0.01,0.03") from error
