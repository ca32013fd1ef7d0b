"""Scoring of models whose layers are not all attention: against brute force, and never several responses in one row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import safelocus as sl
from safelocus.errors import ModelError, SafelocusError
from safelocus.model import forcing
from safelocus.model.generation import generate
from safelocus.model.target import Target
from tiny_models import UNUSUAL, build
from tiny_targets import PROMPTS, byte_level

RECURRENT = (
    "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "lfm2_moe", "granitemoehybrid", "falcon_h1", "nemotron_h",
    "bamba", "olmo_hybrid", "jamba", "minimax", "zamba2", "mamba", "falcon_mamba", "mamba2", "kimi_linear",
    "bailing_hybrid", "recurrent_gemma",
)  # fmt: skip
OTHERS = (
    "gemma3n_text",
    "afmoe",
    "dots1",
    "diffllama",
    "doge",
    "jetmoe",
    "longcat_flash",
    "dbrx",
    "axk2",
    "mimo_v2_flash",
    "aria_text",
    "modernbert-decoder",
    "moshi",
    "bert",
)
OBJECTIVE = sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"])


def target_of(name: str) -> Target:
    tokenizer = byte_level()
    size = len(tokenizer) + 6
    changes = {"vocab_size_per_layer_input": size} if name == "gemma3n_text" else {}
    model = build(name, vocab_size=size, pad_token_id=5, bos_token_id=0, eos_token_id=1, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5)  # milder, so that the objective does not saturate
    return Target.of(model, tokenizer, name=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECURRENT + OTHERS + UNUSUAL)
def test_esi_equals_brute_force(name: str) -> None:
    target = target_of(name)
    layout, weights = target.layout, dict(target.model.named_parameters())
    total = {n: torch.zeros(weights[n].shape, dtype=torch.float64) for n in layout.eligible_tensors}
    for prompt in PROMPTS[:3]:
        target.model.zero_grad(set_to_none=True)
        OBJECTIVE(target, [prompt]).sum().backward()
        for n in total:
            if weights[n].grad is not None:
                total[n] += weights[n].grad.double() / 3
    target.model.zero_grad(set_to_none=True)
    assert all(gradient.any() for n, gradient in total.items() if "expert" not in n)
    scores = sl.score(target, PROMPTS[:3], objective=OBJECTIVE, batch_size=2, progress=False)
    assert list(scores.tensors) == list(total)
    largest = max(float(gradient.abs().max()) for gradient in total.values())
    for n, gradient in total.items():
        expected = gradient.abs()
        for piece, weight in zip(
            layout.tensors[n].split(expected), layout.tensors[n].split(weights[n].detach()), strict=True
        ):
            piece.mul_(weight.double().std(correction=0))
        torch.testing.assert_close(scores.tensors[n].double(), expected, rtol=2e-3, atol=1e-6 * largest)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_state_that_runs_on_forbids_several_responses_in_a_row(name: str) -> None:
    """For any values of the weights: a slow state would not show in a trial."""
    assert not forcing._takes_packed(target_of(name), 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECURRENT)
def test_answers_do_not_depend_on_the_batch(name: str) -> None:
    target = target_of(name)
    together = [list(response.ids) for response in generate(target, PROMPTS[:3], max_new_tokens=5)]
    assert together == [list(generate(target, [prompt], max_new_tokens=5)[0].ids) for prompt in PROMPTS[:3]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jamba", "mamba2", "qwen3_next", "lfm2", "minimax", "zamba2"])
def test_wanda_sees_the_inputs_of_every_matrix(name: str) -> None:
    target = target_of(name)
    scores = sl.score(target, PROMPTS, method="wanda", batch_size=5, max_new_tokens=6, progress=False)
    assert all(tensor.any() for tensor in scores.tensors.values())


def test_wanda_refuses_experts_that_share_an_axis() -> None:
    with pytest.raises(SafelocusError, match=r"ffn\.experts\.mlp\.w1.*one below the other.*another method"):
        sl.score(target_of("dbrx"), PROMPTS, method="wanda", max_new_tokens=3, progress=False)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"is_decoder": False}, r"sees what follows a token \(BertLMHeadModel"),
        ("xlm", {"causal": False}, r"sees what follows a token \(XLMWithLMHeadModel"),
        ("xlnet", {}, r"sees what follows a token \(XLNetLMHeadModel"),
        ("kosmos-2", {}, r"fails on text alone \(ValueError: .*pixel_values"),
    ],
)
def test_models_that_cannot_continue_text_are_refused_when_they_are_loaded(
    name: str, changes: dict[str, bool], message: str, tmp_path: Path
) -> None:
    tokenizer = byte_level()
    build(name, vocab_size=len(tokenizer) + 6, pad_token_id=5, **changes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        sl.load(tmp_path)
