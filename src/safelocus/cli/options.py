"""Options that several commands share: one name, one help text, one meaning, one default."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safelocus.cli.command import Options, RunOptions, SeedOption, argument, flag, option
from safelocus.errors import RunError, SafelocusError

NONE = "none"  # switches off what is taken by default

if TYPE_CHECKING:
    from safelocus.model.target import Target
    from safelocus.prompts import PromptSet
    from safelocus.training import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class ModelArgument(Options):
    model: str = argument("Model folder, hub id, or organism:NAME.")


@dataclass(frozen=True, kw_only=True)
class RatioOption(Options):
    ratio: float = option("Share of the weights to select, in (0, 1].", "-r", default=0.01)


@dataclass(frozen=True, kw_only=True)
class ShareOptions(RatioOption):
    of: Literal["model", "eligible"] = option("What the ratio is a share of.", default="model")


@dataclass(frozen=True, kw_only=True)
class RevisionOption(Options):
    revision: str | None = option("Branch, tag or commit on the hub.")


@dataclass(frozen=True, kw_only=True)
class LayoutOptions(RevisionOption):
    layout: Path | None = option("TOML description of an architecture unknown here.")
    skip_unknown: bool = flag("Leave out tensors that are not understood, and say so, instead of stopping.")


@dataclass(frozen=True, kw_only=True)
class HubOptions(LayoutOptions):
    trust_remote_code: bool = flag("Run Python code that comes with a model.")


@dataclass(frozen=True, kw_only=True)
class DtypeOption(Options):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("Type of the weights in memory.", default="auto")


@dataclass(frozen=True, kw_only=True)
class OffloadOption(Options):
    offload: bool = flag(
        "Keep the weights in the host's memory, from where layers come to the accelerator one by one: for "
        "models larger than that (docs/distributed.md)."
    )


@dataclass(frozen=True, kw_only=True)
class LoadOptions(DtypeOption, HubOptions):
    """How `load` makes a target of a model in one process."""

    system: str | None = option("System prompt before every request.")
    template: str | None = option("Plain template with {prompt}, instead of the tokenizer's chat template.")
    thinking: Literal["on", "off"] | None = option(
        "Whether the model thinks before it answers, where its chat template lets one choose. Only answers are judged.",
        shown="off, unless the template opens a thought",
    )
    device: str | None = option("cuda, cpu, ...; auto places over several devices.", shown="the accelerator")

    @property
    def guards(self) -> dict[str, Any]:
        """How guards are loaded beside it."""
        return {name: getattr(self, name) for name in ("dtype", "device", "trust_remote_code")}


@dataclass(frozen=True, kw_only=True)
class PlaceOptions(OffloadOption, LoadOptions):
    """How `load` makes a target of a model, in one process or several."""

    shard: bool = flag("Under torchrun: spread the model over the processes (docs/distributed.md).")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(PlaceOptions, ModelArgument):
    def load(self) -> "Target":
        from safelocus.model.target import load

        return load(self.model, **self.part(PlaceOptions))


@dataclass(frozen=True, kw_only=True)
class AnswerOption(Options):
    max_new_tokens: int = option("Length of the model's answers.", default=256, min=1)


@dataclass(frozen=True, kw_only=True)
class BatchOptions(AnswerOption):
    batch_size: int | None = option("Prompts answered, and answers judged, at a time.", shown="what fits", min=1)


@dataclass(frozen=True, kw_only=True)
class FieldOptions(Options):
    field: str | None = option("Field that holds the prompts.", shown="recognised")
    where: list[str] | None = option("Keep rows with COLUMN=VALUE; may be repeated.")


@dataclass(frozen=True, kw_only=True)
class PromptOptions(FieldOptions):
    prompts: str = option(
        "File (json, jsonl, csv, tsv, txt, parquet), hub-id:split:field, embedded:NAME or organism:NAME.", "-p"
    )
    limit: int | None = option("Use at most this many prompts, the first ones.", min=1)

    def read(self, held_out: float = 0.0) -> "tuple[PromptSet, PromptSet | None]":
        """(prompts, those left out)."""
        from safelocus.prompts import read_prompts

        found = read_prompts(self.prompts, field=self.field, where=conditions(self.where))
        kept, left_out = found.split(held_out) if held_out else (found, None)
        return kept.limit(self.limit), left_out


@dataclass(frozen=True, kw_only=True)
class AllowOptions(Options):
    """Checks of `check_unseen` and of selections that are left out."""

    allow_seen: bool = flag("Measure with prompts that were trained or scored with, all the same.")
    allow_mismatch: bool = flag("The selection was made for another model (a fine-tuned sibling).")


@dataclass(frozen=True, kw_only=True)
class DescriptionOption(Options):
    guard_description: Path | None = option("TOML description of a guard unknown here (docs/guards.md).")


@dataclass(frozen=True, kw_only=True)
class GuardOptions(DescriptionOption):
    guard: str | None = option("Guard model: folder, hub id or organism:guard.")

    @property
    def described(self) -> dict[str, Any]:
        """Which guard is described how, for `load_judges`."""
        return {"description": self.guard_description, "of": self.guard}


@dataclass(frozen=True, kw_only=True)
class LexiconOption(Options):
    lexicon: Path | None = option("File of expressions that must not come, one on each line (docs/lexicon.md).")


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(LexiconOption, GuardOptions):
    """What S is: one of guard, refusal and lexicon; see `sources.make_objective`."""

    refusal: bool = flag("Objective without a guard: refusal openings.")
    lexicon: Path | None = option(
        "Objective without a guard: file of expressions that must not come, one on each line (docs/lexicon.md)."
    )
    similarity: float | None = option(
        "With --lexicon: words whose embeddings are alike count too, from this cosine; 1: none.", shown="0.65", max=1
    )


@dataclass(frozen=True, kw_only=True)
class LimitOption(Options):
    limit: int | None = option("Measure on at most this many of each set, drawn by the seed.", min=1)


@dataclass(frozen=True, kw_only=True)
class LocateOptions(ObjectiveOptions):
    """Which weights to act on: see `locating.locate`."""

    selection: Path | None = option("Selection file, or the run folder of `score` it is in.")
    guard: str | None = option("Guard to find the weights with, and to judge: folder, hub id or organism:guard.")
    refusal: bool = flag("Find the weights without a guard: by refusal openings.")
    lexicon: Path | None = option(
        "Find the weights without a guard, and judge: file of expressions that must not come, one on each line."
    )
    prompts: str | None = option("Harmful prompts to find the weights with.", "-p")
    ratio: float | None = option("Share of the weights to select, in (0, 1].", "-r", shown="0.01")
    usual_ratio: ClassVar[float] = 0.01

    @property
    def share(self) -> float:
        """Of the weights to select."""
        return self.usual_ratio if self.ratio is None else self.ratio


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(LimitOption):
    """What is measured, beside harmful prompts."""

    harmless: str | None = option("Harmless prompts, for over-refusal.")
    task: list[str] | None = option("Questions with answers, for utility. May be repeated.")


@dataclass(frozen=True, kw_only=True)
class PerplexityOption:
    perplexity: str | None = option("Prompts with responses whose perplexity to measure: does language break?")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(SeedOption):
    """Settings of a training by their names there."""

    steps: int = option("Optimizer steps.", default=100, min=1)
    learning_rate: float | None = option("Peak learning rate.", min=0)
    schedule: Literal["constant", "linear", "cosine"] = option(
        "What the learning rate does after the warm-up.", default="constant"
    )
    weight_decay: float = option("Of AdamW.", default=0.0, min=0)
    max_length: int = option("Tokens of a row; longer responses are cut.", default=1024, min=1)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    ScheduleOptions, MeasureOptions, LocateOptions, AllowOptions, AnswerOption, ModelOptions, RunOptions
):
    """How to train the weights that are located, or all but them, and to measure what that changed."""

    rows: ClassVar[int]  # of an optimizer step, where nothing else is given

    judge: list[str] | None = option(
        "guard:NAME, lexicon:FILE, reader or refusal; the first one's verdicts make the ASR. May be repeated.",
        shown="the guard and the lexicon where they are given, else reader",
    )
    controls: str | None = option("What else to train, with commas.")
    warmup: int = option("Steps in which the learning rate rises.", default=0, min=0)
    batch_size: int | None = option("Rows per forward and backward pass.", min=1)
    accumulation: int | None = option("Passes per optimizer step.", shown="1, or what the batch needs to fit", min=1)
    max_grad_norm: float = option("Clip gradients to this norm; 0 leaves them.", default=1.0, min=0)
    checkpointing: bool | None = option(
        "Compute activations twice and store few: less memory, slower.", shown="where it is needed"
    )
    card_with: list[Path] | None = option(
        "Run folder whose results count on the acceptance card too: another seed, other prompts, another task."
    )
    score_batch_size: int | None = option("Prompts at a time when weights are scored.", shown="what fits", min=1)

    def settings(self) -> "TrainingSettings":
        from safelocus.training import TrainingSettings

        return TrainingSettings(
            warmup_steps=self.warmup, batch_size=self.batch_size or self.rows, accumulation=self.accumulation or 1,
            max_grad_norm=self.max_grad_norm or None, activation_checkpointing=bool(self.checkpointing),
            **self.part(ScheduleOptions),
        )  # fmt: skip


def conditions(where: list[str] | None) -> dict[str, str]:
    """`COLUMN=VALUE` strings as a mapping."""
    pairs = {}
    for text in where or []:
        column, separator, value = text.partition("=")
        if not separator or not column:
            raise RunError(f"--where {text!r}: expected COLUMN=VALUE")
        pairs[column] = value
    return pairs


def words(text: str | None, option: str = "", known: Iterable[str] = ()) -> tuple[str, ...]:
    """`a, b` as ("a", "b"), each once; SafelocusError for a word that is not known, naming the option."""
    found, known = tuple(dict.fromkeys(word for part in (text or "").split(",") if (word := part.strip()))), [*known]
    if option and (unknown := sorted(set(found) - set(known))):
        raise SafelocusError(f"{option} {', '.join(unknown)}: expected {', '.join(known)}")
    return found


def check_none(sources: list[str] | None, option: str) -> None:
    """Refuse NONE beside sets."""
    if sources and NONE in sources and len(sources) > 1:
        raise SafelocusError(f"{option} {NONE}, and other sets too: expected one or the other")


def only_with(given: Options, what: str, is_there: bool, *names: str) -> None:
    """Refuse options, by the names of their fields, that are given without what they are about."""
    found = [name for name in names if getattr(given, name) != getattr(type(given), name, None)]
    if found and not is_there:
        said = ", ".join(f"--{name.replace('_', '-')}" for name in found)
        raise SafelocusError(f"{said} {'is' if len(found) == 1 else 'are'} for {what}")


def numbers(text: str | None, option: str) -> tuple[float, ...]:
    """`0.01, 0.03` as numbers; RunError for anything else, and for a text without any, naming the option."""
    try:
        found = tuple(float(word) for word in words(text))
    except ValueError:
        found = ()
    if (text is not None and not found) or not all(map(isfinite, found)):
        raise RunError(f"{option} {text!r}: expected numbers with commas between them, such as 0.01,0.03")
    return found
