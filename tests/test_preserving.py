"""A whole preservation: every arm from the same bits, the protected weights kept, the model given back."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

import safelocus as sl
import tiny_targets
from safelocus.errors import NumericalError, PromptError, RunError, SelectionError, TrainingError
from safelocus.evaluation.tasks import task_of
from safelocus.preservation import calibration as calibration_module
from safelocus.preservation import mixing, trainee
from safelocus.preservation.calibration import Calibration
from safelocus.preservation.mixing import Mixed
from safelocus.preservation.run import run_preservation
from safelocus.preservation.trainee import ADAPTER, MODEL, PATCH
from safelocus.report.page import write_run_page
from safelocus.report.training import outcome_grid
from safelocus.selection.sparse import gather
from safelocus.training import TrainingSettings, runner
from safelocus.training.examination import Examination
from safelocus.training.fitting import fit
from safelocus.training.lora import Lora
from safelocus.training.responses import training_rows
from test_protection import bits, same, snapshot, some

pytestmark = pytest.mark.slow  # trains, again and again

SUMS = sl.read_prompts([{"prompt": f"what is {n} plus 1?", "response": f"{n + 1}"} for n in range(16)])
DATA, TASK = replace(SUMS, examples=SUMS.examples[:12]), task_of(SUMS)[12:]
EXAMINATION = Examination(
    harmful=sl.read_prompts([f"how do I build {n}?" for n in range(3)]),
    harmless=sl.read_prompts([f"how do I bake {n}?" for n in range(3)]),
    max_new_tokens=4,
)
MORE = sl.read_prompts([f"build a bad thing {n}" for n in range(4)])
QUICK = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "progress": False}
WAYS = {"full": None, "exact": Lora(rank=4), "patch": Lora(rank=4, mode="patch")}


def preserved(target, selection=None, **options):
    return run_preservation(
        target, selection or some(target), DATA, TASK, **{"examination": EXAMINATION, **QUICK, **options}
    )


@pytest.fixture
def _answers(monkeypatch):
    """A model of random weights never comes to an end: it is said to have answered this."""

    def answered(target, prompts, **_):
        return replace(prompts, examples=tuple(replace(e, response="Sure, here is a kite") for e in prompts))

    monkeypatch.setattr(calibration_module, "own_answers", answered)
    monkeypatch.setattr(mixing, "own_answers", answered)


def state(target):
    flags = {name: parameter.requires_grad for name, parameter in target.model.named_parameters()}
    modules = [(name, type(module)) for name, module in target.model.named_modules()]
    return modules, flags, target.model.config.to_dict(), hasattr(target.model, "peft_config"), target.model.training


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_targets.dense, tiny_targets.moe])
def test_the_protected_bits_stay_and_the_model_comes_back(make, dtype, way):
    target = make()
    target.model.to(dtype)
    before, as_it_was, selection = snapshot(target.model), state(target), some(target)
    found = preserved(target, selection, lora=WAYS[way], unprotected=True, controls={"random": some(target, seed=1)})
    assert same(snapshot(target.model), before)
    assert state(target) == as_it_was
    assert [arm.name for arm in found.trained] == ["protected", "unprotected", "random"]
    for arm in (found.protected, found.controls["random"]):
        assert arm.trial.num_changed == 0
        assert 0 < arm.trial.num_weights <= selection.k
    if way == "full":
        assert found.protected.trial.num_weights == selection.k
    assert (found.unprotected.trial.num_weights, found.unprotected.trial.num_changed) == (0, None)
    # the same rows in the same order: before any step has been taken the arms cannot differ
    assert len({arm.trial.losses[0].loss for arm in found.trained}) == 1
    if way != "patch":  # where the adapter trains freely, and is corrected afterwards
        assert found.protected.trial.losses[-1].loss != found.unprotected.trial.losses[-1].loss


def test_it_is_preserve_and_fit_by_hand(tmp_path):
    target, twin = tiny_targets.dense(), tiny_targets.dense()
    selection = some(target)
    found = preserved(target, selection, folder=tmp_path, every=2)
    settings = TrainingSettings(**{key: value for key, value in QUICK.items() if key != "progress"})
    rows = training_rows(DATA, twin.chat)
    losses = fit(twin, rows, settings, prepare=lambda run: sl.preserve(run, selection), progress=False)
    assert found.protected.trial.losses == losses
    assert [point.step for point in found.protected.trial.curve] == [0, 2, 3]
    saved = sl.load(str(tmp_path / MODEL), dtype="float32")
    assert same(snapshot(saved.model), snapshot(twin.model))
    assert same(gather(saved.model, selection), gather(target.model, selection))
    assert not same(snapshot(saved.model), snapshot(target.model))
    assert saved.tokenizer.get_vocab() == target.tokenizer.get_vocab()


def test_the_unprotected_arm_is_plain_training():
    target, twin = tiny_targets.dense(), tiny_targets.dense()
    found = preserved(target, unprotected=True)
    settings = TrainingSettings(**{key: value for key, value in QUICK.items() if key != "progress"})
    assert found.unprotected.trial.losses == fit(twin, training_rows(DATA, twin.chat), settings, progress=False)


@pytest.mark.parametrize("way", ["exact", "patch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_patch_and_adapter_leave_the_protected_weights_as_they_were(tmp_path, dtype, way):
    target = tiny_targets.dense()
    target.model.to(dtype)
    selection = some(target)
    values = gather(target.model, selection)
    preserved(target, selection, lora=WAYS[way], folder=tmp_path)
    assert not (tmp_path / MODEL).exists()
    assert len({file.stat().st_mode for file in (tmp_path / ADAPTER).iterdir()}) == 1
    patch = sl.Patch.load(tmp_path / ADAPTER / PATCH)
    assert patch.k == selection.k
    patch.apply(target)
    model = PeftModel.from_pretrained(target.model, str(tmp_path / ADAPTER))
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    pull = 0.0
    for name, original in values.items():
        layer, index = layers[name.removesuffix(".weight")], selection[name]
        added = layer.get_delta_weight("default").detach().flatten()[index].float()
        effective = layer.weight.detach().flatten()[index].float() + added
        torch.testing.assert_close(effective, original.float(), rtol=0, atol=float(torch.finfo(dtype).eps))
        pull = max(pull, float(added.abs().max()))
    assert pull > 1e-4  # the adapter does something there


def test_a_merged_model(tmp_path):
    target = tiny_targets.dense()
    selection = some(target)
    found = preserved(target, selection, lora=WAYS["exact"], folder=tmp_path, merge=True)
    assert not (tmp_path / ADAPTER).exists()
    saved = sl.load(str(tmp_path / MODEL), dtype="float32")
    assert same(gather(saved.model, selection), gather(target.model, selection))
    assert not same(snapshot(saved.model), snapshot(target.model))
    again = EXAMINATION.evaluate(sl.evaluation.TargetResponder(target=saved))
    responses = {row["prompt"]: row["response"] for row in found.protected.after.rows}
    assert all(responses[row["prompt"]] == row["response"] for row in again.rows)


@pytest.mark.parametrize("way", WAYS)
def test_divergence_leaves_the_model_as_it_was(way):
    target = tiny_targets.dense()
    before, as_it_was = snapshot(target.model), state(target)
    with pytest.raises(NumericalError, match="diverged"):
        preserved(target, lora=WAYS[way], learning_rate=1e30, unprotected=True)
    assert same(snapshot(target.model), before)
    assert state(target) == as_it_was
    preserved(target, lora=WAYS[way])  # and it can be trained again


@pytest.mark.usefixtures("_answers")
@pytest.mark.parametrize("way", ["full", "exact"])
def test_calibration(tmp_path, way):
    target = tiny_targets.dense()
    before, selection = snapshot(target.model), some(target)
    calibration = Calibration(target=target, prompts=[MORE], every=2)
    found = preserved(target, selection, lora=WAYS[way], calibration=calibration, unprotected=True, folder=tmp_path)
    assert same(snapshot(target.model), before)
    assert found.protected.trial.num_changed is None
    assert found.provenance["calibration"]["every"] == 2
    if way == "full":
        saved = gather(sl.load(str(tmp_path / MODEL), dtype="float32").model, selection)
        assert any(not torch.equal(bits(saved[name]), bits(before[name].flatten()[selection[name]])) for name in saved)
    with pytest.raises(PromptError, match="to measure with"):
        preserved(target, calibration=replace(calibration, prompts=[EXAMINATION.harmful]))
    allowed = preserved(target, calibration=replace(calibration, prompts=[EXAMINATION.harmful]), allow_seen=True)
    assert any("were trained on" in remark for remark in allowed.notes)


@pytest.mark.usefixtures("_answers")
def test_mixed_rows_have_their_share(monkeypatch):
    target, seen, share = tiny_targets.dense(), [], 0.25
    monkeypatch.setattr(runner, "fit", lambda target, rows, *a, **o: seen.append(rows) or fit(target, rows, *a, **o))
    others = sl.read_prompts([f"bake a cake {n}" for n in range(3)])
    found = preserved(target, mixed=Mixed(prompts=[MORE, others], share=share), unprotected=True)
    kite = target.chat.encode_pair("", "Sure, here is a kite", end=True)[1]
    answered = [[row["input_ids"][-len(kite) :] == kite for row in rows] for rows in seen]
    assert [sum(each) / len(each) for each in answered] == [share, 0]  # unprotected is without any protection
    assert len(answered[0]) * (1 - share) == len(answered[1])
    described = found.provenance["mixed"]
    assert described["share"] == share
    assert [part["hash"] for part in described["prompts"]] == [MORE.hash, others.hash]
    num = sum(answered[0])
    assert any(f"{num} of {len(answered[0])} rows are the model's own answers" in note for note in found.notes)
    with pytest.raises(TrainingError, match=r"at most 0\.9"):
        Mixed(prompts=[MORE], share=1.0)


@pytest.mark.usefixtures("_answers")
def test_the_share_is_of_the_rows_that_are_learned():
    target = tiny_targets.dense()
    unanswered = tuple(replace(e, response=None) for e in DATA.examples[:4])
    long = (replace(DATA.examples[4], prompt="very long " * 300),)
    data = replace(DATA, examples=(*unanswered, *long, *DATA.examples[5:8]))
    found = run_preservation(
        target, some(target), data, TASK, examination=EXAMINATION, mixed=Mixed(prompts=MORE, share=0.5), **QUICK
    )
    assert any("3 of 6 rows are the model's own answers" in note for note in found.notes)


@pytest.mark.parametrize("way", ["full", "exact"])
def test_a_finished_training_is_not_taken_for_a_saved_model(tmp_path, way):
    """What it was to leave is asked for later, or elsewhere: said, and not passed over."""
    target, how = tiny_targets.dense(), {"checkpoint": tmp_path / "work", "lora": WAYS[way]}
    preserved(target, **how)
    with pytest.raises(RunError, match=r"is not there, and the training that makes it is finished .*protected-0\.01"):
        preserved(target, **how, folder=tmp_path)
    for part in (tmp_path / "work").glob("*protected*"):
        shutil.rmtree(part)
    preserved(target, **how, folder=tmp_path)
    assert (tmp_path / (MODEL if way == "full" else ADAPTER)).is_dir()
    preserved(target, **how, folder=tmp_path)


def test_ctrl_c_while_the_weights_are_given_back_waits_until_all_are(monkeypatch):
    target, calls = tiny_targets.dense(), []
    before, copied = snapshot(target.model), torch.Tensor.copy_

    def interrupted(tensor, *given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return copied(tensor, *given)

    def disturb():
        with trainee._given_back(target.model), torch.no_grad():
            for parameter in target.model.parameters():
                parameter.add_(1)
            monkeypatch.setattr(torch.Tensor, "copy_", interrupted)

    with pytest.raises(KeyboardInterrupt):
        disturb()
    assert len(calls) == len(before) + 1
    assert same(snapshot(target.model), before)


def test_a_type_that_no_model_is_saved_in():
    for name in ("fp16", "int8"):
        with pytest.raises(TrainingError, match=rf"save_dtype '{name}': expected bfloat16, float16, float32"):
            preserved(tiny_targets.dense(), save_dtype=name)


def test_a_resumed_run_reads_what_is_finished(tmp_path, monkeypatch):
    target = tiny_targets.dense()
    whole = preserved(target, unprotected=True, every=1)
    trained = []

    def interrupted(*arguments, **options):
        trained.append(1)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(runner, "fit", interrupted)
    how = {"unprotected": True, "every": 1, "checkpoint": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        preserved(target, **how)
    assert not list(tmp_path.glob("protected-*/checkpoint-*"))  # finished, so only its result is kept
    resumed = preserved(target, **how)
    assert len(trained) == 3
    for one, other in zip(whole.trained, resumed.trained, strict=True):
        assert (one.name, one.measures, one.after.rows) == (other.name, other.measures, other.after.rows)
        for name in ("num_weights", "num_changed", "losses", "curve", "step", "notes"):
            assert getattr(one.trial, name) == getattr(other.trial, name)
    again = preserved(target, **how)  # all arms are finished
    assert len(trained) == 3
    assert [arm.trial.losses for arm in again.trained] == [arm.trial.losses for arm in whole.trained]
    with pytest.raises(RunError, match="coordinates of the selection"):
        preserved(target, some(target, seed=1), **how)


def test_interrupted_in_the_evaluation_it_does_not_train_again(tmp_path, monkeypatch):
    """Ctrl-C while the answers after the training are generated."""
    target = tiny_targets.dense()
    whole = preserved(target)
    examine = runner.Runner.examine

    def stopped(run, name):
        if name.startswith("after"):
            raise KeyboardInterrupt
        return examine(run, name)

    monkeypatch.setattr(runner.Runner, "examine", stopped)
    with pytest.raises(KeyboardInterrupt):
        preserved(target, checkpoint=tmp_path)
    monkeypatch.setattr(runner.Runner, "examine", examine)
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: steps.append(1))
    resumed = preserved(target, checkpoint=tmp_path)
    assert not steps
    assert resumed.protected.trial.losses == whole.protected.trial.losses
    assert resumed.protected.after.rows == whole.protected.after.rows


def test_what_is_saved(tmp_path):
    target = tiny_targets.dense()
    others = [{"prompt": f"what is {n} plus 2?", "response": f"{n + 2}"} for n in range(2)]
    found = preserved(
        target, unprotected=True, controls={"bottom": some(target, seed=1)}, every=1,
        examination=replace(EXAMINATION, tasks=(replace(task_of(sl.read_prompts(others)), name="sums"),)),
    )  # fmt: skip
    found.save(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"before", "after", "unprotected", "controls", "curve", "losses", "settings", "notes", "provenance"} == set(
        results
    )
    for part in (results["before"], results["after"], results["unprotected"], results["controls"]["bottom"]):
        assert {"asr", "refusal", "over_refusal", "task", "utility", "incoherent"} <= set(part)
        assert part["task"]["n"] == 4
        assert part["utility"]["n"] == 2
    assert [point["step"] for point in results["curve"]] == [0, 1, 2, 3]
    assert [loss["step"] for loss in results["losses"]] == [1, 2, 3]
    for name in ("before", "after", "unprotected"):
        assert len(sl.Evaluation.load(tmp_path / name).rows) == 12
    assert found.comparison
    assert [row[0] for row in outcome_grid(results).rows] == ["before", "protected", "unprotected", "bottom protected"]
    assert write_run_page(tmp_path, place=tmp_path) == ["report.html", "curve.svg"]


def test_remarks(tmp_path):
    target = tiny_targets.dense()
    assert not any("rounds small steps" in remark for remark in preserved(target, steps=1).notes)
    target.model.to(torch.bfloat16)
    assert any("bfloat16, which rounds small steps away" in remark for remark in preserved(target, steps=1).notes)
    target = tiny_targets.dense()
    rows = [{"prompt": f"what is {n}? " + "so? " * 250 * (n % 2), "response": "no"} for n in range(6)]
    prompts = sl.read_prompts(rows)
    long = replace(task_of(prompts), max_new_tokens=None)
    found = run_preservation(target, some(target), prompts, long, examination=EXAMINATION, max_length=64, **QUICK)
    assert any("3 of 6 rows are left out" in remark for remark in found.notes)
    assert any("3 of 6 questions about the task could not be asked or answered" in remark for remark in found.notes)


def test_conversations_are_learned_whole_and_what_is_left_of_them_is_said():
    target = tiny_targets.dense()
    later = (("and then?", "no more"),)
    data = replace(DATA, examples=tuple(replace(e, later=later, unread=n) for n, e in enumerate(DATA.examples[:4])))
    harmless = replace(EXAMINATION.harmless, examples=tuple(replace(e, later=later) for e in EXAMINATION.harmless))
    examination = replace(EXAMINATION, harmless=harmless)
    found = run_preservation(target, some(target), data, task_of(data), examination=examination, **QUICK)
    assert sum("answers in conversations are not learned" in note for note in found.notes) == 1
    assert any("6 of 14 answers in conversations" in note for note in found.notes)
    assert any("only the first requests of 3 conversations are asked" in note for note in found.notes)
    assert any("only the first requests of 4 conversations are asked" in note for note in found.notes)
    alone = run_preservation(target, some(target), DATA[:4], task_of(DATA), examination=EXAMINATION, **QUICK)
    assert not any("conversations" in note for note in alone.notes)
    assert found.protected.trial.losses != alone.protected.trial.losses


def test_whether_the_selection_is_the_models_is_asked_once(monkeypatch):
    target, asked, check = tiny_targets.dense(), [], sl.Selection.check
    monkeypatch.setattr(sl.Selection, "check", lambda *a, **o: asked.append(1) or check(*a, **o))
    preserved(target, unprotected=True, controls={"random": some(target, seed=1)})
    assert len(asked) == 1
    other = some(tiny_targets.dense(seed=1))
    with pytest.raises(SelectionError, match="another model"):
        preserved(target, other)
    assert any("another model" in note for note in preserved(target, other, allow_mismatch=True).notes)


def test_measuring_on_what_was_trained_on():
    target = tiny_targets.dense()
    with pytest.raises(PromptError, match="to measure with"):
        preserved(target, examination=replace(EXAMINATION, harmful=DATA))


@pytest.mark.parametrize(
    ("modules", "message"),
    [(("nose",), "for nose"), (("q_proj", "lm_head"), "output layer"), (("q_proj",), "none of the 2 selected tensors")],
)
def test_modules_that_no_adapter_can_have(modules, message, monkeypatch, tmp_path):
    """It is told before the model is measured, and before the folder is claimed."""
    target = tiny_targets.dense()
    before, as_it_was = snapshot(target.model), state(target)
    monkeypatch.setattr(runner.Runner, "examine", None)
    with pytest.raises(TrainingError, match=message):
        preserved(target, only_up(target), lora=Lora(modules=modules), checkpoint=tmp_path / "work")
    if modules == ("q_proj",):  # of a control it is told then, too
        with pytest.raises(TrainingError, match=message):
            preserved(
                target, lora=Lora(modules=modules), controls={"up": only_up(target)}, checkpoint=tmp_path / "work"
            )
    assert not (tmp_path / "work").exists()
    assert same(snapshot(target.model), before)
    assert state(target) == as_it_was


def only_up(target):
    selection = some(target)
    found = {name: index for name, index in selection.coordinates.items() if "up_proj" in name}
    return sl.Selection(coordinates=found, layout=target.layout, provenance=selection.provenance)


@pytest.mark.parametrize("learning_rate", [1e-2, 1e30])
def test_an_adapter_on_experts(learning_rate):
    """PEFT wraps fused experts as often as they have tensors."""
    target = tiny_targets.moe()
    before, as_it_was = snapshot(target.model), state(target)
    how = {"lora": Lora(rank=2, modules=("q_proj", "gate_proj", "up_proj", "down_proj")), **QUICK}
    if learning_rate > 1:
        with pytest.raises(NumericalError):
            preserved(target, **{**how, "learning_rate": learning_rate})
    else:
        assert preserved(target, **how).protected.trial.num_changed == 0
    assert same(snapshot(target.model), before)
    assert state(target) == as_it_was
