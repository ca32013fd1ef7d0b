"""How many bytes each stage needs at once, item by item.

    need = what stands all the time + the largest of the phases that come one after another

What stands is counted from the configuration (weights, fp32 sums, state of the optimizer, guard); phases are rehearsed
(see `rehearsal`): the model's own code on tensors without data, in the shapes that the stage will give it.

A phase grows with the batch. Its peak is the largest of several sums that each grow along a line, so it is convex, and
the chord between a batch of one and a large one is never below it: two rehearsals tell all batch sizes between.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from safelocus.forcing import Forced, logits_at
from safelocus.objective.refusal import COMPLIANCES, REFUSALS
from safelocus.resources.rehearsal import Peak, Rehearsal, inputs
from safelocus.resources.subject import Subject

LARGE = 64  # batch of the chord's other end
OPENINGS, OPENING_TOKENS = len(REFUSALS) + len(COMPLIANCES), 7  # of the refusal objective
GUARD_TEMPLATE = 256  # tokens that a guard's own template adds
_TRANSFER = 3 * (256 << 20)  # of the vocabulary transfer, which works in chunks (objective.transfer)
_VALUE = 4  # bytes of fp32
_INDEX = 8  # bytes of a coordinate


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one stage on one device, and beside it.

    Attributes:
        standing: name -> bytes that are there all the time.
        phases: name -> bytes that come and go, one after another.
        host: name -> bytes on the CPU, where the model lies on an accelerator.
    """

    standing: Mapping[str, int]
    phases: Mapping[str, Peak]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.standing.values()) + self.phases[self.largest_phase].total

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name].total)

    def on_host(self) -> "Need":
        """The same where the device is the CPU: what would lie beside the device is on it."""
        return replace(self, standing={**self.standing, **self.host}, host={})

    def offloaded(self, *, gathered: int) -> "Need":
        """The same with weights, and all that is kept of them, on the host; `gathered` bytes of them come at a time."""
        guard = {name: size for name, size in self.standing.items() if name.startswith("guard")}
        rest = {name: size for name, size in self.standing.items() if name not in guard}
        return replace(self, standing={"gathered layers": gathered, **guard}, host={**rest, **self.host})

    def spread(self, count: int, *, gathered: int | None = None) -> "Need":
        """The share of each of several devices. Shards are gathered to compute with, and every process has a guard."""
        sharded = gathered is not None
        standing = {
            name: size if sharded and name.startswith(("guard", "gathered")) else -(-size // count)
            for name, size in self.standing.items()
        }
        if gathered is not None:
            shards = {name: replace(peak, gradients=-(-peak.gradients // count)) for name, peak in self.phases.items()}
            return replace(self, standing=standing | {"gathered layers": gathered}, phases=shards)
        # layers, and with them what they keep, are divided; the head's logits are on one device
        parts = {
            name: Peak(-(-peak.activations // count), peak.logits, -(-peak.gradients // count))
            for name, peak in self.phases.items()
        }
        return replace(self, standing=standing, phases=parts)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens.

    Attributes:
        prompt, response: of a prompt in its template, and of an answer.
        row: of a training row, at most.
        retained: of a row to retain.
    """

    prompt: int = 64
    response: int = 256
    row: int = 512
    retained: int | None = None

    @property
    def both(self) -> int:
        return self.prompt + self.response


class _Chord:
    """A peak for every batch size, from two rehearsals."""

    def __init__(self, rehearse: Callable[[int], Peak], *, large: int = LARGE) -> None:
        self._large = max(large, 2)
        self._ends = rehearse(1), rehearse(self._large)

    def __call__(self, batch: int) -> Peak:
        small, large = (astuple(end) for end in self._ends)
        share = (batch - 1) / (self._large - 1)
        return Peak(*(max(round(low + (high - low) * share), 0) for low, high in zip(small, large, strict=True)))


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
        if self.guard is None:
            with rehearsal.training(eligible):
                return {"forward and backward": _Chord(lambda b: rehearsal.peak(_refusal(b, lengths.prompt)))}
        reader = self.guard.rehearsal
        with reader.training(lambda _: False):
            reading = _Chord(lambda b: reader.peak(_reading(b, GUARD_TEMPLATE + lengths.both)))
        with rehearsal.training(eligible):
            backward = _Chord(lambda b: rehearsal.peak(_transferred(b, lengths)))
        return {
            "generation": _generation(rehearsal, lengths),
            "guard's reading": reading,
            "forward and backward": backward,
        }


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
        from safelocus.preservation.preserving import Lora

        return Lora(rank=self.lora_rank).wrap(model)

    def _step(self, checkpointing: bool) -> _Chord:
        known: dict[bool, _Chord] = self._steps
        if checkpointing not in known:
            trained = {"sparse": _eligible(self.target), "lora": lambda name: "lora_" in name}.get(
                self.kind, lambda _: True
            )
            work = _training(self._rehearsal, self.lengths, self.retained_rows)
            with self._rehearsal.training(trained):
                known[checkpointing] = _Chord(
                    lambda b: self._rehearsal.peak(
                        work(b), checkpointing=checkpointing, keep_gradients=self.kind == "full"
                    ),
                    large=self.batch,
                )
        return known[checkpointing]

    @cached_property
    def _steps(self) -> dict[bool, _Chord]:
        return {}

    @cached_property
    def _looks(self) -> Callable[[int], Peak]:
        return _generation(self.target.rehearsal, self.lengths)


def _eligible(target: Subject) -> Callable[[str], bool]:
    """Whether a parameter may be selected, also where layers alike were left out and others have moved up."""
    kinds = {_numberless(name) for name in target.layout.eligible_tensors}
    return lambda name: _numberless(name) in kinds


def _numberless(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _generation(rehearsal: Rehearsal, lengths: Lengths) -> Callable[[int], Peak]:
    """The cache at its longest, a tenth more for the layer of it that grows by a copy, and a pass over the prompts."""
    cache = rehearsal.cache(lengths.both)
    with rehearsal.training(lambda _: False):
        prefill = _Chord(lambda b: rehearsal.peak(_last_logits(b, lengths.prompt)))

    def peak(batch: int) -> Peak:
        pass_over = prefill(batch)
        return replace(pass_over, activations=pass_over.activations + round(cache * batch * 1.1))

    return peak


def _last_logits(batch: int, length: int) -> Callable[[Any], None]:
    @torch.no_grad()
    def work(model: Any) -> None:
        _logits(model, batch, length, batch).float()

    return work


def _refusal(batch: int, prompt: int) -> Callable[[Any], Tensor]:
    """As `Refusal`: every prompt with every opening."""
    rows = batch * OPENINGS

    def work(model: Any) -> Tensor:
        logits = _logits(model, rows, prompt + OPENING_TOKENS, rows * OPENING_TOKENS)
        index = torch.zeros(len(logits), dtype=torch.long, device="meta")
        return Forced(logits=logits, token=index, row=index).log_likelihood(rows).sum()

    return work


def _transferred(batch: int, lengths: Lengths) -> Callable[[Any], Tensor]:
    """As `TextObjective`: logits along the answers, and their gradient of the same size, made in chunks."""

    def work(model: Any) -> Tensor:
        logits = _logits(model, batch, lengths.both, batch * lengths.response)
        slope = torch.empty_like(logits)
        torch.empty(min(4 * _VALUE * logits.numel(), _TRANSFER), dtype=torch.uint8, device="meta")
        return torch.einsum("nv,nv->n", logits, slope).float().sum()

    return work


def _reading(batch: int, length: int) -> Callable[[Any], Tensor]:
    """As a guard reads: one verdict for each row, differentiated in the embeddings."""

    def work(model: Any) -> Tensor:
        handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_())
        try:
            return _logits(model, batch, length, batch).float().logsumexp(-1).sum()
        finally:
            handle.remove()

    return work


def _training(
    rehearsal: Rehearsal, lengths: Lengths, retained_rows: int
) -> Callable[[int], Callable[[Any], Iterator[Tensor]]]:
    """What is retained, by itself (`retention`), and then SFTTrainer's loss."""
    from trl.trainer.utils import add_fused_lm_head

    base = rehearsal.model.get_base_model() if hasattr(rehearsal.model, "get_base_model") else rehearsal.model
    if "forward" not in vars(base):  # rehearsed as a training before
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    length = lengths.retained or lengths.row

    def divergence(model: Any, rows: int) -> Tensor:
        with torch.no_grad():
            reference = _logits(model, rows, length, rows * lengths.response).float().log_softmax(-1)
        own = _logits(model, rows, length, rows * lengths.response).float()
        return (reference.exp() * (reference - own.log_softmax(-1))).sum(-1).mean()

    def work(batch: int) -> Callable[[Any], Iterator[Tensor]]:
        def step(model: Any) -> Iterator[Tensor]:
            if retained_rows:
                yield divergence(model, batch * retained_rows)
            given = inputs(batch, lengths.row)
            yield model(**given, labels=given["input_ids"], fused_lm_head=True).loss

        return step

    return work


def _logits(model: Any, batch: int, length: int, number: int) -> Tensor:
    given = inputs(batch, length)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"]
    return logits_at(model, given, torch.zeros(number, dtype=torch.long, device="meta"))
