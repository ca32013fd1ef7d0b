"""Settings that a command's user did not give: chosen by what fits, said in one line, and the same in all processes.

A run that was interrupted goes on with what was chosen when it began: its run.toml says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from safelocus.cli.command import RunOptions
from safelocus.cli.locating import selection_file
from safelocus.cli.options import LayoutOptions, ModelOptions, PlaceOptions, TrainOptions
from safelocus.cli.output import mind, note
from safelocus.cli.sources import guards_named, judging

if TYPE_CHECKING:
    from safelocus.evaluation.tasks import TaskExample
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
    place: PlaceOptions

    @classmethod
    def of(cls, given: ModelOptions) -> Self:
        return cls(name=given.model, place=given)

    @property
    def placement(self) -> dict[str, Any]:
        return {"sharded": self.place.shard, "offload": self.place.offload}

    def subject(self) -> "Subject":
        return self._load(self.name, **self.place.part(LayoutOptions))

    def reader(self, name: str | None) -> "Subject | None":
        """The guard, in the same dtype."""
        return self._load(name) if name else None

    def readers(self, judges: Sequence[str]) -> "tuple[Subject, ...]":
        """The guards among judges."""
        return tuple(map(self._load, guards_named(judges)))

    def classifier(self, name: str | None) -> int:
        """Bytes of a classifier beside it."""
        from safelocus.model.target import dtype_on
        from safelocus.resources import classifier_bytes

        return classifier_bytes(name, dtype=dtype_on(self.place.device, self.place.dtype)) if name else 0

    def _load(self, name: str, **options: Any) -> "Subject":
        from safelocus.model.target import dtype_on
        from safelocus.resources import Subject

        dtype = dtype_on(self.place.device, self.place.dtype)
        return Subject.load(name, dtype=dtype, trust_remote_code=self.place.trust_remote_code, **options)

    def devices(self) -> "Device":
        """Of one process: its own accelerator, and its part of the CPU's memory."""
        import os

        from safelocus import distributed
        from safelocus.resources import find_device

        size = distributed.world_size()
        found = find_device(self.place.device or ("auto" if size == 1 else None))
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", size))  # processes on this machine
        if found.is_cpu:
            found = replace(found, free=found.free // beside)
        elif found.host is not None and not self.place.shard:  # what is on the host has shards too
            found = replace(found, host=found.host // beside)
        return replace(found, count=size) if self.place.shard else found

    def lengths(
        self, prompts: "Sequence[Example | TaskExample]" = (), *, response: int = 256, rows: "Sequence[PromptSet]" = (),
        max_length: int = 1024,
    ) -> "Lengths":  # fmt: skip
        """Tokens of the longest prompt that has room, and of the longest row of the first set and of the others."""
        from safelocus.model.chat import chat_format
        from safelocus.model.generation import room_for_prompt
        from safelocus.model.target import load_config, load_tokenizer
        from safelocus.resources import Lengths
        from safelocus.training.responses import IGNORED, encode_rows

        hub: dict[str, Any] = {"revision": self.place.revision, "trust_remote_code": self.place.trust_remote_code}
        config = load_config(self.name, **hub)
        room = room_for_prompt(config, response)
        chat = chat_format(
            load_tokenizer(self.name, **hub), system=self.place.system, template=self.place.template,
            thinking=None if self.place.thinking is None else self.place.thinking == "on",
            reads_apart=bool(config.is_encoder_decoder),
        )  # fmt: skip

        def longest(part: "PromptSet") -> tuple[int, int]:
            def size(e: "Example") -> int:
                return sum(map(len, (e.prompt, e.response or "", *(text for turns in e.later for text in turns))))

            rows = [row for e in sorted(part.examples, key=size)[-_MOST_ROWS:] for row in encode_rows(e, chat)[0]]
            labels = [row["labels"] for row in rows]
            return max(len(row["input_ids"]) for row in rows), max(
                sum(label != IGNORED for label in each) for each in labels
            )

        found = [longest(part) for part in rows]
        asked = sorted(prompts, key=lambda e: len(e.prompt) + len(e.system or ""))[-_MOST_ROWS:]
        sizes = [len(chat.encode_prompt(e.prompt, system=e.system)) for e in asked]
        retained = max((row for row, _ in found[1:]), default=None)
        return Lengths(
            prompt=max((size for size in sizes if size <= room), default=64),
            response=max((answer for _, answer in found[1:]), default=response),
            row=min(found[0][0] if found else max_length, max_length),
            answer=min(found[0][1], max_length) if found else None,
            retained=None if retained is None else min(retained, max_length),
        )


def agreed(choose: Callable[[], T]) -> T:
    """What the first process chooses, in all of them."""
    from safelocus import distributed

    return distributed.gather_objects(choose() if distributed.is_main() else None)[0]  # type: ignore[return-value]


def scoring_settings(
    model: Model, prompts: "PromptSet", *, method: str = "esi", guard: str | None, classifier: str | None = None,
    answers: bool = False, max_new_tokens: int, batch_size: int | None, accumulate_on: str | None, quiet: bool = False,
) -> "tuple[int, str | None, str | None]":  # fmt: skip
    """(batch size, device of the fp32 sums, device): those given, and for the rest what fits.

    Args:
        answers: whether answers are scored without a guard or a classifier.

    Raises:
        ResourceError: nothing fits; or, with a batch size given, the weights alone do not.
    """
    from safelocus import distributed
    from safelocus.resources import Scoring, choose

    def make() -> "Choice":
        asked = [replace(example, system=None) for example in prompts.examples]
        reads = answers or guard is not None or classifier is not None or method == "wanda"
        scoring = Scoring(
            target=model.subject(), method=method, guard=model.reader(guard), classifier=model.classifier(classifier),
            answers=answers or classifier is not None,
            lengths=model.lengths(asked, response=max_new_tokens if reads else 0),
        )  # fmt: skip
        sums = "the weights'" if (model.place.shard or model.place.offload) and accumulate_on is None else accumulate_on
        most = max(len(prompts) // distributed.world_size(), 1)
        return choose(
            scoring, model.devices(), most=most, batch_size=batch_size, accumulate_on=sums, **model.placement
        )  # fmt: skip

    size, device, choice = _settled("scoring", model, make, batch_size or 8, quiet=quiet)
    return size, "cpu" if choice is not None and choice.settings.sums_on_cpu else accumulate_on, device


def answering_settings(
    model: Model, sets: "Sequence[Sequence[Example | TaskExample]]", *, judges: Sequence[str], max_new_tokens: int,
    batch_size: int | None, texts: "PromptSet | None" = None, num_disturbed: int = 0, num_scores: int = 0,
    source: str | None = None, quiet: bool = False,
) -> "tuple[int, str | None]":  # fmt: skip
    """(batch size, device) of `evaluate` and `verify`: those given, and for the rest what fits.

    Args:
        sets: all that will be answered.
        judges: by name; only the guards among them are models.
        texts: whose perplexity is measured.
        num_disturbed, num_scores, source: see `Answering`.

    Raises:
        ResourceError: as for `scoring_settings`.
    """
    from safelocus import distributed
    from safelocus.model.generation import room_for_prompt
    from safelocus.resources import Answering, choose

    asked = [example for part in sets for example in part]

    def make() -> "Choice":
        subject = model.subject()
        lengths = model.lengths(
            asked, response=max_new_tokens, rows=[] if texts is None else [texts],
            max_length=room_for_prompt(subject.config, 0),
        )  # fmt: skip
        answering = Answering(
            target=subject, guards=model.readers(judges), lengths=lengths,
            reads_rows=texts is not None, num_disturbed=num_disturbed, num_scores=num_scores,
            source=model.reader(source),
        )  # fmt: skip
        number = max(len(asked), len(texts or ())) or ANSWERED  # the tasks of other libraries are not counted
        most = -(-number // distributed.world_size())
        return choose(answering, model.devices(), most=most, batch_size=batch_size, **model.placement)

    return _settled("answering", model, make, batch_size or ANSWERED, quiet=quiet)[:2]


def settle(given: Train, make_stage: "Callable[[Subject, tuple[Subject, ...]], Training]") -> Train:
    """Options of a training, with batches and device: those given, those of a run to resume, what fits.

    Args:
        make_stage: from the model and the guards that judge.
    """
    from safelocus.prompts import read_prompts
    from safelocus.resources import choose_training

    given = resumed(given, "batch_size", "accumulation", "checkpointing", "score_batch_size")
    model, size, passes = Model.of(given), given.batch_size or given.rows, given.accumulation or 1
    is_given = given.batch_size is not None or given.accumulation is not None

    def make() -> "Choice":
        return choose_training(
            make_stage(model.subject(), model.readers(judging(given))), model.devices(), batch_size=size,
            accumulation=passes, checkpointing=given.checkpointing, given=is_given, **model.placement,
        )  # fmt: skip

    batch_size, device, choice = _settled("training", model, make, size, quiet=given.json)
    settled = replace(
        given, batch_size=batch_size, device=device, accumulation=choice.settings.accumulation if choice else passes,
        checkpointing=choice.settings.checkpointing if choice else bool(given.checkpointing),
    )  # fmt: skip
    if given.prompts is None:
        return settled
    score_batch_size, _, device = scoring_settings(
        Model.of(settled), read_prompts(given.prompts), guard=given.guard, answers=given.lexicon is not None,
        max_new_tokens=given.max_new_tokens, batch_size=given.score_batch_size, accumulate_on="the weights'",
        quiet=given.json,
    )  # fmt: skip
    return replace(settled, score_batch_size=score_batch_size, device=device)


def _settled(
    what: str, model: Model, make: "Callable[[], Choice]", otherwise: int, *, quiet: bool
) -> "tuple[int, str | None, Choice | None]":
    """(batch size, device, choice), the same in all processes and said in a line; a remark where there is no plan."""
    from safelocus.errors import ArchitectureError, PlanError, ResourceError, SafelocusError, first_line
    from safelocus.resources import in_bytes

    def attempt() -> "Choice | Exception":
        try:
            return make()
        except ResourceError as error:
            return ResourceError(f"{what} {error}")
        except SafelocusError as error:
            return error

    found = agreed(attempt)
    if isinstance(found, ArchitectureError | PlanError):
        note(f"{what}: batch size {otherwise}; no plan: {first_line(found)}")
        return otherwise, model.place.device, None
    if isinstance(found, Exception):
        raise found
    if not quiet:
        note(f"{what}: {found.sentence}")
    if not found.fits:
        mind([f"by the plan that does not fit into {in_bytes(found.room)}, but it was asked for"])
    is_spread = found.settings.count > 1 and not found.settings.sharded
    return found.settings.batch_size, "auto" if is_spread else model.place.device, found


def resumed(given: Run, *names: str) -> Run:
    """Options with those of the run that will be resumed, where they are not given."""
    from safelocus.run.folder import read_unfinished

    earlier = {} if given.overwrite else agreed(lambda: read_unfinished(given.output, given.command_name))
    settled: dict[str, Any] = {name: earlier.get(name) for name in names if getattr(given, name) is None}
    return replace(given, **settled)


def num_selected(selection: Path | None, ratio: float, subject: "Subject") -> int:
    """K of a selection file, or of a selection to be made."""
    from safelocus.selection.ratio import count_for_ratio
    from safelocus.selection.selection import Selection

    if selection is None:
        return count_for_ratio(subject.layout, ratio)
    return Selection.load(selection_file(selection)).k
