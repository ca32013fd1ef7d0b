"""Speed of evaluation: prompts per second, batched, against one at a time and against a bare `model.generate`.

All on the same prompts, in the same run, greedy:
  bare       `model.generate` on the very batches that evaluation makes, already padded; nothing decoded or kept
  evaluate   this package: rendering, batching by length, generation, decoding, refusals, measures
  one        one prompt at a time

    python benchmarks/generation.py [--model organism:dense] [--prompts organism:harmful-heldout] [--num 128]
"""

import argparse
import statistics
import time

import torch
from transformers import GenerationConfig

import safelocus as sl
from safelocus.model.forcing import pad


def batches_of(target, texts, batch_size):
    """Token ids in the batches of `evaluate`: like lengths together, longest first."""
    encoded = sorted((target.chat.encode_prompt(text) for text in texts), key=len, reverse=True)
    padding = target.tokenizer.pad_token_id
    batches = [encoded[start : start + batch_size] for start in range(0, len(encoded), batch_size)]
    return [pad(batch, padding, target.device, left=True) for batch in batches]


@torch.no_grad()
def bare(target, batches, max_new_tokens):
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=target.tokenizer.pad_token_id,
        eos_token_id=list(target.chat.end_of_turn_ids),
        stop_strings=list(target.chat.stop_strings) or None,  # where a base model's answer ends
    )
    for ids, mask in batches:
        target.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, tokenizer=target.tokenizer
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="organism:dense")
    parser.add_argument("--prompts", default="organism:harmful-heldout")
    parser.add_argument("--num", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    target = sl.load(options.model)
    prompts = sl.read_prompts(options.prompts).limit(options.num)
    texts, size, new = prompts.texts, options.batch_size, options.max_new_tokens
    batches = batches_of(target, texts, size)
    settings = {"harmful": prompts, "max_new_tokens": new, "progress": False}
    runs = {
        "bare": lambda: bare(target, batches, new),
        "evaluate": lambda: sl.evaluate(target, batch_size=size, **settings),
        "one": lambda: sl.evaluate(target, batch_size=1, **settings),
    }
    for run in runs.values():
        run()  # warm-up
    times = {name: [] for name in runs}
    for _ in range(options.repeats):  # in turn, so that a drifting machine drifts for all
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["bare"])
    print(
        f"{options.model}, {len(prompts)} prompts, batch {size}, {new} new tokens, {target.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'':12}{'prompts/s':>10}{'median s':>10}{'min':>8}{'max':>8}{'time / bare':>14}")
    for name, values in times.items():
        median = statistics.median(values)
        rate = len(prompts) / median
        print(f"{name:12}{rate:10.1f}{median:10.3f}{min(values):8.3f}{max(values):8.3f}{median / base:13.2f}x")


if __name__ == "__main__":
    main()
