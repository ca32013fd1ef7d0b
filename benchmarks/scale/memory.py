"""Most bytes of tensors at once, over the bytes of the weights; each figure is a process of its own.

    activations   forward and backward for all eligible matrices, each gradient dropped when it is made: no sums
    scoring       `sl.score` with sums on the device, from the loaded model to the scores; limit: activations + sums
    on cpu        the same with `accumulate_on="cpu"`, what lies on the device; limit: 1.15 x activations
    plain         gradients of the whole model, fp32 sums, all scores, `cat` and `topk`
    SET           a step of SparseOptimizer on 64 tokens; limit: 1.35 and the activations of 64 tokens
    masked        dense AdamW with a mask

On the CPU both memories are one, so "on cpu" is left out there. What kernels and allocators keep is not counted
("resident" adds it: peak resident memory of the process while scoring, less that before the model was made).
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from enhancing import Masked
from machine import Machine
from models import build, num_bytes, num_weights, select, target_of

import safelocus as sl
from safelocus.enhancement.optimizer import SparseOptimizer

_NUM_PROMPTS, _BATCH = 8, 4


def _objective() -> sl.Refusal:
    return sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"])


def _prompts():
    return sl.read_prompts("organism:harmful").limit(_NUM_PROMPTS)


def _longest_batch(target) -> list[str]:
    return sorted(_prompts().texts, key=lambda text: -len(target.chat.encode_prompt(text)))[:_BATCH]


def _score(kind: str, size: str, machine: Machine, accumulate_on: str | None = None):
    target = target_of(build(kind, size, device=machine.device, dtype=machine.dtype))
    options = {"batch_size": _BATCH, "accumulate_on": accumulate_on, "progress": False}
    return target, sl.score(target, _prompts(), objective=_objective(), **options)


def _activations(kind: str, size: str, machine: Machine):
    target = target_of(build(kind, size, device=machine.device, dtype=machine.dtype))
    target.model.requires_grad_(False)
    for name in target.layout.eligible_tensors:
        weight = target.model.get_parameter(name).requires_grad_(True)
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    _objective()(target, _longest_batch(target)).sum().backward()
    return target


def _plain(kind: str, size: str, machine: Machine):
    target = target_of(build(kind, size, device=machine.device, dtype=machine.dtype))
    model = target.model
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    _objective()(target, _longest_batch(target)).sum().backward()
    for name, parameter in model.named_parameters():
        total[name] += parameter.grad.float()
    scores = {name: sums.abs() * model.get_parameter(name).float().std() for name, sums in total.items()}
    return model, torch.cat([s.flatten() for s in scores.values()]).topk(num_weights(model) // 100)


def _train(kind: str, size: str, machine: Machine, make):
    model = build(kind, size, device=machine.device, dtype=machine.dtype)
    optimizer = make(model, select(model))
    ids = torch.randint(1000, (1, 64), device=machine.device)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


RUNS = {
    "activations": _activations,
    "scoring": _score,
    "on cpu": lambda *of: _score(*of, "cpu"),
    "plain": _plain,
    "SET": lambda *of: _train(*of, SparseOptimizer),
    "masked": lambda *of: _train(*of, Masked),
}
# bytes per weight beside the weights, to leave out what does not fit
_NEEDED = {"plain": 24.0, "masked": 21.0}


def child(kind: str, size: str, what: str, machine: Machine) -> dict[str, float]:
    """What one process measures."""
    if what == "resident":
        import psutil

        before = psutil.Process().memory_info().rss
        _score(kind, size, machine)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {"bytes": int(status["VmHWM"].split()[0]) * 1024 - before}
    return {"bytes": machine.peak(lambda: RUNS[what](kind, size, machine))[1]}


def measure(kind: str, size: str, machine: Machine) -> dict[str, object]:
    with torch.device("meta"):
        model = build(kind, size, device="meta", dtype=machine.dtype)
    weights, held = num_weights(model), num_bytes(model)
    eligible = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name)
    found: dict[str, object] = {"kind": kind, "weights": f"{weights / 1e6:.0f}M", "dtype": str(machine.dtype)[6:]}
    left_out = {"on cpu"} if not machine.is_cuda else {"resident"}
    for what in [*RUNS, "resident"]:
        if what in left_out or _NEEDED.get(what, 0) * weights + held > machine.memory:
            found[what] = "-"
            continue
        command = [sys.executable, str(Path(__file__).parent), "--child", what, "--kinds", kind, "--sizes", size]
        command += ["--device", machine.device, "--dtype", str(machine.dtype)[6:], "--threads", str(machine.threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[what] = round(json.loads(output.splitlines()[-1])["bytes"] / held, 3)
    activations = found["activations"]
    found["scoring, limit"] = round(activations + 4 * eligible / held, 3)  # type: ignore[operator]
    return found
