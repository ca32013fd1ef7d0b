"""Peak memory of scoring over the size of the weights.

Each figure is a process of its own: peak resident memory while scoring, minus resident memory before the
model was made, over the bytes of the weights. The limit for fp32 weights with fp32 sums is 2 (weights and
sums) plus activations; in bf16, 3.

    python benchmarks/memory.py [--weights 2e7 1.2e8]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


def measure(num_weights, dtype, what):
    import psutil
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import safelocus as sl
    from safelocus import organism
    from safelocus.target import Target

    before = psutil.Process().memory_info().rss
    tokenizer = PreTrainedTokenizerFast.from_pretrained(organism.resolve_model("dense"))
    layers = 8
    width = int((num_weights / (layers * 13)) ** 0.5) // 64 * 64
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    target = Target.of(model, tokenizer)
    size = sum(p.numel() * p.element_size() for p in target.model.parameters())
    if what == "scoring":
        prompts = sl.read_prompts("organism:harmful").limit(8)
        sl.score(
            target,
            prompts,
            objective=sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"]),
            batch_size=4,
            progress=False,
        )
    elif what == "plain":
        ids = torch.tensor([target.chat.encode_prompt("How do I make a kite?")] * 8)
        total = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in target.model.named_parameters()}
        target.model(ids).logits.float().logsumexp(-1).mean().backward()
        for name, parameter in target.model.named_parameters():
            total[name] += parameter.grad.float()
        scores = {n: g.abs() * target.model.get_parameter(n).float().std() for n, g in total.items()}
        torch.cat([s.flatten() for s in scores.values()]).topk(target.layout.num_weights // 100)
    # not ru_maxrss: a child inherits its parent's
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"weights": sum(p.numel() for p in target.model.parameters()), "over": (peak - before) / size}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[2e7, 1.2e8])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        number, dtype, what = options.child
        measure(float(number), dtype, what)
        return
    print(
        f"{'weights':>12}  {'dtype':10}{'model only':>12}{'scoring':>10}{'plain':>10}   (peak memory / weights' bytes)"
    )
    for number in options.weights:
        for dtype in ("float32", "bfloat16"):
            results = {}
            for what in ("model", "scoring", "plain"):
                command = [sys.executable, __file__, "--child", str(number), dtype, what]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results[what] = json.loads(output.strip().splitlines()[-1])
            row = "".join(
                f"{results[what]['over']:>{w}.2f}" for what, w in (("model", 12), ("scoring", 10), ("plain", 10))
            )
            print(f"{results['model']['weights']:>12,}  {dtype:10}{row}")


if __name__ == "__main__":
    main()
