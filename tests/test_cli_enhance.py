"""`safelocus enhance` as a user meets it."""

import json

import pytest

import safelocus as sl
from pages import check_run_page
from safelocus.cli import main
from safelocus.objective import Guard
from safelocus.report.grid import Span

pytestmark = pytest.mark.slow  # trains, again and again

SMALL = [
    "--steps", "2", "--batch-size", "2", "--retain-rows", "1", "--eval-every", "2", "--max-new-tokens", "12", "--limit",
    "6", "--dtype", "float32",
]  # fmt: skip
SETS = [
    "--data", "organism:refusals", "--retain", "organism:answers", "--harmful", "organism:harmful-heldout",
    "--harmless", "organism:harmless-heldout", "--task", "organism:utility",
]  # fmt: skip
REFUSAL = ["--refusal", "--prompts", "organism:harmful", "--ratio", "0.01"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "scored"
    with pytest.raises(SystemExit) as stop:
        main(
            ["score", "organism:dense-unaligned", "-p", "organism:harmful", "--limit", "8", "--refusal", "--dtype",
             "float32", "-o", str(folder)]
        )  # fmt: skip
    assert not stop.value.code
    return folder


def test_a_selection_becomes_a_patch(scored, tmp_path, run, monkeypatch):
    folder = tmp_path / "e"
    monkeypatch.setattr("safelocus.cli.enhance.LARGE", 10**6)
    code, out, err = run(
        "enhance", "organism:dense-unaligned", "--selection", scored, *SETS, *SMALL, "--controls", "random,bottom",
        "-o", folder,
    )  # fmt: skip
    assert code == 0, err
    assert {path.name for path in folder.iterdir()} == {
        "run.toml", "digests.json", "results.json", "README.md", "safety.patch.safetensors", "selection.safetensors",
        "before", "after", "controls", "curve.svg", "report.html",
    }  # fmt: skip
    assert "report.html" in err
    assert "this one has 1,270,912; larger ones may want less: --sweep 3e-5,1e-4,3e-4" in err
    shown = check_run_page(folder).table("Before and after")
    results = json.loads((folder / "results.json").read_text())
    assert {"asr", "refusal", "over_refusal", "utility", "incoherent"} <= set(results["before"]) & set(results["after"])
    assert "kl" not in results["before"]
    assert results["after"]["kl"]["value"] > 0
    assert results["after"]["kl"]["n"] == results["after"]["over_refusal"]["n"]
    assert set(results["before"]["asr"]) == {"value", "low", "high", "n"}
    asr = [row["ASR"] for row in shown[:2]]
    assert asr == [Span(results[state]["asr"]).exact for state in ("before", "after")]
    patch = sl.Patch.load(folder / "safety.patch.safetensors")
    sizes = {results["training"]["num_weights"], *(c["num_weights"] for c in results["controls"].values())}
    assert sizes == {patch.k} == {sl.Selection.load(scored / "selection.safetensors").k}
    assert "Before and after" in out
    card = (folder / "README.md").read_text()
    for part in (
        "| before |",
        "| selected weights |",
        "| random |",
        "safelocus patch apply",
        "## Limits",
        "## Licence",
    ):
        assert part in card
    # nothing of a response is printed
    lines = (folder / "after" / "responses.jsonl").read_text().strip().split("\n")
    responses = [json.loads(line)["response"] for line in lines]
    assert not any(len(response) > 12 and response in out + err for response in responses)
    target = sl.load("organism:dense-unaligned", dtype="float32")
    assert patch.apply(target)
    assert patch.revert(target)


def test_the_card_takes_other_seeds_and_leaves_other_runs_out(scored, tmp_path, run):
    command = ["enhance", "organism:dense-unaligned", "--selection", scored, *SETS, *SMALL, "--validation", "0"]
    assert run(*command, "--controls", "random", "-o", tmp_path / "a")[0] == 0
    first = json.loads((tmp_path / "a" / "results.json").read_text())["acceptance"]
    assert run(*command, "--steps", "1", "-o", tmp_path / "b")[0] == 0
    others = [part for name in "ab" for part in ("--card-with", tmp_path / name)]
    code, out, err = run(*command, "--controls", "random", "--seed", "1", *others, "-o", tmp_path / "c")
    assert code == 0, err
    assert "Acceptance card" in out
    card = json.loads((tmp_path / "c" / "results.json").read_text())["acceptance"]
    assert [run["seed"] for run in card["runs"]] == [1, 0]
    assert card["left_out"] == [f"{tmp_path / 'b'}: another settings"]
    alone, both = ({each["asked"]: each for each in found["criteria"]} for found in (first, card))
    assert "one seed" in alone["reliability"]["measured"]
    assert "2 seeds" in both["reliability"]["measured"]
    assert both["mechanism"]["numbers"]["beyond random"]["n"] > alone["mechanism"]["numbers"]["beyond random"]["n"]
    assert both["fresh semantics"]["verdict"] == "not measured"  # all of it is one organism's world
    assert "organism" in both["fresh semantics"]["measured"]
    assert check_run_page(tmp_path / "c").words.count("2 seeds") == 1


def test_everything_at_once(tmp_path, run, monkeypatch):
    loaded, load = [], Guard.load
    monkeypatch.setattr(Guard, "load", lambda name, **how: loaded.append(name) or load(name, **how))
    folder, retained = tmp_path / "e", tmp_path / "retained.txt"
    retained.write_text("\n".join(sl.read_prompts("organism:harmless").texts[:40]))  # without answers
    (harmful := tmp_path / "harmful.txt").write_text("\n".join(sl.read_prompts("organism:harmful-heldout").texts[:16]))
    code, out, err = run(
        "enhance", "organism:moe-unaligned", "--guard", "organism:guard", "--prompts", harmful,
        "--ratio", "0.01", "--data", "organism:refusals", "--retain", retained, "--retain-weight", "0.5",
        "--answer-tokens", "8", *SMALL, "--max-new-tokens", "4", "--sweep", "1e-3,3e-3", "--controls", "snip,lora",
        "--accumulation", "2", "--interpolate", "--checkpointing", "--schedule", "linear", "--warmup", "1", "--json",
        "-o", folder,
    )  # fmt: skip
    assert code == 0, err
    results = json.loads(out)
    assert list(results["controls"]) == ["snip", "lora"]
    assert "LoRA of rank" in results["controls"]["lora"]["description"]
    assert len(results["sweep"]) == 6
    assert results["before"]["judges"][0]["name"] == "organism:guard"
    assert loaded == ["organism:guard"]  # once, for finding and judging
    assert results["provenance"]["retained"][0]["source"] == str(retained)
    assert (folder / "sweep.svg").is_file()
    for arm in (results["training"], *results["controls"].values()):
        assert [point["share"] for point in arm["back"][:2]] == [1.0, 0.9]
        assert arm["share"] in [point["share"] for point in arm["back"]]
    assert (folder / "back.svg").is_file()
    remarks = " ".join(results["notes"])
    assert "prompts of organism:refusals that are not trained on" in remarks
    assert "utility is not measured" in remarks


def test_prompts_without_a_response_are_named(tmp_path, run):
    rows = [{"prompt": f"build a bad thing {n}", "response": "I cannot help" if n % 3 else None} for n in range(12)]
    (data := tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, _, err = run(
        "enhance", "organism:dense-unaligned", *REFUSAL, "--data", data, "--sweep", "fast", "-o", tmp_path / "x"
    )
    assert "have no response" not in err  # what is wrong with the options comes first
    _, _, err = run(
        "enhance", "organism:dense-unaligned", *REFUSAL, "--data", data, "--validation", "0", "--interpolate",
        "--harmless", "none", "--retain", "none", "-o", tmp_path / "x",
    )  # fmt: skip
    assert "4 of 12 prompts of" in err
    assert "have no response and are left out" in err


def test_run_toml_repeats_the_run(scored, tmp_path, run):
    command = ["enhance", "organism:dense-unaligned", "--selection", scored, *SETS, *SMALL, "-o", tmp_path / "a"]
    assert run(*command)[0] == 0
    assert run("enhance", "--config", tmp_path / "a", "-o", tmp_path / "b")[0] == 0
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    for part in ("before", "after", "curve", "losses"):
        assert first[part] == second[part]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing says which weights to act on"),
        (["--refusal"], "nothing says which weights to act on"),
        ([*REFUSAL, "--guard", "organism:guard"], "found --guard and --refusal"),
        ([*REFUSAL, "--selection", "x.safetensors"], "--selection says already"),
        (["--selection", "x.safetensors"], "x.safetensors: does not exist"),
        ([*REFUSAL, "--controls", "best"], "--controls best: expected random, bottom, full, lora"),
        ([*REFUSAL, "--ratio", "1.5"], "ratio must be in (0, 1]"),
        ([*REFUSAL, "--sweep", "fast"], "--sweep 'fast'"),
        ([*REFUSAL, "--sweep", "1e-4", "--learning-rate", "5e-3"], "--learning-rate 0.005, and --sweep without it"),
        ([*REFUSAL, "--judge", "nobody"], "no judge 'nobody'"),
        ([*REFUSAL, "--task", "organism:utility"], "--task organism:utility: given twice"),
        ([*REFUSAL, "--card-with", "nowhere"], "nowhere: no run for an acceptance card"),
        ([*REFUSAL, "--sweep", "0,1"], "learning_rate is a positive number"),
        ([*REFUSAL, "--sweep", "1e-3,1e-2", "--validation", "0"], "leave one"),
        ([*REFUSAL, "--interpolate", "--validation", "0"], "--interpolate: the validation part is what chooses"),
        (
            [*REFUSAL, "--early-stopping", "--validation-task", "organism:utility", "--validation", "0"],
            "--early-stopping and --validation-task: the validation part",
        ),
        ([*REFUSAL, "--data", "organism:nothing"], "nothing"),
        ([*REFUSAL, "--harmful", "organism:harmful"], "are among those to find the weights with"),
        ([*REFUSAL, "--harmful", "organism:refusals"], "to train on or to choose by are also among those to measure"),
        (
            [*REFUSAL, "--retain", "organism:utility", "--validation-task", "organism:utility-validation"],
            "organism:utility: 6 of 143 prompts to train on or to choose by",
        ),
        (
            [*REFUSAL, "--validation-task", "organism:utility"],
            "prompts to train on or to choose by are also",
        ),
        ([*REFUSAL, "--retain-weight", "0", "--retain-kl", "0"], "what is retained has no weight"),
    ],
)
def test_bad_input_is_one_message_before_the_model_is_loaded(tmp_path, run, monkeypatch, arguments, message):
    monkeypatch.setattr("safelocus.cli.options.ModelOptions.load", lambda _: pytest.fail("it was loaded"))
    code, out, err = run("enhance", "organism:dense-unaligned", *SETS, *SMALL, *arguments, "-o", tmp_path / "e")
    assert code == 2, out + err
    assert message in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "e").exists()


def test_a_control_that_cannot_be_made_is_refused_before_the_model_is_loaded(tmp_path, run, monkeypatch):
    target = sl.load("organism:dense-unaligned")
    sl.score(target, ["a", "b"], method="magnitude", progress=False).select(0.01).save(
        file := tmp_path / "s.safetensors"
    )
    monkeypatch.setattr("safelocus.cli.options.ModelOptions.load", lambda _: pytest.fail("it was loaded"))
    for control in ("bottom", "snip"):
        code, _, err = run(
            "enhance", "organism:dense-unaligned", "--selection", file, *SETS, *SMALL, "--controls", control,
            "-o", tmp_path / "e",
        )  # fmt: skip
        assert code == 2
        assert "do not say with which prompts" in err


def test_nothing_but_refusals(scored, tmp_path, run):
    """No sets of their own to measure with, nothing to retain, no looks, bf16."""
    code, _, err = run(
        "enhance", "organism:dense-unaligned", "--selection", scored, "--allow-mismatch", "--data",
        "organism:refusals", "--retain", "none", "--harmless", "none", "--validation", "0", "--steps", "1",
        "--limit", "4", "--max-new-tokens", "8", "--dtype", "bfloat16", "-o", tmp_path / "my e",
    )  # fmt: skip
    assert code == 0, err
    assert err.count("nothing is retained") == err.count("over-refusal is not measured") == 1
    assert f"patch apply '{tmp_path / 'my e' / 'safety.patch.safetensors'}'" in err
    results = json.loads((tmp_path / "my e" / "results.json").read_text())
    assert results["before"]["asr"]["n"] == 4
    assert "over_refusal" not in results["before"]
    assert results["curve"] == results["sweep"] == []
    assert results["provenance"]["dtype"] == "bfloat16"


def test_embedded_prompts_are_retained_and_measured_with_where_none_are_given(scored, tmp_path, run):
    folder = tmp_path / "e"
    code, _, err = run(
        "enhance", "organism:dense-unaligned", "--selection", scored, "--data", "organism:refusals", "--validation",
        "0", "--steps", "1", "--batch-size", "1", "--limit", "4", "--max-new-tokens", "4", "--retain-rows", "2",
        "--dtype", "float32", "-o", folder,
    )  # fmt: skip
    assert code == 0, err
    assert "no --retain: how the model itself answers embedded:ordinary and embedded:alarming is retained" in err
    assert "no --harmless: over-refusal is measured with embedded:harmless-heldout" in err
    results = json.loads((folder / "results.json").read_text())
    assert [part["source"] for part in results["provenance"]["retained"]] == ["embedded:ordinary", "embedded:alarming"]
    made = results["provenance"]
    # by how they begin, as often as refusals; but what is given counts
    assert [made[f"retain_{name}"] for name in ("kl", "weight", "rows")] == [0, 1, 2]
    assert made["answer_tokens"] == 8
    assert results["after"]["over_refusal"]["n"] == 4
    assert "may be" not in " ".join(results["notes"])
    again = (folder / "run.toml").read_text()
    assert 'harmless = "embedded:harmless-heldout"' in again
    assert "answer_tokens = 8" in again


def test_a_share_of_what_is_retained_is_measured_with_only_where_that_was_given(tmp_path, run):
    code, _, err = run(
        "enhance", "organism:dense-unaligned", *REFUSAL, "--data", "organism:refusals", "--retain", "none",
        "--retain", "organism:answers", "-o", tmp_path / "e",
    )  # fmt: skip
    assert code == 2
    assert "--retain none, and other sets too" in err


def test_how_to_retain_needs_something_to_retain(tmp_path, run, monkeypatch):
    """But a run.toml says all the same how it would be."""
    monkeypatch.setattr("safelocus.cli.options.ModelOptions.load", lambda _: pytest.fail("it was loaded"))
    given = [
        "enhance", "organism:dense-unaligned", *REFUSAL, "--data", "organism:refusals", "--retain", "none",
        "--harmless", "none", "-o", tmp_path / "e",
    ]  # fmt: skip
    code, _, err = run(*given, "--retain-kl", "3", "--own-answers")
    assert code == 2
    assert "--retain-kl, --own-answers are for what is retained" in err
    (file := tmp_path / "run.toml").write_text("retain_kl = 0.0\nretain_weight = 1.0\nretain_rows = 1\n")
    with pytest.raises(BaseException, match="it was loaded"):
        run(*given, "--config", file)


def test_a_selection_that_does_not_go_with_the_rest(scored, tmp_path, run):
    held_out = ["--harmful", "organism:harmful", "--limit", "256"]
    code, _, err = run(
        "enhance", "organism:dense-unaligned", "--selection", scored, *SETS, *SMALL, *held_out, "-o", tmp_path / "e"
    )
    assert code == 2
    assert "were used to find the weights of the selection" in err
    arguments = ["enhance", "organism:dense", "--selection", scored, *SETS, *SMALL, "-o", tmp_path / "e"]
    code, _, err = run(*arguments)
    assert code == 2
    assert "--allow-mismatch" in err
    assert run(*arguments, "--allow-mismatch")[0] == 0


def test_ctrl_c_and_the_same_command_give_the_same_patch(scored, tmp_path, run, interrupt):
    command = [
        "enhance", "organism:dense-unaligned", "--selection", scored, *SETS, *SMALL, "--steps", "6", "-o",
    ]  # fmt: skip
    interrupt("transformers.Trainer.training_step", *command, tmp_path / "run", at=5)
    checkpoint = tmp_path / ".run.partial" / "checkpoint" / "selection-0.001"
    assert (checkpoint / "curve" / "curve.jsonl").read_text().count("\n") == 3
    assert list(checkpoint.glob("checkpoint-*"))
    assert not (tmp_path / "run").exists()
    for name in ("run", "whole"):
        assert run(*command, tmp_path / name)[0] == 0
    resumed, whole = (tmp_path / name / "safety.patch.safetensors" for name in ("run", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "run" / "checkpoint").exists()
