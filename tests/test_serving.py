"""What `preserve` saves serves where the original did: its files, byte for byte, but for what was trained."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import safelocus as sl
from safelocus import organism
from safelocus.preservation.trainee import ADAPTER, MODEL
from safelocus.selection.sparse import gather
from test_cli_preserve import REFUSAL, SETS
from test_patch import same
from test_patch_folder import contents
from test_preserving import preserved
from test_protection import some
from test_wrappers import wrapper
from tiny_targets import byte_level

QUICK = [
    "--steps", "2", "--max-new-tokens", "4", "--limit", "3", "--batch-size", "4", "--learning-rate", "1e-3",
    "--calibrate", "none",
]  # fmt: skip
BESIDE = {  # files that neither model nor tokenizer classes write
    "preprocessor_config.json": '{"image_mean": [0.5]}', "processor_config.json": '{"processor_class": "X"}',
    "special_tokens_map.json": '{ "eos_token" : "<|end|>" }', "LICENSE": "free",
    "additional/tool.jinja": "{{ messages }}",
}  # fmt: skip
EXTRA = "model.mtp.layers.0.eh_proj.weight"  # a head for speculative decoding, which transformers does not load


@pytest.fixture(params=["dense", "moe"])
def original(request, tmp_path):
    """An organism in several files, with all that may lie beside a model, and without a padding token."""
    source, folder = organism.resolve_model(request.param), tmp_path / "original"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1MB")
    shutil.copy(source / "tokenizer.json", folder)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "chat_template.jinja").write_text(settings.pop("chat_template"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=4))
    (folder / "generation_config.json").write_text('{ "eos_token_id": 2, "top_k": 7, "do_sample": true }')
    for name, text in BESIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file({EXTRA: torch.ones(3, 3)}, folder / "mtp.safetensors", {"format": "pt"})
    index["weight_map"][EXTRA] = "mtp.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"old weights in another form")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--lora", "--lora-rank", "2", "--merge"]])
def test_a_preserved_folder_has_the_originals_files(original, how, tmp_path, run):
    code, out, err = run("preserve", original, *REFUSAL, *SETS, *QUICK, *how, "-o", tmp_path / "p")
    assert code == 0, err
    assert "trained and measured in float32 and are saved in bfloat16" in out + err
    before, after = contents(original), contents(tmp_path / "p" / MODEL)
    assert set(after) == set(before) - {"pytorch_model.bin"}
    changed = {name for name in after if after[name] != before[name]}
    assert changed
    assert "mtp.safetensors" not in changed
    assert all(name.endswith(".safetensors") for name in changed)
    for name in changed:  # the same tensors in the same places, of the same type
        length = int.from_bytes(before[name][:8], "little") + 8
        assert before[name][:length] == after[name][:length]
        assert len(before[name]) == len(after[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p" / MODEL)
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "p" / MODEL).pad_token is None
    selection = sl.Selection.load(tmp_path / "p" / "selection.safetensors")
    models = [sl.load(place, dtype="float32").model for place in (original, tmp_path / "p" / MODEL)]
    first, other = (gather(each, selection) for each in models)
    assert same(first, other)  # protected, also where the rest was rounded


@pytest.mark.slow
def test_a_model_is_saved_in_another_type_where_that_is_asked_for(original, tmp_path, run):
    asked = ["--save-dtype", "float32"]
    code, out, err = run("preserve", original, *REFUSAL, *SETS, *QUICK, *asked, "-o", tmp_path / "p")
    assert code == 0, err
    assert "are saved in" not in out + err
    before, after = contents(original), contents(tmp_path / "p" / MODEL)
    assert set(after) == set(before) - {"pytorch_model.bin"}
    changed = {name for name in after if after[name] != before[name]}
    assert {"config.json", "model.safetensors.index.json"} <= changed
    assert all(name.endswith((".safetensors", "config.json", "index.json")) for name in changed)
    assert "generation_config.json" not in changed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p" / MODEL)
    assert model.dtype == torch.float32
    assert any(not torch.equal(p, p.bfloat16().float()) for p in model.parameters())  # nothing was rounded
    selection = sl.Selection.load(tmp_path / "p" / "selection.safetensors")
    models = [sl.load(place, dtype="float32").model for place in (original, tmp_path / "p" / MODEL)]
    assert same(*(gather(each, selection) for each in models))


@pytest.mark.slow
def test_an_adapter_comes_with_the_originals_tokenizer(original, tmp_path, run):
    code, _, err = run(
        "preserve", original, *REFUSAL, *SETS, *QUICK, "--lora", "--lora-rank", "2", "-o",
        tmp_path / "p",
    )  # fmt: skip
    assert code == 0, err
    before, after = contents(original), contents(tmp_path / "p" / ADAPTER)
    own = {"adapter_model.safetensors", "adapter_config.json", "protection.patch.safetensors", "README.md"}
    inputs = {name for name in before if name.startswith(("token", "chat", "pre", "special", "processor"))}
    assert set(after) == own | inputs
    assert all(after[name] == before[name] for name in inputs)
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(original), tmp_path / "p" / ADAPTER)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_a_vision_language_model_keeps_its_tower(name, tmp_path):
    folder = tmp_path / "original"
    wrapper(name).to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    byte_level().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(BESIDE["preprocessor_config.json"])
    target = sl.load(folder)
    preserved(target, some(target), folder=tmp_path / "p", learning_rate=1e-2)
    before, after = contents(folder), contents(tmp_path / "p" / MODEL)
    assert set(before) == set(after)
    assert all(before[name] == after[name] for name in before if not name.endswith(".safetensors"))
    old, new = (
        {key: value for file in place.glob("*.safetensors") for key, value in load_file(file).items()}
        for place in (folder, tmp_path / "p" / MODEL)
    )
    towers = {key for key in old if "vis" in key}
    assert same({key: old[key] for key in towers}, {key: new[key] for key in towers})
    assert sum(not torch.equal(old[key], new[key]) for key in old) > 10
    AutoModelForImageTextToText.from_pretrained(tmp_path / "p" / MODEL)
