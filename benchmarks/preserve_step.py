"""What does protection cost? A training step with 1 % of the weights protected, against the same step without.

    python benchmarks/preserve_step.py [--size 10M 125M] [--ratio 0.01] [--device cpu] [--dtype float32]

Random Llama-shaped models, AdamW. Steps with and without protection alternate on one model, so drifts of the
machine hit both alike; each ratio is that of the medians. On the CPU the time is that of the process, which
others on the machine do not stretch. Prints one JSON object per size:

    full_ratio       full fine-tuning, step time with protection / without                     limit 1.03
    lora_ratio       LoRA (r 16, all linear layers), step time exact / plain                   limit 1.3
    exact_gradient_ratio   the same with `exact_gradient=True`, which costs one matrix product more per layer
    restore_ms       writing the weights back, by itself
    memory_ratio     bytes of the protection / (K x (bytes of a weight + 8))                   limit 1.05
    merge_s          `protection.merge()`, the adapter into the weights, protected bits included
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parent / "scale"))

from models import DENSE, build, select

import safelocus as sl

LIMITS = {"full_ratio": 1.03, "lora_ratio": 1.3, "memory_ratio": 1.05}
LENGTH = 256


class Stepper:
    """One training step on the same batch, timed to its end on the device."""

    def __init__(self, model, options):
        self.model, self.device = model, torch.device(options.device)
        self.clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self.ids = torch.randint(1000, (options.batch, LENGTH), device=self.device)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def seconds(self, after=lambda: None):
        self.wait()
        start = self.clock()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        after()
        self.optimizer.zero_grad()
        self.wait()
        return self.clock() - start

    def wait(self):
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def compare(stepper, protection, num):
    """(median seconds without, with), steps alternating."""
    for _ in range(3):
        stepper.seconds(protection.restore)
    found = {False: [], True: []}
    for index in range(2 * num):
        guarded = index % 2 == index // 2 % 2  # ABBA: neither always follows the other
        found[guarded].append(stepper.seconds(protection.restore) if guarded else stepper.seconds())
    return statistics.median(found[False]), statistics.median(found[True])


def timed(stepper, action, num=9):
    seconds = []
    for _ in range(num):
        stepper.wait()
        start = stepper.clock()
        action()
        stepper.wait()
        seconds.append(stepper.clock() - start)
    return statistics.median(seconds)


def measure(size, options):
    model = build("dense", size, device=options.device, dtype=getattr(torch, options.dtype)).train()
    selection = select(model, options.ratio)
    stepper = Stepper(model, options)
    protection = sl.preserve(model, selection, allow_mismatch=True)
    plain, guarded = compare(stepper, protection, options.steps)
    found = {
        "size": size, "device": options.device, "dtype": options.dtype, "ratio": options.ratio, "k": selection.k,
        "num_weights": selection.num_weights, "full_step_ms": 1e3 * plain, "full_ratio": guarded / plain,
        "restore_ms": 1e3 * timed(stepper, protection.restore),
        "memory_ratio": protection.num_bytes / (selection.k * (next(model.parameters()).element_size() + 8)),
    }  # fmt: skip
    del stepper, protection
    model.zero_grad()
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    stepper = Stepper(adapted, options)
    protection = sl.preserve(adapted, selection, allow_mismatch=True)
    plain, guarded = compare(stepper, protection, options.steps)
    found |= {
        "lora_step_ms": 1e3 * plain, "lora_ratio": guarded / plain,
        "lora_restore_ms": 1e3 * timed(stepper, protection.restore),
    }  # fmt: skip
    protection.remove()
    protection = sl.preserve(adapted, selection, allow_mismatch=True, exact_gradient=True)
    found |= {
        "exact_gradient_ratio": compare(stepper, protection, options.steps)[1] / plain,
        "merge_s": timed(stepper, protection.merge, num=1),
    }  # fmt: skip
    found["missed"] = [name for name, limit in LIMITS.items() if found[name] > limit]
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", nargs="+", default=["10M", "125M"], choices=DENSE)
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default=str(torch.accelerator.current_accelerator() or "cpu"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    for size in options.size:
        found = measure(size, options)
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}), flush=True)


if __name__ == "__main__":
    main()
