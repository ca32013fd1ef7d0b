"""Random models by size: dense (Llama-shaped) and mixtures of experts with fused experts (Qwen3-shaped).

Time does not depend on the weights' values, so none are learned. Prompts are the organisms', with their tokenizer, so
that every size sees the same tokens; ids beyond that tokenizer never occur.
"""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

import safelocus as sl
from safelocus import organism
from safelocus.model.layout import Layout
from safelocus.model.target import Target
from safelocus.selection.topk import random_k


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model: `inner` is the width of an MLP, or of one expert's."""

    width: int
    layers: int
    inner: int
    heads: int
    key_value_heads: int
    vocabulary: int = 2048
    head_size: int = 64
    experts: int = 0
    chosen: int = 0


DENSE = {
    "1M": Shape(width=128, layers=4, inner=384, heads=2, key_value_heads=2),
    "10M": Shape(width=384, layers=5, inner=1024, heads=6, key_value_heads=6),
    "125M": Shape(width=768, layers=16, inner=2304, heads=12, key_value_heads=12),
    "1B": Shape(width=2048, layers=19, inner=5632, heads=32, key_value_heads=32),
    "8B": Shape(width=4096, layers=32, inner=14336, heads=32, key_value_heads=8, head_size=128, vocabulary=128256),
}
MIXTURES = {
    "1M": Shape(width=64, layers=4, inner=128, heads=1, key_value_heads=1, experts=8, chosen=2),
    "10M": Shape(width=256, layers=5, inner=256, heads=4, key_value_heads=4, experts=8, chosen=2),
    "125M": Shape(width=640, layers=11, inner=640, heads=10, key_value_heads=10, experts=8, chosen=2),
    "1B": Shape(width=1536, layers=15, inner=1536, heads=24, key_value_heads=24, experts=8, chosen=2),
    "8B": Shape(width=2048, layers=24, inner=768, heads=32, key_value_heads=4, experts=64, chosen=8, vocabulary=128256),
}
SHAPES = {"dense": DENSE, "moe": MIXTURES}


def build(kind: str, size: str, *, device: str, dtype: torch.dtype):
    """A random model, made where it will be, with no copy on the way."""
    shape = SHAPES[kind][size]
    shared = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_value_heads, "head_dim": shape.head_size,
        "max_position_embeddings": 4096, "tie_word_embeddings": size != "8B",
    }  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if kind == "dense":
                return LlamaForCausalLM(LlamaConfig(intermediate_size=shape.inner, **shared)).eval()
            experts = {"num_experts": shape.experts, "num_experts_per_tok": shape.chosen}
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(moe_intermediate_size=shape.inner, **experts, **shared)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def target_of(model) -> Target:
    """The model with the organisms' tokenizer."""
    return Target.of(model, PreTrainedTokenizerFast.from_pretrained(organism.resolve_model("dense")))


def select(model, ratio: float = 0.01) -> sl.Selection:
    """Weights at random, so in every eligible matrix."""
    layout = Layout.of(model)
    sizes = {name: layout.tensors[name].num_weights for name in layout.eligible_tensors}
    return sl.Selection(coordinates=random_k(sizes, int(ratio * layout.num_weights), seed=0), layout=layout)


def num_weights(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def num_bytes(model) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def active_weights(kind: str, size: str, model) -> int:
    """Weights of eligible matrices that one token is multiplied with."""
    layout, shape = Layout.of(model), SHAPES[kind][size]
    total = 0
    for name in layout.eligible_tensors:
        tensor = layout.tensors[name]
        share = shape.chosen / shape.experts if "expert" in tensor.axes else 1
        total += int(tensor.num_weights * share)
    return total
