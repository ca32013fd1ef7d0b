import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

import tiny_models
from safelocus.model import forcing
from safelocus.model.forcing import batches_by_length, teacher_force, teacher_force_several
from safelocus.model.layout import Layout
from safelocus.model.target import Target
from safelocus.scoring.observing import RoutingCounter
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


def windowed(width=16):
    """Every second layer sees no farther than so many tokens."""
    return family("gemma2", sliding_window=width)


def family(name, **changes):
    tokenizer = dense().tokenizer
    return Target.of(tiny_models.build(name, vocab_size=len(tokenizer), **changes), tokenizer, name=name)


SEVERAL = [RESPONSES, [[20, 30]], [], [[70], [80, 90, 100, 110]], [[40, 50, 60], []]]


def singly(target, prompts):
    pairs = [(prompt, one) for prompt, several in zip(prompts, SEVERAL, strict=True) for one in several]
    return teacher_force(target, [prompt for prompt, _ in pairs], [response for _, response in pairs])


def check_several(target):
    """Values and gradients of all responses behind one prompt are those of each behind a prompt of its own."""
    prompts = [target.chat.encode_prompt(prompt) for prompt in PROMPTS]
    expected, found = singly(target, prompts), teacher_force_several(target, prompts, SEVERAL)
    assert found.token.tolist() == expected.token.tolist()
    assert found.row.tolist() == expected.row.tolist()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    weight = target.model.get_input_embeddings().weight
    gradients = [torch.autograd.grad(forced.log_likelihood(10).sum(), weight)[0] for forced in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def run_tokens(target, work):
    """Tokens that a model is given in `work`, padding too, and what it returns."""
    seen = []
    hook = target.model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].numel()))
    with torch.no_grad():
        result = work()
    hook.remove()
    return sum(seen), result


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [dense, moe, gpt2])
def test_several_responses_share_their_prompt(make, attention):
    target = make()
    target.model.set_attn_implementation(attention)
    tried, taken = run_tokens(target, lambda: forcing._takes_packed(target, 55))
    assert taken
    assert tried
    prompts, several = [[*range(20, 60)]], [[[20, 30, 40]] * 5]
    tokens, _ = run_tokens(target, lambda: teacher_force_several(target, prompts, several))
    assert tokens == 40 + 5 * 2  # and nothing was tried again
    check_several(target)


@pytest.mark.parametrize(
    "make",
    [
        bart,
        windowed,
        lambda: family("bloom"),
        lambda: family("mpt"),
        lambda: family("falcon_rw"),
        lambda: family("rwkv"),
    ],
)
def test_several_responses_where_rows_cannot_be_packed(make):
    target = make()
    assert not forcing._takes_packed(target, 30)
    check_several(target)


def test_short_rows_are_packed_where_a_window_is_longer_than_they_are():
    target = windowed(width=64)
    assert forcing._takes_packed(target, 60)
    check_several(target)


def test_trying_leaves_no_trace():
    target = moe()
    counter = RoutingCounter(target.model, Layout.of(target.model))
    state = torch.get_rng_state()
    with counter.counting():
        assert forcing._takes_packed(target, 30)
    assert not counter.tokens
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_of_packed_rows_are_counted_once_and_padding_never():
    target = moe()
    prompts = [target.chat.encode_prompt(prompt) for prompt in PROMPTS]
    counter = RoutingCounter(target.model, target.layout)
    with counter.counting():
        teacher_force_several(target, prompts, SEVERAL)
    run = sum(map(len, prompts)) + sum(max(len(response) - 1, 0) for several in SEVERAL for response in several)
    assert counter.tokens
    for counts in counter.tokens.values():
        assert int(counts.sum()) == run * target.model.config.num_experts_per_tok


@pytest.mark.parametrize("size", [1, 3, 32])
def test_batches_by_length(size):
    lengths = [5, 100, 9, 7, 60, 49, 1, 11, 0]
    batches = batches_by_length(lengths, size)
    assert sorted(i for batch in batches for i in batch) == list(range(9))  # each once
    assert all(len(batch) <= size and lengths[batch[0]] <= 2 * lengths[batch[-1]] for batch in batches)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)
    if size == 32:
        assert [[lengths[i] for i in batch] for batch in batches] == [[100, 60], [49], [11, 9, 7], [5], [1], [0]]
    assert batches_by_length([4, 4, 4, 4], 3) == [[0, 1, 2], [3]]
    assert batches_by_length([], 3) == []


def test_what_leaks_into_a_state_and_fades_is_noticed(monkeypatch):
    monkeypatch.setattr(forcing, "_has_running_state", lambda _: False)
    assert not forcing._takes_packed(family("rwkv"), 200)
