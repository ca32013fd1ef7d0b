"""Rows, settings, the loop and its learning curve, on a tiny model."""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from trl import SFTConfig

import safelocus as sl
import tiny_targets
from safelocus.errors import NumericalError, PromptError, RunError, TrainingError
from safelocus.evaluation.measures import proportion
from safelocus.model.chat import chat_format
from safelocus.model.generation import generate
from safelocus.run.files import seal
from safelocus.training import Schedule, TrainingSettings
from safelocus.training.arm import single_words
from safelocus.training.curve import CurvePoint
from safelocus.training.fitting import Checkpoints, fit
from safelocus.training.looks import Curve
from safelocus.training.responses import rows_with_remarks, training_rows
from safelocus.training.sharing import on_own_device
from tiny_targets import CHAT

ROWS = [{"prompt": f"bake a cake {n}", "response": f"no, I can't help with {n}"} for n in range(12)]
SETTINGS = TrainingSettings(steps=4, batch_size=2, learning_rate=1e-2)


def conversation(first="a lamp", **changes):
    (example,) = sl.read_prompts([{"prompt": "1", "response": first, "system": changes.pop("system", None)}])
    example = replace(example, later=(("2", "a kite"), ("3", "no more")), **changes)
    return sl.read_prompts([example])


def without_system_role(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    return tokenizer


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

    @pytest.mark.parametrize("system", [None, "be brief"])
    @pytest.mark.parametrize("has_role", [True, False])
    def test_every_answer_of_a_conversation_carries_loss_in_one_row(self, system, has_role):
        chat = tiny_targets.dense().chat
        if not has_role:
            chat = chat_format(without_system_role(chat.tokenizer))
        (row,), remarks = rows_with_remarks(conversation(system=system), chat)
        assert remarks == []
        text = chat.tokenizer.decode(row["input_ids"])
        said = [
            chat.tokenizer.decode([token for _, token in part])
            for is_learned, part in itertools.groupby(
                zip(row["labels"], row["input_ids"], strict=True), key=lambda pair: pair[0] != -100
            )
            if is_learned
        ]
        assert said == [f"{answer}<|end|>" for answer in ("a lamp", "a kite", "no more")]
        turns = [(f"<|user|>{u}<|end|><|assistant|>{a}<|end|>") for u, a in zip("123", ("a lamp", "a kite", "no more"))]
        whole = "<s>" + "".join(turns)
        if system:
            folded = whole.replace("<|user|>1", f"<|user|>{system}\n\n1")
            whole = whole.replace("<s>", f"<s><|system|>{system}<|end|>") if has_role else folded
        assert text == whole

    def test_a_template_that_forgets_what_was_said_makes_a_row_of_each_answer(self):
        tokenizer = copy.deepcopy(tiny_targets.byte_level())
        tokenizer.chat_template = CHAT.replace("m['content'] }}", "m['content'].split('#')[-1] }}")
        chat = chat_format(tokenizer)
        rows, _ = rows_with_remarks(conversation(first="a thought#a lamp"), chat)
        assert [chat.tokenizer.decode([t for t in row["labels"] if t != -100]) for row in rows] == [
            "a thought#a lamp<|end|>", "a kite<|end|>no more<|end|>",
        ]  # fmt: skip
        assert "a thought" not in chat.tokenizer.decode(rows[1]["input_ids"])

    def test_answers_that_a_prompt_holds_are_not_learned(self):
        chat = tiny_targets.dense().chat
        (row,), remarks = rows_with_remarks(conversation(context=2), chat)
        assert remarks == []
        assert chat.tokenizer.decode([t for t in row["labels"] if t != -100]) == "no more<|end|>"

    def test_what_is_not_learned_is_counted(self):
        chat = tiny_targets.dense().chat
        turns, alone = conversation(unread=4), sl.read_prompts(ROWS[:3], field="prompt")
        plain = chat_format(chat.tokenizer, template="User: {prompt}\nAssistant: ")
        assert "6 of 7 answers in conversations are not learned" in rows_with_remarks(turns, plain)[1][0]
        assert "4 of 7 answers in conversations are not learned" in rows_with_remarks(turns, chat)[1][0]
        refusing = copy.deepcopy(chat.tokenizer)
        refusing.chat_template = "{% if messages|length > 3 %}{{ raise_exception('no') }}{% endif %}" + CHAT
        (remark,) = rows_with_remarks(conversation(), chat_format(refusing))[1]
        assert "1 of 3 answers in conversations" in remark
        size = len(chat.encode_prompt(ROWS[0]["prompt"])) + 2
        longer = replace(alone, examples=(*alone.examples, replace(alone[0], prompt="x" * 400)))
        rows, (left_out, cut) = rows_with_remarks(longer, chat, max_length=size)
        assert len(rows) == 3
        assert f"1 of 4 rows are left out: their prompts alone have {size} tokens" in left_out
        assert f"3 of 4 rows are cut to {size} tokens" in cut

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
        ({"max_grad_norm": -1.0}, "max_grad_norm is at least 0"),
        ({"steps": 10, "warmup_steps": 11}, r"warmup_steps is 0 to steps \(10\), found 11"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"weight_decay": -0.1}, "weight_decay is a number of at least 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
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

    @pytest.mark.parametrize("schedule", get_args(Schedule))
    def test_the_learning_rate_rises_in_the_warm_up(self, schedule):
        warm = replace(SETTINGS, warmup_steps=2, schedule=schedule)
        rates = [point.learning_rate for point in train(tiny_targets.dense(), settings=warm)]
        assert rates[:3] == [0, SETTINGS.learning_rate / 2, SETTINGS.learning_rate]
        assert (rates[3] == rates[2]) == (schedule == "constant")

    def test_a_process_trains_on_the_accelerator_that_the_model_is_on(self, tmp_path, monkeypatch):
        chosen, device = [], torch.device("cuda:1")
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
        arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
        arguments._n_gpu = 2
        on_own_device(arguments, torch.device("cpu"))
        assert (arguments.n_gpu, arguments.device, chosen) == (2, torch.device("cpu"), [])
        on_own_device(arguments, device)
        assert (arguments.n_gpu, arguments.device, chosen) == (1, device, [device])

    @pytest.mark.slow
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

    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_a_run_that_was_stopped_does_not_go_on_when_it_is_resumed(self, tmp_path):
        """The newest checkpoint may be that of the look at which there was reason to stop."""

        def run():
            target = tiny_targets.dense()
            curve = Curve(
                Look(target), every=1, stop_when=lambda points: "enough" if len(points) == 3 else None,
                folder=tmp_path / "curve",
            )  # fmt: skip
            checkpoints = Checkpoints(folder=tmp_path / "run", every_seconds=1e-9)
            losses = train(target, callbacks=[curve], checkpoints=checkpoints)
            return [point.step for point in losses], curve.reason, target.fingerprint()

        assert run() == run()
        assert (run()[0], run()[1]) == ([1, 2], "enough")

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


def _asked(*answers, kind="harmful"):
    return SimpleNamespace(rows=[{"set": kind, "response": answer} for answer in answers])


def test_answers_that_became_single_words_are_spoken_of():
    """A model that learned to say yes or no refuses nothing, and helps nobody."""
    before = _asked("I cannot help with that.", "No.", "Sure, here is how", None)
    arms = {
        "protected": _asked("I cannot help with that.", "No.", "Yes", "It is."),
        "unprotected": _asked("no", "Maybe.", " yes ", ""),
    }
    trained = [SimpleNamespace(name=name, after=after) for name, after in arms.items()]
    (said,) = single_words(before, trained)
    assert said.startswith("unprotected: 100 % of the answers to harmful prompts are single words (33 % before)")
    assert single_words(before, [SimpleNamespace(name="x", after=_asked("Yes", "No", kind="utility"))]) == []
