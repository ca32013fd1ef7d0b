"""Scoring of models whose layers are not all attention: against brute force, and never several responses in one row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import safelocus as sl
from safelocus.errors import ModelError, SafelocusError
from safelocus.model import forcing
from safelocus.model.generation import generate
from safelocus.model.layout import Layout
from safelocus.model.target import Target
from safelocus.scoring import observing
from safelocus.scoring.gradients import named_weights
from safelocus.scoring.observing import InputNorms
from tiny_models import NAMES, UNUSUAL, build, forward, tokens
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


def observed(name: str) -> tuple[InputNorms, dict[str, torch.Tensor]]:
    """What was seen of a pass, and the squares of what each linear module and all experts at once were given."""
    model = build(name)
    layout, given = Layout.of(model), {}

    def see(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            square = args[0].detach().float().square()
            given[name] = given.get(name, 0) + square.reshape(-1, square.shape[-1]).sum(dim=0)[None]

        return add

    names = {parameter: name for name, parameter in model.named_parameters()}  # several modules may share one
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(see(names[module.weight]))
    norms = InputNorms(named_weights(model, layout.eligible_tensors), layout.tensors)
    with norms.observing(model):
        forward(model, tokens(1, 32))
    norms.check_all_seen()
    return norms, {name: square for name, square in given.items() if name in norms.squares}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("falcon_7b", "recurrent_gemma", "llama4_text") else pytest.mark.slow)
        for name in NAMES + UNUSUAL
        if name not in ("dbrx", "deepseek_v4")
    ],
)
def test_wanda_sees_the_inputs_of_every_matrix(name: str) -> None:
    norms, given = observed(name)
    for tensor, square in given.items():
        torch.testing.assert_close(norms.squares[tensor], square, rtol=1e-4, atol=1e-6)
    routed = [square for tensor, square in norms.squares.items() if norms.layouts[tensor].fused_experts]
    assert all(len(square.unique(dim=0)) > 1 for square in routed)


def test_wanda_sees_the_inputs_of_experts_that_are_multiplied_at_once() -> None:
    model = build("llama4_text")
    name, experts = "model.layers.1.feed_forward.experts.gate_up_proj", model.model.layers[1].feed_forward.experts
    given: list[torch.Tensor] = []
    experts.register_forward_pre_hook(lambda module, args: given.append(args[0].view(module.num_experts, -1, 24)))
    norms = InputNorms({name: experts.gate_up_proj}, Layout.of(model).tensors)
    with norms.observing(model):
        forward(model, tokens(1, 32))
    torch.testing.assert_close(norms.squares[name], given[0].square().sum(dim=1)[:, :, None])


def test_a_matrix_that_wanda_does_not_see_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(observing._PRODUCTS, "baddbmm")
    with pytest.raises(SafelocusError, match=r"saw no inputs of 2 tensors.*rg_lru\.input_gate_weight.*another method"):
        observed("recurrent_gemma")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dbrx", r"ffn\.experts\.mlp\.w1.*one below the other.*another method"),
        ("deepseek_v4", r"o_a_proj\.weight.*in groups.*one below the other.*another method"),
    ],
)
def test_wanda_refuses_what_shares_an_axis(name: str, message: str) -> None:
    with pytest.raises(SafelocusError, match=message):
        observed(name)


@pytest.mark.parametrize("name", ["jetmoe", "llama4_text"])
def test_experts_that_no_token_reached_are_told_where_none_are_counted(name: str) -> None:
    scores = sl.score(target_of(name), PROMPTS[:1], objective=OBJECTIVE, progress=False)
    unreached = {(s.layer, s.expert) for s in scores.statistics if s.expert is not None and s.max == 0}
    assert all(s.tokens is None for s in scores.statistics)
    assert scores.provenance.extra.get("remarks", [""])[0].startswith(f"{len(unreached)} experts" if unreached else "")
    assert unreached or name != "jetmoe"


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
