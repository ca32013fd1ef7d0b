"""SPA: a training step with 1 % of the weights protected, against the same step without; in turn, on one model.

    full       full fine-tuning: AdamW, or plain SGD where AdamW's state does not fit          aim: at most 1.03 times
    LoRA       rank 16 on all linear layers, the effective weights kept exactly                aim: at most 1.3 times
               exact gradient: that of the effective weights, one more product per layer
    restore    writing the weights back, alone; per protected weight

*kept bytes*: of the protection, over those of the protected weights and 8 bytes of an index each.
Limit of *restore*: a cache line read and written for each weight, and its index and value read.
"""

import torch
from machine import Machine, Times
from models import build, num_bytes, num_weights, select
from peft import LoraConfig, get_peft_model
from rows import Row

import safelocus as sl

_LINE = 64


def _compare(
    what: str, kind: str, model, protection, optimizer, machine: Machine, num_tokens: int, plain: Times | None = None
) -> list[Row]:
    """plain: steps without protection, where what protects is in the layers too."""
    ids = torch.randint(1000, (1, num_tokens), device=machine.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def protected() -> None:
        step()
        protection.restore()

    copy, copied = machine.copy()
    times = machine.alternate({"plain": step, "protected": protected, "restore": protection.restore, "copy": copy})
    times["plain"] = plain or times["plain"]
    ratio, least, most = times["protected"].over(times["plain"])
    k, size = protection.num_protected, next(model.parameters()).element_size()
    of = {"kind": kind, "weights": num_weights(model)}
    columns = {
        "protected/plain": f"{ratio:.3f} [{least:.3f}, {most:.3f}]",
        "optimizer": type(optimizer).__name__,
        "kept bytes": f"{protection.num_bytes / (k * (size + 8)):.2f}",
    }
    rows = [Row(what=what, units=of["weights"], ours=times["protected"], baseline=times["plain"], more=columns, **of)]
    if what == "full":
        moved = k * (2 * _LINE + 8 + size)
        limit = {"limit": times["copy"], "limit_units": moved / copied, "bytes": moved}
        rows.append(Row(what="restore", units=k, ours=times["restore"], **limit, **of))
    return rows


def measure(kind: str, size: str, machine: Machine, *, num_tokens: int) -> list[Row]:
    model = build(kind, size, device=machine.device, dtype=machine.dtype)
    selection, held = select(model), num_bytes(model)
    rows: list[Row] = []
    if 2.2 * held < machine.memory:  # weights and gradients; AdamW keeps twice as much more
        make = torch.optim.AdamW if 4.2 * held < machine.memory else torch.optim.SGD
        optimizer = make(model.parameters(), lr=1e-5)
        with sl.preserve(model, selection, allow_mismatch=True) as protection:
            rows += _compare("full", kind, model, protection, optimizer, machine, num_tokens)
        del optimizer, protection
        model.zero_grad()
    if kind == "dense":  # PEFT leaves fused experts out of all-linear
        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-5)
        plain = None
        for what, exact in (("LoRA", False), ("LoRA, exact gradient", True)):
            protection = sl.preserve(adapted, selection, allow_mismatch=True, exact_gradient=exact)
            rows += _compare(what, kind, adapted, protection, optimizer, machine, num_tokens, plain)
            plain = rows[-1].baseline
            protection.remove(restore_base=True)
    return rows
