"""How many bytes each stage needs at once, item by item.

What stands is counted from the configuration (weights, fp32 sums, optimizer states, guards). Phases are rehearsed:
the model's own code on tensors without data, in the shapes that the stage will give it (see `passes`).

Input: a `Subject` and `Lengths`. Output: a `Need` for every batch size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from safelocus.model.layout.sizes import text_config
from safelocus.resources import passes
from safelocus.resources.need import Lengths, Need
from safelocus.resources.rehearsal import Peak, Rehearsal
from safelocus.resources.subject import Subject

GUARD_TEMPLATE = 256  # tokens that a guard's own template adds
JUDGED = 16  # answers that a guard judges at a time (evaluation.judges.guard)
_VALUE = 4  # bytes of fp32
_INDEX = 8  # bytes of a coordinate
_PLACE = 10 * _INDEX  # of expert, matrix, row and column of a coordinate, while they are computed


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring:
    """What scoring needs.

    Attributes:
        target, guard: models; a guard generates answers, without one the refusal objective scores openings.
        lengths: of prompts and answers.
    """

    target: Subject
    guard: Subject | None = None
    lengths: Lengths = field(default_factory=Lengths)

    def need(self, batch: int, *, sums_on_cpu: bool = False) -> Need:
        """Bytes at this batch size; the fp32 sums may be on the CPU."""
        sums = {"fp32 sums": _VALUE * self.target.num_eligible}
        standing = {"weights": self.target.num_bytes} | ({} if sums_on_cpu else sums)
        if self.guard is not None:
            standing["guard weights"] = self.guard.num_bytes
        return Need(
            standing=standing,
            phases={name: phase(batch) for name, phase in self._phases.items()} | {"statistics": self._statistics},
            host=sums if sums_on_cpu else {},
        )

    @property
    def _statistics(self) -> Peak:
        """One tensor at a time in fp32: its weights, and what quantiles need."""
        return Peak(3 * _VALUE * self.target.largest_tensor)

    @cached_property
    def _phases(self) -> dict[str, Callable[[int], Peak]]:
        rehearsal, lengths = self.target.rehearsal, self.lengths
        eligible = _eligible(self.target)

        def backward(work: Callable[[int], Any]) -> passes.Chord:
            return passes.Chord(lambda batch: rehearsal.peak(work(batch), trained=eligible))

        if self.guard is None:
            return {"forward and backward": backward(lambda batch: passes.refusal(batch, lengths.prompt))}
        read = GUARD_TEMPLATE + lengths.both
        return {
            "generation": passes.generation(rehearsal, lengths),
            "guard's reading": _reading(self.guard.rehearsal, lambda batch: passes.reading(batch, read)),
            "forward and backward": backward(lambda batch: passes.transferred(batch, lengths)),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Answering:
    """What `evaluate` and `verify` need: answers, and guards that judge them.

    Attributes:
        target: the model that answers.
        guards: that judge; all of them are loaded at once.
        lengths: of prompts, answers, and rows.
        reads_rows: whether the perplexity of rows is measured.
        num_disturbed: K, the weights that are disturbed at a time (verify).
        num_scores: how many scores of all eligible weights are made first, and kept beside the model (verify).
        source: whose weights are transplanted (verify).
    """

    target: Subject
    guards: tuple[Subject, ...] = ()
    lengths: Lengths = field(default_factory=Lengths)
    reads_rows: bool = False
    num_disturbed: int = 0
    num_scores: int = 0
    source: Subject | None = None

    def need(self, batch: int) -> Need:
        """Bytes with so many prompts at a time."""
        target, k = self.target, self.num_disturbed
        standing = {"weights": target.num_bytes}
        host: dict[str, int] = {}
        phases = {name: phase(batch) for name, phase in self._phases.items()}
        if self.num_scores:
            standing["scores"] = self.num_scores * _VALUE * target.num_eligible
        if self.source is not None:
            standing["source of transplants"] = self.source.num_bytes
        if k:
            coordinates = {"disturbed: coordinates": _INDEX * k}  # a copy on an accelerator, and the same on the CPU
            standing |= {"disturbed: old values": target.weight_bytes * k, **coordinates}
            host |= {**coordinates, "disturbed: scores": _VALUE * k}
            # new values; and of one tensor, with its share of the weights, where each lies; or sigma of it in fp32
            share = target.largest_tensor / target.num_eligible
            phases["disturbing"] = Peak(max(round((_VALUE + _PLACE * share) * k), _VALUE * target.largest_tensor))
        if self.guards:
            standing["guard weights"] = sum(guard.num_bytes for guard in self.guards)
        return Need(standing=standing, phases=phases, host=host)

    @cached_property
    def _phases(self) -> dict[str, Callable[[int], Peak]]:
        lengths, target = self.lengths, self.target.rehearsal
        phases: dict[str, Callable[[int], Peak]] = {"generation": passes.generation(target, lengths)}
        if self.guards:
            readers = [_judging(guard.rehearsal, lengths) for guard in self.guards]
            phases["guard's reading"] = lambda batch: max((read(batch) for read in readers), key=lambda p: p.total)
        if self.reads_rows:
            phases["perplexity"] = _reading(target, lambda batch: passes.likelihood(batch, lengths.row))
        return phases


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """What `enhance` and `preserve` need while they train.

    Attributes:
        target: the model.
        num_selected: K, the weights trained (enhance) or kept (preserve).
        kind: "sparse" (enhance), "full" or "lora" (preserve).
        lengths: of rows.
        retained_rows: rows to retain beside each row (enhance).
        lora_rank: of the adapter.
        guard: that judges beside it.
        batch: rows at a time, at most.
        look_batch: prompts answered at a time when the model is looked at.
    """

    target: Subject
    num_selected: int
    kind: str
    lengths: Lengths = field(default_factory=Lengths)
    retained_rows: int = 0
    lora_rank: int = 16
    guard: Subject | None = None
    batch: int = 8
    look_batch: int = 32

    def need(self, micro_batch: int, *, checkpointing: bool = False, accumulation: int = 1) -> Need:
        """Bytes with so many rows at a time."""
        target, k = self.target, self.num_selected
        standing = {"weights": target.num_bytes}
        host: dict[str, int] = {}
        if self.kind == "sparse":
            standing |= {"selected: fp32 masters": _VALUE * k, "selected: moments": 2 * _VALUE * k,
                         "selected: gradient": _VALUE * k, "selected: old values": target.weight_bytes * k,
                         "selected: coordinates": _INDEX * k}  # fmt: skip
        else:
            trained, size = (
                (target.num_weights, target.weight_bytes) if self.kind == "full" else (self._adapter, _VALUE)
            )
            standing |= {"moments": 2 * size * trained, "protected values and coordinates":
                         (target.weight_bytes + _INDEX) * k}  # fmt: skip
            if self.kind == "lora":
                standing |= {"adapter": size * trained, "gradients": size * trained}
            host["original weights"] = target.num_bytes
        if self.guard is not None:
            standing["guard weights"] = self.guard.num_bytes
        step = self._step(checkpointing)(micro_batch)
        if self.kind == "full" and accumulation > 1:
            step = replace(step, gradients=step.gradients + target.num_bytes)  # of earlier passes
        return Need(standing=standing, phases={"step": step, "looks": self._looks(self.look_batch)}, host=host)

    @property
    def _adapter(self) -> int:
        """Weights of the adapter on all linear layers."""
        total = 0
        for name in self.target.layout.eligible_tensors:
            tensor = self.target.layout.tensors[name]
            if not tensor.fused_experts and len(tensor.shape) == 2:
                total += self.lora_rank * sum(tensor.shape)
        return total

    @cached_property
    def _rehearsal(self) -> Rehearsal:
        return self.target.wrapped(self._wrap) if self.kind == "lora" else self.target.rehearsal

    def _wrap(self, model: Any) -> Any:
        from safelocus.training.lora import Lora

        return Lora(rank=self.lora_rank).wrap(model)

    def _step(self, checkpointing: bool) -> passes.Chord:
        known: dict[bool, passes.Chord] = self._steps
        if checkpointing not in known:
            trained = {"sparse": _eligible(self.target), "lora": lambda name: "lora_" in name}.get(
                self.kind, lambda _: True
            )
            routers = self.kind != "sparse" and hasattr(text_config(self.target.config), "output_router_logits")
            work = passes.training(self._rehearsal, self.lengths, self.retained_rows, routers=routers)
            known[checkpointing] = passes.Chord(
                lambda batch: self._rehearsal.peak(
                    work(batch), trained=trained, checkpointing=checkpointing, keep_gradients=self.kind == "full"
                ),
                large=self.batch,
            )
        return known[checkpointing]

    @cached_property
    def _steps(self) -> dict[bool, passes.Chord]:
        return {}

    @cached_property
    def _looks(self) -> Callable[[int], Peak]:
        return passes.generation(self.target.rehearsal, self.lengths)


def _eligible(target: Subject) -> Callable[[str], bool]:
    """Whether a parameter may be selected, also where layers alike were left out and others have moved up."""
    kinds = {_numberless(name) for name in target.layout.eligible_tensors}
    return lambda name: _numberless(name) in kinds


def _numberless(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _reading(rehearsal: Rehearsal, work: Callable[[int], Any]) -> passes.Chord:
    return passes.Chord(lambda batch: rehearsal.peak(work(batch), trained=passes.nothing))


def _judging(guard: Rehearsal, lengths: Lengths) -> Callable[[int], Peak]:
    """A guard takes no more answers at a time than its own batch size."""
    read = _reading(guard, lambda batch: passes.last_logits(batch, GUARD_TEMPLATE + lengths.both))
    return lambda batch: read(min(batch, JUDGED))
