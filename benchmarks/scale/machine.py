"""The machine: its name, its clock, and its limits, which are measured beside every figure.

On a CPU with one thread the clock is the process's own time, which other work on the machine does not stretch (but
for caches and memory that are shared). Otherwise it is wall time, with the device waited for at both ends.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import safelocus as sl

_COPIED = 1 << 28  # bytes, well beyond a cache


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one action, round after round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: "Times") -> tuple[float, float, float]:
        """(median, least, most) of this over the other, round by round: what slows both cancels."""
        ratios = [own / theirs for own, theirs in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True, kw_only=True)
class Machine:
    device: str
    dtype: torch.dtype
    threads: int
    rounds: int
    memory: float  # bytes that a baseline may need; it is left out where it would need more

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def describe(self) -> dict[str, object]:
        """What the figures depend on; no names of hosts or users."""
        found = {"processor": _processor(), "cores": torch.get_num_threads(), "memory_gb": round(_memory() / 2**30)}
        if self.is_cuda:
            found["device"] = torch.cuda.get_device_name()
            found["cuda"] = torch.version.cuda
        return found | {
            "dtype": str(self.dtype).removeprefix("torch."), "threads": self.threads, "rounds": self.rounds,
            "clock": "process" if self._uses_process_time else "wall", "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__, "transformers": transformers.__version__, "safelocus": sl.__version__,
        }  # fmt: skip

    @property
    def _uses_process_time(self) -> bool:
        return not self.is_cuda and self.threads == 1

    def seconds(self, action: Callable[[], object]) -> float:
        """Of one call, to its end on the device."""
        clock = time.process_time if self._uses_process_time else time.perf_counter
        self.wait()
        start = clock()
        action()
        self.wait()
        return clock() - start

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def alternate(self, actions: dict[str, Callable[[], object]], rounds: int | None = None) -> dict[str, Times]:
        """Run all in turn, once to warm up and then round by round: a drifting machine drifts for all."""
        for action in actions.values():
            action()
        found: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(rounds or self.rounds):
            for name, action in actions.items():
                found[name].append(self.seconds(action))
        return {name: Times(seconds=tuple(values)) for name, values in found.items()}

    def matmul(self) -> tuple[Callable[[], object], int]:
        """A large product, and its number of floating-point operations."""
        size = 8192 if self.is_cuda else 1536
        left, right = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return (lambda: left @ right), 2 * size**3

    def copy(self) -> tuple[Callable[[], object], int]:
        """A copy of memory, and the bytes that it reads and writes."""
        size = _COPIED * (8 if self.is_cuda else 1)
        source, to = (torch.ones(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        return (lambda: to.copy_(source)), 2 * size

    def peak(self, work: Callable[[], object]) -> tuple[int, int]:
        """(bytes of tensors kept, most bytes of tensors at once) of a call; what kernels keep is not counted."""
        if self.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            kept = work()
            found = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
            del kept
            return found
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            kept = work()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        del kept
        return now, most


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> int:
    import psutil

    return psutil.virtual_memory().total
