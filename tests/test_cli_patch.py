"""`safelocus patch`: from two organisms to a patch, applied, described, merged and reverted."""

import json

import pytest
import torch

import safelocus as sl
from safelocus.cli import main
from test_patch import everything, same
from test_patch_folder import contents

pytestmark = pytest.mark.slow  # writes models, again and again

NAMES = "organism:dense", "organism:dense-unaligned"


@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    path = tmp_path_factory.mktemp("patch") / "unalign.safetensors"
    with pytest.raises(SystemExit) as stop:
        main(["patch", "diff", *NAMES, "-o", str(path)])
    assert not stop.value.code
    return path


def test_a_model_becomes_another_and_itself_again(run, patch, tmp_path):
    code, _, told = run("patch", "apply", patch, NAMES[0], "-o", tmp_path / "b")
    assert code == 0
    assert "weights of 56 tensors in 1 file" in told
    assert same(*(everything(sl.load(name).model) for name in (tmp_path / "b", NAMES[1])))
    code, out, _ = run("patch", "apply", patch, tmp_path / "b", "--in-place", "--json")
    assert (code, json.loads(out)["changed"]) == (0, False)
    assert "nothing to do" in run("patch", "apply", patch, tmp_path / "b", "--in-place")[2]
    code, _, told = run("patch", "revert", patch, tmp_path / "b", "--in-place")
    assert (code, "restored" in told) == (0, True)
    assert contents(tmp_path / "b") == contents(sl.organism.resolve_model("dense"))
    assert "is as it was before the patch already" in run("patch", "revert", patch, tmp_path / "b", "--in-place")[2]


def test_where_to_must_be_said(run, patch, tmp_path):
    for words in ((), ("-o", tmp_path / "x", "--in-place")):
        code, _, told = run("patch", "apply", patch, NAMES[0], *words)
        assert (code, "-o FOLDER) or --in-place" in told) == (2, True)
    code, _, told = run("patch", "apply", patch, NAMES[0], "--in-place")
    assert (code, "only a folder of your own" in told) == (2, True)


def test_a_sibling_and_another_dtype(run, patch, tmp_path):
    sibling = sl.load(NAMES[0], dtype="float32")
    with torch.no_grad():
        sibling.model.get_parameter("model.layers.3.mlp.up_proj.weight").mul_(1.001)
    sibling.model.save_pretrained(tmp_path / "sibling")
    sibling.tokenizer.save_pretrained(tmp_path / "sibling")
    (tmp_path / "sibling" / "old.bin").write_bytes(b"x")
    apply = ("patch", "apply", patch, tmp_path / "sibling", "-o", tmp_path / "out")
    code, _, told = run(*apply)
    assert (code, "neither as before the patch nor as after it: 1 of" in told) == (2, True)
    assert not (tmp_path / "out").exists()
    code, _, told = run(*apply, "--allow-mismatch")
    assert code == 0
    assert "allowed: model.layers.3.mlp.up_proj.weight" in told
    assert (
        "not copied, weights in other forms, or the state of a trainer, which the patch does not change: old.bin"
        in told
    )


def test_info(run, patch, tmp_path):
    code, out, _ = run("patch", "info", patch)
    assert code == 0
    for word in ("organism:dense (llama)", "patch diff", "yes, bit for bit", "query", "layer"):
        assert word in out
    facts = json.loads(run("patch", "info", patch, "--json")[1])
    assert facts["k"] == facts["num_changed"] == sum(facts["counts"]["layer"].values())
    assert facts["dtypes"] == ["bfloat16"]
    assert facts["revertible"]
    assert facts["before"] != facts["after"]
    code, _, told = run("patch", "info", tmp_path)
    assert (code, "no such file" in told) == (2, True)


def test_diff_options_and_merge(run, tmp_path):
    parts = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for part, options in zip(
        parts, (("--largest", 50), ("--ratio", 0.001), ("--largest", 9, "--old", "digest")), strict=True
    ):
        code, out, _ = run("patch", "diff", *NAMES, *options, "--eligible", "-o", part, "--json")
        assert code == 0
        assert json.loads(out)["revertible"] == (part.name != "c")
    code, _, told = run("patch", "diff", *NAMES, "-o", parts[0])
    assert (code, "--overwrite" in told) == (2, True)
    code, _, told = run("patch", "diff", *NAMES, "-o", tmp_path / "no" / "x")
    assert (code, "does not exist" in told) == (2, True)
    code, out, _ = run("patch", "merge", *parts[:2], "-o", tmp_path / "merged", "--json")
    assert code == 0
    merged, largest = json.loads(out), sl.Patch.load(parts[1])
    assert merged["k"] == largest.k  # the 50 largest are among them
    assert (merged["after"], merged["num_tensors"]) == (None, len(largest.new))
    code, _, told = run("patch", "merge", parts[0], parts[2], "-o", tmp_path / "merged", "--overwrite")
    assert (code, "without old values" in told) == (2, True)
    assert "not known without the model" in run("patch", "info", tmp_path / "merged")[1]


def test_help_of_every_command(run):
    for command in ((), ("apply",), ("revert",), ("diff",), ("merge",), ("info",)):
        code, out, _ = run("patch", *command, "--help")
        assert code == 0
        assert "Usage" in out
