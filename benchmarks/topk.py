"""Exact streaming top-k against concatenating all scores and calling torch.topk, on the CPU.

    python benchmarks/topk.py [--sizes 1e7 1e8] [--ratio 0.01] [--values continuous|bfloat16|zeros]

Times are medians of runs that alternate between the methods in one process. Extra memory is the peak
resident size of a process that calls one method once, less its resident size with the scores loaded; the
result (12 bytes per selected weight) counts for both. Claims: at most 1.5 times the time, at most 5 % of
the extra memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelocus.topk import Which, pick

NUM_TENSORS = 20
NUM_PASSES = 3
MAX_TIME, MAX_MEMORY = 1.5, 0.05
OURS: tuple[Which, ...] = ("top", "bottom", "random")


def make_scores(num_weights: int, values: str) -> dict[str, Tensor]:
    """Tensors of equal size, made in place so that their making leaves no higher peak."""
    torch.manual_seed(0)
    tensors = {}
    for i in range(NUM_TENSORS):
        tensor = torch.empty(num_weights // NUM_TENSORS)
        for chunk in tensor.split(1 << 18):
            chunk.uniform_().pow_(4)
            if values == "bfloat16":
                chunk.copy_(chunk.bfloat16())
            elif values == "zeros":
                chunk.zero_()
        tensors[f"layers.{i}"] = tensor
    return tensors


def methods(tensors: dict[str, Tensor], k: int) -> dict[str, Callable[[], Any]]:
    return {
        "plain read (sum)": lambda: [tensor.sum() for tensor in tensors.values()],
        "cat + topk": lambda: torch.topk(torch.cat(list(tensors.values())), k, sorted=False),
        **{f"safelocus {which}": partial(pick, tensors, k, which=which) for which in OURS},
    }


def resident_bytes(field: str) -> int:
    """VmRSS, or its peak VmHWM. (ru_maxrss starts from the parent's peak, so it cannot be used here.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure_memory(num_weights: int, ratio: float, values: str, method: str) -> int:
    """In a process of its own: extra bytes at the peak."""
    small = make_scores(NUM_TENSORS * 10, values)
    methods(small, 5)[method]()  # what libraries allocate once is nobody's extra
    tensors = make_scores(num_weights, values)
    before = resident_bytes("VmRSS")
    methods(tensors, int(ratio * num_weights))[method]()
    return resident_bytes("VmHWM") - before


def measure_in_child(arguments: argparse.Namespace, num_weights: int, method: str) -> int:
    command = [sys.executable, __file__, "--child", method, "--sizes", str(num_weights)]
    command += ["--ratio", str(arguments.ratio), "--values", arguments.values]
    command += ["--threads", str(arguments.threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_time(num_weights: int, ratio: float, values: str, num_runs: int) -> dict[str, float]:
    """Median seconds of each method."""
    calls = methods(make_scores(num_weights, values), int(ratio * num_weights))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(num_runs + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if run:  # the first is to warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(arguments: argparse.Namespace, num_weights: int) -> None:
    seconds = measure_time(num_weights, arguments.ratio, arguments.values, arguments.runs)
    extra = {name: measure_in_child(arguments, num_weights, name) for name in seconds}
    baseline = "cat + topk"
    print(
        f"\n{num_weights:.0e} weights in {NUM_TENSORS} tensors, {arguments.values} values, "
        f"ratio {arguments.ratio}, {arguments.threads} threads, median of {arguments.runs}"
    )
    print(f"{'method':18} {'ms':>9} {'of topk':>9} {'extra MB':>9} {'of topk':>9} {'GB/s read':>10}")
    for name, found in seconds.items():
        passes = {"plain read (sum)": 1, baseline: None, "safelocus random": 1}.get(name, NUM_PASSES)
        speed = f"{passes * 4 * num_weights / found / 1e9:10.1f}" if passes else f"{'':10}"
        print(
            f"{name:18} {found * 1e3:9.1f} {found / seconds[baseline]:8.3f}x {extra[name] / 1e6:9.1f} "
            f"{extra[name] / extra[baseline]:8.2%} {speed}"
        )
    time_ratio = seconds["safelocus top"] / seconds[baseline]
    memory_ratio = extra["safelocus top"] / extra[baseline]
    held = time_ratio <= MAX_TIME and memory_ratio <= MAX_MEMORY
    print(
        f"top: {time_ratio:.3f}x the time (at most {MAX_TIME}x), {memory_ratio:.2%} of the extra memory "
        f"(at most {MAX_MEMORY:.0%}): {'holds' if held else 'DOES NOT HOLD'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1e7", "1e8"])
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--values", choices=["continuous", "bfloat16", "zeros"], default="continuous")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for size in (int(float(size)) for size in arguments.sizes):
        if arguments.child:
            print(json.dumps(measure_memory(size, arguments.ratio, arguments.values, arguments.child)))
        else:
            report(arguments, size)


if __name__ == "__main__":
    main()
