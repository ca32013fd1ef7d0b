"""What a device has: memory, floating-point operations and bytes per second.

Of this machine's own devices it is asked (memory) or measured (a CPU's speed); well-known accelerators are in a table
by name, so that a run can be planned for a machine that is elsewhere; `24GB` describes a device by its memory alone.

Sources of the table: the makers' data sheets, dense rates without sparsity; memory as drivers report it, in GiB.
"""

import difflib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from safelocus.errors import ResourceError

_GIB = 1 << 30
_UNITS = {"GB": 10**9, "GIB": _GIB, "TB": 10**12, "TIB": 1 << 40, "MB": 10**6, "MIB": 1 << 20}
_CONTEXT = 600 * 10**6  # what a driver and its libraries take of an accelerator before any tensor


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Operations per second in 16 and in 32 bits, and bytes per second between memory and cores, at best."""

    half_flops: float
    single_flops: float
    bandwidth: float

    def flops(self, num_bytes: int) -> float:
        """Operations per second on weights of so many bytes each."""
        return self.half_flops if num_bytes <= 2 else self.single_flops


# name -> memory in GiB, teraFLOP/s in bf16 (fp16 where there is no bf16) and in fp32, gigabytes per second
_TABLE: dict[str, tuple[float, float, float, float]] = {
    "B200": (180, 2250, 75, 8000),
    "H200": (140, 989, 67, 4800),
    "H100": (79.6, 989, 67, 3350),
    "H100 NVL": (93, 835, 60, 3900),
    "H100 PCIe": (79.6, 756, 51, 2000),
    "GH200": (95, 989, 67, 4000),
    "A100": (79.3, 312, 19.5, 2039),
    "A100 40GB": (39.5, 312, 19.5, 1555),
    "A40": (45, 150, 37, 696),
    "A10": (22.5, 125, 31, 600),
    "A6000": (47.5, 155, 39, 768),
    "L40S": (45, 362, 92, 864),
    "L40": (45, 181, 91, 864),
    "L4": (22.5, 121, 30, 300),
    "T4": (14.7, 65, 8.1, 320),
    "V100": (31.7, 125, 15.7, 900),
    "RTX 3090": (23.6, 71, 36, 936),
    "RTX 4090": (23.6, 165, 83, 1008),
    "RTX 5090": (31.4, 209, 105, 1792),
    "MI250X": (64, 191, 24, 1600),
    "MI300X": (192, 1307, 163, 5300),
}
_MODEST = Rates(half_flops=60e12, single_flops=15e12, bandwidth=400e9)  # of a device known by its memory alone


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, or several alike.

    Attributes:
        name: as torch calls it where it is here ("cuda:0", "cpu"), else as it was described.
        label: what it is, for people.
        memory, free: bytes of one: all, and those that nothing else uses.
        known_rates: of one; None where they have to be measured.
        count: how many there are.
        is_here: whether it is a device of this machine.
    """

    name: str
    label: str
    memory: int
    free: int
    known_rates: Rates | None = None
    count: int = 1
    is_here: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    @property
    def rates(self) -> Rates:
        """Of one; a CPU's are measured the first time, in less than a second."""
        return self.known_rates or _measured()


def find_device(text: str | None = None, *, count: int | None = None) -> Device:
    """The device that a text describes.

    Args:
        text: "cuda:0", "cpu" and the like for one of this machine; "H200", "RTX 4090", "80GB", "2x24GB" for any;
            "auto" for all accelerators of this machine; default: what models are loaded to.
        count: how many of them.

    Raises:
        ResourceError: nothing is known by that name, or this machine has no such device.

    Example:
        >>> find_device("2xH100").count, find_device("24GB").memory
        (2, 24000000000)
    """
    several, _, rest = (text or "").partition("x") if re.match(r"\s*\d+\s*x", text or "") else ("", "", text or "")
    if several and count is not None and int(several) != count:
        raise ResourceError(f"{text!r} are {int(several)} devices, and {count} are asked for; say one of both")
    number = int(several) if several else count
    if number is not None and number < 1:
        raise ResourceError(f"{number} devices: expected at least 1")
    name = rest.strip()
    if name in ("", "auto") or re.fullmatch(r"(cpu|cuda|mps|xpu|hip|npu)(:\d+)?", name):
        return _here(name, number)
    found = _described(name)
    if found is None:
        near = difflib.get_close_matches(name, _TABLE, n=3, cutoff=0.3)
        raise ResourceError(
            f"device {text!r} is unknown; expected a device of this machine (cpu, cuda:0, auto), memory (24GB, 2x80GB) "
            f"or one of {', '.join(near or _TABLE)}"
        )
    return replace(found, count=number or 1)


def _described(name: str) -> Device | None:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GMT]i?B)", name, re.IGNORECASE)
    if size is not None:
        return _elsewhere(name, int(float(size[1]) * _UNITS[size[2].upper()]), _MODEST)
    key = {_plain(known): known for known in _TABLE}.get(_plain(name))
    if key is None:
        return None
    memory, half, single, bandwidth = _TABLE[key]
    return _elsewhere(
        key, int(memory * _GIB), Rates(half_flops=half * 1e12, single_flops=single * 1e12, bandwidth=bandwidth * 1e9)
    )


def _elsewhere(name: str, memory: int, rates: Rates) -> Device:
    return Device(name=name, label=name, memory=memory, free=max(memory - _CONTEXT, 0), known_rates=rates)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|nvidia|geforce|rtx|amd|instinct|tesla", "", name.lower())


def _here(name: str, count: int | None) -> Device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "cpu" or (name in ("", "auto") and accelerator is None):
        if count not in (None, 1):
            raise ResourceError("several devices: this machine has no accelerators; describe them, such as 2x80GB")
        return _cpu()
    kind, _, own = name.partition(":")
    if accelerator is None or (kind not in ("", "auto") and kind != accelerator.type):
        have = accelerator.type if accelerator else "no accelerator"
        raise ResourceError(f"device {name!r}: this machine has {have}; describe another one by name or memory (24GB)")
    available = torch.accelerator.device_count()
    index = int(own) if own else torch.accelerator.current_device_index()
    if index >= available or (count or 1) > available:
        raise ResourceError(f"device {name!r}: there are {available} of {accelerator.type} here")
    shares_memory = accelerator.type == "mps"  # with the CPU
    free, memory = torch.accelerator.get_memory_info(index) if not shares_memory else _host_memory()[::-1]
    module = torch.get_device_module(accelerator)
    label = module.get_device_name(index) if hasattr(module, "get_device_name") else accelerator.type
    known = next((d for d in map(_described, _longest_first()) if d and _plain(d.name) in _plain(label)), None)
    return Device(
        name=f"{accelerator.type}:{index}", label=label, memory=memory, free=free, is_here=True,
        known_rates=known.known_rates if known else _MODEST, count=count or (available if name == "auto" else 1),
    )  # fmt: skip


def _longest_first() -> list[str]:
    return sorted(_TABLE, key=len, reverse=True)  # "H100 PCIe" before "H100"


def _cpu() -> Device:
    memory, free = _host_memory()
    label = f"CPU, {torch.get_num_threads()} threads"
    return Device(name="cpu", label=label, memory=memory, free=free, is_here=True)


def host_free() -> int:
    """Bytes of this machine's memory that nothing uses."""
    return _host_memory()[1]


def _host_memory() -> tuple[int, int]:
    """All and available bytes, of the machine or of the container that this process may use."""
    file = Path("/proc/meminfo")
    if file.is_file():
        lines = dict(line.split(":", 1) for line in file.read_text(encoding="ascii").splitlines())
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    else:  # no such file outside Linux; what is free is not told there
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = total // 2
    for limit, used in _control_groups():
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return total, free


def _control_groups() -> list[tuple[int, int]]:
    """(limit, used) of a container, in the files of version 2 and of version 1."""
    root, found = Path("/sys/fs/cgroup"), []
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ):
        if limit.is_file() and used.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
            found.append((int(text), int(used.read_text(encoding="ascii"))))
    return found


@cache
def _measured() -> Rates:
    """Of this machine's CPU."""
    source = torch.ones(4 << 20)
    return Rates(
        half_flops=_matmul_rate(torch.bfloat16), single_flops=_matmul_rate(torch.float32),
        bandwidth=2 * source.nbytes / _seconds(source.clone),
    )  # fmt: skip


def _matmul_rate(dtype: torch.dtype, size: int = 256) -> float:
    matrix = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / _seconds(lambda: matrix @ matrix)


def _seconds(work: Callable[[], object]) -> float:
    """The best of three, after one to warm up."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return max(min(times[1:]), 1e-9)
