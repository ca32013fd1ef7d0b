"""Rows, settings, the loop and its learning curve, on a tiny model."""

import math
from dataclasses import replace

import pytest
import torch

import safelocus as sl
import tiny_targets
from safelocus.errors import NumericalError, PromptError, RunError, TrainingError
from safelocus.evaluation.measures import proportion
from safelocus.model.generation import generate
from safelocus.run.files import seal
from safelocus.training import Checkpoints, Curve, CurvePoint, TrainingSettings, fit, training_rows

ROWS = [{"prompt": f"bake a cake {n}", "response": f"no, I can't help with {n}"} for n in range(12)]
SETTINGS = TrainingSettings(steps=4, batch_size=2, learning_rate=1e-2)


def rows(target, **options):
    return training_rows(sl.read_prompts(ROWS), target.chat, **options)


def train(target, **options):
    return fit(target, rows(target), options.pop("settings", SETTINGS), progress=False, **options)


def state(target):
    return {name: parameter.detach().clone() for name, parameter in target.model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


class TestRows:
    def test_only_the_response_carries_loss(self):
        target = tiny_targets.dense()
        (first, *_) = rows(target)
        prompt = target.chat.encode_prompt(ROWS[0]["prompt"])
        assert first["input_ids"][: len(prompt)] == prompt
        assert first["labels"][: len(prompt)] == [-100] * len(prompt)
        answer = first["labels"][len(prompt) :]
        assert answer == first["input_ids"][len(prompt) :]
        assert answer[-1] in target.chat.end_of_turn_ids
        assert target.tokenizer.decode(answer[:-1]) == ROWS[0]["response"]

    def test_long_responses_are_cut_and_long_prompts_left_out(self):
        target = tiny_targets.dense()
        whole = rows(target)
        room = len(target.chat.encode_prompt(ROWS[0]["prompt"])) + 2
        cut = rows(target, max_length=room)
        assert all(len(row["input_ids"]) <= room for row in cut)
        assert cut[0]["input_ids"] == whole[0]["input_ids"][:room]
        with pytest.raises(PromptError, match="longer than 2 tokens"):
            rows(target, max_length=2)

    def test_prompts_without_responses(self):
        with pytest.raises(PromptError, match="no example has a response"):
            training_rows(sl.read_prompts(["bake a cake"]), tiny_targets.dense().chat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate is a positive number"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"schedule": "zigzag"}, "zigzag"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(TrainingError, match=message):
        TrainingSettings(**change)


class TestFit:
    def test_it_learns_and_leaves_nothing_but_weights(self):
        target = tiny_targets.dense()
        before, config = state(target), target.model.config.to_dict()
        losses = train(target, settings=replace(SETTINGS, steps=12))
        assert [point.step for point in losses] == list(range(1, 13))
        assert losses[-1].loss < losses[0].loss
        assert not same(before, state(target))
        assert target.model.config.to_dict() == config
        assert "forward" not in vars(target.model)
        assert not target.model.training
        assert all(parameter.grad is None for parameter in target.model.parameters())

    def test_the_seed_decides(self):
        runs = []
        for seed in (0, 0, 1):
            target = tiny_targets.dense()
            train(target, settings=replace(SETTINGS, seed=seed))
            runs.append(state(target))
        assert same(runs[0], runs[1])
        assert not same(runs[0], runs[2])

    def test_divergence_is_an_error_that_names_the_step(self):
        with pytest.raises(NumericalError, match="step 2 is nan: training diverged"):
            train(tiny_targets.dense(), settings=replace(SETTINGS, learning_rate=1e30))

    def test_another_runs_checkpoint_is_refused(self, tmp_path):
        Checkpoints(folder=tmp_path, inputs={"--data": "1", "seed": 0}).latest()
        (tmp_path / "checkpoint-1").mkdir()
        seal(tmp_path / "checkpoint-1")
        with pytest.raises(RunError, match="differs in --data"):
            Checkpoints(folder=tmp_path, inputs={"--data": "2", "seed": 0}).latest()


class Look:
    """Measures something of the weights, and notes how it found the model."""

    def __init__(self, target):
        self.target, self.modes = target, []

    def __call__(self):
        self.modes.append((self.target.model.training, torch.is_grad_enabled()))
        torch.rand(3)  # a look may draw random numbers
        weight = next(self.target.model.parameters())
        return {"asr": proportion(int(weight.abs().sum()) % 7, 7)}


class TestCurve:
    def test_looks_before_between_and_after(self):
        target = tiny_targets.dense()
        look = Look(target)
        curve = Curve(look, every=3)
        train(target, settings=replace(SETTINGS, steps=7), callbacks=[curve])
        assert [point.step for point in curve.points] == [0, 3, 6, 7]
        assert look.modes == [(False, False)] * 4
        assert curve.reason is None

    def test_looks_change_nothing(self):
        runs = []
        for looking in (False, True):
            target = tiny_targets.dense(attention_dropout=0.3)
            train(target, callbacks=[Curve(Look(target), every=1)] if looking else [])
            runs.append(state(target))
        assert same(*runs)

    def test_a_mixture_of_experts_generates_in_between(self):
        target = tiny_targets.moe()

        def look():
            generate(target, ["bake a cake", "help"], max_new_tokens=3)
            return {}

        curve = Curve(look, every=2)
        train(target, callbacks=[curve])
        assert [point.step for point in curve.points] == [0, 2, 4]
        assert not target.model.config.output_router_logits

    def test_a_reason_stops_the_training(self):
        target = tiny_targets.dense()
        curve = Curve(Look(target), every=1, stop_when=lambda points: "enough" if len(points) == 3 else None)
        losses = train(target, callbacks=[curve])
        assert (len(losses), curve.points[-1].step, curve.reason) == (2, 2, "enough")

    def test_a_resumed_run_has_all_points(self, tmp_path):
        target = tiny_targets.dense()
        whole = Curve(Look(target), every=1)
        train(target, callbacks=[whole])
        target = tiny_targets.dense()
        checkpoints = Checkpoints(folder=tmp_path / "run")
        look = Interrupting(target, at=3)
        with pytest.raises(KeyboardInterrupt):
            train(target, callbacks=[Curve(look, every=1, folder=tmp_path / "curve")], checkpoints=checkpoints)
        resumed = Curve(Look(target), every=1, folder=tmp_path / "curve")
        losses = train(target, callbacks=[resumed], checkpoints=checkpoints)
        assert resumed.points == whole.points
        assert [point.step for point in losses] == [1, 2, 3, 4]

    def test_points_survive_json(self):
        point = CurvePoint(step=3, measures={"asr": proportion(1, 7)})
        assert CurvePoint.from_json(point.to_json()) == point

    def test_every_is_at_least_one(self):
        with pytest.raises(TrainingError, match="every 0 steps"):
            Curve(dict, every=0)


class Interrupting(Look):
    """Ctrl-C during a look."""

    def __init__(self, target, at):
        super().__init__(target)
        self.at = at

    def __call__(self):
        import signal

        found = super().__call__()
        if len(self.modes) == self.at:
            signal.raise_signal(signal.SIGINT)
        return found


@pytest.mark.parametrize("steps", [4, 6], ids=["within an epoch", "at its end"])
def test_a_finished_training_is_not_repeated(tmp_path, steps):
    """What follows the training was interrupted: the last checkpoint has everything, and no step is taken again."""
    settings, checkpoints = replace(SETTINGS, steps=steps), Checkpoints(folder=tmp_path)
    target = tiny_targets.dense()
    losses = train(target, settings=settings, checkpoints=checkpoints)
    assert (tmp_path / f"checkpoint-{steps}").is_dir()
    again = tiny_targets.dense()
    curve = Curve(Look(again), every=1)
    assert train(again, settings=settings, checkpoints=checkpoints, callbacks=[curve]) == losses
    assert same(state(target), state(again))
    assert not curve.points
