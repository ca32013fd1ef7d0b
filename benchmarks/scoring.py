"""Time of scoring: batched against one prompt at a time.

Baselines, both in the same run:
  plain    one prompt at a time; every parameter of the model collects a gradient; logits at every position
  single   this package with a batch of one

    python benchmarks/scoring.py [--model organism:dense] [--prompts organism:harmful] [--num 64] [--repeats 3]
"""

import argparse
import statistics
import time

import torch

import safelocus as sl
from safelocus.model.generation import generate


def plain(target, judge, prompts, max_new_tokens):
    """A straightforward implementation of the same S."""
    transfer = judge.transfer_for(target)
    total = {name: torch.zeros_like(p) for name, p in target.model.named_parameters()}
    target.model.requires_grad_(True)
    for prompt in prompts:
        (response,) = generate(target, [prompt], max_new_tokens=max_new_tokens)
        text, spans = transfer.response_text(response.ids)
        reading = judge.read([prompt], [text])
        gain = transfer.gain(transfer.align(reading, [spans]))
        ids = target.chat.encode_prompt(prompt)
        logits = target.model(torch.tensor([[*ids, *response.ids]])).logits[0, len(ids) - 1 : -1]
        (gain * torch.softmax(logits / judge.tau, -1)).sum().backward()
        for name, parameter in target.model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad
        target.model.zero_grad(set_to_none=True)
    return {name: gradient.abs() * target.model.get_parameter(name).std() for name, gradient in total.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="organism:dense")
    parser.add_argument("--guard", default="organism:guard")
    parser.add_argument("--prompts", default="organism:harmful")
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    target = sl.load(options.model)
    judge = sl.Guard.load(options.guard, max_new_tokens=options.max_new_tokens)
    prompts = sl.read_prompts(options.prompts).limit(options.num)
    runs = {
        "plain, one at a time": lambda: plain(target, judge, prompts.texts, options.max_new_tokens),
        "batch 1": lambda: sl.score(target, prompts, objective=judge, batch_size=1, progress=False),
    } | {
        f"batch {size}": lambda size=size: sl.score(target, prompts, objective=judge, batch_size=size, progress=False)
        for size in options.batch_sizes
    }
    runs["batch 1"]()  # warm-up
    times = {name: [] for name in runs}
    for _ in range(options.repeats):  # in turn, so that a drifting machine drifts for all
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["plain, one at a time"])
    print(f"{options.model}, {len(prompts)} prompts, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':24}{'median s':>10}{'min':>8}{'max':>8}{'ratio to plain':>16}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:24}{median:10.2f}{min(values):8.2f}{max(values):8.2f}{base / median:15.1f}x")


if __name__ == "__main__":
    main()
