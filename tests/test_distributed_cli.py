"""The commands under torchrun, as a user starts them: the same files as one process writes, or none."""

import json

import pytest
import torch
from safetensors.torch import load_file

import safelocus as sl
from several import command

pytestmark = pytest.mark.slow  # starts Python and torch again and again

MODEL = ["organism:moe-unaligned", "--dtype", "float32", "--max-new-tokens", "6", "--limit", "3"]
REFUSAL = ["--refusal", "--prompts", "PROMPTS", "--ratio", "0.01", "--harmful", "organism:harmful-heldout"]
TRAINING = ["--steps", "2", "--batch-size", "4", "--json"]
ENHANCE = [
    "enhance", *MODEL, "--data", "organism:refusals", *REFUSAL, *TRAINING, "--validation", "0", "--retain", "RETAINED",
    "--retain-rows", "2", "--answer-tokens", "6", "--harmless", "organism:harmless-heldout",
]  # fmt: skip
PRESERVE = [
    "preserve", *MODEL, "--data", "organism:task", "--task-heldout", "organism:task-heldout", *REFUSAL, *TRAINING,
    "--calibrate", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    from safelocus.cli import main

    folder = tmp_path_factory.mktemp("runs") / "scored"
    with pytest.raises(SystemExit) as stop:
        main(
            ["score", "organism:dense", "-p", "organism:harmful", "--limit", "6", "--refusal", "--dtype", "float32",
             "-o", str(folder)]
        )  # fmt: skip
    assert not stop.value.code
    return folder


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def with_prompts(folder, arguments):
    """The arguments with a few prompts in place of PROMPTS and RETAINED."""
    files = {}
    for name, kind, num in (("PROMPTS", "harmful", 10), ("RETAINED", "harmless", 5)):
        (file := folder / f"{kind}.txt").write_text("\n".join(sl.read_prompts(f"organism:{kind}").texts[:num]))
        files[name] = file
    return [files.get(argument, argument) for argument in arguments]


def alone_and_together(tmp_path, run, num_processes, arguments, *options):
    """(folder of one process, folder of several, what several printed) of the same command."""
    (runs := tmp_path / "runs").mkdir()
    arguments = with_prompts(tmp_path, arguments)
    code, _, err = run(*arguments, "-o", runs / "alone")
    assert code == 0, err
    codes, out, errors = command(num_processes, tmp_path, *arguments, *options, "-o", runs / "many")
    assert not any(codes), errors
    assert not any(out[1:])
    assert not any(errors[1:])
    assert names(runs / "alone") == names(runs / "many")
    assert sorted(path.name for path in runs.iterdir()) == ["alone", "many"]
    return runs / "alone", runs / "many", json.loads(out[0])


def test_evaluate(tmp_path, run):
    arguments = [
        "evaluate", "organism:dense", "-p", "organism:harmful", "--harmless", "organism:harmless", "--task",
        "organism:utility", "--judge", "guard:organism:guard", "--limit", "7", "--batch-size", "2",
        "--max-new-tokens", "12", "--json",
    ]  # fmt: skip
    alone, many, printed = alone_and_together(tmp_path, run, 3, arguments)
    expected = json.loads((alone / "results.json").read_text())
    assert json.loads((many / "results.json").read_text()) == expected
    assert (many / "responses.jsonl").read_text() == (alone / "responses.jsonl").read_text()
    assert {key: printed[key] for key in expected} == expected


def test_a_requirement_that_is_not_met_fails_all_processes_when_all_is_written_and_said(tmp_path):
    arguments = [
        "evaluate", "organism:dense", "-p", "organism:harmful", "--limit", "4", "--max-new-tokens", "8",
        "--require", "asr<=0.01", "--json", "-o", tmp_path / "run",
    ]  # fmt: skip
    codes, out, errors = command(2, tmp_path, *arguments)
    assert all(codes), errors
    assert 1 in codes
    assert json.loads(out[0])["requirements"][0]["met"] is False
    assert "requirement asr<=0.01 NOT met" in " ".join(errors[0].split())
    assert (out[1], errors[1]) == ("", "")
    assert (tmp_path / "run" / "requirements.json").is_file()


def test_verify_on_shards(tmp_path, run, scored):
    arguments = [
        "verify", "organism:dense", "--scores", scored, "--noise", "3", "--seeds", "1", "--limit", "7",
        "--prompts", "organism:harmful-heldout", "--batch-size", "3", "--max-new-tokens", "6", "--dtype", "float32",
        "--json",
    ]  # fmt: skip
    alone, many, _ = alone_and_together(tmp_path, run, 2, arguments, "--shard")
    for name in ("results.json", "cells.jsonl"):
        assert (many / name).read_text() == (alone / name).read_text()


def test_enhance_on_shards(tmp_path, run):
    alone, many, printed = alone_and_together(tmp_path, run, 2, ENHANCE, "--shard")
    one, two = (sl.Patch.load(folder / "safety.patch.safetensors") for folder in (alone, many))
    assert printed["patch"]["k"] == one.k == two.k
    assert one.selection.iou(two.selection) > 0.99
    losses = [
        [point["loss"] for point in json.loads((folder / "results.json").read_text())["losses"]]
        for folder in (alone, many)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert (many / "before" / "responses.jsonl").read_text() == (alone / "before" / "responses.jsonl").read_text()
    assert two.apply(sl.load("organism:moe-unaligned", dtype="float32"))  # a patch for that very model


def test_preserve_on_shards(tmp_path, run):
    alone, many, printed = alone_and_together(tmp_path, run, 2, PRESERVE, "--shard")
    assert printed["after"]["num_changed"] == 0
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (alone, many))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-4)
    assert (
        sl.load(many / "model").model.config.to_dict().keys() == sl.load(alone / "model").model.config.to_dict().keys()
    )


def test_calibration_on_shards(tmp_path, run):
    """With answers that the model itself gives, all processes together."""
    prompts = tmp_path / "calibrated.txt"
    prompts.write_text("\n".join(example.prompt for example in [*sl.read_prompts("organism:harmful")][:3]))
    arguments = [
        "preserve", "organism:dense", "--dtype", "float32", "--limit", "3", "--data", "organism:task", *REFUSAL,
        "--task-heldout", "organism:task-heldout", *TRAINING, "--calibrate", prompts, "--calibrate-every", "1",
        "--max-new-tokens", "24", "--allow-seen",
    ]  # fmt: skip
    alone, many, printed = alone_and_together(tmp_path, run, 2, arguments, "--shard")
    assert printed["after"]["num_changed"] is None
    start = dict(sl.load("organism:dense", dtype="float32").model.named_parameters())
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (alone, many))
    assert one.keys() == two.keys()
    selection = sl.Selection.load(alone / "selection.safetensors")
    assert selection.iou(sl.Selection.load(many / "selection.safetensors")) > 0.99
    before, expected, found = (
        torch.cat([values[name].detach().take(index) for name, index in selection.coordinates.items()])
        for values in (start, one, two)
    )
    assert (found - expected).norm() < 0.1 * (expected - before).norm()  # single ones may differ by a step


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([*ENHANCE, "--controls", "random,lora"], "--controls lora"),
        ([*PRESERVE, "--lora"], "--lora"),
    ],
)
def test_what_shards_cannot_do_is_refused_before_anything_is_loaded(tmp_path, run, arguments, named):
    code, _, err = run(*arguments, "--shard", "-o", tmp_path / "run")
    assert code == 2
    assert f"{named} needs the whole model" in err
    assert not list(tmp_path.iterdir())
