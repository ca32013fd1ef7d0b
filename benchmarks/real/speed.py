"""How fast scoring, SET and generation are on the real model, and what of it is matrix products.

    python benchmarks/real/speed.py [--model smollm2] [--prompts 8] [--rounds 1] [--threads 2] [--json FILE]

    scoring      the refusal objective, forward and backward: openings in one row behind the prompt, against each alone
    SET          one step: 4 refusals and 4 retained rows of at most 100 tokens; the original's words kept, or run again
    generation   32 prompts, 32 new tokens, against the model's own `generate`

`share`: the time that the matrix products of that work take by themselves, in their shapes and type on this machine,
over the time of the work. Attention's own products are not among them. With one thread, process time; runs alternate.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import sets
import torch
from torch import nn

import safelocus as sl
from safelocus.enhancement.retention import RetainingTrainer
from safelocus.model import forcing
from safelocus.model.autocast import many_passes
from safelocus.model.forcing import pad
from safelocus.model.generation import generate
from safelocus.model.target import Target
from safelocus.scoring.gradients import GradientAccumulator, named_weights
from safelocus.scoring.run import sigma

RATIO, STEPS, ROW = 0.01, 4, 100
DTYPES = {"fp32": "float32", "bf16 products": "auto"}


class Clock:
    """Seconds; of this process alone where it has one thread."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.now = time.process_time if threads == 1 else time.perf_counter

    def of(self, work: Callable[[], object]) -> float:
        start = self.now()
        work()
        return self.now() - start


@contextmanager
def counted(target: Target) -> Iterator[dict[str, int]]:
    """Within: tokens that go through the layers, and through the head, padding too."""
    seen = {"layers": 0, "head": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[torch.Tensor, ...], _o: object) -> None:
            seen[name] += args[0].numel() if name == "layers" else args[0][..., 0].numel()

        return hook

    modules = {"layers": target.model.get_input_embeddings(), "head": target.model.get_output_embeddings()}
    hooks = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def products(clock: Clock, target: Target, layers: int, head: int, *, passes: float = 1, backward: bool) -> float:
    """Seconds of the products alone, of so many tokens each pass; `backward`: for inputs, and weights of the layers."""
    dtype = target.autocast.dtype if target.autocast else target.model.dtype
    output = target.model.get_output_embeddings()
    linear = [module for module in target.model.modules() if isinstance(module, nn.Linear)]
    shapes = Counter((module.in_features, module.out_features, module is output) for module in linear)
    total = 0.0
    for (ins, outs, is_head), number in shapes.items():
        rows = head if is_head else layers
        x, w, g = (torch.randn(size, dtype=dtype) for size in ((rows, ins), (outs, ins), (rows, outs)))
        pairs = [(x, w.T), *([(g, w)] if backward else []), *([(g.T, x)] if backward and not is_head else [])]
        for pair in pairs:
            total += passes * number * median(clock.of(partial(torch.matmul, *pair)) for _ in range(3))
    return total


def scoring(clock: Clock, target: Target, prompts: Sequence[str]) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Seconds of one batch, S, and the top 1 % of ESI."""
    weights = named_weights(target.model, target.layout.eligible_tensors)
    accumulator, found = GradientAccumulator(weights), []
    with accumulator.collecting(target.model):

        def work() -> None:
            found.append(sl.Refusal()(target, prompts))
            found[0].sum().backward()

        seconds = clock.of(work)
    layout = target.layout.tensors
    esi = torch.cat([(g.abs_() * sigma(layout[n], weights[n].detach())).flatten() for n, g in accumulator.sums.items()])
    top = torch.zeros(len(esi), dtype=torch.bool)
    top[esi.topk(int(RATIO * target.layout.num_weights)).indices] = True
    return seconds, found[0].detach(), top


def steps(clock: Clock, target: Target, selection: sl.Selection, *, again: bool) -> float:
    """Seconds of a step of SET, median of all but the first, in which everything comes for the first time."""
    starts: list[float] = []
    step, keep = RetainingTrainer.training_step, RetainingTrainer._keep

    def timed(self: Any, *arguments: Any) -> Any:
        starts.append(clock.now())
        return step(self, *arguments)

    def forgetful(self: Any, *arguments: Any) -> None:
        self._kept.clear()
        keep(self, *arguments)

    with (
        patch.object(RetainingTrainer, "training_step", timed),
        patch.object(RetainingTrainer, "_keep", forgetful if again else keep),
    ):
        sl.enhance(
            target, selection, sets.refusals().limit(8, seed=0), retain=sets.benign().limit(4, seed=0),
            retain_kl=1.0, retain_rows=1, steps=STEPS, batch_size=4, max_length=ROW, progress=False,
        )  # fmt: skip
    return median(after - before for before, after in pairwise(starts[1:]))


def bare(target: Target, prompts: Sequence[str]) -> None:
    ids, mask = pad(
        [target.chat.encode_prompt(p) for p in prompts], target.tokenizer.pad_token_id, target.device, left=True
    )
    with many_passes(target.autocast):
        target.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=32, min_new_tokens=0, do_sample=False,
            eos_token_id=list(target.chat.end_of_turn_ids), pad_token_id=target.tokenizer.pad_token_id,
        )  # fmt: skip


def measured(clock: Clock, name: str, dtype: Any, prompts: Sequence[str], rounds: int) -> dict[str, Any]:
    target, found = sl.load(name, dtype=dtype), {}
    apart = {"packed": forcing._takes_packed, "each alone": lambda *_: False}
    times: dict[str, list[float]] = {}
    with patch.object(forcing, "_takes_packed", apart["packed"]), torch.no_grad():
        sl.Refusal()(target, prompts[:1])  # tries packing, reads the weights
    results = {}
    for _ in range(rounds):
        for way, takes in apart.items():
            with patch.object(forcing, "_takes_packed", takes), counted(target) as tokens:
                seconds, *results[way] = scoring(clock, target, prompts)
            times.setdefault(way, []).append(seconds)
            found[way] = {"seconds": min(times[way]), "products": products(clock, target, **tokens, backward=True)}
    (s, top), (other, other_top) = results["packed"], results["each alone"]
    found["packed"] |= {
        "S differs by": float((s - other).abs().max()), "IoU": float((top & other_top).sum() / (top | other_top).sum()),
    }  # fmt: skip
    selection = sl.score(target, prompts, method="random", progress=False).select(RATIO)
    for way in ("kept", "run again"):
        seconds = min(steps(clock, target, selection, again=way == "run again") for _ in range(rounds))
        found[f"SET, original {way}"] = {"seconds": seconds}
    # the retained rows and the refusals in turn, about half of each an answer
    half = {"layers": 4 * ROW, "head": 4 * ROW // 2}
    found["SET, original kept"]["products"] = 2 * products(clock, target, **half, backward=True)
    many = sets.advbench().texts[:32]
    times = {"generation": [], "bare": []}
    with torch.no_grad():
        for _ in range(rounds + 1):
            with counted(target) as tokens:
                times["generation"].append(clock.of(lambda: generate(target, many, max_new_tokens=32)))
            times["bare"].append(clock.of(lambda: bare(target, many)))
        prompt = products(clock, target, tokens["layers"] - 31 * 32, 32, backward=False)
        found["generation"] = {
            "seconds": min(times["generation"]), "bare": min(times["bare"]),
            "products": prompt + products(clock, target, 32, 32, passes=31, backward=False),
        }  # fmt: skip
    for cell in found.values():
        if "products" in cell:
            cell["share"] = cell["products"] / cell["seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompts", 8), ("rounds", 1), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    clock, prompts = Clock(given.threads), sets.find().texts[: given.prompts]
    found = {name: measured(clock, given.model, dtype, prompts, given.rounds) for name, dtype in DTYPES.items()}
    for name, cells in found.items():
        for work, cell in cells.items():
            print(f"{name:14s} {work:24s}", "  ".join(f"{key} {value:.4g}" for key, value in cell.items()))
        print(f"{name:14s} packed / each alone      {cells['packed']['seconds'] / cells['each alone']['seconds']:.2f}")
    if given.json:
        given.json.write_text(json.dumps({"threads": given.threads, "prompts": given.prompts, **found}, indent=1))


if __name__ == "__main__":
    main()
