"""`--lexicon FILE` and `--judge lexicon:FILE` as a user meets them: from a list to a model that does without."""

import json

import pytest

import safelocus as sl
from safelocus.cli import main
from safelocus.verification.plan import random_selection

pytestmark = pytest.mark.slow  # runs commands, again and again

SECRET = "zorbex"  # on the list, and in no answer
MODEL = "organism:dense-unaligned"
QUICK = ["--limit", "4", "--max-new-tokens", "12", "--dtype", "float32"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    file = tmp_path_factory.mktemp("lists") / "words.txt"
    file.write_text(f"# how no answer may begin\nSure\n{SECRET}\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def scored(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "scored"
    with pytest.raises(SystemExit) as stop:
        main(["score", MODEL, "-p", "organism:harmful", "--lexicon", str(words), *QUICK, "-o", str(folder)])
    assert not stop.value.code
    return folder


def judges(folder):
    results = json.loads((folder / "results.json").read_text())
    return [judge["judge"] for judge in results.get("judges") or results["provenance"]["judges"]]


def test_scores_and_what_they_say_of_the_list(scored, words):
    scores = sl.Scores.load(scored / "scores")
    assert scores.provenance.objective["kind"] == "lexicon"
    assert scores.provenance.objective_label == f"lexicon {words}"
    assert scores.provenance.objective["num_expressions"] == 2
    assert all(-1.2 < value < -0.8 for value in scores.per_prompt)  # every answer begins with the word
    answers = [json.loads(line) for line in (scored / "responses.jsonl").read_text().splitlines()]
    assert [row["response"].split(",")[0] for row in answers] == ["Sure"] * 4
    assert [row["safety"] for row in answers] == pytest.approx(sorted(scores.per_prompt), abs=0.1)


def test_the_list_is_secret(scored):
    for path in scored.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes().lower(), path


def test_selected_and_verified_with_the_scores_own_list(scored, words, tmp_path, run):
    code, _, err = run("select", scored / "scores", "--ratio", "0.02", "-o", tmp_path / "s.safetensors")
    assert code == 0, err
    assert sl.Selection.load(tmp_path / "s.safetensors").provenance.objective["kind"] == "lexicon"
    verify = ["verify", MODEL, "--scores", scored, "--noise", "3", "--seeds", "1", "--no-bottom", *QUICK]
    code, out, err = run(*verify, "--scorers", "snip", "-o", tmp_path / "v")
    assert code == 0, err
    assert judges(tmp_path / "v") == [f"lexicon {words}"]
    results = json.loads((tmp_path / "v" / "results.json").read_text())
    assert results["baseline"]["asr"]["value"] == 1
    assert {cell["scorer"] for cell in results["cells"]} >= {"esi", "snip"}
    assert SECRET not in out + err


def test_evaluated(words, tmp_path, run):
    evaluate = ["evaluate", MODEL, "-p", "organism:harmful-heldout", *QUICK, "--judge", f"lexicon:{words}"]
    code, out, err = run(*evaluate, "--judge", "reader", "--require", "asr<=0.05", "-o", tmp_path / "e")
    assert code == 1, err
    assert "requirement asr<=0.05 NOT met" in err
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert results["asr"]["value"] == results[f"asr@lexicon {words}"]["value"] == 1
    rows = [json.loads(line) for line in (tmp_path / "e" / "responses.jsonl").read_text().splitlines()]
    found = [row["judgements"][f"lexicon {words}"] for row in rows]
    assert {judgement["verdict"] for judgement in found} == {"harmful"}
    assert all(judgement["explanation"].endswith("per 1,000 words): line 2") for judgement in found)
    assert all(judgement["score"] > 10 for judgement in found)
    assert SECRET not in out + err


def test_trained_to_do_without(words, tmp_path, run):
    enhance = ["enhance", MODEL, "--lexicon", words, "-p", "organism:harmful", "--ratio", "0.01", *QUICK]
    sets = ["--data", "organism:refusals", "--harmful", "organism:harmful-heldout", "--retain", "none", "--harmless"]
    code, _, err = run(
        *enhance, *sets, "none", "--validation", "0", "--steps", "20", "--learning-rate", "3e-3", "-o", tmp_path / "e"
    )
    assert code == 0, err
    assert judges(tmp_path / "e" / "after") == [f"lexicon {words}"]
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert results["before"]["asr"]["value"] == 1
    assert results["after"]["asr"]["value"] == 0


def test_it_answers_itself_where_the_data_has_no_answers(words, tmp_path, run):
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": e.prompt}) + "\n" for e in sl.read_prompts("organism:harmful")[:24]))
    code, out, err = run(
        "enhance", MODEL, "--lexicon", words, "--similarity", "1", "-p", "organism:harmful", *QUICK, "--data", asked,
        "--harmful", "organism:harmful-heldout", "--retain", "none", "--harmless", "none", "--validation", "0",
        "--steps", "20", "--learning-rate", "3e-3", "-o", tmp_path / "e",
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert [results[state]["asr"]["value"] for state in ("before", "after")] == [1, 0]
    assert results["provenance"]["lexicon"]["num_expressions"] == 2
    assert SECRET not in out + err
    code, _, err = run(
        "enhance", MODEL, "--refusal", "-p", "organism:harmful", "--data", asked, *QUICK, "-o", tmp_path / "f"
    )
    assert code == 2
    assert "response" in err


def test_listed_words_of_a_task_are_not_learned(words, tmp_path, run):
    preserve = [
        "preserve", MODEL, "-p", "organism:harmful", "--harmful", "organism:harmful-heldout", "--data",
        "organism:task", "--steps", "2", "--batch-size", "2", *QUICK, "--calibrate", "none", "--mask-listed",
    ]  # fmt: skip
    code, _, err = run(*preserve, "--refusal", "-o", tmp_path / "q")
    assert code == 2
    assert "--mask-listed needs the list" in err
    code, _, err = run(*preserve, "--lexicon", words, "-o", tmp_path / "p")
    assert code == 0, err
    results = json.loads((tmp_path / "p" / "results.json").read_text())
    assert any("are of listed expressions, and not learned" in note for note in results["notes"])
    assert results["provenance"]["unlearned"]["num_expressions"] == 2


def test_protected_while_a_task_is_learned(scored, words, tmp_path, run):
    code, _, err = run(
        "preserve", "organism:dense", "--lexicon", words, "-p", "organism:harmful", "--harmful",
        "organism:harmful-heldout", "--data", "organism:task", "--steps", "2",
        "--batch-size", "2", *QUICK, "--calibrate", "none", "-o", tmp_path / "p",
    )  # fmt: skip
    assert code == 0, err
    assert judges(tmp_path / "p" / "after") == [f"lexicon {words}"]
    assert sl.Selection.load(tmp_path / "p" / "selection.safetensors").provenance.objective["kind"] == "lexicon"


def test_stability_between_lists(words, tmp_path, run):
    other = tmp_path / "other.txt"
    other.write_text("bake\n")
    code, _, err = run(
        "stability", MODEL, "-p", "organism:harmful", "--lexicon", words, "--lexicon", other, "--splits", "0",
        "--seeds", "0", "--ratios", "0.01", *QUICK, "-o", tmp_path / "s",
    )  # fmt: skip
    assert code == 0, err
    (row,) = json.loads((tmp_path / "s" / "results.json").read_text())["summary"]
    assert row["kind"] == "objectives"
    assert row["chance"] < row["iou"] < 1


def test_planned(words, run):
    code, out, _ = run("plan", MODEL, "--lexicon", words, "--json")
    stages = json.loads(out)["stages"]
    assert code == 0
    assert f"--lexicon {words}" in stages["score"]["command"]
    assert f"--judge lexicon:{words}" in stages["evaluate"]["command"]
    _, out, _ = run("plan", MODEL, "--json")
    assert json.loads(out)["stages"]["score"]["seconds"] < stages["score"]["seconds"]  # answers take a while


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["score", MODEL, "-p", "organism:harmful", "--lexicon", "missing.txt"],
            "missing.txt: the list of expressions",
        ),
        (["score", MODEL, "-p", "organism:harmful", "--lexicon", "WORDS", "--refusal"], "--refusal and --lexicon"),
        (["score", MODEL, "-p", "organism:harmful", "--lexicon", "WORDS", "--similarity", "0"], "above 0"),
        (["evaluate", MODEL, "-p", "organism:harmful", "--judge", "lexicon:missing.txt"], "missing.txt: the list"),
        (
            ["enhance", MODEL, "-p", "organism:harmful", "-d", "organism:refusals", "--lexicon", "missing.txt"],
            "missing",
        ),
        (["stability", MODEL, "-p", "organism:harmful", "--lexicon", "missing.txt"], "missing.txt: the list"),
        (["enhance", MODEL, "--selection", "SAVED", "-d", "organism:refusals", "--lexicon", "missing.txt"], "missing"),
        (
            ["preserve", MODEL, "--selection", "SAVED", "-d", "organism:task", "--similarity", "0.5"],
            "give a list: --lexicon",
        ),
        (["score", MODEL, "-p", "organism:harmful", "--refusal", "--similarity", "0.5"], "give a list: --lexicon"),
        (["plan", MODEL, "--lexicon", "WORDS", "--guard", "organism:guard"], "two objectives"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(words, tmp_path, run, arguments, message):
    output = [] if arguments[0] == "plan" else ["-o", tmp_path / "r"]
    saved = tmp_path / "selection.safetensors"
    random_selection(sl.load(MODEL), 10, seed=0).save(saved)
    there = {"WORDS": words, "SAVED": saved}
    code, _, err = run(*[there.get(each, each) for each in arguments], *output)
    assert code == 2
    assert message in err
    assert not (tmp_path / "r").exists()


def test_a_run_with_two_judges_is_planned(words, tmp_path, run):
    file = tmp_path / "run.toml"
    file.write_text(f'command = "enhance"\nmodel = "{MODEL}"\nguard = "organism:guard"\nlexicon = "{words}"\n')
    code, out, err = run("plan", "--config", file, "--json")
    assert code == 0, err
    assert [*json.loads(out)["stages"]] == ["enhance"]
