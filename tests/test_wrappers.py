"""Vision-language models, used with text alone: loaded whole, their language model's matrices eligible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

import safelocus as sl
from safelocus.model.layout import Layout
from safelocus.model.layout.sizes import auto_class
from safelocus.patch import Patch, apply_to_folder, revert_folder
from safelocus.selection.sparse import gather
from safelocus.selection.topk import random_k
from test_patch import everything, same, strange
from tiny_models import DELTA, LLAMA, SQUARE, TOWER
from tiny_targets import PROMPTS, byte_level

MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
# type -> (settings of its language model, of the whole)
WRAPPERS = {
    "qwen2_5_vl": ({**LLAMA, "num_attention_heads": 3, "num_key_value_heads": 1, **MROPE}, {}),
    "qwen3_vl": ({**LLAMA, **MROPE}, {}),
    "qwen3_5": (DELTA, {}),
    "mistral3": (LLAMA, {}),
    "gemma3": (LLAMA, {}),
    "glm4v": (
        {**LLAMA, "head_dim": 6, "rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 1]}},
        {},
    ),
    "llava": (LLAMA, {}),
    "lfm2_vl": ({**SQUARE, "layer_types": ["full_attention", "conv"], "block_auto_adjust_ff_dim": False}, {}),
}
NOT_TEXT_CLASSES = {"qwen2_5_vl", "qwen3_vl", "mistral3", "glm4v", "llava", "lfm2_vl"}


def wrapper(name: str, seed: int = 0) -> PreTrainedModel:
    text, whole = WRAPPERS[name]
    tokenizer = byte_level()
    default = AutoConfig.for_model(name).to_dict()
    size = {"vocab_size": len(tokenizer) + 6, "pad_token_id": 5, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(
        name,
        text_config={"model_type": default["text_config"]["model_type"], **text, **size},
        vision_config={"model_type": default["vision_config"]["model_type"], **TOWER},
        **whole,
    )
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(std=0.1)
    return model


@pytest.fixture(params=WRAPPERS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, PreTrainedModel]:
    model = wrapper(request.param)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    byte_level().save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model", model


def test_it_is_loaded_whole_and_scored_with_text_alone(stored: tuple[str, Path, PreTrainedModel]) -> None:
    name, folder, model = stored
    assert (auto_class(model.config).__name__ == "AutoModelForImageTextToText") == (name in NOT_TEXT_CLASSES)
    target = sl.load(folder)
    assert same(everything(target.model), everything(model))
    assert target.layout == Layout.from_config(model.config)
    if auto_class(text := model.config.get_text_config()) is not None:
        assert target.layout.num_eligible == Layout.from_config(text).num_eligible
    assert target.layout.num_layers == 2
    language = {id(parameter) for parameter in getattr(model.model, "language_model", model.model).parameters()}
    for tensor, parameter in model.named_parameters():
        if target.layout.tensors[tensor].eligible:
            assert id(parameter) in language
    scores = sl.score(target, PROMPTS[:2], objective=sl.Refusal(), batch_size=2, progress=False)
    assert all(tensor.any() for tensor in scores.tensors.values())
    assert scores.select(ratio=0.01).k == int(0.01 * model.num_parameters())


def test_a_patch_is_applied_to_its_folder_and_reverted(
    stored: tuple[str, Path, PreTrainedModel], tmp_path: Path
) -> None:
    _, folder, _ = stored
    target = sl.load(folder)
    sizes = {name: target.layout.tensors[name].num_weights for name in target.layout.eligible_tensors}
    selection = sl.Selection(coordinates=random_k(sizes, 150, seed=0), layout=target.layout)
    patch = Patch.of(target.model, selection, new=strange(gather(target.model, selection), 0))
    before = everything(target.model)
    assert apply_to_folder(patch, folder, output=tmp_path / "b").num_weights == 150
    assert patch.apply(target.model)
    assert same(everything(sl.load(tmp_path / "b").model), everything(target.model))
    assert revert_folder(patch, tmp_path / "b", output=tmp_path / "c")
    assert same(everything(sl.load(tmp_path / "c").model), before)


def test_a_guard_that_reads_images_too_judges_text(stored: tuple[str, Path, PreTrainedModel], tmp_path: Path) -> None:
    _, folder, model = stored
    described = {"name": "mine", "format": "text", "text": "{prompt} {response}:", "safe": ["a"], "unsafe": ["b"]}
    file = tmp_path / "guard.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in described.items()))
    guard = sl.Guard.load(folder, description=file)
    tokenizer = byte_level()
    ids = torch.tensor([tokenizer("bake a cake no:")["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1].float()
    a, b = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in "ab")
    assert torch.allclose(guard.verdicts(["bake a cake"], ["no"]), logits[a] - logits[b], atol=1e-4)
