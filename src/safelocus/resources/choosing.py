"""Which settings fit a device, and which of them are taken.

Scoring: the largest batch (a power of two) that fits, the fp32 sums beside the weights if that leaves room for a batch
of a few prompts, else on the CPU; one device before several. Answering: the largest batch that fits.

Training: rows per step never change. What may change is how many of them are in memory at once: first activations are
checkpointed (the same numbers, a third more time), then batches are divided into passes.

Input: a stage's memory (`memory`) and a `Device`. Output: a `Choice`, with what it needs and why it was made.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from safelocus.errors import ResourceError
from safelocus.resources.devices import Device, host_free
from safelocus.resources.memory import Answering, Scoring, Training
from safelocus.resources.need import Need
from safelocus.resources.passes import LARGE

MARGIN = 0.9  # of what is free: allocators leave gaps, kernels take work space
_FEW = 4  # prompts at a time, for which nothing is moved off the device
_LARGEST, _LARGEST_ON_CPU = 32, 8  # prompts scored at a time; a core is busy with few already
ANSWERED = 32  # prompts answered at a time, on any device


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where things lie.

    Attributes:
        count: devices that share one model.
        sharded: by rows, over as many processes (FSDP2); else by layers, in one process.
        sums_on_cpu: whether scoring adds up gradients on the CPU.
        offload: whether weights lie in the host's memory, and come layer by layer.
    """

    count: int = 1
    sharded: bool = False
    sums_on_cpu: bool = False
    offload: bool = False

    @property
    def label(self) -> str:
        where = "one device"
        if self.count > 1:
            where = f"{self.count} processes, sharded" if self.sharded else f"{self.count} devices"
        where = f"{where}, weights on the host" if self.offload else where
        return f"{where}, sums on the CPU" if self.sums_on_cpu else where

    @property
    def options(self) -> list[str]:
        """Of the command line."""
        spread = [] if self.count == 1 else ["--shard"] if self.sharded else ["--device", "auto"]
        return spread + ["--offload"] * self.offload + ["--accumulate-on", "cpu"] * self.sums_on_cpu


class DoesNotFit(ResourceError):
    """No settings fit; `smallest` are those that come closest."""

    def __init__(self, message: str, smallest: "Choice") -> None:
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings, and what they need.

    Attributes:
        device: that they are for.
        placement: on it, or on several.
        batch_size: prompts or rows at a time.
        accumulation: passes per optimizer step.
        checkpointing: whether activations are computed twice.
        wide: whether a weight has more than 16 bits.
        need: bytes on each device.
    """

    device: Device
    placement: Placement
    batch_size: int
    accumulation: int = 1
    checkpointing: bool = False
    wide: bool = False
    need: Need

    @property
    def room(self) -> int:
        """Bytes that one device has for it."""
        return int(MARGIN * self.device.free)

    @property
    def fits(self) -> bool:
        return self.need.total <= self.room and self._host_fits

    @property
    def _host_fits(self) -> bool:
        return not self.device.is_here or sum(self.need.host.values()) <= MARGIN * host_free()

    @property
    def sentence(self) -> str:
        """What was chosen and why, in one line."""
        settings = [f"batch size {self.batch_size}"]
        settings += [f"{self.accumulation} passes per step"] if self.accumulation > 1 else []
        settings += ["activations computed twice"] if self.checkpointing else []
        settings += [self.placement.label] if self.placement != Placement() else []
        parts = [
            *self.need.standing.items(),
            (self.need.largest_phase, self.need.phases[self.need.largest_phase].total),
        ]
        items = ", ".join(f"{name} {in_bytes(size)}" for name, size in _joined(parts) if size)
        room = f"{in_bytes(self.need.total)} of {in_bytes(self.device.free)} free on {self.device.label}"
        return f"{', '.join(settings)}: {room} ({items})"


def choose_scoring(
    scoring: Scoring,
    device: Device,
    *,
    most: int = LARGE,
    batch_size: int | None = None,
    accumulate_on: str | None = None,
    sharded: bool = False,
    offload: bool = False,
) -> Choice:
    """Settings for scoring.

    Args:
        device: or several alike, which are used where one does not do; with `sharded` all are.
        most: prompts at a time, at most; no more are ever taken than keep a device of this kind busy.
        batch_size, accumulate_on: given by the user, and not changed.
        offload: keep the weights on the host. Slow, so nothing chooses it by itself.

    Raises:
        DoesNotFit: nothing fits; or, with a batch size given, the weights alone do not.

    Example:
        >>> from safelocus.resources import Subject, find_device
        >>> choice = choose_scoring(Scoring(target=Subject.load("organism:dense")), find_device("24GB"))
        >>> choice.batch_size, choice.placement.label
        (32, 'one device')
    """
    found: list[Choice] = []
    most = min(most, _LARGEST_ON_CPU if device.is_cpu else _LARGEST)
    for placement in _placements(device, sharded, offload):
        if accumulate_on is not None and placement.sums_on_cpu != (accumulate_on == "cpu" and not device.is_cpu):
            continue
        sizes = [batch_size] if batch_size else list(_powers(most))
        needs = ((size, scoring.need(size, sums_on_cpu=placement.sums_on_cpu)) for size in sizes)
        found.append(_fitting(_choice(device, placement, need, scoring, batch_size=size) for size, need in needs))
    return _first(found, _FEW if batch_size is None else 1, given=batch_size is not None)


def choose_answering(
    answering: Answering,
    device: Device,
    *,
    most: int = ANSWERED,
    batch_size: int | None = None,
    sharded: bool = False,
    offload: bool = False,
) -> Choice:
    """Settings for answering and judging.

    Args:
        most: prompts at a time, at most.
        batch_size: given by the user, and not changed.
        sharded, offload: as for scoring.

    Raises:
        DoesNotFit: as for scoring.

    Example:
        >>> from safelocus.resources import Subject, find_device
        >>> choice = choose_answering(Answering(target=Subject.load("organism:dense")), find_device("24GB"), most=20)
        >>> choice.batch_size
        20
    """
    found: list[Choice] = []
    most = min(most, ANSWERED)
    for placement in _placements(device, sharded, offload):
        if placement.sums_on_cpu:
            continue
        sizes = [batch_size] if batch_size else list(dict.fromkeys([most, *_powers(most)]))
        needs = ((size, answering.need(size)) for size in sizes)
        found.append(_fitting(_choice(device, placement, need, answering, batch_size=size) for size, need in needs))
    return _first(found, _FEW if batch_size is None else 1, given=batch_size is not None)


def choose_training(
    training: Training,
    device: Device,
    *,
    batch_size: int,
    accumulation: int = 1,
    checkpointing: bool | None = None,
    given: bool = False,
    sharded: bool = False,
    offload: bool = False,
    processes: int = 1,
) -> Choice:
    """Settings for training with `batch_size * accumulation` rows per step.

    Args:
        given: whether batch size and accumulation were given by the user, and are not changed.
        checkpointing: the user's; None to choose.
        sharded, offload: as for scoring.
        processes: that share the rows of every batch.

    Raises:
        DoesNotFit: nothing fits; or, with all settings given, the weights alone do not.
    """
    divisors = [1] if given else [2**n for n in range(12) if batch_size % 2**n == 0]
    ways = [
        (divisor, twice)
        for divisor in divisors
        for twice in ((False, True) if checkpointing is None and divisor == 1 else (checkpointing is not False,))
    ]

    def choose(placement: Placement, divisor: int, twice: bool) -> Choice:
        rows, passes = batch_size // divisor, accumulation * divisor
        need = training.need(-(-rows // processes), checkpointing=twice, accumulation=passes)
        choice = _choice(device, placement, need, training, batch_size=rows, accumulation=passes)
        return replace(choice, checkpointing=twice)

    placements = [placement for placement in _placements(device, sharded, offload) if not placement.sums_on_cpu]
    found = [_fitting(choose(placement, *way) for way in ways) for placement in placements]
    return _first(found, 1, given=given, training=True)


def _placements(device: Device, sharded: bool, offload: bool) -> list[Placement]:
    if sharded or offload:
        return [Placement(count=device.count if sharded else 1, sharded=sharded, offload=offload and not device.is_cpu)]
    counts = [1] if device.count == 1 else [1, device.count]
    ways = (False,) if device.is_cpu else (False, True)
    return [Placement(count=count, sums_on_cpu=sums) for count in counts for sums in ways]


def _choice(
    device: Device, placement: Placement, need: Need, stage: Scoring | Answering | Training, **settings: int
) -> Choice:
    if device.is_cpu:
        need = need.on_host()
    layers = 2 * stage.target.largest_layer * stage.target.weight_bytes  # one is used while the next one comes
    if placement.offload:
        need = need.offloaded(gathered=layers)
    elif placement.count > 1:
        need = need.spread(placement.count, gathered=layers if placement.sharded else None)
    wide = stage.target.weight_bytes > 2
    return Choice(device=device, placement=placement, need=need, wide=wide, **settings)  # type: ignore[arg-type]


def _fitting(choices: Iterable[Choice]) -> Choice:
    """The first that fits, and none after it is made; else the last."""
    for choice in choices:
        if choice.fits:
            break
    return choice


def _first(found: list[Choice], least: int, *, given: bool, training: bool = False) -> Choice:
    """The first that fits with a batch of some size, else the first that fits at all."""
    fitting = [choice for choice in found if choice.fits]
    for choice in fitting:
        if choice.batch_size >= least:
            return choice
    if fitting:
        return max(fitting, key=lambda choice: choice.batch_size)
    if given and (
        possible := [choice for choice in found if choice.need.standing.get("weights", 0) <= choice.device.free]
    ):
        return possible[0]  # the user's word against an estimate: warned, not refused
    smallest = min(found, key=lambda choice: choice.need.total)
    raise DoesNotFit(_advice(smallest, training=training), smallest)


def _advice(choice: Choice, *, training: bool) -> str:
    """What does not fit, and what would."""
    need, device = choice.need, choice.device
    items = ", ".join(f"{name} {in_bytes(size)}" for name, size in _joined([*need.standing.items()]) if size)
    ways = []
    if "weights" in need.standing and choice.room > 0:
        shared = sum(size for name, size in need.standing.items() if not name.startswith("guard"))
        left = choice.room - (need.total - shared)
        if left > 0 and (number := -(-shared // left) * choice.placement.count) > choice.placement.count:
            ways.append(f"{number} devices like it (--device auto, or torchrun --nproc-per-node {number} ... --shard)")
    ways.append("--dtype bfloat16" if choice.wide else "")
    ways.append("" if device.is_cpu or choice.placement.offload else "--offload, which is slow")
    if training:
        ways.append("a smaller --max-length, or --lora (preserve)")
    else:
        ways.append("fewer --max-new-tokens" if "generation" in need.phases else "")
        ways.append("" if device.is_cpu else "--device cpu")
    where = f"{choice.placement.label} of " if choice.placement.count > 1 else ""
    phase = f"{need.largest_phase} {in_bytes(need.phases[need.largest_phase].total)}"
    return (
        f"does not fit: at least {in_bytes(need.total)} are needed on {where}{device.label}, "
        f"{in_bytes(choice.room)} can be used ({items}, {phase}). "
        f"What would help: {'; '.join(way for way in ways if way)}. `safelocus plan` shows every part"
    )


def _joined(items: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Parts of one thing ("selected: moments") added up."""
    sums: dict[str, int] = {}
    for name, size in items:
        key = name.partition(":")[0]
        sums[key] = sums.get(key, 0) + size
    return iter(sums.items())


def _powers(most: int) -> Iterator[int]:
    """Powers of two, the largest first, none above `most`."""
    size = 1 << max(most, 1).bit_length() - 1
    while size:
        yield size
        size >>= 1


def in_bytes(size: float) -> str:
    """A size, in the unit that suits it.

    >>> in_bytes(123_456_789_000), in_bytes(1_234_000_000), in_bytes(3_400_000)
    ('123 GB', '1.2 GB', '3.4 MB')
    """
    value, unit = (size / 1e9, "GB") if size >= 1e9 else (size / 1e6, "MB")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
