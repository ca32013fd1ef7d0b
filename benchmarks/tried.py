"""What was tried to make scoring faster: each variant against what is in use, in turn in one run.

    eager attention     instead of SDPA
    compiled            `torch.compile` of the model (the compilation itself is timed apart)
    shared prompts      guard-free objective: the prompt run once and its keys and values used by all openings
    one by one          batches of one prompt
    unsorted            batches in the order given instead of by length

and, of the organisms with their guard, how much of teacher forcing is padding, and how long guard and target take.

    python benchmarks/tried.py [--size 10M] [--kind dense] [--rounds 5]

CPU time of one thread; the ratio is of the variant over what is in use, median [least, most] of the rounds.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "scale"))

from machine import Machine
from models import build, target_of

import safelocus as sl
from safelocus.model.forcing import pad, teacher_force
from safelocus.model.generation import generate
from safelocus.scoring.gradients import GradientAccumulator, named_weights


def shared_prompts(target, objective, prompts):
    """S of the guard-free objective, with each prompt run once."""
    openings = [*objective.refusals, *objective.compliances]
    pairs = [[target.chat.encode_pair(prompt, opening) for opening in openings] for prompt in prompts]
    contexts = [own[0][0] for own in pairs]
    responses = [response for own in pairs for _, response in own]
    padding, device, many = target.tokenizer.pad_token_id, target.device, len(openings)
    ids, mask = pad([context[:-1] for context in contexts], padding, device, left=True)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    cache = target.model(ids, attention_mask=mask, position_ids=places, use_cache=True).past_key_values
    cache.batch_repeat_interleave(many)
    last = [contexts[i // many][-1] for i in range(len(responses))]
    rest, rest_mask = pad([[first, *r[:-1]] for first, r in zip(last, responses, strict=True)], padding, device)
    lengths = torch.tensor([len(contexts[i // many]) - 1 for i in range(len(responses))])
    output = target.model(
        rest,
        attention_mask=torch.cat([mask.repeat_interleave(many, 0), rest_mask], 1),
        position_ids=lengths[:, None] + torch.arange(rest.shape[1]),
        past_key_values=cache,
    )
    tokens, _ = pad(responses, padding, device)
    chosen = torch.log_softmax(output.logits.float(), -1).gather(2, tokens[:, :, None])[:, :, 0] * rest_mask
    refusal, compliance = chosen.sum(1).view(len(prompts), many).split([len(objective.refusals), many // 2], dim=1)
    return torch.logsumexp(refusal, 1) - torch.logsumexp(compliance, 1)


def batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def variants(kind, size, machine):
    target = target_of(build(kind, size, device="cpu", dtype=torch.float32))
    texts = sl.read_prompts("organism:harmful").texts[:4]
    mixed = [*texts[:2], *(" ".join([text] * 5) for text in texts[2:])]
    random.Random(0).shuffle(mixed)
    by_length = sorted(mixed, key=lambda text: -len(target.chat.encode_prompt(text)))
    objective = sl.Refusal(refusals=sl.Refusal().refusals[:2], compliances=sl.Refusal().compliances[:2])
    accumulator = GradientAccumulator(named_weights(target.model, target.layout.eligible_tensors))

    def passes(of, prompts=texts, size=8):
        for batch in batches(prompts, size):
            of(target, batch).sum().backward()
        accumulator.check_finite("any")

    def attention(name):
        target.model.set_attn_implementation(name)
        passes(objective)
        target.model.set_attn_implementation("sdpa")

    actions = {
        "in use": lambda: passes(objective),
        "eager attention": lambda: attention("eager"),
        "shared prompts": lambda: passes(lambda t, p: shared_prompts(t, objective, p)),
        "one by one": lambda: passes(objective, size=1),
        "by length, in use": lambda: passes(objective, by_length, 2),
        "unsorted": lambda: passes(objective, mixed, 2),
    }
    with accumulator.collecting(target.model):
        ours, other = objective(target, texts), shared_prompts(target, objective, texts)
        print(f"shared prompts: S differs by at most {(ours - other).abs().max():.1e}")
        del ours, other
        times = machine.alternate(actions)
        for name in ("eager attention", "shared prompts", "one by one"):
            show(name, times[name].over(times["in use"]))
        show("unsorted", times["unsorted"].over(times["by length, in use"]))
        compiled(target, machine)


def compiled(target, machine):
    ids = torch.randint(1000, (16, 48))
    plain = target.model.model
    fast = torch.compile(plain)

    def run(model):
        model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()

    start = time.perf_counter()
    run(fast)
    seconds = time.perf_counter() - start
    times = machine.alternate({"eager": lambda: run(plain), "compiled": lambda: run(fast)})
    show("compiled", times["compiled"].over(times["eager"]))
    print(f"compiling took {seconds:.0f} s, of one shape; {times['eager'].median:.2f} s a pass without")


def organisms(machine):
    target = sl.load("organism:dense", dtype="float32")
    judge = sl.Guard.load("organism:guard", dtype="float32", max_new_tokens=32)
    texts = sl.read_prompts("organism:harmful").texts[:64]
    prompts = sorted(texts, key=lambda text: -len(target.chat.encode_prompt(text)))
    real = padded = 0
    for batch in batches(prompts, 8):
        answers = generate(target, batch, max_new_tokens=32)
        lengths = [len(target.chat.encode_prompt(p)) + len(a.ids) - 1 for p, a in zip(batch, answers, strict=True)]
        real, padded = real + sum(lengths), padded + max(lengths) * len(lengths)
    print(f"padding in teacher forcing, batches of 8 by prompt length: {1 - real / padded:.1%} of {padded} tokens")
    batch = prompts[:32]
    answers = generate(target, batch, max_new_tokens=32)
    encoded, ids = [target.chat.encode_prompt(p) for p in batch], [list(a.ids) for a in answers]
    times = machine.alternate(
        {
            "generate": lambda: generate(target, batch, max_new_tokens=32),
            "guard": lambda: judge.read(batch, [a.text for a in answers]),
            "target": lambda: teacher_force(target, encoded, ids).logits.sum().backward(),
        }
    )
    whole = sum(each.median for each in times.values())
    print("of a batch: " + ", ".join(f"{name} {each.median / whole:.0%}" for name, each in times.items()))


def show(name, ratio):
    print(f"{name:18} {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="10M")
    parser.add_argument("--kind", default="dense")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = Machine(device="cpu", dtype=torch.float32, threads=1, rounds=options.rounds, memory=12e9)
    print(", ".join(f"{name} {value}" for name, value in machine.describe().items()), flush=True)
    variants(options.kind, options.size, machine)
    organisms(machine)


if __name__ == "__main__":
    main()
