"""The plan's bytes beside those that are measured: every stage, with models of random weights.

Each row is a process of its own. *measured*: the most bytes of tensors at once, weights included, as torch's profiler
counts them on the CPU while the stage runs for real (`sl.score`, `sl.evaluate`, `sl.verify`, `sl.enhance`, training
under `sl.preserve`);
*predicted*: what `safelocus plan` says from the configuration alone. The plan should not be below, nor far above.

    python benchmarks/plan.py [--weights 1e7 5e7] [--kinds dense moe] [--stages refusal evaluate enhance full]
"""

import argparse
import itertools
import json
import subprocess
import sys

STAGES = ("refusal", "guard", "evaluate", "verify", "enhance", "enhance checkpointed", "full", "lora")
VOCABULARY, NEW_TOKENS, ROWS = 8192, 16, 4
ANSWERED, LONG_ANSWER = 32, 64  # prompts answered at a time, and the tokens of each answer


def build(kind, num_weights, dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from safelocus import organism
    from safelocus.model.target import Target

    tokenizer = PreTrainedTokenizerFast.from_pretrained(organism.resolve_model("dense"))
    layers = 6
    per_layer = {"dense": 13, "moe": 16}[kind]  # weights of a layer over the square of the width
    width = max(int((num_weights / (layers * per_layer)) ** 0.5) // 64 * 64, 64)
    shared = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "tie_word_embeddings": True,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64, "dtype": dtype,
    }  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    if kind == "dense":
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=3 * width, **shared))
    else:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": width // 2}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**experts, **shared))
    torch.set_default_dtype(torch.float32)
    return Target.of(model, tokenizer, name=kind)


def compare(kind, num_weights, dtype, stage):
    """(weights, measured, predicted) in bytes."""
    import safelocus as sl
    from safelocus.model.layout import Layout
    from safelocus.resources import Lengths, Scoring, Settings, Subject, Training, find_device
    from safelocus.selection.topk import random_k

    target = build(kind, num_weights, dtype)
    subject = Subject.of(kind, target.model.config, dtype=dtype)
    prompts = sl.read_prompts("organism:harmful").limit(2 * ROWS)
    longest = max(len(target.chat.encode_prompt(text)) for text in prompts.texts)
    size = subject.num_bytes
    if stage in ("refusal", "guard"):
        objective = sl.Refusal() if stage == "refusal" else sl.Guard.load("organism:guard", max_new_tokens=NEW_TOKENS)
        guard = Subject.load("organism:guard") if stage == "guard" else None
        need = Scoring(target=subject, guard=guard, lengths=Lengths(prompt=longest, response=NEW_TOKENS))
        need = need.need(Settings(batch_size=ROWS)).on(find_device("cpu"), Settings(batch_size=ROWS), 0)
        peak = _allocating(lambda: sl.score(target, prompts, objective=objective, batch_size=ROWS, progress=False))
        return size, size + (guard.num_bytes if guard else 0) + peak, need.total
    layout = Layout.of(target.model)
    sizes = {name: layout.tensors[name].num_weights for name in layout.eligible_tensors}
    selection = sl.Selection(coordinates=random_k(sizes, layout.num_weights // 100, seed=0), layout=layout)
    if stage in ("evaluate", "verify"):
        return size, *_answering(target, subject, selection if stage == "verify" else None)
    from safelocus.training import TrainingSettings
    from safelocus.training.fitting import fit
    from safelocus.training.responses import training_rows

    rows = training_rows(sl.read_prompts("organism:refusals"), target.chat)
    retain = sl.read_prompts("organism:retain").with_responses().limit(32)
    retained = training_rows(retain, target.chat)
    answers = max(sum(label >= 0 for label in row["labels"]) for row in retained)
    lengths = Lengths(
        prompt=longest, response=answers, row=max(map(len, rows["input_ids"])),
        answer=max(sum(label >= 0 for label in row["labels"]) for row in rows),
        retained=max(map(len, retained["input_ids"])),
    )  # fmt: skip
    checkpointed = stage.endswith("checkpointed")
    settings = TrainingSettings(steps=2, batch_size=ROWS, activation_checkpointing=checkpointed)
    form = {"full": "full", "lora": "lora"}.get(stage, "sparse")
    training = Training(
        target=subject, num_selected=selection.k, kind=form, lengths=lengths, most=ROWS,
        retained_rows=3 if form == "sparse" else 0,
    )  # fmt: skip
    need = training.need(Settings(batch_size=ROWS, checkpointing=checkpointed))
    if form == "sparse":
        peak = _allocating(
            lambda: sl.enhance(
                target,
                selection,
                "organism:refusals",
                retain=retain,
                retain_rows=3,
                settings=settings,
                allow_mismatch=True,
                progress=False,
            )
        )
    else:
        from safelocus.training.lora import Lora

        model = Lora().wrap(target.model, target.layout) if form == "lora" else target.model
        peak = _allocating(
            lambda: fit(
                target, rows, settings, model=model, progress=False,
                prepare=lambda trainer: sl.preserve(trainer, selection, allow_mismatch=True),
            )
        )  # fmt: skip
    return size, size + peak, need.total


def _answering(target, subject, selection):
    """(measured, predicted) of answering, with a guard that judges; disturbed where a selection is given."""
    import safelocus as sl
    from safelocus.resources import Answering, Lengths, Settings, Subject, find_device

    prompts = sl.read_prompts("organism:harmful").limit(2 * ANSWERED)
    longest = max(len(target.chat.encode_prompt(text)) for text in prompts.texts)
    guard = Subject.load("organism:guard")
    need = Answering(
        target=subject, guards=(guard,), lengths=Lengths(prompt=longest, response=LONG_ANSWER),
        num_disturbed=selection.k if selection else 0,
    ).need(Settings(batch_size=ANSWERED))  # fmt: skip
    need = need.on(find_device("cpu"), Settings(batch_size=ANSWERED), 0)

    def work():
        judge = sl.load_judge("guard:organism:guard")
        how = {"judges": [judge], "batch_size": ANSWERED, "max_new_tokens": LONG_ANSWER, "progress": False}
        if selection is None:
            sl.evaluate(target, harmful=prompts, **how)
        else:
            sl.verify(target, selection, prompts=prompts, noises=(1.0,), seeds=1, **how)

    return subject.num_bytes + _allocating(work), need.total


def _allocating(work):
    """Most bytes of tensors allocated at once by `work`."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[1e7, 5e7])
    parser.add_argument("--kinds", nargs="+", default=["dense", "moe"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--stages", nargs="+", default=STAGES)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, number, dtype, stage = options.child
        print(json.dumps(compare(kind, float(number), dtype, stage)))
        return
    print("| weights, MB | kind | dtype | stage | measured, MB | predicted, MB | predicted / measured |")
    print("|---:|---|---|---|---:|---:|---:|")
    for number, kind, dtype, stage in itertools.product(options.weights, options.kinds, options.dtypes, options.stages):
        command = [sys.executable, __file__, "--child", kind, str(number), dtype, stage]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        size, measured, predicted = json.loads(output.strip().splitlines()[-1])
        cells = [f"{size / 1e6:,.0f}", kind, dtype, stage, f"{measured / 1e6:,.0f}", f"{predicted / 1e6:,.0f}"]
        print(f"| {' | '.join(cells)} | {predicted / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
