"""Which settings fit a device, and which of them are taken.

Scoring and answering: the largest batch that fits; the fp32 sums beside the weights, and one device, if that leaves
room for a few prompts, else the sums on the CPU or several devices.

Training: rows per step never change. What may change is how many of them are in memory at once: first activations are
checkpointed (the same numbers, a third more time), then batches are divided into passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from safelocus.errors import ResourceError
from safelocus.resources.devices import Device
from safelocus.resources.stages import Answering, Need, Scoring, Settings, Training

MARGIN = 0.9  # of what is free: allocators leave gaps, kernels take work space
LARGEST = 32  # prompts at a time
_LARGEST_ON_CPU = 8  # prompts scored at a time; a core is busy with few already
_FEW = 4  # prompts at a time, for which nothing is moved off the device


class DoesNotFit(ResourceError):
    """No settings fit; `smallest` are those that come closest."""

    def __init__(self, message: str, smallest: "Choice") -> None:
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings for a device, and the bytes that they need there."""

    device: Device
    settings: Settings
    need: Need

    @property
    def room(self) -> int:
        """Bytes that one device has for it."""
        return int(MARGIN * self.device.free)

    @property
    def host_room(self) -> float:
        """Bytes of memory that the host has for it."""
        return float("inf") if self.device.host is None else MARGIN * self.device.host

    @property
    def fits(self) -> bool:
        return self.need.total <= self.room and sum(self.need.host.values()) <= self.host_room

    @property
    def sentence(self) -> str:
        """What was chosen and why, in one line."""
        chosen = self.settings
        settings = [f"batch size {chosen.batch_size}"]
        settings += [f"{chosen.accumulation} passes per step"] if chosen.accumulation > 1 else []
        settings += ["activations computed twice"] * chosen.checkpointing
        settings += [chosen.label] if chosen.label != "one device" else []
        room = f"{in_bytes(self.need.total)} of {in_bytes(self.device.free)} free on {self.device.label}"
        return f"{', '.join(settings)}: {room} ({self.parts})"

    @property
    def parts(self) -> str:
        """The bytes, part by part."""
        largest = max(self.need.phases.items(), key=lambda item: item[1])
        items = (*self.need.standing.items(), largest)
        return ", ".join(f"{name} {in_bytes(size)}" for name, size in items if size)


def choose(
    stage: Scoring | Answering,
    device: Device,
    *,
    most: int = LARGEST,
    batch_size: int | None = None,
    accumulate_on: str | None = None,
    sharded: bool = False,
    offload: bool = False,
) -> Choice:
    """Settings for scoring or answering.

    Args:
        device: or several alike, which are used where one does not do; with `sharded` all are.
        most: prompts at a time, at most.
        batch_size, accumulate_on: given by the user, and not changed.
        offload: keep the weights on the host. Slow, so nothing chooses it by itself.

    Raises:
        DoesNotFit: nothing fits; or, with a batch size given, the weights alone do not.

    Example:
        >>> from safelocus.resources import Subject, find_device
        >>> choice = choose(Scoring(target=Subject.load("organism:dense")), find_device("24GB"))
        >>> choice.settings.batch_size, choice.settings.label
        (32, 'one device')
    """
    can_move = isinstance(stage, Scoring) and not device.is_cpu
    most = min(most, _LARGEST_ON_CPU if isinstance(stage, Scoring) and device.is_cpu else LARGEST)
    sizes = [batch_size] if batch_size else [most, *(1 << n for n in range(5, -1, -1) if 1 << n < most)]
    sums = [False, True] if can_move and accumulate_on is None else [can_move and accumulate_on == "cpu"]
    places = [
        replace(place, sums_on_cpu=on_cpu)
        for place in _places(device, sharded=sharded, offload=offload)
        for on_cpu in sums
    ]
    few = min(_FEW, sizes[0])
    ways = [replace(place, batch_size=size) for place in places for size in sizes if size >= few]
    ways += [replace(place, batch_size=size) for size in sizes if size < few for place in places]
    return _first(stage, device, ways, given=batch_size is not None)


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
) -> Choice:
    """Settings for training with `batch_size * accumulation` rows per step.

    Args:
        given: whether batch size and accumulation were given by the user, and are not changed.
        checkpointing: the user's; None to choose.
        sharded, offload: as for scoring.

    Raises:
        DoesNotFit: nothing fits; or, with all settings given, the weights alone do not.
    """
    divisors = [1] if given else [2**n for n in range(12) if batch_size % 2**n == 0]
    ways = [
        replace(
            place, batch_size=batch_size // divisor, accumulation=accumulation * divisor, checkpointing=twice,
        )
        for place in _places(device, sharded=sharded, offload=offload)
        for divisor in divisors
        for twice in ((False, True) if checkpointing is None and divisor == 1 else (checkpointing is not False,))
    ]  # fmt: skip
    return _first(training, device, ways, given=given)


def _places(device: Device, *, sharded: bool, offload: bool) -> list[Settings]:
    """Where the model can lie, one prompt or row at a time: where others are not asked for, on one device or on all."""
    counts = [device.count] if sharded else [1] if offload else sorted({1, device.count})
    on_host = offload and not device.is_cpu
    return [Settings(batch_size=1, count=count, sharded=sharded, offload=on_host) for count in counts]


def _first(
    stage: Scoring | Answering | Training, device: Device, ways: Sequence[Settings], *, given: bool
) -> Choice:  # fmt: skip
    """The first that fits; only those are rehearsed in which what stands does."""
    layers = 2 * stage.target.largest_layer * stage.target.dtype.itemsize  # one is used while the next one comes

    def choice(way: Settings, need: Need) -> Choice:
        return Choice(device=device, settings=way, need=need.on(device, way, layers))

    hopeful = [way for way in ways if given or choice(way, stage.standing(way)).fits]
    tried = []
    for way in hopeful or ways[-1:]:
        tried.append(choice(way, stage.need(way)))
        if tried[-1].fits:
            return tried[-1]
    for attempt in tried if given else ():
        if attempt.need.standing.get("weights", 0) <= device.free:
            return attempt  # the user's word against an estimate: warned, not refused
    smallest = min(tried, key=lambda attempt: attempt.need.total)
    shorter = (
        "a smaller --max-length, or --lora (preserve)" if isinstance(stage, Training) else "fewer --max-new-tokens"
    )
    wide = "--dtype bfloat16; " if stage.target.dtype.itemsize > 2 else ""
    if (beside := {name: size for name, size in smallest.need.host.items() if size}) and (
        smallest.need.total <= smallest.room
    ):
        parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in beside.items())
        raise DoesNotFit(
            f"does not fit: beside {device.label} {in_bytes(sum(beside.values()))} of the CPU's memory are needed, "
            f"{in_bytes(smallest.host_room)} can be used ({parts}). What would help: {wide}fewer processes, or more "
            "memory", smallest,
        )  # fmt: skip
    elsewhere = "" if device.is_cpu else "several devices (--device auto, --shard); --offload or --device cpu (slow); "
    raise DoesNotFit(
        f"does not fit: at least {in_bytes(smallest.need.total)} are needed on {device.label} "
        f"({smallest.settings.label}), {in_bytes(smallest.room)} can be used ({smallest.parts}). "
        f"What would help: {wide}{elsewhere}{shorter}", smallest,
    )  # fmt: skip


def in_bytes(size: float) -> str:
    """A size, in the unit that suits it.

    >>> in_bytes(123_456_789_000), in_bytes(1_234_000_000), in_bytes(3_400_000)
    ('123 GB', '1.2 GB', '3.4 MB')
    """
    value, unit = (size / 1e9, "GB") if size >= 1e9 else (size / 1e6, "MB")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"


def in_words(seconds: float) -> str:
    """A rough time.

    >>> in_words(0.2), in_words(95), in_words(9000)
    ('a second', '2 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days"
