"""A training step of SparseOptimizer against dense AdamW: optimizer state, peak memory, time.

Random weights, 1 % of all weights selected at random among the eligible ones, so in every matrix.

state      bytes of the optimizer's moments over those of dense AdamW's, both in fp32. Limit: 1.1 %.
held       all that is kept from step to step (moments, fp32 masters, coordinates) over the bytes of the weights.
activations, sparse, masked
           most bytes of tensors at once in a step of 64 tokens, over the bytes of the weights. *activations*: one small
           matrix of the first layer is trained, so backward goes through everything but hardly any gradient or state
           exists; the weights are in it. *masked*: dense AdamW, its gradients multiplied by a mask, the other weights
           put back after each step. Each is a process of its own. Limit for sparse: activations + 0.35.
ms, time   median time of a step of dense AdamW; time of the sparse step over it. They run in turn.

    python benchmarks/enhance_step.py [--weights 1e7 1.1e8] [--device cpu] [--repeats 9]
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import safelocus as sl
from safelocus.enhancement.optimizer import SparseOptimizer
from safelocus.layout import Layout
from safelocus.topk import random_k

VOCABULARY, RATIO = 2048, 0.01
SETTINGS = {"lr": 1e-4, "weight_decay": 0.01}


def build(kind, num_weights, dtype, device):
    layers = 8 if num_weights < 5e8 else 32
    per_layer = {"dense": 13, "moe": 16}[kind]  # weights of a layer over the square of the width
    width = max(int((num_weights / (layers * per_layer)) ** 0.5) // 64 * 64, 64)
    shared = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "tie_word_embeddings": True,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64,
        "max_position_embeddings": 512,
    }  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        if kind == "dense":
            model = LlamaForCausalLM(LlamaConfig(intermediate_size=3 * width, **shared))
        else:
            experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": width // 2}
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**experts, **shared))
    torch.set_default_dtype(torch.float32)
    return model.train()


def select(model):
    layout = Layout.of(model)
    sizes = {name: layout.tensors[name].num_weights for name in layout.eligible_tensors}
    k = round(RATIO * layout.num_weights)
    return sl.Selection(coordinates=random_k(sizes, k, seed=0), layout=layout)


def sparse(model):
    return SparseOptimizer(model, select(model), **SETTINGS)


def dense(model):
    return torch.optim.AdamW(model.parameters(), **SETTINGS)


def one_small_matrix(model):
    parameter = model.model.layers[0].self_attn.k_proj.weight
    model.requires_grad_(False)
    return torch.optim.SGD([parameter.requires_grad_(True)], lr=1e-4)


class Masked:
    """Dense AdamW that changes the selected weights alone, as one would write it without this library."""

    def __init__(self, model):
        self.inner, self.parameters = dense(model), dict(model.named_parameters())
        self.masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in self.parameters.items()}
        for name, index in select(model).coordinates.items():
            self.masks[name].view(-1)[index.to(self.masks[name].device)] = True
        self.old = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self):
        for name, parameter in self.parameters.items():
            parameter.grad *= self.masks[name]
        self.inner.step()
        for name, parameter in self.parameters.items():
            parameter.copy_(torch.where(self.masks[name], parameter, self.old[name]))

    def zero_grad(self):
        self.inner.zero_grad()


OPTIMIZERS = {"activations": one_small_matrix, "sparse": sparse, "masked": Masked}


def step(model, optimizer, length):
    ids = torch.randint(VOCABULARY, (1, length), device=model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def peak_memory(kind, num_weights, dtype, device, what):
    """Most bytes of tensors at once in a training step, over those of the weights."""

    def first_step():
        model = build(kind, num_weights, dtype, device)
        optimizer = OPTIMIZERS[what](model)
        step(model, optimizer, 64)
        return model, optimizer

    (model, optimizer), standing, _ = _allocating(first_step, device)
    _, _, peak = _allocating(lambda: step(model, optimizer, 64), device)
    return (standing + peak) / sum(p.nbytes for p in model.parameters())


def _allocating(work, device):
    """(result, bytes allocated and kept, most bytes allocated at once) of `work`."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return work(), torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    running = list(itertools.accumulate(sizes, initial=0))
    return result, running[-1], max(running)


def state_and_time(kind, num_weights, dtype, device, length, repeats):
    models = {make: build(kind, num_weights, dtype, device) for make in (dense, sparse)}
    optimizers = {make: make(model) for make, model in models.items()}
    times = {make: [] for make in models}
    for repeat in range(repeats + 1):
        for make, model in models.items():
            _synchronize(device)
            start = time.perf_counter()
            step(model, optimizers[make], length)
            _synchronize(device)
            if repeat:
                times[make].append(time.perf_counter() - start)
    optimizer, weights = optimizers[sparse], list(models[sparse].parameters())
    state = optimizer.state_dict()
    moments = sum(v.nbytes for entry in state["state"].values() for v in entry.values())
    held = moments + sum(v.nbytes for v in state["masters"].values()) + 8 * optimizer.selection.k
    number = sum(p.numel() for p in weights)
    medians = {make: statistics.median(values) for make, values in times.items()}
    return {
        "weights": number,
        "state": moments / (8 * number),
        "held": held / sum(p.nbytes for p in weights),
        "ms": 1000 * medians[dense],
        "time": medians[sparse] / medians[dense],
    }


def _synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def in_a_process(*arguments):
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--weights", type=float, nargs="+", default=[1e7, 1.1e8, *([1e9, 8e9] if on_gpu else [])])
    parser.add_argument("--kinds", nargs="+", default=["dense", "moe"])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--tokens", type=int, default=256, help="per timed step")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, number, dtype, device, what = options.child
        print(json.dumps(peak_memory(kind, float(number), getattr(torch, dtype), device, what)))
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.tokens} tokens per step")
    columns = ("state", "held", "activations", "sparse", "masked", "ms", "time")
    print(f"{'weights':>14} {'kind':6}{'dtype':9}" + "".join(f"{column:>12}" for column in columns))
    for number in options.weights:
        for kind in options.kinds:
            for dtype in ("float32", "bfloat16"):
                row = state_and_time(
                    kind, number, getattr(torch, dtype), options.device, options.tokens, options.repeats
                )
                row |= {what: in_a_process(kind, number, dtype, options.device, what) for what in OPTIMIZERS}
                form = {"state": "12.2%", "held": "12.1%", "ms": "12.0f"}
                cells = "".join(f"{row[column]:{form.get(column, '12.2f')}}" for column in columns)
                print(f"{row['weights']:>14,} {kind:6}{dtype:9}{cells}", flush=True)


if __name__ == "__main__":
    main()
