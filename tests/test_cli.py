"""The command line as a user meets it: what it prints, what it leaves, and how it refuses bad input."""

import errno
import itertools
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import safelocus as sl
from pages import check_run_page
from safelocus.cli import main
from tiny_targets import dense

SCORE = ["score", "organism:dense", "--prompts", "organism:harmful", "--limit", "8"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dense"
    with pytest.raises(SystemExit) as stop:
        main([*SCORE, "--guard", "organism:guard", "--max-new-tokens", "24", "-o", str(folder)])
    assert not stop.value.code
    return folder


def test_score_writes_a_complete_run(scored):
    names = {path.name for path in scored.iterdir()}
    assert {
        "run.toml",
        "results.json",
        "responses.jsonl",
        "scores",
        "selection.safetensors",
        "report.html",
        "map.svg",
        "digests.json",
    } <= names
    assert "checkpoint" not in names
    check_run_page(scored)
    layout = sl.load("organism:dense").layout
    selection = sl.Selection.load(scored / "selection.safetensors")
    assert selection.k == math.floor(0.01 * layout.num_weights)
    assert len((scored / "responses.jsonl").read_text().splitlines()) == 8
    numbers = json.loads((scored / "results.json").read_text())["maps"]["organism:dense"]
    assert numbers["num_selected"] == selection.k


def test_run_toml_repeats_the_run(scored, tmp_path, run):
    code, out, _ = run("score", "--config", scored / "run.toml", "-o", tmp_path / "again", "--json")
    assert code == 0
    again = sl.Selection.load(tmp_path / "again" / "selection.safetensors")
    assert again.iou(sl.Selection.load(scored / "selection.safetensors")) == 1
    assert json.loads(out)["k"] == again.k


def test_responses_are_not_printed(tmp_path, run):
    _, out, err = run(*SCORE, "--guard", "organism:guard", "--max-new-tokens", "24", "-o", tmp_path / "r")
    response = json.loads((tmp_path / "r" / "responses.jsonl").read_text().splitlines()[0])["response"]
    assert len(response) > 10
    assert response not in out + err


def test_select_and_compare(scored, tmp_path, run):
    half, rest, none = (tmp_path / f"{name}.safetensors" for name in ("half", "rest", "random"))
    assert run("select", scored, "--ratio", "0.005", "-o", half)[0] == 0
    whole = scored / "selection.safetensors"
    assert run("select", scored, "--ratio", "0.01", "--minus", half, "-o", rest)[0] == 0
    assert run("select", scored, "--which", "random", "--seed", "3", "-o", none)[0] == 0
    code, _, err = run("select", scored, "--ratio", "0.005", "--minus", scored, "-o", tmp_path / "nothing.safetensors")
    assert code == 2
    assert "nothing is left of the selection" in err
    assert not (tmp_path / "nothing.safetensors").exists()
    assert sl.Selection.load(rest).k == sl.Selection.load(whole).k - sl.Selection.load(half).k
    code, out, _ = run("compare", whole, half, rest, none, "--json")
    assert code == 0
    comparisons = json.loads(out)["comparisons"]
    assert comparisons[str(half)]["overall"]["iou"] == pytest.approx(0.5, abs=1e-3)
    assert comparisons[str(rest)]["overall"]["iou"] == pytest.approx(0.5, abs=1e-3)
    chance = comparisons[str(none)]["overall"]
    assert chance["iou"] == pytest.approx(chance["expected_iou"], rel=0.5)
    code, out, _ = run("compare", scored, scored)
    assert code == 0
    assert "1.000" in out


@pytest.mark.parametrize("granularity", ["head", "neuron", "matrix"])
def test_select_groups(scored, tmp_path, run, granularity):
    file = tmp_path / "groups.safetensors"
    code, _, _ = run("select", scored, "--granularity", granularity, "--ratio", "0.2", "-o", file)
    assert code == 0
    selection = sl.Selection.load(file)
    layout = sl.load("organism:dense").layout
    groups = layout.groups(granularity)
    chosen = torch.zeros(groups.num_groups, dtype=torch.long)
    for name, indices in selection.coordinates.items():
        chosen += torch.bincount(groups.ids(name, indices), minlength=groups.num_groups)
    assert bool(((chosen == 0) | (chosen == groups.sizes)).all())  # whole groups only
    assert 0 < selection.k <= 0.2 * layout.num_weights


@pytest.mark.parametrize("model", ["organism:dense", "organism:moe"])
def test_inspect(run, model):
    code, out, _ = run("inspect", model, "--no-weights", "--json")
    assert code == 0
    summary = json.loads(out)
    with_weights = json.loads(run("inspect", model, "--json")[1])
    assert summary["num_weights"] == with_weights["num_weights"]
    assert summary["components"] == with_weights["components"]
    code, out, _ = run("inspect", model, "--tensors")
    assert "down_proj" in out


def test_version_and_help(run):
    assert run("--version")[1].strip() == sl.__version__
    code, out, _ = run("score", "--help")
    assert code == 0
    assert "--guard" in out


def lines(tmp_path, text, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "no/such/model", "-p", "organism:harmful", "--refusal"], "does not exist"),
        (["score", "organism:dense", "-p", "nowhere.json", "--refusal"], "nowhere.json"),
        (["score", "organism:dense", "-p", "organism:harmful"], "needs one objective"),
        (
            ["score", "organism:dense", "-p", "organism:harmful", "--refusal", "--guard", "g"],
            "needs one objective",
        ),
        (
            ["score", "organism:dense", "-p", "organism:harmful", "--refusal", "--ratio", "1.5"],
            "ratio must be in (0, 1]",
        ),
        (
            ["score", "organism:dense", "-p", "organism:harmful", "--refusal", "--ratio", "0.99"],
            "largest usable ratio",
        ),
        (
            ["score", "organism:dense", "-p", "organism:harmful", "--refusal", "--method", "best"],
            "not one of",
        ),
        (["score", "organism:dense", "-p", "organism:harmful", "--guard", "organism:dense"], "guard"),
        (["score", "organism:dense", "-p", "organism:harmful", "--refusal", "--where", "x"], "COLUMN=VALUE"),
        (
            ["score", "organism:dense", "-p", "organism:harmful", "--refusal", "--batch-size", "0"],
            "than or equal to 1",
        ),
        (["score", "organism:dense", "-p", "organism:nothing", "--refusal"], "harmful"),
        (["score", "organism:dense", "-p", "organism:harmful", "--refusal", "--ratio", "nan"], "--ratio nan"),
        (["score", "organism:dense", "-p", "organism:harmful", "--refusal", "--layout", "none.toml"], "none.toml"),
        (["score", "organism:dense", "-p", "organism:harmful", "--refusal", "--tau", "1"], "--tau is for --guard or"),
        (["score", "organism:dense", "-p", "organism:harmful", "--classifier", "no/such/model"], "does not exist"),
        (
            [
                "score",
                "organism:dense",
                "-p",
                "organism:harmful",
                "--guard",
                "organism:guard",
                "--guard-description",
                "none.toml",
            ],
            "none.toml: cannot read",
        ),
        (
            ["score", "organism:dense", "-p", "organism:harmful", "--method", "wanda", "--shard"],
            "--method wanda needs the whole model",
        ),
        (["score", "organism:dense", "--refusal"], "--prompts"),
        (["score", "organism:dense", "-p", "no/such.jsonl:train:prompt", "--refusal"], "no/such.jsonl:train: neither"),
    ],
)
def test_bad_input_is_one_message(tmp_path, run, arguments, message):
    code, out, err = run(*arguments, "-o", tmp_path / "run")
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "jsonl:2"),
        ('{"colour": "red", "size": 3}\n', "colour"),
        ('{"prompt": ""}\n', "empty"),
        ("", "empty"),
    ],
)
def test_bad_prompts_say_where(tmp_path, run, text, message):
    code, _, err = run("score", "organism:dense", "-p", lines(tmp_path, text), "--refusal", "-o", tmp_path / "run")
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_guard_without_the_verdict_tokens(tmp_path, run):
    description = lines(
        tmp_path,
        'name = "mine"\nformat = "text"\ntext = "{prompt} {response}"\nsafe = ["same"]\nunsafe = ["samey"]\n',
        "guard.toml",
    )
    code, _, err = run(*SCORE, "--guard", "organism:guard", "--guard-description", description, "-o", tmp_path / "run")
    assert code == 2
    assert "mine" in err
    assert not (tmp_path / "run").exists()


def test_damaged_model_and_nan_weights(tmp_path, run):
    target = dense()
    with torch.no_grad():
        target.model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    target.model.save_pretrained(tmp_path / "model")
    target.tokenizer.save_pretrained(tmp_path / "model")
    code, _, err = run("score", tmp_path / "model", "-p", "organism:harmful", "--refusal", "-o", tmp_path / "run")
    assert code == 2
    assert "model.layers.0.mlp.up_proj.weight" in err
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = run("inspect", tmp_path / "model")
    assert code == 2
    assert "model.safetensors" in err


def test_a_taken_output_is_refused_before_the_work(tmp_path, scored, run):
    code, _, err = run(*SCORE, "--refusal", "-o", scored)
    assert code == 2
    assert "--overwrite" in err


def test_an_input_within_the_output_is_not_replaced(tmp_path, run):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_text("")
    (prompts := tmp_path / "run" / "prompts.txt").write_text("bake a cake\n")
    command = ["score", "organism:dense", "-p", prompts, "--refusal", "--overwrite", "-o", tmp_path / "run"]
    code, _, err = run(*command)
    assert code == 2
    assert "lies in what is written" in err
    assert prompts.is_file()


def test_a_page_replaces_pages_alone(tmp_path, run):
    """And so no seal is put under what was lost."""
    (tmp_path / "run.toml").write_text('command = "score"\n')
    (tmp_path / "results.json").write_text('{"maps": {}}\n')
    (kept := tmp_path / "selection.safetensors").write_text("weights")
    code, _, err = run("report", tmp_path, "-o", kept)
    assert code == 2
    assert "is no page" in err
    assert kept.read_text() == "weights"
    code, _, err = run("report", tmp_path, "--table", "patterns", "-o", tmp_path / "page.html", "--title", "T")
    assert code == 2
    assert "--output, --title are for a page" in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "--batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--batch-size"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "With the right to read or write it"),
        (OSError(errno.ENOSPC, "No space left on device"), "With space"),
    ],
)
def test_what_the_machine_lacks_is_no_bug(run, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("safelocus.model.target.load_config", fail)
    code, _, err = run("inspect", "organism:dense", "--no-weights")
    assert code == 2
    assert message in err


def test_a_file_that_may_not_be_read(tmp_path, run, monkeypatch):
    def forbidden(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    file = lines(tmp_path, '{"prompt": "a"}\n')
    monkeypatch.setattr("pathlib.Path.read_bytes", forbidden)
    code, _, err = run("score", "organism:dense", "-p", file, "--refusal", "-o", tmp_path / "run")
    assert code == 2
    assert "prompts.jsonl: cannot be read (Permission denied)" in err


def test_out_of_memory_says_what_to_try(tmp_path, run, monkeypatch):
    from safelocus.objective import Refusal

    def exhausted(self, target, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Refusal, "__call__", exhausted)
    code, _, err = run(*SCORE, "--refusal", "--batch-size", "4", "-o", tmp_path / "run")
    assert code == 2
    assert "batch size 4" in err
    assert "--batch-size 2" in err


def test_a_bug_is_said_to_be_one(tmp_path, run, monkeypatch):
    from safelocus.objective import Refusal

    monkeypatch.setattr(Refusal, "__call__", lambda self, target, prompts: {}["bug"])
    code, _, err = run(*SCORE, "--refusal", "-o", tmp_path / "run")
    assert code == 1
    assert "--debug" in err
    assert "Traceback" not in err
    code, _, err = run("--debug", *SCORE, "--refusal", "-o", tmp_path / "run")
    assert "Traceback" in err


@pytest.mark.slow
def test_answers_survive_an_attempt_that_failed_after_they_were_written(tmp_path, run, interrupt, monkeypatch):
    command = [*SCORE, "--guard", "organism:guard", "--max-new-tokens", "4", "--batch-size", "2", "-o"]
    assert run(*command, tmp_path / "whole")[0] == 0
    interrupt("safelocus.objective.text.AnswerLog.__call__", *command, tmp_path / "run", at=2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(sl.Scores, "save", full)
        assert run(*command, tmp_path / "run")[0] == 2
    assert run(*command, tmp_path / "run")[0] == 0
    expected = (tmp_path / "whole" / "responses.jsonl").read_text()
    assert (tmp_path / "run" / "responses.jsonl").read_text() == expected
    assert not (tmp_path / "run" / "responses.jsonl.unfinished").exists()


@pytest.mark.parametrize(
    ("silent", "code", "message"),
    [(1, 0, "1 answers, on which the guard came to no verdict, add nothing"), (8, 2, "a verdict on none of 8 answers")],
)
def test_answers_without_a_verdict_are_counted(tmp_path, run, monkeypatch, silent, code, message):
    """Of a guard that writes before it decides."""
    description, asked = tmp_path / "mine.toml", itertools.count(1)
    description.write_text(
        'name = "mine"\nformat = "chat"\ngenerate_until = "So:"\nsafe = ["safe"]\nunsafe = ["unsafe"]\n'
    )
    monkeypatch.setattr(
        sl.Guard, "_write", lambda self, texts, _: ["So:" if next(asked) > silent else "" for _ in texts]
    )
    options = ["--guard", "organism:guard", "--guard-description", description, "--max-new-tokens", "4"]
    found, _, err = run(*SCORE, *options, "--batch-size", "2", "-o", tmp_path / "run")
    assert found == code
    assert message in err
    if not code:
        rows = [json.loads(line) for line in (tmp_path / "run" / "responses.jsonl").read_text().splitlines()]
        assert sum(row["safety"] is None for row in rows) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guard", "organism:guard", "--transfer", "charakter"], "'charakter' is not one of 'identity'"),
        (["--guard", "organism:guard", "--transfer", "identity"], "'identity' needs a guard with the target's own"),
        (["--refusal", "--accumulate-on", "gpu"], "--accumulate-on 'gpu': there is no such device here"),
    ],
)
def test_settings_that_make_no_sense_are_bad_input(tmp_path, run, options, message):
    code, _, err = run(*SCORE, *options, "--max-new-tokens", "4", "-o", tmp_path / "run")
    assert code == 2
    assert message in err


def test_set_operations_with_a_siblings_selection(tmp_path, run):
    for name in ("dense", "dense-unaligned"):
        scores = sl.score(sl.load(f"organism:{name}"), ["bake"], method="magnitude", progress=False)
        scores.save(tmp_path / name / "scores")
        scores.select(0.01).save(tmp_path / name / "selection.safetensors")
    command = ["select", tmp_path / "dense", "--minus", tmp_path / "dense-unaligned", "-o", tmp_path / "rest"]
    code, _, err = run(*command)
    assert code == 2
    assert "--allow-mismatch" in err
    code, _, err = run(*command, "--allow-mismatch")
    assert code == 0
    assert "mind: one selection was made for another model" in err


@pytest.mark.slow
def test_ctrl_c_stops_at_a_batch_and_the_same_command_resumes(tmp_path, run):
    """A real process and a real SIGINT."""
    command = [
        "score", "organism:dense", "-p", "organism:harmful", "--guard",
        "organism:guard", "--max-new-tokens", "16", "--batch-size", "1", "--limit", "16", "--dtype", "float32", "-o",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "safelocus", *command, str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    answers = tmp_path / ".run.partial" / "responses.jsonl.unfinished"
    deadline = time.monotonic() + 120
    while not (answers.exists() and answers.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in err
    assert not (tmp_path / "run").exists()
    (checkpoint,) = (tmp_path / ".run.partial" / "checkpoint").glob("*.safetensors")
    assert load_file(checkpoint)
    done = answers.read_text().count("\n")
    with answers.open("a") as file:
        file.write('\n[{"prompt": "cut')  # as by a crash
    assert run(*command, tmp_path / "run")[0] == 0
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "run" / "responses.jsonl").read_text().splitlines()]
    assert len(prompts) == len(set(prompts)) == 16  # none asked twice
    assert done < len(prompts)
    assert run(*command, tmp_path / "whole")[0] == 0
    resumed, whole = (sl.Scores.load(tmp_path / name / "scores") for name in ("run", "whole"))
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)


def test_only_some_commands_run_in_several_processes(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("inspect", "organism:dense")
    assert code == 2
    assert "runs in one process, and 2 were launched" in err
    assert run("inspect", "--help")[0] == 0
