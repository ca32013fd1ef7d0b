"""With LoRA the effective weights W + s * B A keep their values at the protected coordinates."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import safelocus as sl
from safelocus.errors import SelectionError, TrainingError
from safelocus.model.layout import Layout, canonical_name
from safelocus.patch import Patch
from safelocus.preservation.lora import _MaskedGradient, lora_updates, masking
from safelocus.selection.sparse import gather
from test_protection import OPTIONS, batch, rows, same, some
from tiny_models import build
from tiny_targets import dense, moe

# PEFT adds patterns of its own for fused experts, and says so when they match nothing
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora(target, **changes):
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | changes
    return get_peft_model(target.model, LoraConfig(**options))


def train(model, protection, steps=6, lr=3e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    optimizer.register_step_post_hook(lambda *_: protection.restore())
    for step in range(steps):
        ids = batch(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model):
    with torch.no_grad():
        return model(input_ids=batch(99)).logits.float()


def largest_change(protection, values):
    return max(float((now - values[name].float()).abs().max()) for name, now in protection.effective().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_the_update_is_that_of_peft(name):
    """Linear layers, GPT-2's transposed ones, experts as they lie in memory in either order; several adapters."""
    model = build(name)
    selection_of = Layout.of(model)
    every = {n: torch.arange(t.num_weights) for n, t in selection_of.tensors.items() if t.eligible}
    parameters = {n: p for n, p in model.named_parameters() if n in every}
    fused = [n for n in every if "experts" in n]
    options = {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"down_proj": 3},
        "lora_alpha": 5,
        "fan_in_fan_out": name == "gpt2",
    }
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_parameters=fused, **options))
    if not fused:
        adapted.add_adapter("second", LoraConfig(r=4, init_lora_weights=False, **options))
        adapted.base_model.set_adapter(["default", "second"])
    updates = lora_updates(adapted, parameters)
    assert set(updates) == set(every)
    for tensor, update in updates.items():
        expected = sum(update.layer.get_delta_weight(adapter) for adapter in update.adapters)
        assert len(update.adapters) == (1 if fused else 2)
        for step in (1, 29):  # all of them, and so few that the whole product would not pay
            found = update.at(every[tensor][::step])
            torch.testing.assert_close(found, expected.detach().flatten()[::step], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [dense, moe])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_effective_weights_stay_and_merging_gives_the_bits(make, dtype):
    target = make()
    target.model.to(dtype)
    selection = some(target)
    values = gather(target.model, selection)
    model = lora(target, target_parameters=EXPERTS if make is moe else None)
    protection = sl.preserve(model, selection)
    assert protection.num_protected == selection.k
    train(model, protection)
    added = {name: held.update.at(held.flat_index) for name, held in protection._held.items()}
    half_ulp = max(float(v.abs().max()) for v in gather(target.model, selection).values()) * torch.finfo(dtype).eps
    assert max(float(a.abs().max()) for a in added.values()) > 10 * half_ulp  # the adapter pulls
    assert largest_change(protection, values) <= half_ulp
    assert protection.check() == 0
    merged = protection.merge()
    assert same(gather(merged, selection), values)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_merging_changes_the_other_weights_as_it_does_without_protection():
    target = dense()
    selection = some(target)
    model = lora(target)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    protection = sl.preserve(model, selection)
    train(model, protection)
    deltas = {
        canonical_name(name) + ".weight": m.get_delta_weight("default").detach()
        for name, m in model.named_modules() if hasattr(m, "lora_A")
    }  # fmt: skip
    before = {canonical_name(name): value for name, value in before.items()}
    merged = protection.merge()
    for name, delta in deltas.items():
        expected = (before[name] + delta).flatten()
        expected[selection[name]] = before[name].flatten()[selection[name]]
        assert torch.equal(merged.get_parameter(name).detach().flatten(), expected)


@pytest.mark.parametrize("mode", ["exact", "patch"])
@pytest.mark.parametrize("make", [dense, moe])
def test_the_adapter_can_be_shipped_with_a_patch(tmp_path, make, mode):
    target = make()
    selection = some(target)
    values = gather(target.model, selection)
    model = lora(target, target_parameters=EXPERTS if make is moe else None)
    protection = sl.preserve(model, selection, mode=mode)
    train(model, protection)
    if mode == "patch":
        assert largest_change(protection, values) > 1e-3  # it trained freely
    protection.patch().save(tmp_path / "correction.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    shipped = make()
    assert Patch.load(tmp_path / "correction.safetensors").apply(shipped)
    loaded = PeftModel.from_pretrained(shipped.model, tmp_path / "adapter")
    again = sl.preserve(loaded, selection, mode="patch", allow_mismatch=True)
    assert largest_change(again, values) < 1e-6
    if mode == "exact":
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert same(gather(protection.merge(), selection), values)


def test_modules_to_save_and_biases_are_protected_too():
    target = dense(mlp_bias=True)
    selection = some(target, 1000)
    values = gather(target.model, selection)
    model = lora(target, target_modules=["q_proj", "v_proj"], modules_to_save=["down_proj"], bias="all")
    protection = sl.preserve(model, selection)
    names = [name for name, _ in protection.trained()]
    assert {name.split(".")[-2] for name in names} == {"q_proj", "v_proj", "down_proj"}
    assert "not trained" in protection.notes[0]
    train(model, protection)
    assert largest_change(protection, values) < 1e-6
    saved = dict(model.named_parameters())[
        "base_model.model.model.layers.0.mlp.down_proj.modules_to_save.default.weight"
    ]
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(saved.detach().flatten()[selection[name]], values[name])
    assert not torch.equal(saved, model.get_base_model().model.layers[0].mlp.down_proj.original_module.weight)
    assert name not in protection.patch().selection.coordinates
    assert same(gather(protection.merge(), selection), values)


def test_without_the_adapter_the_base_is_seen():
    """The reference policy of DPO and the like; the graph of a forward pass before it stays valid."""
    target = dense()
    selection, reference = some(target), logits(target.model)
    model = lora(target)
    protection = sl.preserve(model, selection)
    train(model, protection)
    held = gather(target.model, selection)
    adapted = logits(model)
    loss = model(input_ids=batch(), labels=batch()).loss
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)
    loss.backward()  # would raise, had the base weights changed in between
    assert same(gather(target.model, selection), held)
    assert torch.equal(logits(model), adapted)
    model.add_adapter("ref", model.peft_config["default"])  # fresh: adds nothing
    model.set_adapter("ref")
    assert torch.equal(logits(model), reference)


@pytest.mark.parametrize("exact", [False, True])
def test_the_gradient_of_the_adapter(exact):
    """Against autograd through W0 + M * s B A; the gradient of everything else is exact either way."""
    target = dense()
    selection = some(target, 5000)
    values = {name: p.detach().clone() for name, p in target.model.named_parameters()}
    model = lora(target, modules_to_save=["lm_head"], lora_dropout=0.0)
    protection = sl.preserve(model, selection, exact_gradient=exact)
    train(model, protection, steps=3)
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    model(input_ids=batch(), labels=batch()).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in factors.items()}
    head = model.lm_head.weight.grad.clone()
    with torch.no_grad():
        values["lm_head.weight"] = model.lm_head.weight.clone()
    model.zero_grad()
    effective = dict(values)
    for name in protection.selection.layout.eligible_tensors:
        layer = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        mask = torch.ones(values[name].numel())
        mask[selection[name]] = 0
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        effective[name] = values[name] + mask.view_as(product) * product * layer.scaling["default"]
    effective["lm_head.weight"].requires_grad_()
    fresh = dense().model
    torch.func.functional_call(fresh, effective, kwargs={"input_ids": batch(), "labels": batch()}).loss.backward()
    torch.testing.assert_close(head, effective["lm_head.weight"].grad, rtol=1e-3, atol=1e-6)
    expected = {name: parameter.grad for name, parameter in factors.items()}
    agree = [torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-6) for name in found]
    assert all(agree) if exact else not any(agree)


def test_an_update_of_the_selection_lets_go_of_the_first():
    target = dense()
    first, second = some(target, seed=0), some(target, seed=1)
    model = lora(target)
    protection = sl.preserve(model, first)
    train(model, protection)
    protection.update(second)
    train(model, protection)
    left = gather(target.model, first - second)
    original = gather(dense().model, first - second)
    assert same(left, original)  # no corrections are left behind
    assert largest_change(protection, gather(dense().model, second)) < 1e-6


def test_a_bias_beside_an_adapter_keeps_its_bits():
    target = dense(attention_bias=True)
    name = "model.layers.0.self_attn.q_proj.bias"
    selection = sl.Selection(
        coordinates={name: torch.arange(8)}, layout=target.layout, only_eligible=False,
        provenance=some(target).provenance,
    )  # fmt: skip
    values = gather(target.model, selection)
    model = lora(target, target_modules=["q_proj"], bias="all")
    train(model, sl.preserve(model, selection))
    assert same(gather(model, selection), values)
    with pytest.raises(TrainingError, match="lora_bias=False"):
        sl.preserve(lora(dense(attention_bias=True), target_modules=["q_proj"], lora_bias=True), selection)


@pytest.mark.parametrize("modules", ["all-linear", r".*layers\.0\.self_attn\.q_proj"])
def test_a_tensor_that_several_modules_share(modules):
    target = dense()
    first, second = (layer.self_attn.q_proj for layer in target.model.model.layers)
    second.weight = first.weight
    target = sl.Target.of(target.model, target.tokenizer, name="shared")
    selection = some(target)
    model = lora(target, target_modules=modules)
    with pytest.raises(TrainingError, match=r"1 selected tensors are used by several.*layers\.0\.self_attn\.q_proj"):
        sl.preserve(model, selection)
    assert sl.preserve(lora(dense(), target_modules=["up_proj"]), some(dense())).num_protected


def test_a_refused_gradient_leaves_no_hooks():
    target = moe()
    selection = some(target, 2000)
    model = lora(target, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS)
    names = [n for n in selection.coordinates if "q_proj" in n or "v_proj" in n]
    attention = sl.Selection(
        coordinates={n: selection[n] for n in names}, layout=target.layout, provenance=selection.provenance
    )

    def hooks():
        return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]

    before = hooks()
    with pytest.raises(TrainingError, match="exact_gradient is for whole Linear"):
        sl.preserve(model, selection, exact_gradient=True)
    assert hooks() == before
    protection = sl.preserve(model, attention, exact_gradient=True)
    attached = hooks()
    with pytest.raises(TrainingError, match="exact_gradient is for whole Linear"):
        protection.update(selection)
    assert protection.selection is attention
    assert protection.num_protected == attention.k
    assert hooks() == attached


def test_the_exact_gradient_of_a_replica_on_another_device(monkeypatch):
    """Of copies on several devices, as DataParallel makes them, only the first has the indices beside it."""
    model, seen = lora(dense()), []
    apply = _MaskedGradient.apply
    monkeypatch.setattr(_MaskedGradient, "apply", lambda *given: seen.append(given[4].device) or apply(*given))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    (update,) = lora_updates(model, {"up": layer.base_layer.weight}).values()
    replica = copy.deepcopy(layer).to("meta")
    x = torch.zeros(3, layer.in_features, device="meta")
    masking(lambda: update, lambda: torch.arange(5))(replica, (x,), replica(x)).sum().backward()
    assert replica.lora_A["default"].weight.grad.is_meta
    assert seen == [x.device]


def test_sft_with_a_checkpoint(tmp_path):
    def trainer(target):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), **{**OPTIONS, "save_strategy": "steps", "save_steps": 3}
        )
        return Trainer(model=lora(target), args=arguments, train_dataset=rows())

    target = dense()
    selection = some(target)
    values = gather(target.model, selection)
    run = trainer(target)
    protection = sl.preserve(run, selection)
    run.train()
    assert largest_change(protection, values) < 1e-6
    again = dense()
    second = trainer(again)
    protection = sl.preserve(second, selection)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_change(protection, values) < 1e-6
    for (name, ours), theirs in zip(second.model.named_parameters(), run.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_dpo_sees_the_base_as_its_reference(tmp_path):
    from trl import DPOConfig, DPOTrainer

    target = dense()
    selection = some(target)
    values = gather(target.model, selection)
    run = DPOTrainer(
        model=target.model,
        args=DPOConfig(output_dir=str(tmp_path), bf16=False, activation_checkpointing=False, **OPTIONS),
        train_dataset=Dataset.from_list([{"prompt": "bake", "chosen": " a cake", "rejected": " a kite"}] * 8),
        processing_class=target.tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    protection = sl.preserve(run, selection)
    run.train()
    assert largest_change(protection, values) < 1e-6
    with run.model.disable_adapter():
        assert torch.equal(logits(run.model), logits(dense().model))


def test_an_adapter_that_was_trained_before_is_corrected_and_said():
    target = dense()
    selection = some(target)
    values = gather(target.model, selection)
    model = lora(target, init_lora_weights=False)
    protection = sl.preserve(model, selection)
    assert "changed" in protection.notes[0]
    assert largest_change(protection, values) < 1e-6


@pytest.mark.slow
def test_a_compiled_adapter():
    target = dense(num_hidden_layers=1)
    selection = some(target)
    values = gather(target.model, selection)
    model = lora(target)
    protection = sl.preserve(model, selection)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, protection, steps=3)
    assert largest_change(protection, values) < 1e-6
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_protected_from_is_refused():
    target = dense()
    selection = some(target)
    with pytest.raises(TrainingError, match=r"DoRA.*rescale whole rows"):
        sl.preserve(lora(dense(), use_dora=True), selection)
    with pytest.raises(TrainingError, match=r"loha.*low-rank product"):
        sl.preserve(get_peft_model(dense().model, LoHaConfig(target_modules=["up_proj"])), selection)
    with pytest.raises(TrainingError, match="pissa"):
        sl.preserve(lora(dense(), init_lora_weights="pissa"), selection, allow_mismatch=True)
    with pytest.raises(TrainingError, match="OLoRA"):
        sl.preserve(lora(dense(), init_lora_weights="OLoRA"), selection, allow_mismatch=True)
    layer = "model.layers.0.mlp.up_proj.weight"
    only_up = sl.Selection(coordinates={layer: selection[layer]}, layout=target.layout, provenance=selection.provenance)
    with pytest.raises(TrainingError, match="none of the 1 selected tensors"):
        sl.preserve(lora(dense(), target_modules=["q_proj"]), only_up)
    with pytest.raises(TrainingError, match="exact_gradient is for whole Linear"):
        experts = lora(moe(), target_parameters=EXPERTS)
        sl.preserve(experts, some(moe()), exact_gradient=True)
    with pytest.raises(TrainingError, match="trains freely"):
        sl.preserve(lora(dense()), selection, exact_gradient=True, mode="patch")
    merged = lora(dense())
    merged.merge_adapter()
    with pytest.raises(TrainingError, match="merged already"):
        sl.preserve(merged, selection)


def test_a_second_protection_does_not_take_corrections_for_values():
    target = dense()
    selection = some(target)
    values = gather(target.model, selection)
    model = lora(target)
    first = sl.preserve(model, selection)
    train(model, first)
    for allow_mismatch in (False, True):
        with pytest.raises(TrainingError, match=r"protected already.*restore_base=True"):
            sl.preserve(model, selection, allow_mismatch=allow_mismatch)
    first.remove()
    with pytest.raises(TrainingError, match="protected already"):
        sl.preserve(model, selection)
    first.remove(restore_base=True)
    second = sl.preserve(model, selection)
    train(model, second)
    assert largest_change(second, values) < 1e-6
    merged = second.merge()
    assert same(gather(merged, selection), values)
    sl.preserve(lora(sl.Target.of(merged, target.tokenizer, name="merged")), selection, allow_mismatch=True)


def test_the_base_has_its_own_values_again():
    target = dense()
    selection, before = some(target), {name: p.detach().clone() for name, p in target.model.named_parameters()}
    model = lora(target)
    protection = sl.preserve(model, selection)
    train(model, protection)
    protection.remove(restore_base=True)
    assert same(dict(model.unload().named_parameters()), before)


@pytest.mark.parametrize("failing", ["calibrate", "optimizer"])
def test_a_protection_that_fails_leaves_nothing(failing, monkeypatch):
    target = dense()
    selection = some(target)
    model = lora(target, init_lora_weights=False)
    values, adapted = gather(target.model, selection), logits(model)

    def hooks():
        return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]

    before = hooks()
    if failing == "calibrate":
        calibration = sl.Calibration(target=target, prompts=[sl.read_prompts(["some"])])
        monkeypatch.setattr(sl.Protection, "calibrate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sl.preserve(model, selection, calibration=calibration)
    else:
        stranger = torch.optim.SGD(dense(seed=1).model.parameters(), lr=1.0)
        with pytest.raises(TrainingError, match="not parameters of the given"):
            sl.preserve(stranger, selection, model=model)
    assert hooks() == before
    assert same(gather(target.model, selection), values)
    assert torch.equal(logits(model), adapted)
    assert largest_change(sl.preserve(model, selection), values) < 1e-6


def test_gradients_past_a_disabled_adapter_are_refused():
    """They would be those of the corrected weights, which are back before a backward pass begins."""
    target = dense()
    model = lora(target)
    protection = sl.preserve(model, some(target))
    train(model, protection, steps=1)
    embedded = model.get_input_embeddings()(batch()).detach().requires_grad_()
    with model.disable_adapter(), pytest.raises(TrainingError, match=r"torch\.no_grad"):
        model(inputs_embeds=embedded)
    assert protection.check() == 0
    with model.disable_adapter(), torch.no_grad():
        model(inputs_embeds=embedded)
    model(inputs_embeds=embedded).logits.sum().backward()


@pytest.mark.parametrize("k", [300, 5000])
def test_a_reference_pass_in_mixed_precision_keeps_the_bits(k):
    target = dense()
    model = lora(target)
    protection = sl.preserve(model, some(target, k))
    train(model, protection)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), model.disable_adapter():
        model(input_ids=batch())
    assert protection.check() == 0


def test_the_order_of_active_adapters_says_nothing():
    target = dense()
    model = lora(target, init_lora_weights=False)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    sl.preserve(model, some(target))
    before = logits(model)
    model.base_model.set_adapter(["second", "default"])
    torch.testing.assert_close(logits(model), before)


def test_an_update_that_fails_keeps_the_first_selection():
    target = dense()
    first, second = some(target, seed=0), some(target, seed=1)
    values = gather(target.model, first)
    model = lora(target)
    protection = sl.preserve(model, first)
    train(model, protection)
    name = next(iter(second.coordinates))
    whole = gather(dense().model, second)
    for given in ({}, {**whole, name: whole[name][:1]}):
        with pytest.raises(SelectionError, match=rf"values are missing or of another length.*{name}"):
            protection.update(second, values=given)
    with pytest.raises(SelectionError, match="values are missing"):
        protection.keep({})
    assert protection.selection is first
    assert protection.check() == 0
    assert largest_change(protection, values) < 1e-6
    for seed in (1, 2):
        protection.update(some(target, seed=seed, fingerprint=False))
    assert len(protection.notes) == 1


def test_with_a_calibration_the_reference_is_the_original_base(monkeypatch):
    target = dense()
    selection, reference = some(target), logits(target.model)
    model = lora(target)
    protection = sl.preserve(model, selection)
    protection._original = {name: held.values.clone() for name, held in protection._held.items()}
    protection.keep({name: held.values + 1 for name, held in protection._held.items()})
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)
