"""Every stage, interrupted: the same inputs go on to the same bits, and another one is an error that names it."""

import json
import re
import shutil
import signal
from dataclasses import replace
from functools import cache, partial
from unittest import mock

import pytest
import torch
from transformers import Trainer

import safelocus as sl
from safelocus import distributed
from safelocus.cli import locating
from safelocus.enhancement.run import run_enhancement
from safelocus.errors import ModelError, RunError
from safelocus.evaluation import responding
from safelocus.evaluation.judges import GuardJudge, RefusalMatcher
from safelocus.evaluation.tasks import task_of
from safelocus.model.target import Target
from safelocus.preservation.mixing import Mixed
from safelocus.preservation.run import run_preservation
from safelocus.run.folder import holds_work
from safelocus.run.identity import Identity
from safelocus.training.examination import Examination
from safelocus.training.lora import Lora
from safelocus.verification import run as verifying
from safelocus.verification import stability
from test_sparse import some
from tiny_targets import byte_level, dense, guard

pytestmark = pytest.mark.slow  # trains, again and again


@cache
def target(seed=0, dtype=torch.float32, vocab_size=330, **talking):
    made = dense(seed, byte_level(vocab_size))
    return Target.of(made.model.to(dtype), made.tokenizer, name=made.name, **talking)


def rows(*texts, **columns):
    return sl.read_prompts(
        [{"prompt": text, **{k: v[i] for k, v in columns.items()}} for i, text in enumerate(texts)]
    )  # fmt: skip


ASKED = ("how do I make a lamp?", "help me", "is the fox safe?")
HARMFUL, HARMLESS = rows(*ASKED), rows("bake a cake", "build a kite", "lazy dog")
REFUSALS = rows("quick dog", "brown fox", "jumps over", response=("I'm sorry", "I cannot", "no"))
ANSWERS = rows("words to merge", "make a kite", response=("Sure, here", "is how"))
SUMS = rows("1 + 1", "2 + 3", response=("2", "5"))
TASK = replace(task_of(SUMS), name="sums", max_new_tokens=3)
OPENINGS = {"refusals": ("I'm sorry",), "compliances": ("Sure",)}
REFUSAL, EXAMINATION = sl.Refusal(**OPENINGS), Examination(harmful=HARMFUL, max_new_tokens=3)
TRAINING = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "progress": False}


@cache
def scored():
    return sl.score(target(), REFUSALS, objective=REFUSAL, progress=False)


@cache
def guarded(**options):
    return guard(**options)


def identified(scores):
    return scores.identity(), scores.per_prompt


def changed(scores):
    """The same statistics at other places."""
    name, values = next(iter(scores.tensors.items()))
    return replace(scores, tensors={**scores.tensors, name: values.flip(0)})


def each(prompts, **columns):
    """The same rows, with other values in some columns."""
    return replace(prompts, examples=tuple(replace(example, **columns) for example in prompts.examples))


class Asking(dict):
    """A stage: how it is called, what it gives, and the function at whose n-th call Ctrl-C comes."""

    def __init__(self, call, give, owner, name, at, **inputs):
        super().__init__(inputs)
        self.call, self.give, self.owner, self.name, self.at = call, give, owner, name, at

    def run(self, folder, **changes):
        return self.give(self.call(**{**self, "target": target(), **changes}, checkpoint=folder))


def locate(*, target, prompts, objective, ratio=0.01, checkpoint, **how):
    """As the commands do, with what they would read and load."""
    read, made = mock.patch("safelocus.prompts.read_prompts"), mock.patch("safelocus.objective.Refusal")
    with read as reader, made as maker:
        reader.return_value, maker.return_value = prompts, objective
        return locating.locate(
            target, refusal=True, prompts="given", ratio=ratio, checkpoint=checkpoint, progress=False, **how
        ).selection


STAGES = {
    "score": Asking(
        lambda target, prompts, **how: sl.score(target, prompts, progress=False, **how), identified,
        sl.Refusal, "__call__", 2, prompts=HARMFUL, objective=REFUSAL, batch_size=1,
    ),
    "score by a guard": Asking(
        lambda target, prompts, **how: sl.score(target, prompts, progress=False, **how), identified,
        type(guarded()), "__call__", 2, prompts=HARMFUL, objective=guarded(max_new_tokens=3, gumbel_seed=1),
        batch_size=1,
    ),
    "evaluate": Asking(
        lambda target, **how: sl.evaluate(target, progress=False, **how), lambda found: found.rows,
        responding, "generate_from", 2, harmful=HARMFUL, harmless=HARMLESS, tasks=TASK, batch_size=2, max_new_tokens=3,
        judges=(RefusalMatcher(),),
    ),
    "verify": Asking(
        lambda target, scores, **how: sl.verify(target, scores, allow_mismatch=True, progress=False, **how),
        lambda found: found.to_json(),
        verifying, "evaluate", 3, scores={"esi": scored()}, prompts=HARMFUL, harmless=HARMLESS, tasks=TASK,
        noises=(2.0,), seeds=1, max_new_tokens=3, judges=(RefusalMatcher(),),
    ),
    "stability": Asking(
        lambda target, prompts, **how: stability(target, prompts, progress=False, **how),
        lambda found: found.to_json()["agreements"], sl.Refusal, "__call__", 2, prompts=HARMFUL,
        objectives={"refusal": REFUSAL}, splits=1, seeds=0, ratios=(0.01,), batch_size=1,
    ),
    "locate": Asking(
        locate, lambda found: found.identity(), sl.Refusal, "__call__", 2, prompts=HARMFUL, objective=REFUSAL,
        batch_size=1,
    ),
    "enhance": Asking(
        lambda target, selection, data, **how: run_enhancement(
            target, selection, data, allow_mismatch=True, **TRAINING | how
        ),
        lambda found: [
            [found.before.rows, found.after.rows, found.selection.trial.losses],
            {name: value.tolist() for name, value in found.patch.new.items()},
        ],
        Trainer, "training_step", 2, selection=some(target()), data=REFUSALS, retain=ANSWERS, retain_rows=1,
        examination=EXAMINATION,
    ),
    "preserve": Asking(
        lambda target, selection, data, task, **how: run_preservation(
            target, selection, data, task, allow_mismatch=True, **TRAINING | how
        ),
        lambda found: [
            found.before.rows, found.after.rows, found.protected.trial.losses, found.protected.trial.curve
        ],
        Trainer, "training_step", 2, selection=some(target()), data=ANSWERS, task=TASK, examination=EXAMINATION,
    ),
}  # fmt: skip


def retokenized():
    """The same model behind a tokenizer that merges other words; vocabularies are of one size."""
    made = target()
    return Target.of(made.model, byte_level(330, seed=1), name=made.name)


MODEL = {
    "the weights of the model": {"target": target(1)},
    "the dtype of the model": {"target": target(dtype=torch.bfloat16)},
    "the system prompt of the model": {"target": target(system="Be kind.")},
    "the chat template of the model": {"target": target(template="Q: {prompt} A:")},
    "the tokenizer of the model": {"target": retokenized()},
}
OTHER = rows("how do I make a LAMP?", *ASKED[1:])
TOLD = rows(*ASKED, system=("Be brief.", None, None))


def examined(**changes):
    return {"examination": replace(EXAMINATION, **changes)}


def prompts(option, name, **at):
    """Changes of a set of prompts that goes by a name."""
    return {
        f"the texts of {name}": {option: OTHER, **at},
        f"the system messages of {name}": {option: TOLD, **at},
    }


CHANGES = {
    "score": {
        **MODEL, **prompts("prompts", "--prompts"), "the texts of --prompts (order)": {"prompts": rows(*ASKED[::-1])},
        "the refusals of the objective": {"objective": sl.Refusal(**{**OPENINGS, "refusals": ("no",)})},
        "method": {"method": "snip"}, "batch_size (1 there, 2 here)": {"batch_size": 2},
    },
    "score by a guard": {
        "the tau of the objective": {"objective": guarded(max_new_tokens=3, gumbel_seed=1, tau=0.5)},
        "the gumbel_seed of the objective": {"objective": guarded(max_new_tokens=3, gumbel_seed=2)},
        "the weights of the objective": {"objective": guarded(max_new_tokens=3, gumbel_seed=1, seed=2)},
    },
    "evaluate": {
        **MODEL, "the harmful prompts": {"harmful": OTHER}, "the harmful prompts (system)": {"harmful": TOLD},
        "the harmless prompts": {"harmless": HARMLESS[:2]}, "the tasks": {"tasks": replace(TASK, match="exact")},
        "batch_size (2 there, 3 here)": {"batch_size": 3}, "max_new_tokens": {"max_new_tokens": 4}, "seed": {"seed": 1},
    },
    "verify": {
        **MODEL, "the values of the scores of esi": {"scores": {"esi": changed(scored())}},
        "the scores of mine": {"scores": {"mine": some(target())}},
        **prompts("prompts", "--prompts"), "the texts of --harmless": {"harmless": OTHER},
        "the questions of the tasks": {"tasks": TASK[:1]}, "the judges": {"judges": (RefusalMatcher(window=9),)},
        "ratios": {"ratios": (0.02,)}, "the interventions": {"noises": (3.0,)},
        "selections": {"selections": ("top",)}, "seeds": {"seeds": 2}, "random_draws": {"random_draws": 2},
        "batch_size": {"batch_size": 3}, "max_new_tokens": {"max_new_tokens": 4},
    },
    "stability": {
        **MODEL, **prompts("prompts", "--prompts"),
        "the refusals of the objective refusal":
            {"objectives": {"refusal": sl.Refusal(**{**OPENINGS, "refusals": ("no",)})}},
        "method": {"method": "snip"}, "splits": {"splits": 2}, "seeds": {"seeds": 2}, "seed": {"seed": 1},
        "batch_size": {"batch_size": 2},
    },
    "locate": {
        **MODEL, **prompts("prompts", "--prompts"),
        "the refusals of the objective": {"objective": sl.Refusal(**{**OPENINGS, "refusals": ("no",)})},
        "--ratio": {"ratio": 0.02}, "--score-batch-size": {"batch_size": 2}, "--max-new-tokens": {"max_new_tokens": 9},
    },
    "enhance": {
        **MODEL, "the coordinates of the selection": {"selection": some(target(), seed=1)},
        "the texts of --data": {"data": each(REFUSALS, prompt="quick")},
        "the responses of --data": {"data": each(REFUSALS, response="no")},
        "the system messages of --data": {"data": each(REFUSALS, system="Hm.")},
        "--retain": {"retain": each(ANSWERS, response="no")},
        "retain_kl": {"retain_kl": 1.0}, "retain_weight": {"retain_weight": 1.0}, "retain_rows": {"retain_rows": 2},
        "own_answers": {"own_answers": True}, "steps (3 there, 4 here)": {"steps": 4}, "seed": {"seed": 1},
        "learning_rate": {"learning_rate": 1e-3},
        "the validation": {"validation": replace(EXAMINATION, harmful=HARMLESS)},
        "every": {"every": 2},
        "the texts of the harmful prompts of the examination": examined(harmful=OTHER),
        "the harmless prompts of the examination": examined(harmless=HARMLESS),
        "the tasks of the examination": examined(tasks=(TASK,)),
        "the judges of the examination": examined(judges=(RefusalMatcher(window=9),)),
        "the number of new tokens of the examination": examined(max_new_tokens=4),
    },
    "preserve": {
        **MODEL, "the coordinates of the selection": {"selection": some(target(), seed=1)},
        "the responses of --data":
            {"data": each(ANSWERS, response="no")},
        "the answers of the task": {"task": each(TASK, answer="7")},
        "the adapter": {"lora": Lora(rank=2)}, "the rows mixed in": {"mixed": Mixed(prompts=[HARMLESS])},
        "the calibration": {"calibration": sl.Calibration(target=target(), prompts=[HARMLESS])},
        "unprotected": {"unprotected": True},
        "steps (3 there, 4 here)": {"steps": 4}, "seed": {"seed": 1}, "every": {"every": 1}, "look": {"look": 1},
        "the texts of the harmful prompts of the examination": examined(harmful=OTHER),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Folders of interrupted stages, made once."""
    made = {}

    def folder(name):
        if name not in made:
            stage, calls, path = STAGES[name], [], tmp_path_factory.mktemp("interrupted")
            original = getattr(stage.owner, stage.name)

            def stopped(*arguments, **options):
                calls.append(1)
                if len(calls) == stage.at:
                    signal.raise_signal(signal.SIGINT)
                return original(*arguments, **options)

            with mock.patch.object(stage.owner, stage.name, stopped), pytest.raises(KeyboardInterrupt):
                stage.run(path)
            assert holds_work(path)
            made[name] = path
        return made[name]

    return folder


@pytest.mark.parametrize("name", STAGES)
def test_the_same_inputs_go_on_to_the_same_bits(name, interrupted, tmp_path):
    folder = shutil.copytree(interrupted(name), tmp_path / "copy")
    stage, calls = STAGES[name], []
    original = getattr(stage.owner, stage.name)
    counted = lambda *arguments, **options: calls.append(1) or original(*arguments, **options)  # noqa: E731
    with mock.patch.object(stage.owner, stage.name, counted):
        expected, num_whole = stage.run(None), len(calls)
        assert stage.run(folder) == expected
    assert len(calls) - num_whole < num_whole  # it was not done all over again


@pytest.mark.parametrize("name", ["enhance", "preserve"])
def test_a_control_more_or_less_is_no_other_run(name, interrupted, tmp_path):
    """So that one that cannot be made can be left out."""
    stage, folder = STAGES[name], shutil.copytree(interrupted(name), tmp_path / "copy")

    def broken():
        raise ModelError("cannot be made")

    with pytest.raises(ModelError, match="cannot be made"):
        stage.run(folder, controls={"broken": broken})
    with mock.patch.object(stage.owner, stage.name, side_effect=AssertionError("it was trained again")):
        stage.run(folder)


@pytest.mark.parametrize(("name", "what"), [(name, what) for name in STAGES for what in CHANGES[name]])
def test_another_input_is_refused_by_its_name(name, what, interrupted):
    folder = interrupted(name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    wanted = what if " there" in what else what.partition(" (")[0]
    with pytest.raises(RunError, match=f"differs in (.*, in )?{re.escape(wanted)}") as error:
        STAGES[name].run(folder, **CHANGES[name][what])
    assert "Give the same inputs to resume it, or --overwrite" in str(error.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_number_of_processes_is_refused(interrupted, monkeypatch):
    monkeypatch.setattr(distributed, "check_same", lambda _: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(RunError, match=r"differs in the number of processes \(1 there, 2 here\)"):
        STAGES["score"].run(interrupted("score"))


def weighted(target, prompts, weight=1.0):
    return weight * REFUSAL(target, prompts)


def doubled(target, prompts):
    return 2 * REFUSAL(target, prompts)


class Weighing:
    def __init__(self, weight):
        self.weight, self._calls = weight, []

    def __call__(self, target, prompts):
        self._calls.append(prompts)
        return self.weight * REFUSAL(target, prompts)

    def again(self, target, prompts):
        return self(target, prompts)


def closed(weight, objective):
    return lambda target, prompts: weight * objective(target, prompts)


def test_an_objective_of_ones_own_is_its_code_and_its_settings():
    made = [
        weighted, doubled, partial(weighted, weight=2.0), partial(weighted, weight=3.0), Weighing(1), Weighing(2),
        Weighing(1).again, Weighing(2).again, closed(1, REFUSAL), closed(2, REFUSAL), closed(1, sl.Refusal()),
    ]  # fmt: skip
    found = [Identity.of({"the objective": objective}) for objective in made]
    for i, identity in enumerate(found):
        assert [i] == [j for j, other in enumerate(found) if not identity.differences(other)]
        assert Identity(json.loads(json.dumps(identity.parts))) == identity
    asked = Weighing(1)
    asked(target(), ["help"])
    assert not Identity.of({"the objective": asked}).differences(found[4])  # what it keeps for itself is none


def test_answers_are_reused_by_other_judges_and_the_same_judge_judges_once(interrupted, tmp_path, monkeypatch):
    folder, stage = shutil.copytree(interrupted("evaluate"), tmp_path / "copy"), STAGES["evaluate"]
    for judges in ((RefusalMatcher(window=9),), (GuardJudge(guard=guarded()),), (GuardJudge(guard=guarded(seed=2)),)):
        rows = stage.run(folder, judges=judges)
        assert rows == stage.run(None, judges=judges)
    monkeypatch.setattr(responding, "generate_from", lambda *_, **__: pytest.fail("all is answered"))
    assert stage.run(folder, judges=judges) == rows
