"""Refusals under attack: what is asked, what is answered, and what a direction's absence does."""

import json
from dataclasses import replace

import pytest
import torch

import safelocus as sl
from safelocus import distributed
from safelocus.errors import PromptError, SafelocusError
from safelocus.evaluation import Ablation, Attacked, Reply, TargetResponder, askings, attack, evaluate
from safelocus.evaluation.attack import _batches, _means, attack_names, decoder_layers
from safelocus.evaluation.responding import Request, collect
from safelocus.model.generation import generate_from
from safelocus.model.target import Target
from safelocus.run.resume import Journal
from tiny_targets import PROMPTS, dense, moe

pytestmark = pytest.mark.slow  # runs commands, again and again


class Echo:
    """Answers with what it was asked."""

    name = "echo"

    def length(self, request):
        return len(request.prompt)

    def respond(self, requests):
        return [Reply(text=request.prompt, finished=True) for request in requests]

    def identity(self):
        return {"kind": "echo"}

    describe = identity


def asked(prompt, tokens=6):
    return Request(prompt=prompt, max_new_tokens=tokens)


@pytest.mark.parametrize("name", [name for name, attack in askings().items() if not attack.opening])
def test_a_wrapper_holds_the_request_and_the_rows_keep_it(name):
    found = evaluate(Attacked(responder=Echo(), attack=askings()[name]), harmful=["make {prompt} lamp"], progress=False)
    (row,) = found.rows
    assert row["prompt"] == "make {prompt} lamp"
    assert "make {prompt} lamp" in row["response"] != row["prompt"]
    assert found.provenance["responder"]["attack"]["name"] == name


@pytest.mark.parametrize("target", [dense(), moe()], ids=["dense", "moe"])
def test_a_begun_answer_is_continued_and_only_the_rest_is_the_reply(target):
    attacked = Attacked(responder=TargetResponder(target=target), attack=askings()["prefill"])
    replies = attacked.respond([asked(prompt) for prompt in PROMPTS])
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        before, opening = target.chat.encode_pair(prompt, askings()["prefill"].opening)
        assert len(opening) > 0
        (bare,) = generate_from([[*before, *opening]], target, 6)
        assert reply.text == bare.text
    assert attacked.identity() != TargetResponder(target=target).identity()
    assert attacked.length(asked("help")) > TargetResponder(target=target).length(asked("help"))


def test_behind_the_opening_no_thought_is_open():
    target = dense()
    thinking = replace(target, chat=replace(target.chat, opened=("<think>", "</think>"), closing="</think>"))
    attacked = Attacked(responder=TargetResponder(target=thinking), attack=askings()["prefill"])
    (reply,) = attacked.respond([asked("help")])
    assert reply.failure is None
    assert reply.thought is None
    (plain,) = TargetResponder(target=thinking).respond([asked("help")])
    assert plain.thought is not None


@pytest.mark.parametrize("wrap", [lambda own: own, lambda own: Attacked(responder=own, attack=askings()["fiction"])])
def test_a_sharded_model_answers_in_step_under_an_attack_too(monkeypatch, wrap):
    steps, own = [], distributed.share
    share = lambda items, *, in_step: steps.append(in_step) or own(items, in_step=in_step)  # noqa: E731
    monkeypatch.setattr(distributed, "share", share)
    monkeypatch.setattr(Target, "is_sharded", True)
    monkeypatch.setattr(TargetResponder, "respond", lambda _, some: [Reply(text="", finished=True) for _ in some])
    collect(wrap(TargetResponder(target=dense())), [asked("help")], Journal(None, "r"), batch_size=1, progress=False)
    assert steps == [True]


def ablation_by_hand(target, prompts, direction):
    """Logits [B, V] at the last token, computed layer by layer as a Llama does, without the direction."""
    model, found = target.model.model, []

    def without(hidden):
        return hidden - (hidden @ direction)[..., None] * direction

    for prompt in prompts:
        ids = torch.tensor([target.chat.encode_prompt(prompt)])
        hidden = model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        rotary = model.rotary_emb(hidden, positions)
        mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), torch.finfo(torch.float32).min).triu(1)
        for layer in model.layers:
            hidden = without(hidden)
            normed = layer.input_layernorm(hidden)
            hidden = hidden + without(layer.self_attn.forward(normed, rotary, mask)[0])
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        found.append(target.model.lm_head(model.norm(without(hidden)))[0, -1])
    return torch.stack(found)


def logits(target, prompts):
    rows = [torch.tensor([target.chat.encode_prompt(prompt)]) for prompt in prompts]
    with torch.no_grad():
        return torch.stack([target.model(ids).logits[0, -1] for ids in rows])


def test_an_ablated_model_computes_without_the_direction_and_is_itself_again_after():
    target = dense()
    direction = torch.nn.functional.normalize(torch.randn(target.model.config.hidden_size), dim=0)
    ablation = Ablation(direction=direction, layer=1, kl=0.0, prompts=("a", "b"))
    before = logits(target, PROMPTS)
    with ablation.applied(target), torch.no_grad():
        ablated = logits(target, PROMPTS)
    assert torch.equal(logits(target, PROMPTS), before)
    assert not torch.allclose(ablated, before, atol=1e-3)
    with torch.no_grad():
        expected = ablation_by_hand(target, PROMPTS, direction)
    torch.testing.assert_close(ablated, expected, atol=1e-4, rtol=1e-4)


def test_means_are_those_of_the_last_token_one_prompt_at_a_time():
    target = dense()
    prompts = sl.read_prompts(PROMPTS)
    found = _means(target, decoder_layers(target), _batches(target, prompts, 3))
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([target.chat.encode_prompt(prompt, closed=True)])
        with torch.no_grad():
            states = target.model(ids, output_hidden_states=True).hidden_states
        rows.append(torch.stack([state[0, -1] for state in states[: len(found)]]))
    torch.testing.assert_close(found, torch.stack(rows).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("max_kl", [0.0, float("inf")], ids=["none is mild", "all are"])
def test_the_direction_found_is_the_one_under_which_refusal_is_least_likely(monkeypatch, max_kl):
    monkeypatch.setattr(attack, "MAX_KL", max_kl)
    target = dense(num_hidden_layers=6)
    harmful, harmless = sl.read_prompts(PROMPTS[:3]), sl.read_prompts(PROMPTS[3:])
    found = Ablation.find(target, harmful, harmless, progress=False)
    means = [_means(target, decoder_layers(target), _batches(target, prompts, 8)) for prompts in (harmful, harmless)]
    apart = torch.nn.functional.normalize(means[0] - means[1], dim=-1)
    scores = {}
    for layer in range(1, 5):
        with replace(found, direction=apart[layer]).applied(target), torch.no_grad():
            scores[layer] = sl.Refusal()(target, harmful.texts).mean().item()
    assert found.layer == min(scores, key=scores.__getitem__)
    torch.testing.assert_close(found.direction, apart[found.layer])
    assert ("carries more than refusal" in found.told) == (max_kl == 0.0)
    with pytest.raises(PromptError, match="have 3 prompts in common"):
        Ablation.find(target, harmful, harmful)


def test_a_direction_that_changes_harmless_answers_is_left_for_a_milder_one(monkeypatch):
    target = dense(num_hidden_layers=6)
    harmful, harmless = sl.read_prompts(PROMPTS[:3]), sl.read_prompts(PROMPTS[3:])
    kls = {}
    monkeypatch.setattr(attack, "MAX_KL", float("inf"))
    first = Ablation.find(target, harmful, harmless, progress=False)
    monkeypatch.setattr(attack, "MAX_KL", first.kl)
    assert Ablation.find(target, harmful, harmless, progress=False).layer == first.layer  # at most
    monkeypatch.setattr(attack, "_refusal", lambda *_: next(scores))
    monkeypatch.setattr(attack, "MAX_KL", 0.0)
    for layer in range(1, 5):  # each made the least likely in turn: what it does to harmless answers
        scores = iter([float(other != layer) for other in range(1, 5)])
        kls[layer] = Ablation.find(target, harmful, harmless, progress=False).kl
    strong = max(kls, key=kls.__getitem__)
    monkeypatch.setattr(attack, "MAX_KL", sorted(kls.values())[-2])
    scores = iter([float(other != strong) for other in range(1, 5)])
    assert Ablation.find(target, harmful, harmless, progress=False).layer != strong


def test_prompts_without_room_show_no_direction():
    target = dense(num_hidden_layers=6, max_position_embeddings=64)
    harmful, harmless, long = sl.read_prompts(PROMPTS[:3]), sl.read_prompts(PROMPTS[3:]), "word " * 40
    expected = Ablation.find(target, harmful, harmless, progress=False)
    found = Ablation.find(target, sl.read_prompts([*PROMPTS[:3], long]), harmless, progress=False)
    assert torch.equal(found.direction, expected.direction)
    with pytest.raises(PromptError, match="no prompt fits"):
        Ablation.find(target, sl.read_prompts([long]), harmless, progress=False)


def test_what_an_attack_cannot_be_put_to_is_a_clear_error():
    with pytest.raises(SafelocusError, match="prefill needs the model itself, but echo only answers"):
        Attacked(responder=Echo(), attack=askings()["prefill"])
    with pytest.raises(SafelocusError, match="ablation needs the model itself"):
        Ablation.find(Echo(), sl.read_prompts(["a"]), sl.read_prompts(["b"]))
    with pytest.raises(SafelocusError, match="has 1 layers"):
        Ablation.find(dense(num_hidden_layers=1), sl.read_prompts(["a"]), sl.read_prompts(["b"]))


def test_the_command_asks_under_an_attack_and_compares(run, tmp_path):
    quick = ["--limit", "6", "--max-new-tokens", "8", "--judge", "refusal"]
    common = ["evaluate", "organism:dense", "-p", "organism:harmful-heldout", *quick]
    assert run(*common, "-o", tmp_path / "plain")[0] == 0
    code, out, _ = run(
        *common, "--attack", "prefill", "--against", tmp_path / "plain", "--json", "-o", tmp_path / "begun"
    )
    assert code == 0
    results = json.loads(out)
    assert results["provenance"]["responder"]["attack"]["opening"] == "Sure, here is"
    assert "asked under no attack first and prefill second" in results["against"]["notes"]
    code, _, errors = run(*common, "--ablation-harmful", "organism:harmful", "-o", tmp_path / "none")
    assert (code, "--ablation-harmful is for --attack ablation" in errors) == (2, True)
    code, _, errors = run(*common, "--attack", "hypnosis", "-o", tmp_path / "none")
    assert code == 2
    assert all(name in errors for name in attack_names())
    assert not (tmp_path / "none").exists()
    code, out, errors = run(
        *common, "--attack", "ablation", "--ablation-harmful", "organism:harmful-heldout", "--ablation-harmless",
        "organism:harmless", "--json", "-o", tmp_path / "ablated",
    )  # fmt: skip
    assert code == 0
    assert "of the prompts measured find the direction too" in errors
    assert json.loads(out)["provenance"]["responder"]["attack"]["layer"] >= 1
