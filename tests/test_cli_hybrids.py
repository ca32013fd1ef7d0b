"""Every verb by the command line on models whose layers are not all attention, or that take images too."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE as SMOLVLM

import safelocus as sl
from test_scoring_hybrids import target_of
from test_wrappers import wrapper
from tiny_targets import byte_level

NAMES = (
    "qwen3_next", "lfm2", "granitemoehybrid", "nemotron_h", "gemma3n_text", "qwen2_5_vl",
    pytest.param("qwen3_5_text", marks=pytest.mark.long),  # the layers of qwen3_next
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_score_verify_enhance_preserve_patch_and_report(name: str, tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    model = wrapper(name) if name == "qwen2_5_vl" else target_of(name).model
    model.config.get_text_config().max_position_embeddings = 512  # of bytes, and an opening comes behind the prompt
    model.save_pretrained(tmp_path / "model")
    tokenizer = deepcopy(byte_level())
    if name == "qwen2_5_vl":  # whose messages are lists of parts
        tokenizer.chat_template = SMOLVLM
    tokenizer.save_pretrained(tmp_path / "model")
    where, few = tmp_path / "model", ("--limit", "4")

    def command(*words: object) -> str:
        code, out, err = run(*words)
        assert code == 0, err
        return str(out)

    told = json.loads(command("inspect", where, "--no-weights", "--json"))
    assert told["num_weights"] == model.num_parameters()
    command("score", where, "--prompts", "organism:harmful", *few, "--refusal", "--ratio", "0.05", "-o", tmp_path / "s")
    selection = tmp_path / "s" / "selection.safetensors"
    command(
        "verify", where, "--scores", tmp_path / "s", "--prompts", "organism:harmful-heldout", *few,
        "--judge", "refusal", "--ratios", "0.05", "--seeds", "1", "--max-new-tokens", "4", "-o", tmp_path / "v",
    )  # fmt: skip
    training = ("--selection", selection, "--data", "organism:refusals", "--steps", "2", *few, "--seed", "0",
                "--max-new-tokens", "4", "--judge", "refusal", "--batch-size", "2")  # fmt: skip
    command("enhance", where, *training, "--retain", "none", "--harmless", "none", "-o", tmp_path / "e")
    patch = tmp_path / "e" / "safety.patch.safetensors"
    command("patch", "apply", patch, where, "-o", tmp_path / "patched")
    command("patch", "revert", patch, tmp_path / "patched", "-o", tmp_path / "reverted")
    before, after = sl.load(where), sl.load(tmp_path / "reverted")
    assert after.fingerprint().differences(before.fingerprint()) == []
    changed = sl.load(tmp_path / "patched").fingerprint().differences(before.fingerprint())
    assert changed
    command("preserve", where, *training, "--calibrate", "none", "-o", tmp_path / "p")
    (asked := tmp_path / "asked.txt").write_text("how to bake a cake\nhow to pick a lock\n")
    calibrated = ("--calibrate", asked, "--calibrate-every", "1")
    command("preserve", where, *training, *calibrated, "--lora", "-o", tmp_path / "l")
    kept = sl.Selection.load(selection)
    full = dict(sl.load(tmp_path / "p" / "model").model.named_parameters())
    for tensor, indices in kept.items():
        own = dict(before.model.named_parameters())[tensor].flatten()[indices]
        assert own.equal(full[tensor].flatten()[indices].to(own.dtype)), f"{tensor} was to be kept"
    command("report", *(tmp_path / run for run in ("s", "v", "e", "p", "l")), "-o", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000
