"""Settings that a command's user did not give: chosen by what fits, said in one line, and the same in all processes.

A run that was interrupted goes on with what was chosen when it began: its run.toml says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from safelocus.cli.command import RunOptions
from safelocus.cli.options import ModelOptions, PlaceOptions, TrainOptions
from safelocus.cli.output import note

if TYPE_CHECKING:
    from safelocus.evaluation.tasks import TaskExample
    from safelocus.model.target import Dtype
    from safelocus.prompts import Example, PromptSet
    from safelocus.resources import Choice, Device, Lengths, Subject, Training

T = TypeVar("T")
Run = TypeVar("Run", bound=RunOptions)
Train = TypeVar("Train", bound=TrainOptions)

ANSWERED = 32  # prompts at a time where nothing can be planned: a server answers, or the model cannot be rehearsed
_MOST_ROWS = 256  # the longest in characters, of which tokens are counted


@dataclass(frozen=True, kw_only=True)
class Model:
    """What of a command's options says which model, and where."""

    name: str
    dtype: Any = "auto"
    device: str | None = None
    layout: Path | None = None
    skip_unknown: bool = False
    system: str | None = None
    template: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    shard: bool = False
    offload: bool = False

    @classmethod
    def of(cls, given: ModelOptions) -> Self:
        return cls(name=given.model, **given.part(PlaceOptions))

    def subject(self) -> "Subject":
        from safelocus.resources import Subject

        return Subject.load(
            self.name, dtype=self._dtype(), layout=self.layout, skip_unknown=self.skip_unknown,
            revision=self.revision, trust_remote_code=self.trust_remote_code,
        )  # fmt: skip

    def reader(self, name: str | None) -> "Subject | None":
        """The guard, in the same dtype."""
        from safelocus.resources import Subject

        return Subject.load(name, dtype=self._dtype(), trust_remote_code=self.trust_remote_code) if name else None

    def _dtype(self) -> "Dtype":
        from safelocus.model.target import dtype_on

        return dtype_on(self.device, self.dtype)

    def devices(self) -> "Device":
        """Of one process: its own accelerator, or its part of the CPU's memory."""
        import os

        from safelocus import distributed
        from safelocus.resources import find_device

        found = find_device(self.device or ("auto" if distributed.world_size() == 1 else None))
        if distributed.world_size() > 1 and found.is_cpu:
            found = replace(found, free=found.free // int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size())))
        return replace(found, count=distributed.world_size()) if self.shard else found

    def lengths(
        self, prompts: "Sequence[Example | TaskExample]" = (), *, response: int = 256, rows: "Sequence[PromptSet]" = (),
        max_length: int = 1024,
    ) -> "Lengths":  # fmt: skip
        """Tokens of the longest prompt that has room, and of the longest row of the first set and of the others."""
        from safelocus.model.chat import chat_format
        from safelocus.model.generation import room_for_prompt
        from safelocus.model.target import load_config, load_tokenizer
        from safelocus.resources import Lengths

        hub: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        room = room_for_prompt(load_config(self.name, **hub), response)
        chat = chat_format(load_tokenizer(self.name, **hub), system=self.system, template=self.template)

        def longest(part: "PromptSet") -> tuple[int, int]:
            examples = sorted(part.examples, key=lambda e: len(e.prompt) + len(e.response or ""))[-_MOST_ROWS:]
            pairs = [chat.encode_pair(e.prompt, e.response or "", system=e.system, end=True) for e in examples]
            return max(len(p) + len(r) for p, r in pairs), max(len(r) for _, r in pairs)

        found = [longest(part) for part in rows]
        asked = sorted(prompts, key=lambda e: len(e.prompt) + len(e.system or ""))[-_MOST_ROWS:]
        sizes = [len(chat.encode_prompt(e.prompt, system=e.system)) for e in asked]
        retained = max((row for row, _ in found[1:]), default=None)
        return Lengths(
            prompt=max((size for size in sizes if size <= room), default=64),
            response=max((answer for _, answer in found[1:]), default=response),
            row=min(found[0][0] if found else max_length, max_length),
            retained=None if retained is None else min(retained, max_length),
        )


def agreed(choose: Callable[[], T]) -> T:
    """What the first process chooses, in all of them."""
    from safelocus import distributed

    return distributed.gather_objects(choose() if distributed.is_main() else None)[0]  # type: ignore[return-value]


def scoring_settings(
    model: Model,
    prompts: "PromptSet",
    *,
    guard: str | None,
    max_new_tokens: int,
    batch_size: int | None,
    accumulate_on: str | None,
    default: int = 8,
    quiet: bool = False,
) -> "tuple[int, str | None, str | None]":
    """(batch size, device of the fp32 sums, device): those given, and for the rest what fits.

    Raises:
        ResourceError: nothing fits; or, with a batch size given, the weights alone do not.
    """
    from safelocus import distributed
    from safelocus.resources import Scoring, choose_scoring

    def make() -> "Choice":
        asked = [replace(example, system=None) for example in prompts.examples]
        lengths = model.lengths(asked, response=0 if guard is None else max_new_tokens)
        scoring = Scoring(target=model.subject(), guard=model.reader(guard), lengths=lengths)
        sums = "the weights'" if (model.shard or model.offload) and accumulate_on is None else accumulate_on
        return choose_scoring(
            scoring, model.devices(), most=max(len(prompts) // distributed.world_size(), 1), batch_size=batch_size,
            accumulate_on=sums, sharded=model.shard, offload=model.offload,
        )  # fmt: skip

    choice = choose("scoring", make, otherwise=f"batch size {batch_size or default}", quiet=quiet)
    if choice is None:
        return batch_size or default, accumulate_on, model.device
    sums = "cpu" if choice.placement.sums_on_cpu else accumulate_on
    return choice.batch_size, sums, _device(model, choice)


def answering_settings(
    model: Model,
    sets: "Sequence[Sequence[Example | TaskExample]]",
    *,
    judges: Sequence[str],
    max_new_tokens: int,
    batch_size: int | None,
    texts: "PromptSet | None" = None,
    num_disturbed: int = 0,
    num_scores: int = 0,
    source: str | None = None,
    quiet: bool = False,
) -> "tuple[int, str | None]":
    """(batch size, device) of `evaluate` and `verify`: those given, and for the rest what fits.

    Args:
        sets: all that will be answered.
        judges: by name; only the guards among them are models.
        texts: whose perplexity is measured.
        num_disturbed, num_scores, source: of `verify`, see `Answering`.

    Raises:
        ResourceError: as for `scoring_settings`.
    """
    from safelocus import distributed
    from safelocus.model.generation import room_for_prompt
    from safelocus.resources import Answering, choose_answering

    asked = [example for part in sets for example in part]

    def make() -> "Choice":
        subject = model.subject()
        readers = [model.reader(name.removeprefix("guard:")) for name in judges if name.startswith("guard:")]
        answering = Answering(
            target=subject, guards=tuple(reader for reader in readers if reader is not None),
            lengths=model.lengths(
                asked, response=max_new_tokens, rows=[] if texts is None else [texts],
                max_length=room_for_prompt(subject.config, 0),
            ),
            reads_rows=texts is not None, num_disturbed=num_disturbed, num_scores=num_scores,
            source=model.reader(source),
        )  # fmt: skip
        number = max(len(asked), len(texts or ())) or ANSWERED  # the tasks of other libraries are not counted
        return choose_answering(
            answering, model.devices(), most=-(-number // distributed.world_size()), batch_size=batch_size,
            sharded=model.shard, offload=model.offload,
        )  # fmt: skip

    choice = choose("answering", make, otherwise=f"batch size {batch_size or ANSWERED}", quiet=quiet)
    if choice is None:
        return batch_size or ANSWERED, model.device
    return choice.batch_size, _device(model, choice)


def training_settings(
    model: Model,
    make_stage: "Callable[[Subject, Subject | None], Training]",
    *,
    guard: str | None,
    rows: int,
    batch_size: int | None,
    accumulation: int | None,
    checkpointing: bool | None,
    quiet: bool = False,
) -> tuple[int, int, bool, str | None]:
    """(batch size, accumulation, checkpointing, device): those given, and for the rest what fits.

    Args:
        make_stage: from the model and the guard.
        rows: of an optimizer step, where neither batch size nor accumulation is given; never changed.
    """
    from safelocus import distributed
    from safelocus.resources import choose_training

    given = batch_size is not None or accumulation is not None
    size, passes = batch_size or rows, accumulation or 1

    def make() -> "Choice":
        return choose_training(
            make_stage(model.subject(), model.reader(guard)), model.devices(), batch_size=size, accumulation=passes,
            checkpointing=checkpointing, given=given, sharded=model.shard, offload=model.offload,
            processes=distributed.world_size(),
        )  # fmt: skip

    choice = choose("training", make, otherwise=f"batch size {size}", quiet=quiet)
    if choice is None:
        return size, passes, bool(checkpointing), model.device
    return choice.batch_size, choice.accumulation, choice.checkpointing, _device(model, choice)


def settle(given: Train, make_stage: "Callable[[Subject, Subject | None], Training]") -> Train:
    """Options of a training, with batches and device: those given, those of a run to resume, what fits."""
    from safelocus.prompts import read_prompts

    given = resumed(given, "batch_size", "accumulation", "checkpointing", "score_batch_size")
    batch_size, accumulation, checkpointing, device = training_settings(
        Model.of(given), make_stage, guard=given.guard, rows=given.rows, quiet=given.json, batch_size=given.batch_size,
        accumulation=given.accumulation, checkpointing=given.checkpointing,
    )  # fmt: skip
    given = replace(
        given, batch_size=batch_size, accumulation=accumulation, checkpointing=checkpointing, device=device
    )  # fmt: skip
    if given.prompts is None:
        return given
    score_batch_size, _, device = scoring_settings(
        Model.of(given), read_prompts(given.prompts), guard=given.guard, max_new_tokens=given.max_new_tokens,
        batch_size=given.score_batch_size, accumulate_on="the weights'", quiet=given.json,
    )  # fmt: skip
    return replace(given, score_batch_size=score_batch_size, device=device)


def choose(what: str, make: "Callable[[], Choice]", *, otherwise: str, quiet: bool = False) -> "Choice | None":
    """A choice, the same in all processes and said in a line; None, with a remark, where there can be no plan."""
    from safelocus.errors import LayoutError, PlanError, ResourceError
    from safelocus.resources import in_bytes

    def attempt() -> "Choice | Exception":
        try:
            return make()
        except (LayoutError, PlanError) as error:
            return error
        except ResourceError as error:
            return ResourceError(f"{what} {error}")

    found = agreed(attempt)
    if isinstance(found, ResourceError):
        raise found
    if isinstance(found, Exception):
        note(f"{what}: {otherwise}; no plan: {str(found).splitlines()[0]}")
        return None
    if not quiet:
        note(f"{what}: {found.sentence}")
    if not found.fits:
        note(f"[bold]mind:[/] by the plan that does not fit into {in_bytes(found.room)}, but it was asked for")
    return found


def _device(model: Model, choice: "Choice") -> str | None:
    return "auto" if choice.placement.count > 1 and not choice.placement.sharded else model.device


def resumed(given: Run, *names: str) -> Run:
    """Options with those of the run that will be resumed, where they are not given."""
    from safelocus.run.folder import read_unfinished

    earlier = {} if given.overwrite else agreed(lambda: read_unfinished(given.output))
    settled: dict[str, Any] = {name: earlier.get(name) for name in names if getattr(given, name) is None}
    return replace(given, **settled)


def num_selected(selection: Path | None, ratio: float | None, subject: "Subject") -> int:
    """K of a selection file, or of a selection to be made."""
    from safelocus.selection.selection import Selection

    if selection is None:
        return int((0.01 if ratio is None else ratio) * subject.num_weights)
    return Selection.load(selection / "selection.safetensors" if selection.is_dir() else selection).k
