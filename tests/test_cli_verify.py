"""`safelocus verify` and `safelocus stability` as a user meets them."""

import json
import shutil

import pytest

import safelocus as sl
from pages import check_run_page
from safelocus.cli import main
from safelocus.cli.sources import read_artefact
from safelocus.prompts import prompt_hash
from safelocus.verification import Verification

pytestmark = pytest.mark.slow  # runs commands, again and again

VERIFY = ["--noise", "2", "--seeds", "2", "--limit", "6", "--max-new-tokens", "16", "--dtype", "float32"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "scored"
    with pytest.raises(SystemExit) as stop:
        main(
            ["score", "organism:dense", "-p", "organism:harmful", "--limit", "8", "--guard", "organism:guard",
             "--max-new-tokens", "16", "--dtype", "float32", "-o", str(folder)]
        )  # fmt: skip
    assert not stop.value.code
    return folder


def test_what_scoring_left_out_is_read_as_it_was(tmp_path, run):
    """Of a file that holds harmless prompts too, the harmful ones; wherever the run has gone since."""
    rows = [{"goal": p, "label": "unsafe", "note": "x"} for p in sl.read_prompts("organism:harmful").texts[:16]]
    rows += [{"goal": p, "label": "safe", "note": "y"} for p in sl.read_prompts("organism:harmless").texts[:12]]
    (data := tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(
        "score", "organism:dense", "-p", data, "--where", "label=unsafe", "--held-out", "0.5", "--refusal", "-o",
        tmp_path / "scored",
    )  # fmt: skip
    assert code == 0, err
    (tmp_path / "scored" / "scores").rename(tmp_path / "moved")
    code, _, err = run("verify", "organism:dense", "--scores", tmp_path / "moved", *VERIFY, "-o", tmp_path / "v")
    assert code == 0, err
    (used,) = json.loads((tmp_path / "v" / "results.json").read_text())["provenance"]["prompts"]
    assert 0 < used["num_prompts"] <= 6
    left_out = sl.read_prompts(data, where={"label": "unsafe"}).split(0.5)[1]
    assert used["num_prompts"] == min(6, len(left_out))
    data.unlink()
    code, _, err = run("verify", "organism:dense", "--scores", tmp_path / "moved", *VERIFY, "-o", tmp_path / "w")
    assert code == 2
    assert "what the scores were made with" in err
    assert "--prompts" in err


def test_verify_takes_what_is_not_given_from_the_scores(scored, tmp_path, run):
    code, out, err = run("verify", "organism:dense", "--scores", scored, *VERIFY, "-o", tmp_path / "v")
    assert code == 0, err
    results = json.loads((tmp_path / "v" / "results.json").read_text())
    assert results["provenance"]["judges"][0]["name"] == "organism:guard"
    (used,) = results["provenance"]["prompts"]
    assert (used["source"], used["num_prompts"]) == ("organism:harmful", 6)
    scores = sl.Scores.load(scored / "scores")
    assert len(scores.provenance.extra["prompt_hashes"]) == 8
    names = {path.name for path in (tmp_path / "v").iterdir()}
    assert names == {"run.toml", "results.json", "cells.jsonl", "curves.svg", "report.html", "digests.json"}
    assert "report.html" in err
    page = check_run_page(tmp_path / "v")
    assert results["verdicts"]["noise"]["text"] in page.words
    assert len(results["cells"]) == 2 * 3
    assert {cell["k"] for cell in results["cells"]} == {scores.select(0.01).k}
    assert results["verdicts"]["noise"]["text"] in out
    assert "Utility was not measured" in out
    assert Verification.load(tmp_path / "v").to_json() == results


def test_verify_several_scorers_with_utility(scored, tmp_path, run):
    code, out, err = run(
        "verify", "organism:dense", "--scores", scored, "-p", "organism:harmful-heldout", "--harmless",
        "organism:harmless-heldout", "--task", "organism:utility", "--scorers", "magnitude,snip", "--intervention",
        "noise,zero,transplant", "--transplant-from", "organism:dense-unaligned", "--ratios", "0.01,0.02",
        "--no-bottom", "--json", *VERIFY, "--max-new-tokens", "8", "-o", tmp_path / "v",
    )  # fmt: skip
    assert code == 0, err
    printed = json.loads(out)
    assert {entry["scorer"] for entry in printed["rankings"]["transplant"]} == {"esi", "magnitude", "snip"}
    assert set(printed["verdicts"]) == {"noise", "zero", "transplant"}
    measures = {"asr", "refusal", "over_refusal", "utility", "incoherent"}
    assert measures <= set(printed["baseline"])
    assert all(measures <= set(cell) for cell in printed["cells"])
    names = {path.name for path in (tmp_path / "v").iterdir()}
    assert {"curves.svg", "curves-snip.svg", "ranking-noise.svg"} <= names
    # the scores made here are of the prompts that the first ones were made with
    used = sl.Scores.load(scored / "scores").provenance.extra["prompt_hashes"]
    made = printed["provenance"]["scorers"]["snip"]
    assert made["num_prompts"] == len(used)


def test_run_toml_repeats_the_verification(scored, tmp_path, run):
    assert run("verify", "organism:dense", "--scores", scored, *VERIFY, "-o", tmp_path / "a")[0] == 0
    assert run("verify", "--config", tmp_path / "a", "-o", tmp_path / "b")[0] == 0
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    assert first == second


def test_a_selection_file_is_enough(scored, tmp_path, run):
    code, out, err = run(
        "verify", "organism:dense", "--scores", scored / "selection.safetensors", "-p", "organism:harmful-heldout",
        "--judge", "refusal", "--perplexity", "organism:answers", *VERIFY, "-o", tmp_path / "v",
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((tmp_path / "v" / "results.json").read_text())
    assert {cell["selection"] for cell in results["cells"]} == {"top", "random"}
    tops = [cell["perplexity"]["value"] for cell in results["cells"] if cell["selection"] == "top"]
    found = results["verdicts"]["noise"]["operating_point"]["perplexity"]["value"]
    assert found == pytest.approx((tops[0] * tops[1]) ** 0.5 / results["baseline"]["perplexity"]["value"])
    assert f"Perplexity of the given texts becomes {found:.3g}" in out
    assert f"perplexity goes to {found:.3g} times" in check_run_page(tmp_path / "v").words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "organism:harmful", "--limit", "256"], "were used to find"),
        (["--ratios", "one"], "--ratios 'one'"),
        (["--ratios", "2"], "ratio must be in (0, 1]"),
        (["--noise", "-1"], "positive"),
        (["--intervention", "shake"], "'shake'"),
        (["--intervention", "transplant"], "--transplant-from"),
        (["--scorers", "best"], "--scorers best"),
        (["--ratios", ","], "--ratios ','"),
        (["--noise", "nan"], "--noise 'nan'"),
        (["--transplant-from", "organism:moe"], "--transplant-from is for --intervention transplant"),
        (["--judge", "nobody"], "nobody"),
    ],
)
def test_bad_input_is_one_message_before_the_model_is_loaded(scored, tmp_path, run, monkeypatch, arguments, message):
    monkeypatch.setattr("safelocus.cli.options.ModelOptions.load", lambda _: pytest.fail("it was loaded"))
    code, out, err = run(
        "verify", "organism:dense", "--scores", scored, "--limit", "6", "--max-new-tokens", "8", "--seeds", "1",
        *arguments, "-o", tmp_path / "v",
    )  # fmt: skip
    assert code == 2, out + err
    assert message in err
    assert "Traceback" not in out + err


def test_scorers_that_cannot_be_made_are_refused_at_once_and_a_run_without_scores_has_its_selection(
    tmp_path, run, monkeypatch
):
    target = sl.load("organism:dense")
    sl.score(target, ["a", "b"], method="magnitude", progress=False).select(0.01).save(tmp_path / "hand.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr("safelocus.cli.options.ModelOptions.load", lambda _: pytest.fail("it was loaded"))
        code, _, err = run(
            "verify", "organism:dense", "--scores", tmp_path / "hand.safetensors", "-p", "organism:harmful-heldout",
            "--judge", "refusal", "--scorers", "snip", *VERIFY, "-o", tmp_path / "v",
        )  # fmt: skip
    assert code == 2
    assert "no snip scores can be made like them" in err
    code, _, err = run(
        "score", "organism:dense", "-p", "organism:harmful", "--limit", "8", "--method", "magnitude",
        "--no-save-scores", "-o", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    assert isinstance(read_artefact(tmp_path / "run"), sl.Selection)
    shutil.rmtree(tmp_path / "run" / "scores")
    assert isinstance(read_artefact(tmp_path / "run"), sl.Selection)


def test_a_guard_that_is_described_judges_as_it_scored(tmp_path, run):
    (described := tmp_path / "own.toml").write_text(
        'name = "upside-down"\nformat = "chat"\nsafe = ["unsafe"]\nunsafe = ["safe"]\n'
    )
    code, out, err = run(
        "score", "organism:dense", "-p", "organism:harmful", "--limit", "2", "--held-out", "0.5", "--max-new-tokens",
        "2", "--guard", "organism:guard", "--guard-description", described, "--json", "-o", tmp_path / "s",
    )  # fmt: skip
    assert code == 0, err
    assert "prompts were left out for verifying" in json.loads(out)["remarks"][0]
    quick = ["--limit", "1", "--max-new-tokens", "2", "--seeds", "1", "--no-bottom", "--json"]
    code, out, err = run("verify", "organism:dense", "--scores", tmp_path / "s", *quick, "-o", tmp_path / "v")
    assert code == 0, err
    assert json.loads(out)["provenance"]["judges"][0]["preset"] == "upside-down"
    code, out, err = run(
        "evaluate", "organism:dense", "-p", "organism:harmful", "--limit", "1", "--max-new-tokens", "2", "--judge",
        "guard:organism:guard", "--guard-description", described, "--json", "-o", tmp_path / "e",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["judges"][0]["preset"] == "upside-down"


def test_scores_that_are_missing_or_of_another_model(scored, tmp_path, run, monkeypatch):
    code, _, err = run("verify", "organism:dense", "--scores", tmp_path / "none", *VERIFY, "-o", tmp_path / "v")
    assert code == 2
    assert "does not exist" in err
    monkeypatch.setattr("safelocus.scoring.run.score", lambda *_, **__: pytest.fail("it was scored"))
    code, _, err = run(
        "verify", "organism:dense-unaligned", "--scores", scored, "--scorers", "snip", *VERIFY, "-o", tmp_path / "v"
    )
    assert code == 2
    assert "--allow-mismatch" in err
    assert not (tmp_path / "v").exists()


def test_stability(tmp_path, run):
    code, out, err = run(
        "stability", "organism:dense", "-p", "organism:harmful", "--limit", "16", "--guard", "organism:guard",
        "--also-refusal", "--splits", "1", "--seeds", "2", "--ratios", "0.01", "--max-new-tokens", "16", "-o",
        tmp_path / "s",
    )  # fmt: skip
    assert code == 0, err
    summary = json.loads((tmp_path / "s" / "results.json").read_text())["summary"]
    shown = [
        row["IoU (lowest to highest)"] for row in check_run_page(tmp_path / "s").table("Stability of the top weights")
    ]
    assert [each.split()[0] for each in shown] == [f"{row['iou']:.3f}" for row in summary]
    assert [row["kind"] for row in summary] == ["prompts", "seeds", "objectives"]
    assert all(row["chance"] < row["iou"] <= 1 for row in summary)
    assert f"{summary[0]['iou']:.3f}" in out
    code, _, err = run("stability", "organism:dense", "-p", "organism:harmful", "-o", tmp_path / "t")
    assert code == 2
    assert "--also-refusal" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--splits", "0"], "nothing to compare"),
        (["--ratios", "nan"], "--ratios 'nan'"),
        (["--ratios", "2"], "ratio must be in (0, 1]"),
        (["--guard", "organism:dense"], "neither its name nor its chat template"),
    ],
)
def test_what_stability_cannot_do_is_refused_before_the_model_is_loaded(tmp_path, run, monkeypatch, arguments, message):
    monkeypatch.setattr("safelocus.model.target.load", lambda *_, **__: pytest.fail("it was loaded"))
    given = ["stability", "organism:dense", "-p", "organism:harmful", "--also-refusal", *arguments]
    code, _, err = run(*given, "-o", tmp_path / "s")
    assert code == 2
    assert message in err


def test_help_names_the_options(run):
    code, out, _ = run("verify", "--help")
    assert code == 0
    assert "--scorers" in out


def test_ctrl_c_keeps_finished_cells_and_the_same_command_resumes(scored, tmp_path, run, interrupt):
    command = ["verify", "organism:dense", "--scores", scored, *VERIFY, "--noise", "1,2", "-o"]
    interrupt("safelocus.evaluation.responding.generate_from", *command, tmp_path / "run", at=6)
    assert not (tmp_path / "run").exists()
    done = (tmp_path / ".run.partial" / "checkpoint" / "cells.jsonl").read_text().splitlines()
    assert run(*command, tmp_path / "run")[0] == 0
    resumed = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(resumed["cells"]) == 12 > len(done) - 1 > 0
    assert run(*command, tmp_path / "whole")[0] == 0
    assert json.loads((tmp_path / "whole" / "results.json").read_text()) == resumed


def test_prompt_hashes_ignore_form():
    assert prompt_hash("How do I  bake?") == prompt_hash("how do i bake?") != prompt_hash("how do i fly?")
