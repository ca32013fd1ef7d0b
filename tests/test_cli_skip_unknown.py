"""`--skip-unknown`: the rest of a model that is mostly understood, and what was left out, in all that comes of it."""

import json

import pytest

import safelocus as sl

MLP_ALONE = """
extends = "base"
layers = "model.layers.{layer}."
[layer]
"mlp.gate_proj.weight" = "gate"
"mlp.up_proj.weight" = "up"
"mlp.down_proj.weight" = "down"
"""
SAID = "24 tensors with"


@pytest.mark.slow
def test_what_is_left_out_is_said_by_every_command_and_artefact(tmp_path, run):
    described = tmp_path / "mlp.toml"
    described.write_text(MLP_ALONE)
    code, _, err = run("inspect", "organism:dense", "--layout", described, "--no-weights")
    assert code == 2
    assert "24 of 56 tensors" in err
    how = ("--layout", described, "--skip-unknown")
    code, out, _ = run("inspect", "organism:dense", *how, "--no-weights")
    assert code == 0
    assert f"left out: {SAID}" in out

    code, _, err = run(
        "score", "organism:dense", *how, "--prompts", "organism:harmful", "--limit", "4", "--refusal",
        "-o", tmp_path / "scored",
    )  # fmt: skip
    assert code == 0, err
    assert f"mind: {SAID}" in err
    scores = sl.Scores.load(tmp_path / "scored" / "scores")
    assert scores.layout.left_out.startswith(SAID)
    assert all(".mlp." in name for name in scores.tensors)
    selection = sl.Selection.load(tmp_path / "scored" / "selection.safetensors")
    assert selection.provenance.extra["left_out"] == selection.layout.left_out
    maps = json.loads((tmp_path / "scored" / "results.json").read_text())["maps"]
    assert maps["organism:dense"]["left_out"] == selection.layout.left_out
    assert f"Mind: {SAID}" in (tmp_path / "scored" / "report.html").read_text()
    assert "skip_unknown = true" in (tmp_path / "scored" / "run.toml").read_text()

    code, _, err = run(
        "enhance", "organism:dense", *how, "--selection", tmp_path / "scored" / "selection.safetensors", "--data",
        "organism:refusals", "--retain", "none", "--steps", "1", "--limit", "4", "--seed", "0", "-o",
        tmp_path / "tuned",
    )  # fmt: skip
    assert code == 0, err
    assert any(SAID in remark for remark in json.loads((tmp_path / "tuned" / "results.json").read_text())["notes"])
    patch = sl.Patch.load(tmp_path / "tuned" / "safety.patch.safetensors")
    assert patch.selection.layout.left_out.startswith(SAID)
