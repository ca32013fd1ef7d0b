import copy

import pytest
import torch

import safelocus as sl
from safelocus.errors import ModelError
from safelocus.model import autocast
from safelocus.model import target as target_module
from safelocus.model.autocast import Autocast, many_passes
from safelocus.model.generation import generate
from tiny_targets import PROMPTS, dense, moe


def _logits(target):
    ids = torch.tensor([target.chat.encode_prompt(PROMPTS[0])])
    with torch.no_grad():
        return target.model(input_ids=ids).logits


@pytest.mark.parametrize("make", [dense, moe])
def test_forward_passes_are_in_bf16_and_gradients_in_fp32(make):
    target = make()
    exact = _logits(target)
    Autocast.attach(target.model, torch.bfloat16)
    coarse = _logits(target)
    assert coarse.dtype == torch.bfloat16
    assert 0 < (exact - coarse.float()).abs().max() < 0.05 * exact.abs().max()
    target.model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
    assert {p.grad.dtype for p in target.model.parameters() if p.grad is not None} == {torch.float32}


def test_nothing_stays_in_autocast_after_an_error():
    target = dense()
    Autocast.attach(target.model, torch.bfloat16)
    with pytest.raises(IndexError):
        target.model(input_ids=torch.tensor([[10**6]]))
    assert not torch.is_autocast_enabled("cpu")
    assert _logits(target).dtype == torch.bfloat16


def test_a_copy_computes_with_its_own_weights():
    target = dense()
    Autocast.attach(target.model, torch.bfloat16)
    copied = copy.deepcopy(target.model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert _logits(target).abs().sum() > 0
    assert copied(input_ids=torch.tensor([[1, 2]])).logits.abs().sum() == 0


def test_weights_changed_between_passes_are_seen():
    """Casts are kept within `many_passes` only."""
    target = dense()
    kept = Autocast.attach(target.model, torch.bfloat16)
    before = _logits(target)
    with many_passes(kept):
        _logits(target)
    with torch.no_grad():
        target.model.get_output_embeddings().weight.mul_(2)
    assert torch.allclose(_logits(target), 2 * before)


def test_small_models_never_depend_on_the_machine(monkeypatch):
    monkeypatch.setattr(autocast, "_gain", lambda width: 100.0)
    target = sl.load("organism:dense")
    assert target.autocast is None
    if target.device.type == "cpu":
        assert target.dtype == "float32"


def test_wide_models_take_bf16_where_it_is_quicker(monkeypatch, tmp_path):
    target = dense(hidden_size=512, num_hidden_layers=1)
    target.model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    for gain, expected in ((1.2, "float32"), (2.0, "float32, bfloat16 products")):
        monkeypatch.setattr(autocast, "_gain", lambda width, gain=gain: gain)
        loaded = sl.load(tmp_path, device="cpu")
        assert loaded.dtype == expected
        assert loaded.model.dtype == torch.float32
    assert sl.load(tmp_path, device="cpu", dtype="float32").autocast is None
    assert generate(loaded, PROMPTS[:1], max_new_tokens=2)[0].ids


@pytest.mark.parametrize(
    ("accelerator", "how", "kind"),
    [
        ("cuda", {"offload": True}, "auto"),
        ("cuda", {}, "auto"),
        ("cuda", {"device": "cpu"}, "float32"),
        ("cpu", {}, "float32"),
    ],
)
def test_auto_is_fp32_where_a_cpu_computes_not_where_weights_wait(monkeypatch, accelerator, how, kind):
    def loaded(*_, dtype, **__):
        raise ModelError(f"asked for {dtype}")

    monkeypatch.setattr(target_module, "default_device", lambda: torch.device(accelerator))
    monkeypatch.setattr(target_module, "load_model", loaded)
    with pytest.raises(ModelError, match=f"asked for {kind}"):
        sl.load("organism:dense", **how)
