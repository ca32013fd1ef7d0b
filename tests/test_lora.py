"""Where a LoRA adapter goes when nothing is asked for: onto all linear layers and experts, past routers and towers."""

import pytest
import torch
from peft import PeftModel

from safelocus.model.layout import Layout, canonical_name
from safelocus.training.lora import Lora, unwrapping
from test_patch import everything, same
from test_wrappers import wrapper
from tiny_models import build

IDS = torch.arange(3, 12)[None]
# what is no matrix of a layer's own, by the end of its name; routers of several families among them
WITHOUT = (
    "lm_head.weight", "embed_tokens.weight", "mlp.gate.weight", "shared_expert_gate.weight", "router.weight",
    "router.layer.weight", "mamba.out_proj.weight", "conv1d.weight", "dt_proj.weight", "_bias", "A_log", ".D",
)  # fmt: skip


def adapted(model):
    """Tensors that an adapter changes, by the names of the bare model."""
    owners = [name.rpartition(".lora_B")[0] for name, _ in model.named_parameters() if "lora_B" in name]
    modules = dict(model.named_modules())
    found = set()
    for owner in owners:
        kind = getattr(modules[owner], "parameter_name", "weight")
        found.add(f"{canonical_name(owner + '.')}{kind}")
    assert len(found) == len(owners)
    return found


@pytest.mark.parametrize(
    "name", ["llama", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoehybrid", "jamba", "mixtral", "phimoe"]
)
def test_every_layer_and_expert_has_an_adapter_that_learns_and_no_router_has_one(name):
    model = build(name).float()
    layout, lora = Layout.of(model), Lora(rank=2)
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(WITHOUT)}
    left_out = lora.left_out(model, layout)
    with unwrapping(model):
        wrapped = lora.wrap(model, layout)
        assert adapted(wrapped) == matrices
        wrapped.train()(input_ids=IDS).logits.square().mean().backward()
        for name, parameter in wrapped.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            assert "lora_B" not in name or parameter.grad.any()
    assert all(parameter.requires_grad and "lora" not in name for name, parameter in model.named_parameters())
    routers = [name for name in layout.tensors if "router" in layout.tensors[name].components and "bias" not in name]
    assert (f"router ({len(routers)}: " in (left_out or "")) == bool(routers)


def test_shared_experts_and_dense_layers_are_adapted_also_where_peft_takes_their_names_for_experts(tmp_path):
    """PEFT reads `gate_proj` of these as a part of the fused experts, and `gate` as the router."""
    model = build("qwen2_moe", mlp_only_layers=[0]).float()
    model.save_pretrained(tmp_path / "base")
    wrapped = Lora(rank=2).wrap(model, Layout.of(model))
    names = adapted(wrapped)
    for name in ("0.mlp.gate_proj", "1.mlp.shared_expert.up_proj", "1.mlp.shared_expert.down_proj"):
        assert f"model.layers.{name}.weight" in names
    assert {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")} < names
    assert not any("gate.weight" in name for name in names)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    expected = wrapped(input_ids=IDS).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert same(everything(again), everything(wrapped))
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_modules_by_their_whole_names_are_those_and_no_experts():
    model = build("qwen2_moe").float()
    name = "model.layers.0.mlp.shared_expert.gate_proj"
    wrapped = Lora(rank=2, modules=(name, "q_proj")).wrap(model, Layout.of(model))
    assert adapted(wrapped) == {f"{name}.weight", *(f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))}


def test_a_router_is_adapted_when_it_is_asked_for():
    model = build("qwen3_moe").float()
    wrapped = Lora(rank=2, modules=("gate",)).wrap(model, Layout.of(model))
    assert adapted(wrapped) == {f"model.layers.{n}.mlp.gate.weight" for n in (0, 1)}


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_a_vision_tower_is_left_alone_and_named(name):
    model = wrapper(name)
    layout, lora = Layout.of(model), Lora(rank=2)
    left_out = lora.left_out(model, layout)
    names = adapted(lora.wrap(model, layout))
    assert names == set(layout.eligible_tensors)
    assert not any("vis" in name for name in names)
    assert "other (" in left_out
    assert "vis" in left_out
