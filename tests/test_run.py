import errno
import os
from pathlib import Path

import pytest
import torch

from safelocus.errors import RunError
from safelocus.run.files import read_json, replacing, seal, write_json
from safelocus.run.folder import CHECKPOINT, read_config, read_unfinished, run_folder
from safelocus.run.resume import claim
from safelocus.run.tensors import TensorFile, save_tensors


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_appears_when_complete(tmp_path):
    with run_folder(tmp_path / "run", config={"command": "score", "limit": None, "ratio": 0.01}) as folder:
        (folder / "results.json").write_text("{}")
        assert not (tmp_path / "run").exists()
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["digests.json", "results.json", "run.toml"]
    assert read_config(tmp_path / "run") == {"command": "score", "ratio": 0.01}


def test_a_failed_run_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), run_folder(tmp_path / "run", config={}) as folder:
        (folder / "half").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_an_interrupted_run_with_a_checkpoint_is_kept_and_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run", config={}) as folder:
        (folder / CHECKPOINT).mkdir()
        (folder / CHECKPOINT / "state").write_text("3")
        raise KeyboardInterrupt
    assert names(tmp_path) == [".run.partial"]
    with run_folder(tmp_path / "run", config={}) as folder:
        assert (folder / CHECKPOINT / "state").read_text() == "3"
    assert names(tmp_path / "run") == ["digests.json", "run.toml"]


def test_overwrite_replaces_a_run_and_forgets_an_interrupted_one(tmp_path):
    for text in ("old", "new"):
        with run_folder(tmp_path / "run", config={"text": text}, overwrite=True) as folder:
            (folder / text).touch()
    assert names(tmp_path / "run") == ["digests.json", "new", "run.toml"]
    assert names(tmp_path) == ["run"]


def test_what_a_crash_left_does_not_stop_an_overwrite(tmp_path):
    (tmp_path / ".run.old").mkdir()  # it ended after the new run was in place
    (tmp_path / ".run.old" / "old").touch()
    for _ in range(2):
        with run_folder(tmp_path / "run", config={}, overwrite=True) as folder:
            (folder / "new").touch()
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["digests.json", "new", "run.toml"]


def test_a_run_that_was_put_aside_comes_back(tmp_path):
    with run_folder(tmp_path / "run", config={}) as folder:
        (folder / "old").touch()
    (tmp_path / "run").rename(tmp_path / ".run.old")  # killed between the renaming of the old and of the new
    with pytest.raises(RunError, match="holds an earlier run"), run_folder(tmp_path / "run", config={}):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["run"]


def test_work_that_is_forgotten_is_nobodys_however_far_its_removal_came(tmp_path, monkeypatch):
    def killed(folder, ignore_errors=False):
        if folder.is_dir():
            (folder / "identity.json").unlink(missing_ok=True)
            raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run", config={"seed": 1}) as folder:
        claim(folder / CHECKPOINT, {"seed": 1})
        (folder / CHECKPOINT / "work").touch()
        raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("shutil.rmtree", killed)
        with run_folder(tmp_path / "run", config={"seed": 1}):
            pass
    with run_folder(tmp_path / "run", config={"seed": 2}) as folder:
        claim(folder / CHECKPOINT, {"seed": 2})
        assert not (folder / CHECKPOINT / "work").exists()
    assert names(tmp_path) == ["run"]


def test_digests_of_an_attempt_that_was_killed_say_nothing_of_the_next(tmp_path):
    def run(text):
        with run_folder(tmp_path / "run", config={}) as folder:
            (folder / CHECKPOINT).mkdir(exist_ok=True)
            (folder / CHECKPOINT / "work").touch()
            write_json(folder / "results.json", text)
            assert read_json(folder / "results.json") == text
            if text == "first":
                seal(folder)  # as it is done last of all
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("first")
    run("second")


def test_a_run_that_only_began_is_not_kept(tmp_path):
    with pytest.raises(ZeroDivisionError), run_folder(tmp_path / "run", config={}) as folder:
        claim(folder / CHECKPOINT, {"seed": 0})
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_refused_run_leaves_the_interrupted_one_as_it_is(tmp_path):
    def run(seed):
        with run_folder(tmp_path / "run", config={"seed": seed}) as folder:
            claim(folder / CHECKPOINT, {"seed": seed})
            (folder / CHECKPOINT / "work").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(1)
    with pytest.raises(RunError, match=r"differs in seed \(1 there, 2 here\)"):
        run(2)
    assert read_unfinished(tmp_path / "run", None) == {"seed": 1}
    with pytest.raises(KeyboardInterrupt):
        run(1)


def test_another_command_leaves_an_interrupted_run_as_it_is(tmp_path):
    def run(command, **options):
        with run_folder(tmp_path / "run", config={"command": command}, **options) as folder:
            (folder / CHECKPOINT).mkdir(exist_ok=True)
            (folder / CHECKPOINT / "work").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("enhance")
    with pytest.raises(RunError, match="interrupted `safelocus enhance` lies here"):
        run("score")
    assert (tmp_path / ".run.partial" / CHECKPOINT / "work").is_file()
    assert read_unfinished(tmp_path / "run", "enhance") == {"command": "enhance"}
    with pytest.raises(KeyboardInterrupt):
        run("score", overwrite=True)
    assert read_unfinished(tmp_path / "run", "score") == {"command": "score"}


def test_what_run_toml_cannot_say_is_refused_before_the_work(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    with pytest.raises(RunError, match=r"prompts = .*not UTF-8"), run_folder(
        tmp_path / "run", config={"command": "evaluate", "prompts": ["a", name]}
    ):  # fmt: skip
        pytest.fail("begun")
    assert names(tmp_path) == []


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(file, _data):
        file.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        patched.setattr(Path, "write_bytes", full)
        write_json(tmp_path / "results.json", {})
    assert names(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_tensors_can_be_read_by_whoever_may_read_other_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.ones(3)}, tmp_path / "a.safetensors")
        TensorFile(kind="patch", version=1, made_by="a test").write(tmp_path / "b.safetensors", {}, {})
        (tmp_path / "c.txt").touch()
    finally:
        os.umask(before)
    assert names(tmp_path) == ["a.safetensors", "b.safetensors", "c.txt"]
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_a_failed_overwrite_keeps_the_old_run(tmp_path):
    with run_folder(tmp_path / "run", config={}) as folder:
        (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), run_folder(tmp_path / "run", config={}, overwrite=True):
        raise ZeroDivisionError
    assert names(tmp_path / "run") == ["digests.json", "old", "run.toml"]


@pytest.mark.parametrize("prepare", ["run", "files", "file"])
def test_a_taken_place_is_refused(tmp_path, prepare):
    path = tmp_path / "run"
    if prepare == "file":
        path.touch()
    else:
        path.mkdir()
        (path / ("run.toml" if prepare == "run" else "thesis.tex")).touch()
    with pytest.raises(RunError, match="run"), run_folder(path, config={}):
        pytest.fail("the block must not run")
    if prepare == "files":  # never even with overwrite: these are not ours
        with (
            pytest.raises(RunError, match="no run of safelocus"),
            run_folder(path, config={}, overwrite=True),
        ):
            pytest.fail("the block must not run")
    assert path.exists()


def test_an_unwritable_place_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"), run_folder(tmp_path / "file" / "run", config={}):
        pytest.fail("the block must not run")


def test_read_config_errors(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(RunError, match="not valid TOML"):
        read_config(tmp_path / "bad.toml")


def test_a_link_stays_and_the_run_is_where_it_leads(tmp_path):
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (link := tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for number in range(3):
        with run_folder(link, config={"number": number}, overwrite=number > 0) as folder:
            assert folder.parent == tmp_path / "disk"
    assert link.is_symlink()
    assert read_config(tmp_path / "disk" / "out") == {"number": 2}
    assert names(tmp_path / "disk") == ["out"]


def test_a_place_that_nothing_can_take_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (lambda path: run_folder(path, config={}), replacing):
        for path, said in ((Path(), "the current folder"), (Path("/"), "where a disk is mounted")):
            with pytest.raises(RunError, match=f"is {said}.*a folder within it"), write(path):
                raise AssertionError
    assert names(tmp_path) == []


@pytest.mark.parametrize("earlier", [False, True])
def test_where_the_last_step_fails_it_is_said_where_the_finished_run_lies(tmp_path, monkeypatch, earlier):
    if earlier:
        with run_folder(tmp_path / "run", config={"number": 0}):
            pass
    rename = os.replace

    def fail(source, destination):
        if (source, destination) == (tmp_path / ".run.partial", tmp_path / "run"):
            raise OSError(16, "Device or resource busy")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    with (
        pytest.raises(RunError, match=r"busy\)\. The finished run lies in .*\.run\.partial: move it"),
        run_folder(tmp_path / "run", config={"number": 1}, overwrite=True) as folder,
    ):
        (folder / CHECKPOINT).mkdir()
    assert names(tmp_path / ".run.partial") == ["digests.json", "run.toml"]
    assert not earlier or read_config(tmp_path / "run") == {"number": 0}


def test_a_folder_that_is_replaced_is_never_gone(tmp_path, monkeypatch):
    with replacing(tmp_path / "a") as folder:
        (folder / "old").touch()
    rename, done = os.replace, []

    def stop(source, destination):
        done.append(destination)
        if len(done) == 2:
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["old"]
