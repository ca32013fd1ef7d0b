import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from safelocus.forcing import teacher_force
from safelocus.target import Target
from tiny_targets import PROMPTS, dense, moe


def gpt2():
    tokenizer = dense().tokenizer
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128)
    torch.manual_seed(0)
    return Target.of(GPT2LMHeadModel(config), tokenizer, name="tiny-gpt2")


def bart():
    tokenizer = dense().tokenizer
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128,
        decoder_start_token_id=1, pad_token_id=5, bos_token_id=0, eos_token_id=1, init_std=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Target.of(BartForConditionalGeneration(config), tokenizer, name="tiny-bart")


RESPONSES = [[20, 30, 40], [50], [], [60, 70], [80, 90, 100, 110]]


@pytest.mark.parametrize("make", [dense, moe, gpt2, bart])
def test_batch_equals_one_at_a_time(make):
    target = make()
    prompts = [target.chat.encode_prompt(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        forced = teacher_force(target, prompts, RESPONSES)
        singles = [teacher_force(target, [p], [r]).logits for p, r in zip(prompts, RESPONSES, strict=True)]
    torch.testing.assert_close(forced.logits, torch.cat(singles), rtol=1e-4, atol=1e-5)
    assert forced.token.tolist() == [token for response in RESPONSES for token in response]
    assert forced.row.tolist() == [row for row, response in enumerate(RESPONSES) for _ in response]


@pytest.mark.parametrize("make", [dense, moe, gpt2])
def test_logits_are_those_of_the_plain_forward_pass(make):
    target = make()
    prompt, response = target.chat.encode_prompt("bake a cake"), [20, 30, 40]
    with torch.no_grad():
        whole = target.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        forced = teacher_force(target, [prompt], [response])
    torch.testing.assert_close(forced.logits, whole, rtol=1e-4, atol=1e-5)
    expected = torch.log_softmax(whole, -1)[range(3), response].sum()
    torch.testing.assert_close(forced.log_likelihood(1)[0], expected, rtol=1e-4, atol=1e-5)
