"""Digests: of folders, of journals, of what an unfinished run keeps; and the command that compares them."""

import json
import os
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import flip
from made_runs import enhance_run
from safelocus.errors import RunError
from safelocus.run.checking import check
from safelocus.run.files import DIGESTS, inside, read_json, read_text, seal, write_json
from safelocus.run.folder import CHECKPOINT, read_config, run_folder
from safelocus.run.resume import Journal, Snapshots, claim
from test_selection import random_selection


def bad(path):
    return {found.file.name: found.state for found in check(path) if found.is_bad}


def made(path):
    """A finished run with everything that has a digest of its own, and what an unfinished one keeps."""
    with run_folder(path, config={"command": "score"}) as folder:
        write_json(folder / "results.json", {"asr": 0.5})
        random_selection(k=20).save(folder / "selection.safetensors")
        (folder / "scores").mkdir()
        (folder / "scores" / "scores.json").write_text("{}")
        seal(folder / "scores")
        keep(folder / "kept")
    return path


def keep(folder):
    claim(folder, {"seed": 1})
    Journal(folder, "answers").add([(("a", 1), "yes"), (("b", 2), [0.1, None])])
    Snapshots(folder).save(3, {"sum": torch.arange(4.0)}, {"done": [1, 2]})


def test_a_run_is_intact_until_a_file_changes_goes_or_comes(tmp_path):
    run = made(tmp_path / "run")
    assert {found.state for found in check(run)} == {"intact"}
    listed = json.loads((run / DIGESTS).read_text())["files"]
    assert {"results.json", "run.toml", "selection.safetensors", f"scores/{DIGESTS}"} <= set(listed)
    assert "scores/scores.json" not in listed  # counts by the digests beside it
    (run / "notes.txt").write_text("mine")
    assert {found.file.name: found.state for found in check(run)}["notes.txt"] == "no digest"
    assert not bad(run)
    (run / "scores" / "scores.json").unlink()
    (run / "results.json").write_text('{"asr": 0.4}')
    assert bad(run) == {"scores.json": "missing", "results.json": "changed"}
    (run / "scores" / DIGESTS).unlink()
    assert DIGESTS in bad(run)


@settings(deadline=None, max_examples=150)
@given(number=st.integers(0, 99), bit=st.integers(0, 2**32))
def test_a_turned_bit_is_found_in_whichever_file_it_is(runs, number, bit):
    files = sorted(file for file in runs.rglob("*") if file.is_file())
    file = files[number % len(files)]
    before = file.read_bytes()
    flip(file, bit)
    assert bad(runs)
    assert check(file)[0].is_bad
    file.write_bytes(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return made(tmp_path_factory.mktemp("check") / "run")


@settings(deadline=None, max_examples=100)
@given(bit=st.integers(0, 2**32))
@pytest.mark.parametrize("name", ["identity.json", "answers.jsonl", "snapshot-3.safetensors"])
def test_a_turned_bit_in_unfinished_work_never_passes_for_work(tmp_path_factory, name, bit):
    folder = tmp_path_factory.mktemp("unfinished")
    keep(folder)
    flip(folder / name, bit)
    is_cut_off = not (folder / "answers.jsonl").read_bytes().endswith(b"\n")
    assert is_cut_off or check(folder / name)[0].is_bad
    with nullcontext() if is_cut_off else pytest.raises(RunError):
        claim(folder, {"seed": 1})
        journal = Journal(folder, "answers")
        Snapshots(folder).load({"sum": torch.zeros(4)})
        assert ("b", 2) not in journal, "all was loaded, as if nothing had happened"


def test_results_that_were_edited_are_refused_and_said_to_be(tmp_path):
    run = made(tmp_path / "run")
    for name, read in (("results.json", read_json), ("run.toml", read_config)):
        (run / name).write_text((run / name).read_text() + "\n")
        with pytest.raises(RunError, match=rf"{name}: changed since it was written .*if it was changed on purpose"):
            read(run / name)
    (run / DIGESTS).unlink()
    assert read_json(run / "results.json") == {"asr": 0.5}  # as a file of an earlier version


def test_digests_of_some_files_stand_beside_the_others(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
        seal(tmp_path, [name])
    assert not bad(tmp_path)
    (tmp_path / "a.txt").write_text("other")
    assert read_text(tmp_path / "b.txt") == "b.txt"
    with pytest.raises(RunError, match="changed since"):
        read_text(tmp_path / "a.txt")
    seal(tmp_path, ["a.txt"])
    assert read_text(tmp_path / "a.txt") == "other"


def test_text_in_another_encoding_and_endless_nesting_are_errors_in_words(tmp_path):
    (tmp_path / "a.json").write_bytes("ä".encode("latin-1"))
    with pytest.raises(RunError, match="not UTF-8"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[" * 200_000)
    with pytest.raises(RunError, match="not valid JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../b", "a\0b"])
def test_a_name_in_an_artefact_never_leads_outside(tmp_path, name):
    with pytest.raises(RunError, match="not within"):
        inside(tmp_path, name)


def test_check_prints_a_table_and_its_exit_code_says_what_was_found(tmp_path, run):
    place = made(tmp_path / "run")
    code, out, _ = run("check", place)
    assert code == 0
    assert "results.json" in out
    assert "intact" in out
    assert run("check", place / "selection.safetensors", place / "results.json")[0] == 0
    flip(place / "selection.safetensors", 12345)
    code, out, _ = run("check", place)
    assert code == 1
    assert "1 changed" in out
    code, out, _ = run("check", place, "--json")
    states = {os.path.basename(each["file"]): each["state"] for each in json.loads(out)["files"]}
    assert code == 1
    assert states["selection.safetensors"] == "changed"
    assert states["results.json"] == "intact"
    (tmp_path / "mine.txt").write_text("no artefact")
    assert run("check", tmp_path / "mine.txt")[0] == 1
    code, _, err = run("check", tmp_path / "nowhere")
    assert code == 2
    assert "no such file or folder" in err


def test_an_unfinished_run_can_be_checked(tmp_path):
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run", config={}) as folder:
        keep(folder / CHECKPOINT)
        raise KeyboardInterrupt
    unfinished = tmp_path / ".run.partial"
    assert not bad(unfinished)
    journal = unfinished / CHECKPOINT / "answers.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"digest": "ab')  # cut off by a crash
    assert not bad(unfinished)
    journal.write_text(journal.read_text().replace("yes", "yet"))
    assert bad(unfinished) == {"answers.jsonl": "damaged"}


def test_a_page_that_is_written_again_is_no_damage(tmp_path, run):
    outer = tmp_path / "demo"
    with run_folder(outer, config={"command": "demo"}) as folder:
        with run_folder(folder / "tuned", config={"command": "enhance"}) as inner:
            enhance_run(inner)
            (inner / "report.html").write_text("old")
        (folder / "results.json").write_text("{}")
    code, _, err = run("report", outer / "tuned")
    assert code == 0, err
    assert (outer / "tuned" / "report.html").read_text() != "old"
    assert not bad(outer)
    (outer / "tuned" / "report.html").write_text("changed")
    assert bad(outer) == {"report.html": "changed"}
