"""Models that accelerate has placed: over several devices they work as on one; offloaded ones are refused."""

import accelerate
import pytest
import torch

import safelocus as sl
from safelocus.errors import ModelError
from safelocus.model.target import Target
from tiny_targets import PROMPTS, dense

OBJECTIVE = sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"])
PLACES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture
def placed():
    """Every part with the hooks of a device map, as on several devices; all of them are the CPU here."""
    target = dense()
    model = accelerate.dispatch_model(target.model, dict.fromkeys(PLACES, "cpu"), force_hooks=True)
    assert hasattr(model.model.layers[0], "_hf_hook")
    return Target.of(model, target.tokenizer)


def scored(target):
    return sl.score(target, PROMPTS, objective=OBJECTIVE, progress=False)


def test_a_placed_model_is_scored_as_in_one_place(placed):
    alone, together = scored(dense()), scored(placed)
    assert together.per_prompt == alone.per_prompt
    for name, scores in alone.tensors.items():
        assert torch.equal(scores, together.tensors[name]), name


def test_a_placed_model_is_enhanced_and_preserved(placed):
    selection = scored(placed).select(0.02)
    before = {name: parameter.clone() for name, parameter in placed.model.named_parameters()}
    rows = [{"prompt": text, "response": "I'm sorry, but I can't help with that."} for text in PROMPTS]
    patch = sl.enhance(placed, selection, rows, retain=None, steps=2, progress=False)
    assert patch.k == selection.k
    assert all(torch.equal(before[name], parameter) for name, parameter in placed.model.named_parameters())
    optimizer = torch.optim.SGD(placed.model.parameters(), lr=0.1, weight_decay=0.1)
    with sl.preserve(optimizer, selection, model=placed.model) as protection:
        ids = torch.tensor([placed.chat.encode_prompt("help")])
        placed.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert protection.check() == 0
    changed = sum(int((before[name] != p).sum()) for name, p in placed.model.named_parameters())
    assert 0 < changed <= placed.layout.num_weights - selection.k


def test_an_offloaded_model_is_refused_with_what_to_do_instead():
    target = dense()
    accelerate.cpu_offload(target.model, execution_device="cpu")
    with pytest.raises(ModelError, match=r"tensors hold no values.*--offload"):
        Target.of(target.model, target.tokenizer)
