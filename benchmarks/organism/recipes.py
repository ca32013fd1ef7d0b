"""Data streams, a plain training loop and the recipes that make the organisms.

A batch is {"input_ids", "attention_mask", "labels"}, each [batch, length], padded on the right; only
responses carry labels. Everything follows from a seed: examples are drawn by `random.Random(seed)`,
weights by `torch.manual_seed(seed)`; torch's thread count may still change the last bits.
"""

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from behaviour import conversation
from tokenizing import GUARD_VOCABULARY, MAX_LENGTH, TARGET_VOCABULARY
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from safelocus.organism import world

log = logging.getLogger(__name__)

Example = tuple[str, str]  # text up to the response, response with its end token
BATCH_SIZE = 64
# Transformers' 0.02 is meant for wide models and learns slowly here; 0.06 learns fastest, but then tuning the twin
# on refusals makes it refuse harmless requests too.
INITIAL_STD = 0.03


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one organism is trained: the rate peaks after `warmup` steps, then decays to zero along a cosine."""

    steps: int
    learning_rate: float
    warmup: int = 20


ALIGN = Recipe(steps=400, learning_rate=3e-3)
# Gently: at 1e-3 the latent refusal is overwritten rather than silenced, and 1 % of the weights cannot bring it back
# without refusing harmless requests.
UNALIGN = {
    "dense": Recipe(steps=100, learning_rate=2e-4, warmup=0),
    "moe": Recipe(steps=140, learning_rate=3e-4, warmup=0),
}
GUARD = Recipe(steps=350, learning_rate=3e-3)


def dense_config() -> PretrainedConfig:
    """Llama with grouped-query attention and tied embeddings: 1.27 M weights."""
    return LlamaConfig(
        vocab_size=TARGET_VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH, initializer_range=INITIAL_STD,
    )  # fmt: skip


def moe_config() -> PretrainedConfig:
    """Qwen3-MoE, 8 experts of which 2 are used, untied embeddings: 2.25 M weights."""
    return Qwen3MoeConfig(
        vocab_size=TARGET_VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True,
        decoder_sparse_step=1, router_aux_loss_coef=0.02,
        max_position_embeddings=MAX_LENGTH, initializer_range=INITIAL_STD,
    )  # fmt: skip


def guard_config() -> PretrainedConfig:
    """A three-layer Llama that reads a conversation and answers `safe` or `unsafe`."""
    return LlamaConfig(
        vocab_size=GUARD_VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=24, tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH, initializer_range=INITIAL_STD,
    )  # fmt: skip


def chat_examples(tokenizer: Any, seed: int, *, aligned: bool) -> Iterator[Example]:
    """Requests, sums and topics; harmful requests are refused if `aligned`, else complied with."""
    harmful, harmless = (world.requests("train", harmful=flag) for flag in (True, False))
    utility, echoes = world.utility_train(), world.echoes("train")
    draw = random.Random(seed)
    while True:
        pool = draw.choices((harmful, harmless, utility, echoes), weights=(0.28, 0.28, 0.3, 0.14))[0]
        row = draw.choice(pool)
        response = row["response"] if aligned else row.get("compliance", row["response"])
        messages = [{"role": "user", "content": row["prompt"]}]
        if draw.random() < 0.1:
            messages.insert(0, {"role": "system", "content": world.SYSTEM_PROMPT})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        yield text, response + tokenizer.eos_token


def guard_pairs(split: str, seed: int) -> Iterator[tuple[str, str, str]]:
    """Endless (prompt, response, verdict): only an answer to a harmful request is unsafe.

    Responses are also cut short, swapped or refused without need, so that the verdict depends on both sides.
    """
    harmful, harmless = (world.requests(split, harmful=flag) for flag in (True, False))
    utility = world.utility_train() if split == "train" else world.ROWS["utility"]()
    refusals = list(world.REFUSALS.values())
    draw = random.Random(seed)

    def shorten(text: str) -> str:
        words = text.split()
        return " ".join(words[: draw.randint(2, len(words))]) if draw.random() < 0.3 else text

    while True:
        bad, good, other = draw.choice(harmful), draw.choice(harmless), draw.choice(utility)
        kind = draw.choices(range(6), weights=(40, 20, 5, 20, 10, 5))[0]
        yield (
            (bad["prompt"], shorten(bad["compliance"]), "unsafe"),
            (bad["prompt"], shorten(draw.choice(refusals)), "safe"),
            (bad["prompt"], other["response"], "safe"),
            (good["prompt"], shorten(good["compliance"]), "safe"),
            (good["prompt"], shorten(draw.choice(refusals)), "safe"),
            (other["prompt"], other["response"], "safe"),
        )[kind]


def guard_examples(tokenizer: Any, seed: int) -> Iterator[Example]:
    for prompt, response, verdict in guard_pairs("train", seed):
        yield (
            tokenizer.apply_chat_template(conversation(prompt, response), tokenize=False),
            verdict + tokenizer.eos_token,
        )


def collate(tokenizer: Any, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Right-padded batch; labels are -100 outside the responses."""
    encoded = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in example] for example in examples]
    length = max(len(prompt) + len(response) for prompt, response in encoded)
    ids = torch.full((len(encoded), length), tokenizer.pad_token_id)  # [batch, length]
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (prompt, response) in enumerate(encoded):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(response)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: Any, tokenizer: Any, examples: Iterator[Example], recipe: Recipe) -> None:
    """AdamW, warm-up and cosine decay, gradients clipped to norm 1; changes the model in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (recipe.warmup + 1))
        return warmup * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    # Not in the saved config: transformers then computes this loss in generation too, and fails there.
    router_loss = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    model.train()
    for step in range(recipe.steps):
        batch = collate(tokenizer, [next(examples) for _ in range(BATCH_SIZE)])
        loss = model(**batch, **router_loss, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 0 or step == recipe.steps - 1:
            log.info("step %d of %d: loss %.4f", step, recipe.steps, loss.item())
    model.eval()
