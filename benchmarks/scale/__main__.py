"""How fast is it, against the straightforward way and against what the machine can do? And does it stay so at scale?

    python benchmarks/scale                                       # CPU: 10M and 125M weights; GPU if there is one
    python benchmarks/scale --stages topk --sizes 10M 125M 1B
    python benchmarks/scale --device cuda --sizes 1B 8B --stages scoring topk

One table per stage: time per unit (weight, or weight and prompt; median [least, most] of the rounds), the same over
that of the smallest size (linear: 1), baseline over ours (round by round, in one run), and the share of the limit that
is reached: floating-point operations at the speed of a large product, or bytes at that of a copy or read, measured
beside it. Random weights. What each stage does and compares with is in the text at the top of its module.
"""

import argparse
import json
import sys

import enhancing
import memory
import patching
import preserving
import selecting
import torch
from machine import Machine
from rows import Row, dump, plain_table, table

import scoring

NUM_SCORES = {"1M": 10**6, "10M": 10**7, "125M": 125 * 10**6, "1B": 10**9, "8B": 8 * 10**9}
STAGES = ("scoring", "topk", "set", "spa", "patch", "memory")


def rows_of(stage: str, kind: str, size: str, options: argparse.Namespace, machine: Machine) -> list[Row]:
    if stage == "topk":
        return selecting.measure(NUM_SCORES[size], machine)
    if stage == "scoring":
        return scoring.measure(kind, size, machine, num_prompts=options.prompts, num_tokens=options.tokens)
    if stage == "set":
        return enhancing.measure(kind, size, machine, num_tokens=options.step_tokens)
    if stage == "spa":
        return preserving.measure(kind, size, machine, num_tokens=options.step_tokens)
    return patching.measure(kind, size, machine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--sizes", nargs="+", choices=NUM_SCORES, default=["1B", "8B"] if cuda else ["10M", "125M"])
    parser.add_argument("--kinds", nargs="+", choices=["dense", "moe"], default=["dense", "moe"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on cuda, float32 on the CPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64 if cuda else 8, help="of a scoring batch")
    parser.add_argument("--tokens", type=int, default=256 if cuda else 24, help="of each answer")
    parser.add_argument("--step-tokens", type=int, default=4096 if cuda else 256, help="of a training step")
    parser.add_argument(
        "--memory", type=float, default=100 if cuda else 12, help="GB; baselines that need more are out"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    machine = Machine(
        device=options.device, dtype=getattr(torch, dtype), threads=options.threads, rounds=options.rounds,
        memory=options.memory * 1e9,
    )  # fmt: skip
    if options.child:
        (kind,), (size,) = options.kinds, options.sizes
        print(json.dumps(memory.child(kind, size, options.child, machine)))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.describe().items()), flush=True)
    for stage in options.stages:
        if stage == "memory":
            found = [memory.measure(kind, size, machine) for kind in options.kinds for size in options.sizes]
            print(f"\n{stage}\n{dump(found) if options.json else plain_table(found)}", flush=True)
            continue
        rows: list[Row] = []
        for size in options.sizes:
            for kind in options.kinds if stage != "topk" else [""]:
                rows += (found := rows_of(stage, kind, size, options, machine))
                print(table(found), file=sys.stderr, flush=True)  # long runs: what is done is seen
        rows.sort(key=lambda row: (row.kind, row.what, row.weights))
        print(f"\n{stage}\n{dump(rows) if options.json else table(rows)}", flush=True)


if __name__ == "__main__":
    main()
