"""Every family goes through the whole chain with random weights: understood, scored, selected, restored."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import safelocus as sl
from safelocus.model.target import Target
from tiny_models import build

FAMILIES = [
    "llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "phi", "gpt2", "gpt_neox", "falcon_7b", "starcoder2",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "t5", "bart",
]  # fmt: skip


def letters() -> PreTrainedTokenizerFast:
    """One token per character; 38 of them, to fit the tiny models' vocabulary of 40."""
    alphabet = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz :'\n,.?SIUA"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="?"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_score_select_restore(family, tmp_path):
    target = Target.of(build(family), letters(), template="U: {prompt}\nA:")
    before = target.fingerprint()
    prompts = ["make a lamp", "is it safe?", "help"]
    objective = sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"])
    batched = sl.score(target, prompts, objective=objective, batch_size=3, progress=False)
    single = sl.score(target, prompts, objective=objective, batch_size=1, progress=False)
    assert target.fingerprint().differences(before) == []
    top = batched.select(ratio=0.05)
    assert top.k == math.floor(0.05 * sum(p.numel() for p in target.model.parameters()))
    assert top.iou(single.select(ratio=0.05)) > 0.98  # rounding at the boundary only
    for name, tensor in batched.tensors.items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.count_nonzero() > 0, name  # every eligible tensor matters for something
    top.save(tmp_path / "top.safetensors")
    assert sl.Selection.load(tmp_path / "top.safetensors").iou(top) == 1
