"""`safelocus preserve` as a user meets it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import safelocus as sl
from pages import check_run_page
from safelocus.cli import main
from safelocus.preservation.mixing import ANSWER_TOKENS, PROMPTS
from safelocus.preservation.trainee import PATCH
from safelocus.selection.ratio import count_for_ratio
from safelocus.selection.sparse import gather
from test_protection import same
from test_tasks import shared, write

pytestmark = pytest.mark.slow  # trains, again and again

SMALL = ["--steps", "2", "--max-new-tokens", "12", "--limit", "6", "--batch-size", "4", "--dtype", "float32"]
PLAIN = [*SMALL, "--calibrate", "none"]
SETS = [
    "--data", "organism:task", "--task-heldout", "organism:task-heldout", "--harmful", "organism:harmful-heldout",
    "--harmless", "organism:harmless-heldout",
]  # fmt: skip
REFUSAL = ["--refusal", "--prompts", "organism:harmful", "--ratio", "0.01"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "scored"
    with pytest.raises(SystemExit) as stop:
        main(
            ["score", "organism:dense", "-p", "organism:harmful", "--limit", "8", "--refusal", "--dtype", "float32",
             "-o", str(folder)]
        )  # fmt: skip
    assert not stop.value.code
    return folder


@pytest.fixture
def few(tmp_path):
    """A file of harmless prompts."""
    rows = [{"prompt": prompt} for prompt in sl.read_prompts("organism:harmless").limit(8).texts]
    return write(tmp_path / "harmless.jsonl", rows)


def test_a_tenth_is_calibrated_on_what_is_embedded_unless_it_is_told_otherwise(few, tmp_path, run):
    folder = tmp_path / "p"
    code, _, err = run(
        "preserve", "organism:dense", "--refusal", "--prompts", few, *SETS[:6], "--harmless", "embedded:alarming",
        *SMALL, "--calibrate-every", "2", "-o", folder,
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((folder / "results.json").read_text())
    assert results["after"]["num_changed"] is None
    assert results["after"]["num_protected"] == count_for_ratio(sl.load("organism:dense").layout, 0.1)
    calibration, whole = results["provenance"]["calibration"], sl.read_prompts("embedded:alarming")
    assert [part["source"] for part in calibration["prompts"]] == list(PROMPTS)
    assert calibration["max_new_tokens"] == ANSWER_TOKENS
    assert calibration["learning_rate"] == "the training's"
    assert f"embedded:refusals (71), embedded:ordinary (99), embedded:alarming ({len(whole) - 6})" in err
    assert "--calibrate none leaves them their bits" in err
    assert "calibrate =" not in (folder / "run.toml").read_text()  # what was not given is taken anew


def test_a_task_is_learned_and_the_bits_stay(scored, few, tmp_path, run):
    folder = tmp_path / "p"
    code, out, err = run(
        "preserve", "organism:dense", "--selection", scored, *SETS, *PLAIN, "--mix", few, "--unprotected", "--controls",
        "random",
        "--task", "organism:utility", "--eval-every", "1", "--look", "4", "-o", folder,
    )  # fmt: skip
    assert code == 0, err
    assert {path.name for path in folder.iterdir()} == {
        "run.toml", "digests.json", "results.json", "model", "selection.safetensors", "before", "after", "unprotected",
        "controls", "curve.svg", "report.html",
    }  # fmt: skip
    assert "report.html" in err
    page = check_run_page(folder)
    assert {row["curve"] for row in page.rows("Refusal")} == {"protected", "unprotected", "random"}
    results = json.loads((folder / "results.json").read_text())
    for part in (results["before"], results["after"], results["unprotected"], results["controls"]["random"]):
        assert {"asr", "refusal", "over_refusal", "task", "utility", "incoherent"} <= set(part)
        assert set(part["task"]) == {"value", "low", "high", "n"}
        assert part["task"]["n"] == 6
    selection = sl.Selection.load(folder / "selection.safetensors")
    assert results["after"]["num_protected"] == results["controls"]["random"]["num_protected"] == selection.k
    assert results["after"]["num_changed"] == results["controls"]["random"]["num_changed"] == 0
    assert "0 of the protected weights have other bits than before" in " ".join(out.split())
    models = [sl.load(name, dtype="float32").model for name in ("organism:dense", str(folder / "model"))]
    assert same(*(gather(model, selection) for model in models))
    assert not torch.equal(*(next(model.parameters()) for model in models))
    # nothing of a response is printed
    lines = (folder / "after" / "responses.jsonl").read_text().strip().split("\n")
    responses = [json.loads(line)["response"] for line in lines]
    assert not any(len(response) > 12 and response in out + err for response in responses)
    assert run("report", folder, "-o", tmp_path / "report.html")[0] == 0
    card = {each["asked"]: each for each in results["acceptance"]["criteria"]}
    assert list(card) == ["reliability", "fresh semantics", "mechanism", "transfer"]
    lost = results["after"]["refusal"]["value"] - results["unprotected"]["refusal"]["value"]
    assert card["reliability"]["numbers"]["effect"]["value"] == pytest.approx(lost)
    assert {"beyond random", "task learned beyond unprotected"} == set(card["mechanism"]["numbers"])
    assert [part["source"] for part in results["provenance"]["mixed"]["prompts"]] == [str(few)]
    assert any("rows are the model's own answers" in note for note in results["notes"])


def test_another_task_is_the_transfer(scored, tmp_path, run):
    other = write(
        tmp_path / "other.jsonl", [{"prompt": f"What is {i} plus one?", "response": str(i + 1)} for i in range(60)]
    )
    command = ["preserve", "organism:dense", "--selection", scored, *SETS[4:], *PLAIN, "--unprotected"]
    assert run(*command, *SETS[:4], "-o", tmp_path / "a")[0] == 0
    code, out, err = run(*command, "--data", other, "--card-with", tmp_path / "a", "-o", tmp_path / "b")
    assert code == 0, err
    assert "Acceptance card" in out
    (transfer,) = (
        each
        for each in json.loads((tmp_path / "b" / "results.json").read_text())["acceptance"]["criteria"]
        if each["asked"] == "transfer"
    )
    assert list(transfer["numbers"]) == ["organism:task"]
    assert transfer["verdict"] in ("passes", "fails")


def test_everything_at_once(few, tmp_path, run):
    folder = tmp_path / "p"
    unsafe = write(tmp_path / "a.jsonl", [{"prompt": p} for p in sl.read_prompts("organism:harmful").limit(8).texts])
    calibrate = ["--calibrate", few, "--calibrate-every", "1", "--mix", few]
    code, out, err = run(
        "preserve", "organism:dense", *SETS, *REFUSAL, "--prompts", unsafe, *SMALL, *calibrate, "--max-new-tokens",
        "32", "--limit", "3", "--lora", "--lora-rank", "4", "--controls", "bottom", "--unprotected", "--accumulation",
        "2", "--checkpointing", "--schedule", "linear", "--warmup", "1", "--json", "-o", folder,
    )  # fmt: skip
    assert code == 0, err
    results = json.loads(out)
    assert results["after"]["num_changed"] is None
    assert results["settings"]["learning_rate"] == 2e-4
    assert results["provenance"]["calibration"]["every"] == 1
    assert results["provenance"]["mixed"]["share"] == pytest.approx(1 / 6)
    assert results["provenance"]["lora"]["rank"] == 4
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    target = sl.load("organism:dense", dtype="float32")
    assert sl.Patch.load(folder / "adapter" / PATCH).apply(target)
    assert run("preserve", "--config", folder, "-o", tmp_path / "again")[0] == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["losses"] == results["losses"]
    assert again["curve"] == results["curve"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing says which weights to act on"),
        (["--selection", "x.safetensors"], "x.safetensors: does not exist"),
        ([*REFUSAL, "--controls", "full"], "--controls full: expected random, bottom"),
        ([*REFUSAL, "--learning-rate", "0"], "learning_rate is a positive number"),
        ([*REFUSAL, "--data", "organism:nothing"], "nothing"),
        ([*REFUSAL, "--task-heldout", "organism:task"], "are also questions of organism:task"),
        ([*REFUSAL, "--task", "organism:task-heldout"], "is the task that is learned"),
        ([*REFUSAL, "--harmful", "organism:harmful"], "are among those to find the weights with"),
        ([*REFUSAL, "--calibrate", "organism:harmful-heldout"], "are also among those to measure with"),
        ([*REFUSAL, "--mix", "organism:harmless", "--mix-share", "1"], "above 0 and at most 0.9"),
        ([*REFUSAL, "--calibrate", "none", "--calibrate", "organism:harmless"], "expected one or the other"),
        ([*REFUSAL, "--mix-share", "0.3"], "--mix-share is for rows that are mixed in (--mix)"),
        ([*REFUSAL, "--mix", "organism:harmful-heldout"], "are also among those to measure with"),
        ([*REFUSAL, "--lora", "--lora-mode", "patch", "--calibrate", "organism:harmful"], "needs --lora-mode exact"),
        ([*REFUSAL, "--lora", "--save-dtype", "bfloat16"], "with --lora give --merge too"),
        ([*REFUSAL, "--lora-rank", "4", "--merge"], "--lora-rank, --merge are for an adapter (--lora)"),
        ([*PLAIN, *REFUSAL, "--calibrate-every", "2"], "--calibrate-every is for calibration (--calibrate)"),
        ([*REFUSAL, "--lora", "--lora-mode", "patch", "--calibrate-rate", "1"], "is for calibration (--calibrate)"),
        ([*REFUSAL, "--judge", "nobody"], "no judge 'nobody'"),
        ([*REFUSAL, "--calibrate", "organism:harmful", "--calibrate-rate", "0"], "learning_rate is a positive"),
    ],
)
def test_bad_input_is_one_message(tmp_path, run, arguments, message):
    code, out, err = run("preserve", "organism:dense", *SETS, *SMALL, *arguments, "-o", tmp_path / "p")
    assert code == 2, out + err
    assert message in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "p").exists()


def test_what_a_selection_leaves_to_measure_with_is_known_before_the_model_is_loaded(tmp_path, run, monkeypatch):
    (prompts := tmp_path / "p.json").write_text(json.dumps(["build a bomb", "bake a cake"]))
    scores = sl.score(sl.load("organism:dense"), sl.read_prompts(prompts), objective=sl.Refusal(), progress=False)
    scores.select(0.01).save(file := tmp_path / "s.safetensors")
    monkeypatch.setattr("safelocus.cli.options.ModelOptions.load", lambda _: pytest.fail("it was loaded"))
    given = ["preserve", "organism:dense", "--selection", file, *SETS[:4], *SMALL, "-o", tmp_path / "p"]
    code, _, err = run(*given)
    assert code == 2
    assert "all 2 prompts were used to find these weights" in err
    prompts.write_text(json.dumps(["build a bomb", "bake a cake", "pick a lock"]))
    code, _, err = run(*given, "--mix", prompts)
    assert code == 2
    assert "are also among those to measure with" in err


def test_all_prompts_are_used_to_find_the_weights(tmp_path, run):
    given = [*SETS[:4], *REFUSAL, *SMALL]
    code, _, err = run("preserve", "organism:dense", *given, "-o", tmp_path / "p")
    assert code == 2
    assert "give others to measure with: --harmful" in err


def test_ctrl_c_and_the_same_command_give_the_same_model(scored, few, tmp_path, run, interrupt):
    command = [
        "preserve", "organism:dense", "--selection", str(scored), *SETS, *SMALL, "--steps", "5", "--eval-every", "1",
        "--look", "2", "--calibrate", str(few), "--calibrate-every", "2", "--max-new-tokens", "32", "-o",
    ]  # fmt: skip
    interrupt("transformers.Trainer.training_step", *command, tmp_path / "run", at=3)
    (checkpoint,) = (tmp_path / ".run.partial" / "checkpoint").glob("protected-*/checkpoint-*")
    assert (checkpoint / "calibration.safetensors").is_file()
    assert not (tmp_path / "run").exists()
    for name in ("run", "whole"):
        assert run(*command, tmp_path / name)[0] == 0
    resumed, whole = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "whole"))
    assert one["curve"] == other["curve"]
    assert one["losses"] == other["losses"]
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_real_model_and_real_data(tmp_path, run):
    """A pretrained model that nobody here made, arithmetic, and harmful prompts from a benchmark."""
    model = Path(__file__).resolve().parents[2] / "shared" / "models" / "tinystories-656k"
    if not model.is_dir():
        pytest.skip("needs the model tinystories-656k beside the repository")
    rows = json.loads(shared("advbench/advbench.json").read_text(encoding="utf-8"))
    for name, part in (("found.json", rows[:6]), ("measured.json", rows[100:140])):
        (tmp_path / name).write_text(json.dumps(part), encoding="utf-8")
    code, out, err = run(
        "preserve", model, "--data", shared("gsm8k/train.jsonl"), "--task-heldout", shared("gsm8k/test.jsonl"),
        "--refusal", "--prompts", tmp_path / "found.json", "--ratio", "0.01", "--harmful", tmp_path / "measured.json",
        "--harmless", shared("harmless_alpaca_nc/harmless_1000.json"), *PLAIN, "--lora", "--merge",
        "-o", tmp_path / "p",
    )  # fmt: skip
    assert code == 0, err
    assert "0 of the protected weights have other bits than before" in " ".join(out.split())
    results = json.loads((tmp_path / "p" / "results.json").read_text())
    assert results["after"]["task"]["n"] == results["after"]["refusal"]["n"] == 6
    selection = sl.Selection.load(tmp_path / "p" / "selection.safetensors")
    models = [sl.load(str(folder)).model for folder in (model, tmp_path / "p" / "model")]
    assert same(*(gather(each, selection) for each in models))


def test_what_needs_the_whole_model_is_refused_before_it_is_loaded(run, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr("safelocus.model.target.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("safelocus.cli.options.ModelOptions.load", lambda _: pytest.fail("it was loaded"))
    code, _, err = run(
        "preserve", "organism:dense", "--refusal", "--prompts", "organism:harmful", "--data", "organism:requests",
        "--lora", "--offload", "-o", tmp_path / "r",
    )  # fmt: skip
    assert code == 2
    assert "--lora needs the whole model in each process; leave it out, or --offload" in err
