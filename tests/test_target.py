import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import safelocus as sl
from safelocus.errors import ModelError, PromptError, ResourceError, RunError, SelectionError
from safelocus.model.fingerprint import Fingerprint, check_made_for
from safelocus.model.generation import generate
from safelocus.model.target import Target, dtype_on
from tiny_models import build
from tiny_targets import PROMPTS, dense, guard, moe


@pytest.fixture
def folder(tmp_path):
    target = dense()
    target.model.save_pretrained(tmp_path / "model")
    target.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_load_round_trip(folder):
    assert sl.load(folder).fingerprint().differences(dense().fingerprint()) == []


def test_experts_are_fused_in_memory_whatever_the_file_holds(tmp_path):
    target = moe()
    target.model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    assert sl.load(tmp_path).fingerprint().differences(target.fingerprint()) == []


def test_missing_folder_suggests_its_neighbour(folder):
    with pytest.raises(ModelError, match=r"does not exist.*Did you mean .*model"):
        sl.load(folder.parent / "modell")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer*", "no tokenizer"),
    ],
)
def test_missing_files(folder, remove, message):
    for path in folder.glob(remove):
        path.unlink()
    with pytest.raises(ModelError, match=message):
        sl.load(folder)


def test_an_adapter_is_no_model(folder):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"an adapter, not a model\. Merge it"):
        sl.load(folder)


def test_pickled_weights_are_not_loaded(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="never loaded"):
        sl.load(folder)


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_weights_are_found_by_name(folder, damage):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"garbage")
    with pytest.raises(ModelError, match=r"model\.safetensors: not a complete"):
        sl.load(folder)


def test_missing_tensors_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing .*layers\.1\.mlp\.up_proj"):
        sl.load(folder)


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="configuration"):
        sl.load(folder)


def test_unknown_model_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_type"}))
    with pytest.raises(ModelError, match="configuration"):
        sl.load(folder)


def test_unknown_organism():
    with pytest.raises(ModelError, match="dense"):
        sl.load("organism:platypus")


def test_fingerprints_say_what_differs():
    target = dense()
    first = target.fingerprint()
    assert Fingerprint.from_json(json.loads(json.dumps(first.to_json()))) == first
    with torch.no_grad():
        target.model.model.layers[1].self_attn.v_proj.weight[0, 0] += 1
    (difference,) = first.differences(target.fingerprint())
    assert difference == "values of 1 of 21 tensors differ: model.layers.1.self_attn.v_proj.weight"
    assert first.id != target.fingerprint().id
    (difference,) = first.differences(
        dense().model.bfloat16() and Target.of(dense().model.bfloat16(), target.tokenizer).fingerprint()
    )
    assert difference.startswith("dtype of 21 of 21")
    other = moe().fingerprint()
    assert "model type" in first.differences(other)[0]


def test_a_model_that_was_to_come_back_and_did_not_is_an_error():
    target = dense()
    before = target.fingerprint()
    before.came_back(target.fingerprint(), after="verification")
    with torch.no_grad():
        target.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(RunError, match=r"layers\.0\.mlp\.up_proj.*during the verification.*begin again"):
        before.came_back(target.fingerprint(), after="verification")


def test_an_adapter_changes_neither_fingerprint_nor_scores():
    bare = dense()
    expected = sl.score(bare, PROMPTS, objective=guard(), progress=False).select(0.01)
    wrapped = dense()
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    target = Target.of(get_peft_model(wrapped.model, config), wrapped.tokenizer)
    assert target.fingerprint().differences(bare.fingerprint()) == []
    found = sl.score(target, PROMPTS, objective=guard(), progress=False).select(0.01)
    assert found.k == expected.k
    assert found.iou(expected) == 1


def test_generation_does_not_depend_on_the_batch():
    target = dense()
    together = generate(target, PROMPTS, max_new_tokens=8)
    assert [r.ids for r in together] == [generate(target, [p], max_new_tokens=8)[0].ids for p in PROMPTS]


def test_a_prompt_without_room_is_an_error():
    with pytest.raises(PromptError, match=r"room for 248 beside 8"):
        generate(dense(), ["help " * 300], max_new_tokens=8)


def test_a_copy_of_a_model_is_the_same_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert sl.load(folder).fingerprint() == sl.load(tmp_path / "elsewhere").fingerprint()


@pytest.mark.parametrize("device", [None, "auto"])
def test_weights_on_a_cpu_are_in_fp32(device, monkeypatch):
    monkeypatch.setattr("safelocus.model.target.default_device", lambda: torch.device("cpu"))
    assert dtype_on(device, "auto") == "float32"
    assert dtype_on("cpu:0", "auto") == "float32"
    assert dtype_on("cuda", "auto") == "auto"


def test_a_device_that_is_not_there(folder):
    with pytest.raises(ResourceError, match="device 'gpu': there is no such device here"):
        sl.load(folder, device="gpu")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("place", ["to", "from_pretrained"])
def test_too_little_memory_for_the_weights_says_what_to_try(folder, monkeypatch, error, place):
    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(LlamaForCausalLM, place, exhausted)
    with pytest.raises(ResourceError, match=r"out of memory while it is loaded.*--dtype bfloat16.*safelocus plan"):
        sl.load(folder)


def test_a_merged_model_beside_its_adapter_is_refused_not_adapted_twice(folder, monkeypatch):
    adapted = get_peft_model(dense().model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    adapted.merge_and_unload().save_pretrained(folder)
    with pytest.raises(ModelError, match=r"adapter_config\.json\) comes with the model.*move adapter_\* away"):
        sl.load(folder)
    monkeypatch.setattr("safelocus.model.target._check_weight_files", lambda _: None)  # as on the hub, before loading
    with pytest.raises(ModelError, match=r"applies it on top"):
        sl.load(folder)


def test_a_token_to_pad_with_that_the_model_lacks_is_an_error():
    tokenizer = copy.deepcopy(dense().tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = dense(vocab_size=len(tokenizer) - 1).model
    with pytest.raises(ModelError, match=rf"pads with token {len(tokenizer) - 1} \(\[PAD\]\), but the model has"):
        Target.of(model, tokenizer)


def test_what_routes_tokens_belongs_to_the_identity():
    tokenizer = dense().tokenizer
    target = Target.of(build("deepseek_v3", vocab_size=len(tokenizer)), tokenizer)
    before = target.identity()
    target.model.model.layers[1].mlp.gate.e_score_correction_bias += 1
    now = target.identity()
    assert {key for key in now if now[key] != before[key]} == {"buffers"}
    assert "buffers" not in dense().identity()


def test_another_configuration_of_the_same_weights_is_a_remark():
    target = dense()
    known = target.fingerprint().to_json()
    target.model.config.an_option_of_a_later_release = False
    (remark,) = check_made_for(known, target.fingerprint(like=known), "the selection")
    assert "another configuration of this model, whose weights are the same" in remark
    with torch.no_grad():
        target.model.lm_head.weight[0, 0] += 1
    with pytest.raises(SelectionError, match="configuration values differ; values of 1 of 21"):
        check_made_for(known, target.fingerprint(like=known), "the selection")
