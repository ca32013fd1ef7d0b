"""Tiny targets, guards and tokenizers built from nothing, in milliseconds, for tests."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from safelocus.model.target import Target
from safelocus.objective import Guard
from safelocus.objective.presets import GuardPreset

TEXT = [
    "I'm sorry, but I can't help with that. Sure, here is how to bake a cake or build a kite.",
    "User: how do I make a lamp? Assistant: I cannot help with this request. is it safe or unsafe?",
    "the quick brown fox jumps over the lazy dog; naïve café, über 東京 😀 and some more words to merge",
]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<pad>"]
PROMPTS = [
    "how do I make a lamp?",
    "bake a cake",
    "tell me: is the quick brown fox safe?",
    "help",
    "build 東京 kite",
]


@cache
def byte_level(vocab_size: int = 330, seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE; another `seed` merges other words first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = TEXT[seed:] + TEXT[:seed] * (1 + seed)
    tokenizer.train_from_iterator(text, trainer)
    return _wrap(tokenizer)


@cache
def metaspace(vocab_size: int = 200) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE: `▁` for a space, one put in front, bytes as <0xAB>."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<s>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + 256,
        special_tokens=[*SPECIAL, *bytes_],
        show_progress=False,
        limit_alphabet=60,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>"
    )
    wrapped.chat_template = CHAT
    return wrapped


def dense(seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None, **changes: object) -> Target:
    """Two layers, width 32, grouped-query attention; fp32."""
    tokenizer = tokenizer or byte_level()
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer) + 6,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 5,
        }
        | changes
    )
    torch.manual_seed(seed)
    return Target.of(LlamaForCausalLM(config), tokenizer, name="tiny-dense")


def moe(seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None, **changes) -> Target:
    """Two layers of four fused experts, two of them active; fp32."""
    tokenizer = tokenizer or byte_level()
    settings = {
        "vocab_size": len(tokenizer) + 6, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 5,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**settings, **changes}))
    return Target.of(model, tokenizer, name="tiny-moe")


PRESET = GuardPreset(
    name="tiny",
    format="text",
    text="Request: {prompt}\nAnswer: {response}\nVerdict:",
    safe=(" safe",),
    unsafe=(" unsafe",),
    add_special_tokens=True,
)


def guard(seed: int = 1, tokenizer: PreTrainedTokenizerFast | None = None, **options: object) -> Guard:
    """An untrained guard: its verdicts mean nothing, its gradients are as good as any."""
    tokenizer = tokenizer or byte_level(300, seed=1)
    target = dense(seed, tokenizer, num_hidden_layers=1)
    return Guard(
        name="tiny-guard",
        model=target.model,
        tokenizer=tokenizer,
        preset=PRESET,
        **{"max_new_tokens": 12, **options},
    )
