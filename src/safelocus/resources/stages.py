"""How many bytes each stage needs at once, and how long it takes.

    bytes   = what stands all the time + the largest of the phases, which come one after another
    seconds = operations / rate; of generation, per token of a batch, the longer of computing and of reading the weights

Nothing of an offloaded model takes less than its weights' way from the host.

What stands is counted (weights, fp32 sums, optimizer states, guards); phases are rehearsed (see `rehearsal`) in the
shapes that the stage will give them.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from safelocus.errors import PlanError
from safelocus.model.layout.sizes import text_config
from safelocus.objective.refusal import COMPLIANCES, REFUSALS
from safelocus.resources.devices import Device
from safelocus.resources.rehearsal import Pass, Rehearsal, Subject, Trained
from safelocus.scoring.run import NEEDS_OBJECTIVE

_TEMPLATE = 256  # tokens that a guard's own template adds
_OPENINGS, _OPENING = len(REFUSALS) + len(COMPLIANCES), 7  # of the refusal objective, and tokens of each
_LOOKED_AT = 32  # prompts answered at a time when a training's model is looked at
_VALUE, _INDEX = 4, 8  # bytes of fp32, and of a coordinate
_TRAINED: dict[str, Trained] = {"sparse": "eligible", "lora": "adapter", "full": "all"}
_PLACE = 10 * _INDEX  # of expert, matrix, row and column of a coordinate, while they are computed


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens, at most.

    Attributes:
        prompt, response: of a prompt in its template, and of an answer.
        row: of a training row.
        answer: of it, those with a loss; None: all.
        retained: of a row to retain; None: as `row`.
        own: of the model's own answers that it is calibrated on.
    """

    prompt: int = 64
    response: int = 256
    row: int = 512
    answer: int | None = None
    retained: int | None = None
    own: int = 64

    @property
    def both(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a stage is run.

    Attributes:
        batch_size: prompts or rows at a time.
        accumulation: passes per optimizer step.
        checkpointing: whether activations are computed twice.
        sums_on_cpu: whether scoring adds up gradients on the CPU.
        count: devices that share one model.
        sharded: by rows, over as many processes (FSDP2); else by layers, in one process.
        offload: whether weights lie in the host's memory, and come layer by layer.
    """

    batch_size: int
    accumulation: int = 1
    checkpointing: bool = False
    sums_on_cpu: bool = False
    count: int = 1
    sharded: bool = False
    offload: bool = False

    @property
    def label(self) -> str:
        """Where things lie."""
        parts = ["one device"] if self.count == 1 else [f"{self.count} {'processes' if self.sharded else 'devices'}"]
        parts += ["weights on the host"] * self.offload + ["sums on the CPU"] * self.sums_on_cpu
        return ", ".join(parts)

    @property
    def options(self) -> list[str]:
        """Of the command line."""
        spread = [] if self.count == 1 else ["--shard"] if self.sharded else ["--device", "auto"]
        return spread + ["--offload"] * self.offload + ["--accumulate-on", "cpu"] * self.sums_on_cpu


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one stage on each device, and beside it.

    Attributes:
        standing: name -> bytes that are there all the time.
        phases: name -> the most bytes of what comes and goes.
        host: name -> bytes on the CPU, where the model lies on an accelerator.
    """

    standing: Mapping[str, int]
    phases: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.standing.values()) + max(self.phases.values(), default=0)

    def on(self, device: Device, settings: Settings, gathered: int) -> "Need":
        """The same with things where the settings put them; `gathered` bytes of weights are used at a time.

        Every device is taken to have a guard and a whole phase, which is too much where layers are spread.
        """
        if device.is_cpu:  # what would lie beside the device is on it
            return Need(standing={**self.standing, **self.host}, phases=self.phases)
        if not settings.offload and settings.count == 1:
            return self
        guard = {name: size for name, size in self.standing.items() if name.startswith(("guard", "classifier"))}
        rest = {name: -(-size // settings.count) for name, size in self.standing.items() if name not in guard}
        layers = {"gathered layers": gathered} if settings.offload or settings.sharded else {}
        if settings.offload:
            return Need(standing=layers | guard, phases=self.phases, host={**rest, **self.host})
        return Need(standing=rest | layers | guard, phases=self.phases, host=self.host)


class Phase(NamedTuple):
    """What comes and goes: its most bytes, operations of a batch, and tokens generated after those of the prompts."""

    peak: int
    operations: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stage:
    """A stage of a model without weights, with the lengths of its texts, and up to `most` of them at a time.

    A peak is the largest of several sums that each grow along a line, so it is convex in the batch, and the line from
    one row to the most is never below it: two rehearsals tell all batches between.
    """

    target: Subject
    lengths: Lengths = field(default_factory=Lengths)
    most: int = 32

    def need(self, settings: Settings) -> Need:
        """Bytes, with all in one place."""
        return replace(self.standing(settings), phases={n: phase.peak for n, phase in self._between(settings).items()})

    def standing(self, settings: Settings) -> Need:
        """Without the phases, which have to be rehearsed."""
        standing, host = self._kept(settings)
        return Need(standing={"weights": self.target.num_bytes, **standing}, phases={}, host=host)

    def seconds(self, settings: Settings, device: Device, number: int) -> float:
        """Of so many prompts, every answer as long as it may be; or optimizer steps, without measuring around them."""
        target, total = self.target, 0.0
        # layers come while others compute, each process its shard of them; guards stay where they are
        coming = device.seconds_from_host(target.num_bytes / settings.count) if settings.offload else 0.0
        for name, phase in self._between(settings).items():
            least = coming if phase.operations and "guard" not in name else 0.0
            token = device.seconds(phase.operations / self.lengths.prompt, target.num_bytes, target.dtype)
            total += max(device.seconds(phase.operations, 0, target.dtype), least) + phase.tokens * max(token, least)
        return total * self._batches(settings, number)

    def _between(self, settings: Settings) -> dict[str, Phase]:
        if not 1 < settings.batch_size < self.most:
            return self._phases(settings)
        one, most = (self._phases(replace(settings, batch_size=size)) for size in (1, self.most))
        share = (settings.batch_size - 1) / (self.most - 1)
        return {
            name: Phase(*(round(low + (high - low) * share) for low, high in zip(one[name], most[name], strict=True)))
            for name in one
        }

    def _batches(self, settings: Settings, number: int) -> float:
        return number / settings.batch_size / (settings.count if settings.sharded else 1)

    def _kept(self, settings: Settings) -> tuple[dict[str, int], dict[str, int]]:
        """(beside the weights, on the host)"""
        raise NotImplementedError

    def _phases(self, settings: Settings) -> dict[str, Phase]:
        raise NotImplementedError

    def _generation(self, batch: int) -> Phase:
        """A pass over the prompts, and the cache at its longest, a tenth more for its layer that grows by a copy."""
        prompts = self.target.rehearse(Pass(batch, self.lengths.prompt, batch))
        cache = round(1.1 * batch * self.target.cache(self.lengths.both))
        return Phase(prompts.peak + cache, prompts.operations, self.lengths.response)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring(_Stage):
    """`score`. Guards, classifiers and the lexicon objective read answers; the refusal objective scores openings.

    Attributes:
        method: how weights are scored.
        answers: whether answers are scored without a guard.
        classifier: bytes of the classifier that scores them.
    """

    method: str = "esi"
    guard: Subject | None = None
    answers: bool = False
    classifier: int = 0

    def _kept(self, settings: Settings) -> tuple[dict[str, int], dict[str, int]]:
        sums = {"fp32 sums": _VALUE * self.target.layout.num_eligible}
        guard = {"guard weights": self.guard.num_bytes} if self.guard else {}
        beside = {"classifier weights": self.classifier} if self.classifier else guard
        beside = beside if self.method in NEEDS_OBJECTIVE else {}
        return (beside, sums) if settings.sums_on_cpu else (sums | beside, {})

    def _phases(self, settings: Settings) -> dict[str, Phase]:
        batch, lengths = settings.batch_size, self.lengths
        phases = {"statistics": Phase(3 * _VALUE * self.target.largest_tensor)}
        if self.method == "wanda":  # looks at answers one by one
            peak, operations = self.target.rehearse(Pass(1, lengths.both, lengths.response))
            phases |= {"generation": self._generation(batch), "observing": Phase(peak, batch * operations)}
        if self.method not in NEEDS_OBJECTIVE:
            return phases
        phases["forward and backward"] = Phase(*self._backward(batch))
        if self.guard is not None or self.answers:
            phases["generation"] = self._generation(batch)
        if self.guard is not None:
            reading = self.guard.rehearse(Pass(batch, _TEMPLATE + lengths.both, batch), trained="inputs")
            phases["guard's reading"] = Phase(*reading)
        return phases

    def _backward(self, batch: int) -> Rehearsal:
        lengths, target = self.lengths, self.target
        if self.guard is not None or self.answers:
            asked = Pass(batch, lengths.both, batch * lengths.response, "weighted")
            return target.rehearse(asked, trained="eligible")
        logits = batch * _OPENINGS * _OPENING
        if not target.config.is_encoder_decoder:
            packed = Pass(batch, lengths.prompt + _OPENINGS * (_OPENING - 1), logits, "packed")
            with suppress(PlanError):  # not every architecture takes such rows
                return target.rehearse(packed, trained="eligible")
        alone = Pass(batch * _OPENINGS, lengths.prompt + _OPENING, logits)
        return target.rehearse(alone, trained="eligible")


@dataclass(frozen=True, kw_only=True, eq=False)
class Answering(_Stage):
    """`evaluate` and `verify`: answers, and guards that judge them.

    Attributes:
        guards: all of them are loaded at once.
        reads_rows: whether the perplexity of rows is measured.
        num_disturbed: K, the weights that are disturbed at a time (verify).
        num_scores: how many scores of all eligible weights are made first, and kept beside the model (verify).
        source: whose weights are transplanted (verify), or whose answers are compared (evaluate --kl-to).
    """

    guards: tuple[Subject, ...] = ()
    reads_rows: bool = False
    num_disturbed: int = 0
    num_scores: int = 0
    source: Subject | None = None

    def _kept(self, settings: Settings) -> tuple[dict[str, int], dict[str, int]]:
        k, coordinates = self.num_disturbed, {"coordinates": _INDEX * self.num_disturbed}  # there, and on the CPU
        standing = {
            "guard weights": sum(guard.num_bytes for guard in self.guards),
            "scores": self.num_scores * _VALUE * self.target.layout.num_eligible,
            "the other model": self.source.num_bytes if self.source else 0,
            "disturbed": self.target.dtype.itemsize * k,
        }
        return standing | coordinates, coordinates | {"disturbed: scores": _VALUE * k}

    def _phases(self, settings: Settings) -> dict[str, Phase]:
        target, k, batch, lengths = self.target, self.num_disturbed, settings.batch_size, self.lengths
        phases = {"generation": self._generation(batch)}
        for guard in self.guards:
            read = guard.rehearse(Pass(batch, _TEMPLATE + lengths.both, batch))
            phases[f"reading of guard {len(phases)}"] = Phase(*read)
        if self.reads_rows:
            phases["perplexity"] = Phase(*target.rehearse(Pass(batch, lengths.row, batch * lengths.row)))
        if self.source is not None and not k:
            said = Pass(batch, lengths.both, batch * lengths.response)
            phases |= {f"comparing {n}": Phase(*model.rehearse(said)) for n, model in enumerate((target, self.source))}
        if k:  # new values, and where those of one tensor lie; or sigma of it in fp32
            share = target.largest_tensor / target.layout.num_eligible
            phases["disturbing"] = Phase(max(round((_VALUE + _PLACE * share) * k), _VALUE * target.largest_tensor))
        return phases


@dataclass(frozen=True, kw_only=True, eq=False)
class Training(_Stage):
    """`enhance` and `preserve` while they train.

    Attributes:
        num_selected: K, the weights trained (enhance) or kept (preserve).
        kind: "sparse" (enhance), "full" or "lora" (preserve).
        retained_rows: rows to retain beside each row (enhance).
        lora_rank: of the adapter.
        calibrated: prompts of a step of calibration, which comes after so many of the training (preserve).
        guards: that judge beside it.
        processes: that share the rows of every batch.
    """

    num_selected: int
    kind: Literal["sparse", "full", "lora"]
    retained_rows: int = 0
    lora_rank: int = 16
    calibrated: int = 0
    calibrated_every: int = 4
    guards: tuple[Subject, ...] = ()
    processes: int = 1

    def _kept(self, settings: Settings) -> tuple[dict[str, int], dict[str, int]]:
        target, k, size = self.target, self.num_selected, self.target.dtype.itemsize
        guard = {"guard weights": sum(guard.num_bytes for guard in self.guards)}
        if self.kind == "sparse":  # fp32 master, two moments and gradient; old value and coordinate
            return {"selected": (4 * _VALUE + size + _INDEX) * k, **guard}, {}
        adapter = 3 * _VALUE * target.num_adapted(self.lora_rank) if self.kind == "lora" else 0
        moments = 2 * target.num_bytes if self.kind == "full" else 0
        standing = {"protected": (size + _INDEX) * k, "adapter and its moments": adapter, "moments": moments}
        if self.calibrated:  # fp32 master and two moments; the original value
            standing["calibrated"] = (3 * _VALUE + size) * k
        return standing | guard, {"original weights": target.num_bytes}

    def _phases(self, settings: Settings) -> dict[str, Phase]:
        """What is retained by itself, and then the loss."""
        from safelocus.training.sharing import FEW_VALUES

        lengths, config = self.lengths, text_config(self.target.config)
        rows = -(-settings.batch_size // self.processes)
        retained = rows * self.retained_rows
        passes = [Pass(retained, lengths.retained or lengths.row, retained * lengths.response)] if retained else []
        logits = rows * (lengths.answer or lengths.row)
        routers = self.kind != "sparse" and hasattr(config, "output_router_logits")
        is_fused = routers or logits * int(config.vocab_size) > FEW_VALUES
        passes.append(Pass(rows, lengths.row, logits, "fused" if is_fused else "plain"))
        rank = self.lora_rank if self.kind == "lora" else 0
        step = self.target.rehearse(
            *passes, trained=_TRAINED[self.kind], checkpointing=settings.checkpointing, rank=rank,
            again=settings.accumulation > 1 and self.kind != "sparse",
        )  # fmt: skip
        phases = {"step": Phase(*step), "looks": Phase(self._generation(_LOOKED_AT).peak)}
        if own := -(-self.calibrated // self.processes):  # the gradients of the task are gone by then
            said = Pass(own, lengths.prompt + lengths.own, own * lengths.own)
            asked = self.target.rehearse(said, trained="eligible", checkpointing=settings.checkpointing, rank=rank)
            passes_between = self.calibrated_every * settings.accumulation
            phases["calibration"] = Phase(asked.peak, round(asked.operations / passes_between))
        return phases

    def _batches(self, settings: Settings, number: int) -> float:
        return number * settings.accumulation
