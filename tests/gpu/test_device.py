"""The same numbers on an accelerator as on the CPU."""

import pytest
import torch

import safelocus as sl
from safelocus import distributed
from safelocus.model.generation import generate
from safelocus.model.target import Target
from safelocus.selection.topk import pick
from tiny_targets import PROMPTS, dense, guard, moe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator on this machine"),
]


@pytest.mark.parametrize("accumulate_on", [None, "cpu"])
@pytest.mark.parametrize("make", [dense, moe])
def test_scores_agree_with_the_cpu(make, accumulate_on):
    expected = sl.score(make(), PROMPTS, objective=guard(), progress=False).select(0.02)
    target, judge = make(), guard()
    target.model.cuda()
    judge.model.cuda()
    scores = sl.score(target, PROMPTS, objective=judge, accumulate_on=accumulate_on, progress=False)
    assert next(iter(scores.tensors.values())).device.type == (accumulate_on or "cuda")
    assert scores.select(0.02).iou(expected) > 0.98


@pytest.mark.parametrize("accumulate_on", [None, "cpu"])
@pytest.mark.parametrize("method", ["wanda", "magnitude", "random"])
def test_scores_without_an_objective_are_where_they_are_asked_to_be(method, accumulate_on):
    expected = sl.score(dense(), PROMPTS, method=method, max_new_tokens=4, progress=False).select(0.02)
    target = dense()
    target.model.cuda()
    scores = sl.score(
        target, PROMPTS, method=method, max_new_tokens=4, accumulate_on=accumulate_on, progress=False
    )  # fmt: skip
    assert {tensor.device.type for tensor in scores.tensors.values()} == {accumulate_on or "cuda"}
    assert scores.select(0.02).iou(expected) > 0.98


@pytest.mark.parametrize("which", ["top", "bottom", "random"])
def test_top_k_on_the_device_is_that_of_the_cpu(which):
    scores = {name: torch.randint(0, 1000, (300, 70)).float() for name in "abc"}
    expected = pick(scores, 5000, which=which, seed=3)
    found = pick({name: tensor.cuda() for name, tensor in scores.items()}, 5000, which=which, seed=3)
    assert all(torch.equal(found.indices[name].cpu(), index) for name, index in expected.indices.items())


def test_weights_that_wait_in_the_hosts_memory():
    plain, refusal = dense(), sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"])
    plain.model.cuda()
    model = dense().model
    distributed.keep_on_host(model, model.model.layers)
    try:
        target = Target.of(model, plain.tokenizer, name=plain.name)
        assert target.device.type == "cuda"
        assert all(distributed.local(parameter).device.type == "cpu" for parameter in model.parameters())
        assert target.fingerprint().id == plain.fingerprint().id
        assert generate(target, PROMPTS, max_new_tokens=6) == generate(plain, PROMPTS, max_new_tokens=6)
        selections = [
            sl.score(each, PROMPTS, objective=refusal, progress=False).select(0.02) for each in (target, plain)
        ]
        assert selections[0].iou(selections[1]) > 0.98
        rows = sl.read_prompts([{"prompt": prompt, "response": "I'm sorry"} for prompt in PROMPTS])
        patches = [
            sl.enhance(each, selections[1], rows, retain=None, steps=2, progress=False) for each in (target, plain)
        ]
        for name, value in patches[1].new.items():
            torch.testing.assert_close(patches[0].new[name].cpu(), value.cpu(), rtol=1e-2, atol=1e-3)
    finally:
        torch.distributed.destroy_process_group()
