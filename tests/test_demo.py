"""The demo: its story, its folder, its resumption and its page, with quick stages made up; and one real run."""

import json
import os
import re
import tomllib
from html import unescape

import pytest
from rich.console import Console
from typer.main import get_command

import safelocus as sl
from made_runs import enhance_run, score_run
from safelocus.analysis.claims import Claim
from safelocus.cli import app, main
from safelocus.demo import FULL, QUICK, story
from safelocus.demo.ahead import running_ahead
from safelocus.demo.stages import Found, Place, guard
from safelocus.errors import RunError
from safelocus.evaluation.judges import GuardJudge
from safelocus.report.grid import Grid
from safelocus.report.runs import ReportRun
from safelocus.verification import Verification
from several import copies
from test_claims import all_claims

pytestmark = pytest.mark.slow  # runs commands, again and again

RUNS = ("score", "enhance")


@pytest.fixture
def made_up(monkeypatch):
    """Stages that take no time; `played` says which were."""
    played = []

    def locate(at):
        played.append((at.organism, "locate"))
        score_run(at.folder / "score", at.organism)
        claims = [claim for claim in all_claims()[at.organism] if claim.stage == "locate"]
        table = Grid(title="A table", headings=("a heading",), rows=(("1",),))
        return Found(claims=claims, tables=[table], lines=["A finding [in brackets]."])

    def enhance(at):
        played.append((at.organism, "enhance"))
        enhance_run(at.folder / "enhance")
        return Found(
            claims=[claim for claim in all_claims()[at.organism] if claim.stage == "enhance"], tables=[], lines=[]
        )

    chapters = [
        story.Chapter(key="locate", title="Locate", why="Why we look.", stage=locate),
        story.Chapter(key="enhance", title="Enhance", why="Why we train.", stage=enhance),
    ]
    monkeypatch.setattr(story, "CHAPTERS", chapters)
    monkeypatch.setattr(story, "RUNS", RUNS)
    monkeypatch.setattr(story, "num_cores", lambda: 1)  # made-up stages cannot be sent to another process
    return played


def test_the_story_is_told_stage_by_stage_and_ends_with_the_claims(made_up, tmp_path, run):
    code, out, err = run("demo", "--quick", "-o", tmp_path / "demo")
    assert code == 0, err
    assert made_up == [(o, s) for o in ("dense", "moe") for s in ("locate", "enhance")]
    words = " ".join(out.split())
    for said in ("1/4 Locate: dense organism", "4/4 Enhance: mixture-of-experts organism", "Why we look.", "A table",
                 "A finding [in brackets].", "This is the quick demo", "The paper's claims", "not seen"):  # fmt: skip
        assert said in words, said
    assert words.index("A finding") < words.index("The paper's claims") < words.index("report.html")
    config = tomllib.loads((tmp_path / "demo" / "run.toml").read_text())
    assert config == {"command": "demo", "organisms": True, "quick": True, "seed": 0}
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["shortened"] == QUICK.shortened
    assert [Claim.from_json(each).verdict for each in results["claims"]["moe"]] == ["not seen", "holds", "holds"]
    assert not list(tmp_path.glob(".*"))


def test_the_full_demo_is_cut_nowhere(made_up, tmp_path, run):
    assert FULL.shortened == ""
    code, out, _ = run("demo", "--organisms", "-o", tmp_path / "demo")
    assert code == 0
    assert "quick demo" not in out
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["sizes"] == FULL.to_json()


def test_without_the_chat_model_the_organisms_stand_in_for_it_and_it_is_said(made_up, tmp_path, run, monkeypatch):
    monkeypatch.setenv("SAFELOCUS_CACHE", str(tmp_path / "empty"))
    code, _, err = run("demo", "-o", tmp_path / "demo")
    assert code == 0
    assert "smollm2: not there yet" in err
    assert "The organisms stand in for it" in err
    assert len(made_up) == 4


def test_another_model_that_is_not_there_is_an_error(tmp_path, run):
    code, out, err = run("demo", "--model", tmp_path / "nowhere", "-o", tmp_path / "demo")
    assert code == 2, out
    assert "does not exist" in err


def test_json_is_one_document_and_nothing_else(made_up, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--quick", "--json", "-o", str(tmp_path / "demo")])
    assert not stop.value.code
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert {key: printed[key] for key in saved} == saved
    assert printed["page"] == str(tmp_path / "demo" / "report.html")


def test_an_interrupted_demo_resumes_after_its_finished_stages(made_up, tmp_path, monkeypatch, run):
    chapters = list(story.CHAPTERS)

    def interrupted(at):
        raise KeyboardInterrupt

    stopped = story.Chapter(key="enhance", title="Enhance", why="", stage=interrupted)
    monkeypatch.setattr(story, "CHAPTERS", [chapters[0], stopped])
    code, _, err = run("demo", "--quick", "-o", tmp_path / "demo")
    assert code == 130
    assert "the same command" in err
    assert not (tmp_path / "demo").exists()
    monkeypatch.setattr(story, "CHAPTERS", chapters)
    code, out, _ = run("demo", "--quick", "-o", tmp_path / "demo")
    assert code == 0
    assert made_up == [("dense", "locate"), ("dense", "enhance"), ("moe", "locate"), ("moe", "enhance")]
    assert "Finished before the interruption" in out
    claims = json.loads((tmp_path / "demo" / "results.json").read_text())["claims"]
    assert len(claims["dense"]) == 4  # those of the finished stage too


def an_easy_stage(at):
    return Found(claims=[], tables=[Grid(title="A table", headings=("a",), rows=(("1",),))], lines=[str(at.folder)])


def a_stage_that_fails(at):
    raise RunError(f"no room in {at.folder}")


def a_stage_that_dies(at):
    os._exit(3)


def place(folder):
    return Place(organism="moe", folder=folder, final=folder, sizes=QUICK, checkpoint=folder)


@pytest.fixture
def started_quickly(monkeypatch):
    """The other process is a copy of one that has imported; that of the quick demo imports anew."""
    monkeypatch.setattr("safelocus.demo.ahead.get_context", lambda _: copies())


def test_stages_run_ahead_in_another_process_in_their_order(tmp_path, started_quickly):
    with running_ahead([an_easy_stage, a_stage_that_fails, an_easy_stage], place(tmp_path)) as following:
        found = following()
        assert found.lines == [str(tmp_path)]
        assert str(found.tables[0].title) == "A table"
        with pytest.raises(RunError, match="no room in"):
            following()
        with pytest.raises(RunError, match="the process that works on the moe organism ended"):
            following()  # the stage after a failed one is not begun


def test_a_process_that_is_lost_is_an_error_and_no_wait(tmp_path, started_quickly):
    with running_ahead([a_stage_that_dies], place(tmp_path)) as following, pytest.raises(RunError, match="exit code 3"):
        following()


def test_a_models_folder_is_within_and_no_other_one(tmp_path, monkeypatch):
    for name in ("Qwen/Qwen3-8B", "smollm2", "out/my model/"):
        assert story._key(name) == name.strip("/").rpartition("/")[2].replace(" ", "-")
    for name in ("out/checkpoint", "Checkpoint", "processes", "/", "runs/results.json", ".git"):
        assert story._key(name).startswith("model-")
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "sub")
    assert [story._key(name) for name in ("..", ".", "../sub")] == ["mine", "sub", "sub"]


def test_another_demos_unfinished_folder_is_refused(made_up, tmp_path):
    story.tell(tmp_path, QUICK, final=tmp_path)
    with pytest.raises(RunError, match="other sizes or another seed"):
        story.tell(tmp_path, QUICK, final=tmp_path, seed=1)


def test_one_page_of_all_runs(made_up, tmp_path, run):
    run("demo", "--quick", "-o", tmp_path / "demo")
    html = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    body = unescape(html[: html.index('<section id="provenance"')])
    assert body.index("The paper's claims") < body.index("All runs, below") < body.index("<section")
    contents = re.search(r'<nav class="contents".*?</nav>', html, re.DOTALL)[0]
    for place, name in enumerate(f"{organism}/{kind}" for organism in ("dense", "moe") for kind in RUNS):
        assert name in contents
        assert f'href="#run-{place + 2}"' in contents  # the first section is the claims'
        assert f'<section id="run-{place + 2}"' in html
    again = tmp_path / "again.html"
    assert run("report", tmp_path / "demo", "-o", again, "--title", story.HEADING)[0] == 0
    assert again.read_text(encoding="utf-8") == html
    assert run("report", tmp_path / "demo", "--table", "patterns")[0] == 0
    assert run("report", tmp_path / "demo" / "dense" / "enhance")[0] == 0


def test_silence_without_a_console(made_up, tmp_path, capsys):
    story.tell(tmp_path, QUICK, final=tmp_path)
    assert capsys.readouterr() == ("", "")


def test_narrow_terminals_lose_no_words(made_up, tmp_path):
    console = Console(width=80)
    with console.capture() as captured:
        story.tell(tmp_path, QUICK, final=tmp_path, console=console)
    assert max(map(len, captured.get().splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in captured.get()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """`safelocus demo --quick`, as it is."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--quick", "-o", str(folder)])
    assert not stop.value.code
    return folder


def test_the_quick_demo(quick):
    results = json.loads((quick / "results.json").read_text())
    assert list(results["claims"]) == ["dense", "moe"]
    claims = {name: {claim["key"]: claim for claim in found} for name, found in results["claims"].items()}
    assert {len(found) for found in claims.values()} == {7, 8}
    for organism, found in claims.items():
        assert found["more-noise"]["numbers"]["refusals lost beyond random"]["low"] > 0.1
        assert found["set-asr"]["numbers"]["share of the ASR gone"]["value"] > 0.5
        assert found["spa-calibrated"]["numbers"]["change of refusal"]["value"] > -0.1
        assert found["spa-calibrated"]["verdict"] != "holds"  # too few prompts and steps for that
        # every number is that of the run's own file
        enhanced = json.loads((quick / organism / "enhance" / "results.json").read_text())
        before, after = enhanced["before"], enhanced["after"]
        assert before["asr"]["value"] > 0.9
        assert after["asr"]["value"] < 0.1
        assert after["over_refusal"]["value"] < 0.1
        change = enhanced["change"]["asr"]["value"] / enhanced["before"]["asr"]["value"]
        assert found["set-asr"]["numbers"]["share of the ASR gone"]["value"] == pytest.approx(-change)
        frozen, calibrated = (
            json.loads((quick / organism / name / "results.json").read_text()) for name in ("freeze", "preserve")
        )
        assert frozen["after"]["num_changed"] == 0
        for key, after in (("spa-frozen", frozen), ("spa-calibrated", calibrated)):
            expected = after["after"]["refusal"]["value"] - after["before"]["refusal"]["value"]
            assert found[key]["numbers"]["change of refusal"]["value"] == pytest.approx(expected)
        verification = Verification.load(quick / organism / "verify")
        effect = verification.verdict.effect
        assert found["more-noise"]["numbers"]["beyond bottom"] == effect.beyond_bottom.to_json()
        refusal = {
            each: verification.pool(each, "esi", effect.setting).measures["refusal"]
            for each in ("top", "random", "bottom")
        }
        assert refusal["top"].high < min(refusal["random"].low, refusal["bottom"].low)
        draws = [cell.observed.measures["refusal"] for cell in verification.cells if cell.selection == "random"]
        assert len(draws) == QUICK.num_seeds
        assert all(refusal["top"].high < draw.low for draw in draws)
        assert verification.verdict.kind == "general"  # noise is blunt: that utility falls with it is not hidden
    html = (quick / "report.html").read_text(encoding="utf-8")
    body = unescape(html[: html.index('<section id="provenance"')])
    for found in results["claims"].values():
        for claim in found:
            assert claim["measured"] in body
            assert claim["verdict"] in body


def test_every_stages_run_is_one_of_its_command(quick, tmp_path, run):
    commands = {"score-unaligned": "score", "freeze": "preserve"}
    for part in ReportRun.read(quick).parts:
        name = part.folder.name
        assert part.command == commands.get(name, name)
        options = {parameter.name for parameter in get_command(app).commands[part.command].params}
        assert set(part.config) - {"command"} <= options
    assert run("report", quick / "dense" / "verify", "-o", tmp_path / "page.html")[0] == 0
    # a stage's run.toml repeats it
    config, output = quick / "dense" / "enhance", tmp_path / "again"
    assert run("enhance", "--config", config, "-o", output)[0] == 0
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (config, output))
    assert first["after"]["asr"] == second["after"]["asr"]
    assert first["losses"] == second["losses"]


@pytest.mark.parametrize("organism", ["dense", "moe"])
def test_the_unaligned_twins_values_take_refusals_and_leave_utility(quick, organism):
    """Noise is blunt; these values are not: the damage is specific."""
    target, twin = (sl.load(f"organism:{organism}{end}", dtype="float32") for end in ("", "-unaligned"))
    before = target.fingerprint()
    swap = sl.verify(
        target, sl.Scores.load(quick / organism / "score" / "scores"), ratios=(0.2,), interventions=("transplant",),
        transplant_from=twin, seeds=3, prompts=sl.read_prompts("organism:harmful-heldout").limit(16, seed=0),
        harmless=sl.read_prompts("organism:harmless-heldout").limit(8, seed=0),
        tasks=sl.read_task("organism:utility").limit(16, seed=0), judges=[GuardJudge(guard=guard(), batch_size=64)],
        batch_size=64, max_new_tokens=32, progress=False,
    )  # fmt: skip
    assert swap.verdict.kind == "specific"
    assert swap.verdict.effect.beyond_random.low > 0.2
    assert target.fingerprint() == before


@pytest.mark.parametrize("which", ["--quick", "--organisms"])
def test_a_model_beside_the_organisms_is_refused(tmp_path, run, which):
    code, _, err = run("demo", which, "--model", "organism:dense", "-o", tmp_path / "demo")
    assert code == 2
    assert "are about models of their own" in err
    assert not list(tmp_path.iterdir())
