"""Quantised files: said what can be done with them before anything is loaded, and used as ordinary weights."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import safelocus as sl
from safelocus.errors import ModelError, SelectionError
from safelocus.model import quantised as quantisation
from safelocus.model import target as loading
from safelocus.model.quantised import Quantisation
from safelocus.model.target import load_config
from safelocus.preservation.trainee import MODEL
from safelocus.selection.sparse import gather
from safelocus.training.lora import Lora
from test_patch import everything, same
from test_preserving import preserved
from test_protection import some
from tiny_models import build
from tiny_targets import PROMPTS, byte_level, dense, moe

BLOCK = 16
FOUR_BITS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # E2M1


def write(model, folder, settings, quantise):
    """Save a model with some of its tensors quantised by hand; returns what they are worth, by name in the files."""
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    stored, written, worth = load_file(folder / "model.safetensors"), {}, {}
    for name, value in stored.items():
        parts, worth[name] = quantise(name, value) or ({name: value}, value)
        written |= parts
    save_file(
        {name: value.contiguous() for name, value in written.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return worth


def fp8(name, value):
    """Blocks of 16 x 16 in 8 bits (E4M3), each with a scale."""
    if value.ndim != 2 or not any(part in name for part in ("self_attn", "mlp")) or name.endswith("gate.weight"):
        return None
    rows, columns = value.shape
    blocks = value.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    worth = (small.float() * scale[:, None, :, None]).reshape(rows, columns)
    return {name: small.reshape(rows, columns), f"{name}_scale_inv": scale}, worth


def mxfp4(name, value):
    """Rows of experts in 4 bits (E2M1), 32 share a power of two."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return None
    rows = value.float().transpose(1, 2)  # [E, out, in]
    groups = rows.reshape(*rows.shape[:2], -1, 32)
    power = (groups.abs().amax(-1).log2().ceil() - 2).clamp(-100, 100)
    code = (groups / power.exp2()[..., None]).unsqueeze(-1).sub(FOUR_BITS).abs().argmin(-1)
    worth = (FOUR_BITS[code] * power.exp2()[..., None]).reshape(rows.shape).transpose(1, 2)
    packed = (code[..., ::2] | code[..., 1::2] << 4).to(torch.uint8)
    return {f"{name}_blocks": packed, f"{name}_scales": (power + 127).to(torch.uint8)}, worth


FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4"}


def oss():
    return build("gpt_oss", hidden_size=32, intermediate_size=32, vocab_size=len(byte_level()) + 6)


WAYS = {
    "fp8": (lambda: dense().model, FP8, fp8), "fp8 experts": (lambda: moe().model, FP8, fp8),
    "mxfp4": (oss, MXFP4, mxfp4),
}  # fmt: skip


@pytest.fixture(params=WAYS)
def quantised(request, tmp_path):
    """(folder, the same folder unquantised: with what the quantised weights are worth)."""
    make, settings, quantise = WAYS[request.param]
    worth = write(make(), tmp_path / "q", settings, quantise)
    plain = tmp_path / "plain"
    make().to(torch.bfloat16).save_pretrained(plain)
    byte_level().save_pretrained(plain)
    save_file(
        {name: value.float().contiguous() for name, value in worth.items()},
        plain / "model.safetensors",
        {"format": "pt"},
    )
    return tmp_path / "q", plain


def test_quantised_weights_are_loaded_as_what_they_are_worth(quantised):
    folder, plain = quantised
    target, expected = sl.load(folder, dtype="float32"), sl.load(plain, dtype="float32")
    assert same(everything(target.model), everything(expected.model))
    assert target.layout == expected.layout
    assert target.fingerprint() == expected.fingerprint()
    scores = [sl.score(each, PROMPTS[:2], objective=sl.Refusal(), progress=False) for each in (target, expected)]
    assert all(torch.equal(value, scores[1].tensors[name]) for name, value in scores[0].tensors.items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_of_it_has_the_type_that_is_asked_for(tmp_path, dtype):
    write(dense().model, tmp_path, FP8, fp8)
    target = sl.load(tmp_path, dtype=dtype)
    assert {str(parameter.dtype) for parameter in target.model.parameters()} == {f"torch.{dtype}"}
    assert target.model(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_what_is_preserved_of_a_quantised_model_is_saved_unquantised(tmp_path, lora):
    write(moe().model, tmp_path / "q", FP8, fp8)
    target = sl.load(tmp_path / "q")
    selection, before = some(target), everything(target.model)
    held = gather(sl.load(tmp_path / "q", dtype="bfloat16").model.float(), selection)
    found = preserved(target, selection, folder=tmp_path / "p", lora=lora, merge=lora is not None)
    assert same(everything(target.model), before)
    for said in ("not in the form of its original's files", "in float32 and are saved in bfloat16"):
        assert any(said in note for note in found.protected.trial.notes)
    saved = sl.load(tmp_path / "p" / MODEL)
    assert Quantisation.of(saved.model.config) is None
    assert saved.model.config.dtype == torch.float32  # in memory, on a CPU
    assert load_config(tmp_path / "p" / MODEL).dtype == torch.bfloat16
    assert same(gather(saved.model, selection), held)
    assert not same(everything(saved.model), before)
    assert (tmp_path / "p" / MODEL / "tokenizer.json").read_bytes() == (tmp_path / "q" / "tokenizer.json").read_bytes()


@pytest.fixture
def described(tmp_path):
    """A function: a model whose configuration says that it is quantised so."""

    def describe(**settings):
        target = dense()
        target.model.save_pretrained(tmp_path)
        target.tokenizer.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        return tmp_path

    return describe


FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq\), and transformers has no way back"),
        ({"quant_method": "awq", "bits": 4}, r"quantised \(awq\), and transformers has no way back"),
        (FOUR, r"bitsandbytes_4bit\), and turning them back needs the package bitsandbytes: pip install bitsandbytes;"),
        ({"load_in_8bit": True}, r"bitsandbytes_8bit\), and turning them back needs the package bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "the package compressed_tensors: pip install compressed-tensors;"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_is_loaded(described, monkeypatch, run, settings, message):
    folder = described(**settings)
    monkeypatch.setattr(quantisation, "find_spec", lambda _: None)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=message):
        sl.load(folder)
    code, out, err = run("plan", folder)
    assert (code, out) == (2, "")
    assert "the weights are quantised" in err
    code, out, err = run("inspect", folder)
    assert code == 0, err
    assert "quantised: the weights are quantised" in out
    said = json.loads(run("inspect", folder, "--json")[1])["quantised"]
    assert not said["usable"]
    assert f"quantised ({said['method']})" in said["said"]


def test_inspect_and_plan_say_what_can_be_done(tmp_path, run):
    write(dense().model, tmp_path, FP8, fp8)
    code, out, err = run("inspect", tmp_path)
    assert code == 0, err
    assert "quantised (fp8) and become ordinary ones when they are loaded" in out
    found = json.loads(run("inspect", tmp_path, "--json", "--no-weights")[1])
    assert found["quantised"]["usable"]
    assert found["num_weights"] == dense().layout.num_weights
    code, _, err = run("plan", tmp_path, "--device", "cpu", "--steps", "2")
    assert code == 0, err
    assert "a patch goes onto an unquantised folder" in err


def test_a_patch_goes_onto_the_unquantised_folder(tmp_path, run):
    worth = write(dense().model, tmp_path / "q", FP8, fp8)
    target = sl.load(tmp_path / "q", dtype="bfloat16")
    selection = some(target)
    new = {name: torch.zeros_like(value) for name, value in gather(target.model, selection).items()}
    sl.Patch.of(target, selection, new=new).save(tmp_path / "a.patch.safetensors")
    code, _, err = run("patch", "apply", tmp_path / "a.patch.safetensors", tmp_path / "q", "-o", tmp_path / "out")
    assert code == 2
    assert "single ones are changed in the unquantised model's folder" in err
    dense().model.to(torch.bfloat16).save_pretrained(tmp_path / "plain")  # what the quantised one was made from
    command = ["patch", "apply", tmp_path / "a.patch.safetensors", tmp_path / "plain", "-o", tmp_path / "out"]
    assert run(*command)[0] == 2
    code, _, err = run(*command, "--allow-mismatch")
    assert code == 0, err
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(not stored[name].flatten()[selection[name]].any() for name in selection)
    assert worth


def test_shards_and_what_is_turned_back_afterwards():
    class Packed(nn.Linear):
        def dequantize(self):
            return nn.Linear(2, 2)

    config = dense().model.config
    assert Quantisation.of(config) is None
    with pytest.raises(ModelError, match="m: quantised weights \\(fp8\\) are not sharded"):
        Quantisation(method="fp8").prepare(config, "m", shard=True)
    found = Quantisation(method="bitsandbytes_4bit").settle(Packed(2, 2), torch.bfloat16)
    assert type(found) is nn.Linear


@pytest.fixture(params=["4bit", "8bit"])
def packed(request, tmp_path):
    """(a model that bitsandbytes packed, its folder)"""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    target = dense()
    for folder in ("plain", "q"):
        target.tokenizer.save_pretrained(tmp_path / folder)
    target.model.save_pretrained(tmp_path / "plain")
    how = BitsAndBytesConfig(**{f"load_in_{request.param}": True})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how, dtype=torch.float32)
    model.save_pretrained(tmp_path / "q")
    return model, tmp_path / "q"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_bitsandbytes_packed_is_loaded_as_what_it_is_worth(packed, tmp_path):
    model, folder = packed
    target, ids = sl.load(folder, dtype="float32"), torch.tensor([[3, 4, 5, 6]])
    # with gradients, as in training: without, a CPU's kernels want larger layers
    off = (target.model(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
    assert (
        off == 0 if getattr(model, "is_loaded_in_4bit", False) else off < 0.2
    )  # 8 bit rounds what goes into its products too
    assert not same(everything(target.model), everything(dense().model))
    selection = sl.score(target, PROMPTS[:2], objective=sl.Refusal(), progress=False).select(0.01)
    target.model.save_pretrained(tmp_path / "again")
    assert same(everything(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), everything(target.model))
    # an adapter is trained on what is packed, and protected on what that is worth
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with pytest.raises(SelectionError, match=r"is quantised \((Params4bit|Int8Params).*mode=\"patch\""):
        sl.preserve(adapted, selection, mode="patch")
    adapted.save_pretrained(tmp_path / "adapter")
    held = gather(target.model, selection)
    merged = sl.preserve(PeftModel.from_pretrained(target.model, tmp_path / "adapter"), selection, mode="patch").merge()
    assert same(gather(merged, selection), held)
    assert not same(everything(merged), everything(sl.load(folder, dtype="float32").model))


def test_weights_of_a_language_model_that_are_quantised_are_found_within_a_whole():
    config = AutoConfig.for_model(
        "llava", text_config={"model_type": "llama"}, vision_config={"model_type": "clip_vision_model"}
    )
    config.text_config.quantization_config = dict(FP8)
    found = Quantisation.of(config)
    assert found.method == "fp8"
    found.prepare(config, "m")
    assert config.quantization_config["dequantize"]
    assert "quantization_config" not in config.text_config.to_dict()
