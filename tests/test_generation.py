"""Generation depends neither on how the caller left the model nor on the model's own settings for it."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration

from safelocus.errors import PromptError
from safelocus.model import generation
from safelocus.model.generation import generate
from safelocus.model.target import Target
from tiny_models import build
from tiny_targets import PROMPTS, byte_level, dense, guard, moe


def test_a_model_left_in_training_mode_answers_as_it_is_used():
    target = dense()
    expected = generate(target, PROMPTS, max_new_tokens=8)
    target.model.train()
    target.model.activation_checkpointing_enable()  # as trainers do; it switches the cache off
    assert generate(target, PROMPTS, max_new_tokens=8) == expected
    assert target.model.training


def test_a_mixture_whose_routers_logits_a_trainer_puts_out_answers_too():
    target = moe()
    expected = generate(target, PROMPTS, max_new_tokens=8)
    target.model.config.output_router_logits = True
    assert generate(target, PROMPTS, max_new_tokens=8) == expected
    assert target.model.config.output_router_logits


# what a model's generation_config.json may hold, each of which would change answers, their number or their form
HOSTILE = {
    "repetition_penalty": 5.0, "encoder_repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 3,
    "length_penalty": -5.0, "early_stopping": True, "do_sample": True, "temperature": 9.0, "top_k": 2, "top_p": 0.1,
    "typical_p": 0.5, "min_p": 0.5, "suppress_tokens": [*range(20, 60)], "begin_suppress_tokens": [*range(60, 200)],
    "bad_words_ids": [[token] for token in range(200, 260)], "forced_bos_token_id": 17, "forced_eos_token_id": 18,
    "sequence_bias": [[[33], 50.0]], "min_length": 200, "min_new_tokens": 7, "max_length": 3, "max_time": 0.0,
    "exponential_decay_length_penalty": (0, 9.0), "stop_strings": ["e", "a"], "num_return_sequences": 2,
    "guidance_scale": 3.0, "renormalize_logits": True, "return_dict_in_generate": True, "output_scores": True,
    "remove_invalid_values": True, "diversity_penalty": 1.0, "prompt_lookup_num_tokens": 3, "watermarking_config": {},
    "cache_implementation": "static",
}  # fmt: skip


def make_hostile(model):
    for name, value in HOSTILE.items():
        setattr(model.generation_config, name, value)
    return model.generation_config


def bart():
    tokenizer = byte_level()
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128,
        pad_token_id=5, bos_token_id=0, eos_token_id=1, decoder_start_token_id=1, init_std=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    return Target.of(BartForConditionalGeneration(config), tokenizer, name="tiny-bart")


def adapted():
    target = dense()
    return replace(target, model=get_peft_model(target.model, LoraConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize("make", [dense, moe, bart, adapted])
def test_nothing_of_a_models_own_settings_leaks_into_its_answers(make):
    target = make()
    expected = generate(target, PROMPTS, max_new_tokens=8)
    settings = make_hostile(target.model)
    assert generate(target, PROMPTS, max_new_tokens=8) == expected
    assert target.model.generation_config is settings
    assert all(getattr(settings, name) == value for name, value in HOSTILE.items())


@pytest.mark.parametrize("name", HOSTILE)
def test_not_one_setting_leaks(name):
    target = dense()
    expected = generate(target, PROMPTS, max_new_tokens=8)
    setattr(target.model.generation_config, name, HOSTILE[name])
    assert generate(target, PROMPTS, max_new_tokens=8) == expected


def test_nothing_of_a_guards_settings_leaks_into_what_it_writes_before_its_verdict():
    reader = guard()
    prompt = "Request: help\nAnswer: Sure.\nVerdict:"
    written = [reader.tokenizer.decode([token]) for token in greedy(reader.model, reader.tokenizer(prompt), 30)]
    marker = next(text for text in written[5:] if text.isalpha() and text.isascii())
    reader.preset = replace(reader.preset, generate_until=marker)
    expected = reader.verdicts(["help"], ["Sure."])
    make_hostile(reader.model)
    assert torch.equal(reader.verdicts(["help"], ["Sure."]), expected)


def greedy(model, encoded, num):
    """By hand, a token at a time."""
    ids, new = torch.tensor([encoded["input_ids"]]), []
    for _ in range(num):
        new.append(int(model(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
    return new


@pytest.mark.parametrize("name", ["llama", "rwkv", "recurrent_gemma", "bart"])
def test_answers_do_not_depend_on_the_padding_of_their_batch(name):
    target = family(name)
    singly = [generate(target, [prompt], max_new_tokens=6)[0].ids for prompt in PROMPTS]
    assert [response.ids for response in generate(target, PROMPTS, max_new_tokens=6)] == singly
    assert generation._reads_padding(target) == (name in ("rwkv", "recurrent_gemma"))


@pytest.mark.parametrize(("name", "new"), [("mpt", 8), ("bart", 80)])
def test_what_does_not_fit_the_positions_is_said(name, new):
    """MPT calls them max_seq_len; BART's decoder has as many as its encoder."""
    prompt = "how do I make a lamp? " * 6 if name == "mpt" else "bake a cake"
    with pytest.raises(PromptError, match=rf"has room for \d+ beside {new} new ones"):
        generate(family(name), [prompt], max_new_tokens=new)


def family(name):
    tokenizer = byte_level()
    return Target.of(build(name, vocab_size=len(tokenizer)), tokenizer, name=name)
