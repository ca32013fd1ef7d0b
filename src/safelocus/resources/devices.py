"""What a device has: memory, floating-point operations and bytes per second.

This machine's own devices are asked (memory) and measured (products of matrices, copies); a few well-known
accelerators are in a table (data sheets: dense rates, memory as drivers report it); `24GB` is one by its memory alone.
"""

import difflib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from safelocus.errors import ResourceError

_UNITS = {"GB": 10**9, "GIB": 1 << 30}
_CONTEXT = 600 * 10**6  # what a driver and its libraries take of an accelerator before any tensor
_OF_FLOPS, _OF_BANDWIDTH = 0.4, 0.6  # of the rates at best, that well-tuned kernels reach
# name -> memory in GiB, teraFLOP/s in 16 bits, gigabytes per second
_TABLE = {
    "B200": (180, 2250, 8000), "H200": (140, 989, 4800), "H100": (79.6, 989, 3350), "A100": (79.3, 312, 2039),
    "A100 40GB": (39.5, 312, 1555), "L40S": (45, 362, 864), "A10": (22.5, 125, 600), "L4": (22.5, 121, 300),
    "T4": (14.7, 65, 320), "RTX 3090": (23.6, 71, 936), "RTX 4090": (23.6, 165, 1008), "RTX 5090": (31.4, 209, 1792),
    "MI300X": (192, 1307, 5300),
}  # fmt: skip
_MODEST = (60, 400)  # of a device known by its memory alone
_SINGLE = 0.1  # of the rate in 16 bits, in fp32
_LINK = 25e9  # bytes per second from the host's memory to an accelerator: PCIe 4.0, 16 lanes
_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, or several alike.

    Attributes:
        name: as torch calls it where it is here ("cuda:0", "cpu"), else as it was described.
        label: what it is, for people.
        memory, free: bytes of one: all, and those that nothing else uses.
        teraflops, gigabytes: per second, of one: operations in 16 bits, and bytes, at best; None to measure them.
        count: how many there are.
        host: bytes of memory beside it that nothing else uses, or this process's part of them; None: nobody knows.
    """

    name: str
    label: str
    memory: int
    free: int
    teraflops: float | None = None
    gigabytes: float | None = None
    count: int = 1
    host: int | None = None

    @property
    def is_here(self) -> bool:
        """Whether it is a device of this machine."""
        return self.teraflops is None

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def seconds(self, operations: float, num_bytes: float, dtype: torch.dtype) -> float:
        """The longer of computing and of moving bytes between memory and cores."""
        if self.teraflops is None or self.gigabytes is None:
            flops, bandwidth = _measured(self.name, dtype)
        else:
            flops = self.teraflops * 1e12 * (1 if dtype.itemsize <= 2 else _SINGLE)
            bandwidth = self.gigabytes * 1e9
        return max(operations / (_OF_FLOPS * flops), num_bytes / (_OF_BANDWIDTH * bandwidth))

    def seconds_from_host(self, num_bytes: float) -> float:
        """Of bytes that come from the host's memory."""
        return num_bytes / (_OF_BANDWIDTH * _LINK)


def find_device(text: str | None = None) -> Device:
    """The device that a text describes.

    Args:
        text: "cuda:0", "cpu" and the like for one of this machine; "H200", "RTX 4090", "80GB", "2x24GB" for any;
            "auto" for all accelerators of this machine; default: what models are loaded to.

    Raises:
        ResourceError: nothing is known by that name, or this machine has no such device.

    Example:
        >>> find_device("2xH100").count, find_device("24GB").memory
        (2, 24000000000)
    """
    several = re.match(r"\s*([1-9]\d*)\s*x\s*", text or "")
    name = (text or "")[several.end() if several else 0 :].strip()
    if not several and (name in ("", "auto") or re.fullmatch(r"(cpu|cuda|mps|xpu|npu)(:\d+)?", name)):
        return _here(name)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", name, re.IGNORECASE)
    known = next((key for key in _TABLE if _plain(key) == _plain(name)), None)
    if size is not None:
        memory, rates = int(float(size[1]) * _UNITS[size[2].upper()]), _MODEST
    elif known is not None:
        memory, rates = int(_TABLE[known][0] * (1 << 30)), _TABLE[known][1:]
    else:
        near = difflib.get_close_matches(name, _TABLE, n=3, cutoff=0.3)
        raise ResourceError(
            f"device {text!r} is unknown; expected a device of this machine (cpu, cuda:0, auto), memory (24GB, 2x80GB) "
            f"or one of {', '.join(near or _TABLE)}"
        )
    return Device(
        name=known or name, label=known or name, memory=memory, free=max(memory - _CONTEXT, 0), teraflops=rates[0],
        gigabytes=rates[1], count=int(several[1]) if several else 1,
    )  # fmt: skip


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|nvidia|geforce|rtx|amd|instinct|tesla", "", name.lower())


def _here(name: str) -> Device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind, _, own = name.partition(":")
    if name == "cpu" or (name in ("", "auto") and accelerator is None):
        memory, free = host_memory()
        return Device(name="cpu", label=f"CPU, {torch.get_num_threads()} threads", memory=memory, free=free)
    available = torch.accelerator.device_count() if accelerator is not None else 0
    if accelerator is None or kind not in ("", "auto", accelerator.type) or (own and int(own) >= available):
        have = f"{available} of {accelerator.type}" if accelerator else "no accelerator"
        raise ResourceError(f"device {name!r}: this machine has {have}; describe another one by name or memory (24GB)")
    index = int(own) if own else torch.accelerator.current_device_index()
    if accelerator.type == "mps":  # shares the CPU's memory
        memory, free = host_memory()
    else:
        free, memory = torch.accelerator.get_memory_info(index)
    module = torch.get_device_module(accelerator)
    label = module.get_device_name(index) if hasattr(module, "get_device_name") else accelerator.type
    return Device(
        name=f"{accelerator.type}:{index}", label=label, memory=memory, free=free,
        count=available if name == "auto" else 1, host=host_memory()[1],
    )  # fmt: skip


def host_memory() -> tuple[int, int]:
    """All and available bytes, of the machine or of the container that this process may use."""
    host = psutil.virtual_memory()
    total, free = host.total, host.available
    for limit, used, files in (
        (_GROUPS / "memory.max", _GROUPS / "memory.current", "inactive_file"),
        (_GROUPS / "memory/memory.limit_in_bytes", _GROUPS / "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):  # version 2, version 1
        if limit.is_file() and used.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
            taken = int(used.read_text(encoding="ascii")) - _counter(used.with_name("memory.stat"), files)
            total, free = min(total, int(text)), min(free, max(int(text) - taken, 0))
    return total, free


def _counter(file: Path, name: str) -> int:
    """Of a control group's file; here bytes of read files, which make room for whatever needs it."""
    lines = file.read_text(encoding="ascii").splitlines() if file.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)


@cache
def _measured(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Operations and bytes per second of a device of this machine."""
    size = 256 if name == "cpu" else 4096
    matrix, source = (torch.ones(n, n, dtype=dtype, device=name) for n in (size, 4 * size))
    return 2 * size**3 / _fastest(lambda: matrix @ matrix), 2 * source.nbytes / _fastest(source.clone)


def _fastest(work: Callable[[], torch.Tensor]) -> float:
    """Seconds at best, of nine times after one to warm up: whatever else runs makes it slower, never faster."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        work()[0, 0].item()  # waits for an accelerator
        times.append(time.perf_counter() - began)
    return max(min(times[1:]), 1e-9)
