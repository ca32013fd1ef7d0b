"""Interrupted runs of several processes (gloo, CPU) go on where they stopped, with the bits of an uninterrupted one."""

import json
import os
import signal
import sys
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

import safelocus as sl
from safelocus import distributed
from safelocus.enhancement.optimizer import SparseOptimizer
from safelocus.enhancement.run import run_enhancement
from safelocus.errors import RunError
from safelocus.evaluation import responding
from safelocus.evaluation.tasks import task_of
from safelocus.preservation.run import run_preservation
from safelocus.prompts import read_prompts
from safelocus.run.files import seal
from safelocus.run.folder import CHECKPOINT, part_folder, run_folder
from safelocus.run.resume import StopAtBoundary
from safelocus.training.fitting import Checkpoints
from several import command, launch, odd, sharded, together
from test_distributed_cli import ENHANCE, with_prompts
from test_distributed_training import EXAMINATION, HARMLESS, MODELS, REFUSALS
from test_sparse import some
from tiny_targets import PROMPTS

SETTINGS = {"steps": 5, "batch_size": 3, "learning_rate": 1e-2, "progress": False}
STEP = Trainer.training_step


class Interrupted:
    """A function, and Ctrl-C at its n-th call, in some of the processes."""

    def __init__(self, function, at, ranks=None):
        self.function, self.at, self.ranks, self.calls = function, at, ranks, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        if self.calls == self.at and (self.ranks is None or distributed.rank() in self.ranks):
            os.kill(os.getpid(), signal.SIGINT)
        return self.function(*arguments, **options)


def own(folder):
    """Each process's own folder, as machines that share no files have them."""
    return folder / str(distributed.rank())


def whole(tensors):
    return {name: distributed.whole(tensor) for name, tensor in tensors.items()}


# --- scoring --------------------------------------------------------------------------------------------


def score_all(folder, shards):
    for name, make in MODELS.items():
        target = sharded(make()) if shards else make()
        objective = sl.Refusal(refusals=["I'm sorry"], compliances=["Sure"])
        how = {"batch_size": 1, "progress": False}
        expected = sl.score(target, PROMPTS, objective=objective, **how)
        # copies have no boundaries in common, and torchrun interrupts all; on shards one is enough
        stopped = Interrupted(objective.__call__, at=2, ranks=[1] if shards else None)
        stopped.describe = objective.describe
        how["checkpoint"] = own(folder / name)
        with pytest.raises(KeyboardInterrupt):
            sl.score(target, PROMPTS, objective=stopped, **how)
        distributed.barrier()
        assert distributed.in_all(stopped.calls == 2)
        resumed = Interrupted(objective.__call__, at=0)
        resumed.describe = objective.describe
        found = sl.score(target, PROMPTS, objective=resumed, **how)
        # five prompts and two processes; on shards the second one goes along with the third of the first
        assert resumed.calls == (1 if shards else (1, 0)[distributed.rank()])
        assert found.per_prompt == expected.per_prompt
        assert whole(found.tensors).keys() == expected.tensors.keys()
        for tensor, value in whole(expected.tensors).items():
            assert torch.equal(distributed.whole(found.tensors[tensor]), value)
        with pytest.raises(RunError, match="differs in batch_size"):
            sl.score(target, PROMPTS, objective=objective, **how | {"batch_size": 2})
        if shards:
            lose_the_newest(target, objective, own(folder / f"{name}-lost"), expected)


def lose_the_newest(target, objective, checkpoint, expected):
    """One process was ended before it had saved what the other had: all go on from what both have."""
    with mock.patch("safelocus.scoring.run.StopAtBoundary", saving_always), pytest.raises(ZeroDivisionError):
        sl.score(
            target, PROMPTS, objective=Failing(objective, at=3), batch_size=1, checkpoint=checkpoint, progress=False
        )  # fmt: skip
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "identity.json", "snapshot-1.safetensors", "snapshot-2.safetensors"
    ]  # fmt: skip
    if distributed.rank() == 1:
        (checkpoint / "snapshot-2.safetensors").unlink()
    counted = Interrupted(objective.__call__, at=0)
    counted.describe = objective.describe
    found = sl.score(target, PROMPTS, objective=counted, batch_size=1, checkpoint=checkpoint, progress=False)
    assert counted.calls == 2
    assert found.per_prompt == expected.per_prompt
    again = whole(found.tensors)
    assert all(torch.equal(again[name], value) for name, value in whole(expected.tensors).items())


class Failing(Interrupted):
    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.function(*arguments, **options) if self.calls < self.at else 1 / 0

    def describe(self):
        return self.function.describe()


def saving_always(save, *, every_seconds, **options):
    return StopAtBoundary(save, every_seconds=0, **options)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True], ids=["copies", "shards"])
def test_scoring(tmp_path, shards):
    together(2, score_all, tmp_path, shards)


# --- evaluation -----------------------------------------------------------------------------------------


def evaluate_all(folder, shards):
    target = sharded(odd()) if shards else odd()
    how = {"harmful": read_prompts(PROMPTS), "batch_size": 1, "max_new_tokens": 6, "progress": False}
    expected = sl.evaluate(target, **how)
    at = 3 if shards else (3, 2)[distributed.rank()]
    failing, counted = Failing(responding.generate_from, at=at), Interrupted(responding.generate_from, at=0)
    with mock.patch.object(responding, "generate_from", failing), pytest.raises(ZeroDivisionError):
        sl.evaluate(target, checkpoint=own(folder), **how)
    distributed.barrier()
    with mock.patch.object(responding, "generate_from", counted):
        found = sl.evaluate(target, checkpoint=own(folder), **how)
    assert counted.calls == 1  # what any of them had answered is known to all
    assert found.rows == expected.rows


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True], ids=["copies", "shards"])
def test_evaluation(tmp_path, shards):
    together(2, evaluate_all, tmp_path, shards)


# --- training -------------------------------------------------------------------------------------------


@contextmanager
def interrupted(at):
    """Ctrl-C at a step, in the last process alone: all stop there."""
    step = Interrupted(STEP, at=at, ranks=[distributed.world_size() - 1])
    with mock.patch.object(Trainer, "training_step", lambda *arguments: step(*arguments)):
        yield step


def enhance_all(folder, shards):
    for name, make in MODELS.items():
        target = sharded(make()) if shards else make()
        selection = some(target)

        def enhance(checkpoint=None, target=target, selection=selection):
            return run_enhancement(
                target, selection, read_prompts(REFUSALS), retain=read_prompts(HARMLESS), retain_rows=1,
                examination=EXAMINATION, validation=EXAMINATION, every=2, early_stopping=True, allow_seen=True,
                allow_mismatch=True, checkpoint=checkpoint, **SETTINGS,
            )  # fmt: skip

        expected, checkpoint = enhance(), own(folder / name)
        with interrupted(at=4) as step, pytest.raises(KeyboardInterrupt):
            enhance(checkpoint)
        assert step.calls == 4
        assert bool(list(checkpoint.rglob("checkpoint-*/digests.json"))) == (shards or distributed.is_main())
        distributed.barrier()
        with interrupted(at=0) as step:
            found = enhance(checkpoint)
        assert step.calls == 1
        same(found, expected)
        with interrupted(at=0) as step:  # a finished one is read
            same(enhance(checkpoint), expected)
        assert step.calls == 0
        if distributed.rank() == distributed.world_size() - 1:  # unless one process lost it
            next(checkpoint.rglob("trial.json")).unlink()
        distributed.barrier()
        same(enhance(checkpoint), expected)


def same(found, expected):
    assert all(torch.equal(found.patch.new[name], value) for name, value in expected.patch.new.items())
    assert found.trained[0].trial.losses == expected.trained[0].trial.losses
    assert found.trained[0].trial.curve == expected.trained[0].trial.curve
    assert found.after.rows == expected.after.rows


def preserve_all(folder, shards):
    for name, make in MODELS.items():
        target = sharded(make()) if shards else make()
        selection = some(target)
        lesson = read_prompts(HARMLESS), task_of(read_prompts(REFUSALS))

        def keep(output, checkpoint=None, target=target, selection=selection, lesson=lesson):
            return run_preservation(
                target, selection, *lesson, examination=EXAMINATION, every=2, folder=output, allow_mismatch=True,
                checkpoint=checkpoint, **SETTINGS,
            )  # fmt: skip

        expected = keep(folder / f"{name}-whole")
        with interrupted(at=4) as step, pytest.raises(KeyboardInterrupt):
            keep(folder / f"{name}-resumed", own(folder / name))
        assert step.calls == 4
        distributed.barrier()
        with interrupted(at=0) as step:
            found = keep(folder / f"{name}-resumed", own(folder / name))
        assert step.calls == 1
        assert found.protected.trial.losses == expected.protected.trial.losses
        assert found.protected.trial.curve == expected.protected.trial.curve
        assert found.protected.trial.num_changed == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "shards"), [(2, False), (2, True), (1, True)], ids=["copies", "shards", "offloaded"]
)
@pytest.mark.parametrize("train_all", [enhance_all, preserve_all])
def test_training(tmp_path, train_all, num_processes, shards):
    together(num_processes, train_all, tmp_path, shards)
    for file in tmp_path.glob("*-whole/model/model.safetensors"):
        expected, found = load_file(file), load_file(str(file).replace("-whole", "-resumed"))
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def look_elsewhere(folder):
    """The first process's folder is not where the others look for it."""
    checkpoints = Checkpoints(folder=own(folder))
    if distributed.is_main():
        (folder / "0" / "checkpoint-3").mkdir(parents=True)
        seal(folder / "0" / "checkpoint-3")
    distributed.barrier()
    assert checkpoints.latest() == folder / "0" / "checkpoint-3"
    assert checkpoints.latest(of_parts=True) is None
    seen = folder / "0" if distributed.is_main() else folder / "other-machine"
    with mock.patch.object(Checkpoints, "shared", return_value=seen), pytest.raises(RunError, match="can see"):
        checkpoints.latest()


@pytest.mark.slow
def test_a_checkpoint_that_not_all_can_see(tmp_path):
    together(2, look_elsewhere, tmp_path)


# --- run folders, and the commands ----------------------------------------------------------------------


def test_parts_of_a_run_folder(tmp_path):
    path, two = tmp_path / "run", {"config": {}, "processes": 2}
    with pytest.raises(KeyboardInterrupt), run_folder(path, **two) as first, part_folder(path, 1) as part:
        for folder in (first, part):
            (folder / CHECKPOINT).mkdir()
            (folder / CHECKPOINT / "work").touch()
        raise KeyboardInterrupt
    assert (part / CHECKPOINT).is_dir()
    with pytest.raises(RunError, match="of 2 processes was interrupted here"), run_folder(path, config={}):
        pass
    with run_folder(path, **two) as again, part_folder(path, 1) as its_part:
        assert (again, its_part) == (first, part)
    assert sorted(file.name for file in path.iterdir()) == ["digests.json", "run.toml"]
    assert not part.exists()
    with part_folder(tmp_path / "elsewhere", 1) as part:  # on a machine of its own
        assert part.is_dir()
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def kill_the_second_at_a_step():
    step = SparseOptimizer.step

    def killed(self, closure=None):
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, closure)

    SparseOptimizer.step = killed


KILLED = """
import sys
from safelocus.cli import main
from test_distributed_resuming import kill_the_second_at_a_step

kill_the_second_at_a_step()
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.long)], ids=["copies", "torchrun"])
def test_a_killed_process_ends_the_run_and_the_same_command_resumes(tmp_path, run, monkeypatch, torchrun):
    enhance = with_prompts(tmp_path, ENHANCE)
    files = sorted(path.name for path in tmp_path.iterdir())
    (streams := tmp_path / "streams").mkdir()
    sharded_run = [*enhance, "--shard", "-o", tmp_path / "run"]
    if torchrun:
        (script := streams / "killed.py").write_text(KILLED)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        found = launch(2, script, *sharded_run)
        assert found.returncode != 0
        out, error = found.stdout, found.stderr.split("Traceback")[0]  # before torchrun's own report
    else:
        codes, (out, _), (error, _) = command(2, streams, *sharded_run, first=kill_the_second_at_a_step)
        assert codes[0] > 0 > codes[1]
    assert "error: process 0: " in error
    assert not out
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.partial", *files, "streams"]
    code, _, err = run(*enhance, "-o", tmp_path / "run")
    assert code == 2
    assert "a run of 2 processes was interrupted here, and this one has 1" in err
    codes, out, errors = command(2, streams, *sharded_run)
    assert not any(codes), errors
    assert json.loads(out[0])["patch"]["k"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "run", "streams"]
    assert not list((tmp_path / "run").glob("process*"))


@pytest.mark.slow
def test_an_error_that_all_meet_is_said_once(tmp_path):
    (streams := tmp_path / "streams").mkdir()
    arguments = ["evaluate", "organism:dense", "-p", tmp_path / "none", "-o", tmp_path / "run"]
    codes, _, errors = command(3, streams, *arguments)
    assert all(codes)
    assert "".join(errors).count("error: ") == 1, errors
    assert [path.name for path in tmp_path.iterdir()] == ["streams"]
