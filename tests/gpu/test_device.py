"""The same numbers on an accelerator as on the CPU."""

import pytest
import torch

import safelocus as sl
from safelocus.topk import pick
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


@pytest.mark.parametrize("which", ["top", "bottom", "random"])
def test_top_k_on_the_device_is_that_of_the_cpu(which):
    scores = {name: torch.randint(0, 1000, (300, 70)).float() for name in "abc"}
    expected = pick(scores, 5000, which=which, seed=3)
    found = pick({name: tensor.cuda() for name, tensor in scores.items()}, 5000, which=which, seed=3)
    assert all(torch.equal(found.indices[name].cpu(), index) for name, index in expected.indices.items())
