"""Calibration: small steps on the protected weights, and on nothing else, towards what the original model said."""

from collections import defaultdict
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import kl_div
from transformers import Trainer, TrainingArguments

import safelocus as sl
from safelocus.errors import NumericalError, PromptError, TrainingError
from safelocus.evaluation.divergence import divergence
from safelocus.evaluation.responding import Reply
from safelocus.preservation import calibration as module
from safelocus.preservation.calibration import STATE, Calibration, references
from safelocus.selection.sparse import gather
from test_protection import OPTIONS, rows, same, snapshot, some, train, trainer_of
from tiny_targets import dense

PROMPTS = (
    sl.read_prompts([f"how do I build {n}?" for n in range(5)]),
    sl.read_prompts([f"bake a cake {n}" for n in range(4)]),
)


@pytest.fixture
def _answers(monkeypatch):
    """A model of random weights never comes to an end: it is said to have answered this."""

    def answered(target, prompts, **_):
        said = [replace(e, response=f"Sure, here is {n} and a kite") for n, e in enumerate(prompts)]
        return replace(prompts, examples=tuple(said))

    monkeypatch.setattr(module, "own_answers", answered)


def calibration(target, **options):
    return Calibration(
        target=target, prompts=options.pop("prompts", PROMPTS), **{"batch_size": 3, "learning_rate": 1e-3, **options}
    )


def whole_kl(original, target, sets):
    """KL(original || target), row by row and without padding, mean over response tokens."""
    found = []
    for reference in (reference for part in sets for reference in part):
        ids = torch.tensor([reference.row["input_ids"]])
        num = len(reference.log_probs)
        with torch.no_grad():
            theirs, own = (t.model(input_ids=ids).logits[0, -num - 1 : -1].log_softmax(-1) for t in (original, target))
        found.append(kl_div(own, theirs, reduction="none", log_target=True).sum(-1))
    return torch.cat(found).mean()


def moved(target):
    """Every weight elsewhere."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return target


class TestDivergence:
    def test_all_tokens_kept_is_the_whole_kl(self):
        torch.manual_seed(0)
        logits, reference = torch.randn(7, 50), (2 * torch.randn(7, 50)).log_softmax(-1)
        top = reference.topk(50, dim=-1)
        expected = kl_div(logits.log_softmax(-1), reference, reduction="batchmean", log_target=True)
        torch.testing.assert_close(divergence(logits, top.indices.int(), top.values), expected, rtol=1e-5, atol=1e-5)

    def test_the_rest_counts_as_one_token(self):
        torch.manual_seed(0)
        logits, reference = torch.randn(7, 50), (2 * torch.randn(7, 50)).log_softmax(-1)
        full = kl_div(logits.log_softmax(-1), reference, reduction="batchmean", log_target=True)
        top = reference.topk(5, dim=-1)
        own = logits.softmax(-1)
        p, q = (torch.cat([v, 1 - v.sum(-1, keepdim=True)], -1) for v in (top.values.exp(), own.gather(1, top.indices)))
        found = divergence(logits, top.indices.int(), top.values)
        torch.testing.assert_close(found, (p * (p / q).log()).sum(-1).mean())
        assert 0 < found < full  # merging outcomes can only hide a difference

    def test_none_from_itself(self):
        logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
        top = logits.log_softmax(-1).topk(5, dim=-1)
        logits.requires_grad_()
        found = divergence(logits, top.indices, top.values)
        assert found.abs() < 1e-6
        assert torch.autograd.grad(found, logits)[0].abs().max() < 1e-6

    @pytest.mark.usefixtures("_answers")
    def test_of_a_model_in_padded_batches(self):
        original, target = dense(), dense()
        sets = references(calibration(target, num_kept=10_000), progress=False)
        protection = sl.preserve(target, some(target), calibration=calibration(target, num_kept=10_000, batch_size=9))
        moved(target)
        before = whole_kl(original, target, sets)
        protection.calibrator.step({name: held.site for name, held in protection._held.items()})
        torch.testing.assert_close(protection.calibrator.last, before, rtol=1e-4, atol=1e-5)
        assert before > 0.01


@pytest.mark.usefixtures("_answers")
class TestSteps:
    def test_nothing_but_the_protected_weights_is_touched(self):
        target = dense()
        selection = some(target)
        protection = sl.preserve(target, selection, calibration=calibration(target, every=1))
        for parameter in moved(target).model.parameters():
            parameter.requires_grad_(False)
        protection.restore()
        before = snapshot(target.model)
        protection.calibrate_if_due()
        num_moved = 0
        for name, value in snapshot(target.model).items():
            changed = (value != before[name]).flatten()
            if name in selection.coordinates:
                num_moved += int(changed[selection[name]].sum())
                changed[selection[name]] = False
            assert not changed.any(), name
        assert num_moved > selection.k // 2
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in target.model.parameters())

    def test_the_task_never_trains_them(self):
        target = dense()
        selection = some(target)
        optimizer = torch.optim.AdamW(target.model.parameters(), lr=1e-2, weight_decay=0.1)
        protection = sl.preserve(optimizer, selection, model=target.model, calibration=calibration(target, every=3))
        seen = [gather(target.model, selection)]
        optimizer.register_step_post_hook(lambda *_: seen.append(gather(target.model, selection)))
        train(target.model, optimizer, steps=7)
        changes = [step for step in range(1, 8) if not same(seen[step], seen[step - 1])]
        assert changes == [3, 6]
        assert protection.check() == 0

    @pytest.mark.parametrize("resting", [(), (2, 3)], ids=["both step", "one rests now and then"])
    def test_several_optimizers_take_one_step_of_the_training(self, resting):
        target = dense()
        selection, parameters = some(target), list(target.model.parameters())
        first, second = (torch.optim.SGD(parameters[i::2], lr=1e-2) for i in range(2))
        protection = sl.preserve(
            [first, second], selection, model=target.model, calibration=calibration(target, every=2)
        )
        counted = []
        with mock.patch.object(protection, "calibrate_if_due", side_effect=lambda: counted.append(step)):
            for step in range(6):
                first.step()
                if step not in resting:
                    second.step()
        assert counted == ([0, 1, 2, 3, 4, 5] if not resting else [0, 1, 3, 4, 4, 5])
        assert protection.check() == 0

    def test_bf16_weights_are_calibrated_in_fp32(self):
        target = dense()
        target.model.to(torch.bfloat16)
        selection = some(target)
        options = {"every": 1, "learning_rate": 1e-6}
        protection = sl.preserve(target, selection, calibration=calibration(target, **options))
        before = gather(target.model, selection)
        for _ in range(3):
            protection.calibrate_if_due()
        masters = protection.calibrator.masters
        assert all(master.dtype == torch.float32 for master in masters.values())
        steps_too_small_for_bf16 = [masters[n].detach() - before[n].float() for n in masters]
        assert max(float(step.abs().max()) for step in steps_too_small_for_bf16) > 0
        kept = {name: master.detach().bfloat16() for name, master in masters.items()}
        assert same(gather(target.model, selection), kept)

    @pytest.mark.parametrize("adapted", [False, True])
    def test_the_references_are_the_original_models(self, adapted):
        expected = references(calibration(dense(attention_dropout=0.5)), progress=False)
        target = dense(attention_dropout=0.5)
        target.model.train()
        model = get_peft_model(target.model, LoraConfig(target_modules="all-linear")) if adapted else target.model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        protection = sl.preserve(optimizer, some(dense()), model=model, calibration=calibration(target, every=1))
        train(model, optimizer, steps=3)
        assert target.model.training
        for ours, theirs in zip(protection.calibrator.sets, expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one.row == other.row
                assert torch.equal(one.log_probs, other.log_probs)

    def test_with_lora_the_effective_weights_are_those_calibrated(self):
        target = dense()
        selection, before = some(target), gather(target.model, some(target))
        model = get_peft_model(target.model, LoraConfig(r=4, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        protection = sl.preserve(optimizer, selection, model=model, calibration=calibration(target, every=1))
        train(model, optimizer, steps=4)
        masters = {name: master.detach() for name, master in protection.calibrator.masters.items()}
        for name, now in protection.effective().items():
            torch.testing.assert_close(now, masters[name], rtol=0, atol=1e-6)
        patch = protection.patch()
        assert same(patch.old, before)  # the untouched base, to which the patch will be applied
        assert same(gather(protection.merge(), selection), masters)

    def test_every_set_has_its_part_in_every_step(self):
        target = dense()
        protection = sl.preserve(target, some(target), calibration=calibration(target, batch_size=2, every=1))
        calibrator = protection.calibrator
        assert [len(part) for part in calibrator.sets] == [5, 4]
        drawn = []
        for _ in range(2):
            calibrator.count_step()
            batch, tokens, log_probs, share = calibrator._batch()
            assert share == 1  # of the prompts: there is one process
            assert batch.inputs["input_ids"].shape[0] == 4
            assert len(tokens) == len(log_probs) == len(batch.tokens)
            drawn.append(batch.inputs["input_ids"].tolist())
        assert drawn[0] != drawn[1]

    def test_gradients_of_the_task_are_neither_used_nor_lost(self):
        target, plain = dense(), dense()
        for each in (target, plain):
            protection = sl.preserve(each, some(each), calibration=calibration(each, every=1))
            moved(each)
            for parameter in each.model.parameters():
                parameter.grad = torch.ones_like(parameter) if each is target else None
            protection.calibrate_if_due()
        assert all(parameter.grad.eq(1).all() for parameter in target.model.parameters())
        assert same(snapshot(target.model), snapshot(plain.model))

    @pytest.mark.parametrize("adapted", [False, True])
    def test_memory_is_that_of_one_gradient_and_of_checkpointed_layers(self, adapted, monkeypatch):
        """No more than a step of the task: dense gradients go as they come, and activations are computed again."""
        target = dense(attention_dropout=0.5)
        model = get_peft_model(target.model, LoraConfig(r=4, target_modules="all-linear")) if adapted else target.model
        protection = sl.preserve(model, some(dense()), calibration=calibration(target, every=1))
        calls, dense_ones, taken = [], [], []
        gradients, grad = module._gradients, torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda *a, **o: dense_ones.extend(grad(*a, **o)))
        monkeypatch.setattr(module, "_gradients", lambda *a: taken.append(gradients(*a)) or taken[-1])
        target.model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
        protection.calibrator.step({name: held.site for name, held in protection._held.items()})
        target.model.activation_checkpointing_enable({"use_reentrant": False})
        target.model.train()
        protection.calibrator.step({name: held.site for name, held in protection._held.items()})
        assert len(calls) == 1 + 2
        assert len(dense_ones) == 2 * len(protection._held)
        assert all(gradient.untyped_storage().nbytes() == 4 for gradient in dense_ones)
        assert taken[0].keys() == protection._held.keys()
        assert same(*taken)  # without dropout, too
        assert "forward" not in vars(target.model.model.layers[0])

    def test_a_diverged_model(self):
        target = dense()
        protection = sl.preserve(target, some(target), calibration=calibration(target, every=1))
        with torch.no_grad():
            target.model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(NumericalError, match="training diverged"):
            protection.calibrate_if_due()


@pytest.mark.usefixtures("_answers")
@pytest.mark.parametrize("adapted", [False, True])
def test_a_trainer_goes_on_from_a_checkpoint_to_the_bit(tmp_path, adapted):
    def ready():
        target = dense()
        selection, model = some(target), target.model
        if adapted:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        run = trainer_of(SimpleNamespace(model=model), tmp_path, save_strategy="steps", save_steps=3)
        return run, sl.preserve(run, selection, calibration=calibration(target, every=2))

    run, protection = ready()
    run.train()
    again, resumed = ready()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(snapshot(run.model), snapshot(again.model))
    assert same(protection.calibrator.masters, resumed.calibrator.masters)
    (tmp_path / "checkpoint-3" / STATE).unlink()
    with pytest.raises(TrainingError, match="calibration of this checkpoint cannot be resumed"):
        ready()[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.usefixtures("_answers")
def test_a_trainer_goes_on_from_a_checkpoint_that_lies_elsewhere(tmp_path):
    def ready(folder, learning_rate=1e-2):
        target = dense()
        run = trainer_of(target, tmp_path / folder, save_strategy="steps", save_steps=3)
        sl.preserve(run, some(target), calibration=calibration(target, every=1, learning_rate=learning_rate))
        return run

    run, again, other = ready("one"), ready("other"), ready("other", learning_rate=0.1)
    run.train()
    other.train()  # its checkpoint of the same step lies where the resumed run would write
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert same(snapshot(run.model), snapshot(again.model))


@pytest.mark.usefixtures("_answers")
def test_the_best_checkpoint_has_its_own_calibrated_values(tmp_path):
    target = dense()
    arguments = TrainingArguments(output_dir=str(tmp_path), load_best_model_at_end=True, **OPTIONS | {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
    })  # fmt: skip
    run = Trainer(target.model, arguments, train_dataset=rows(), eval_dataset=rows(2))
    protection = sl.preserve(run, some(target), calibration=calibration(target, every=1, learning_rate=1e-2))
    with mock.patch.object(run, "evaluate", side_effect=({"eval_loss": float(loss)} for loss in count())):
        run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert same({name: value for name, value in snapshot(target.model).items() if name in best}, best)
    assert protection.check() == 0


def rates_of(protection):
    """The rates of its steps, as they are taken."""
    found, step = [], protection.calibrator.step

    def noting(sites):
        values = step(sites)
        found.append(protection.calibrator._optimizer.param_groups[0]["lr"])
        return values

    protection.calibrator.step = noting
    return found


@pytest.mark.usefixtures("_answers")
@pytest.mark.parametrize(("own_rate", "adapted"), [(None, False), (None, True), (1e-3, False), (1e-3, True)])
def test_its_rate_is_its_own_or_the_trainers_as_that_is_and_beneath_an_adapter_a_tenth(own_rate, adapted, tmp_path):
    target = dense()
    selection, model = some(target), target.model
    if adapted:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    run = trainer_of(
        SimpleNamespace(model=model), tmp_path, max_steps=4, learning_rate=4e-3, warmup_steps=2,
        lr_scheduler_type="linear", gradient_accumulation_steps=2,
    )  # fmt: skip
    rates = rates_of(sl.preserve(run, selection, calibration=calibration(target, every=1, learning_rate=own_rate)))
    run.train()
    training = [0.0, 2e-3, 4e-3, 2e-3]
    assert rates == pytest.approx([own_rate or rate * (0.1 if adapted else 1) for rate in training])


@pytest.mark.usefixtures("_answers")
@pytest.mark.parametrize("own_rate", [None, 1e-3])
@pytest.mark.parametrize("schedule", ["one cycle", "a function", "by hand"])
def test_its_rate_is_its_own_or_that_of_the_optimizers_of_its_kind(schedule, own_rate):
    target = dense()
    first, *rest = target.model.parameters()
    adam, sgd = (
        torch.optim.AdamW([{"params": rest}, {"params": [], "lr": 1e-9}], lr=1.0),
        torch.optim.SGD([first], lr=7.0),
    )
    how = calibration(target, every=1, learning_rate=own_rate)
    rates = rates_of(sl.preserve([adam, sgd], some(target), model=target.model, calibration=how))
    step = {
        "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=[4e-3, 4e-9], total_steps=5).step,
        "a function": lambda: torch.optim.lr_scheduler.LambdaLR(adam, lambda n: 1e-3 / (1 + n)).step,
        "by hand": lambda: lambda: adam.param_groups[0].update(lr=adam.param_groups[0]["lr"] / 2),
    }[schedule]()
    training = []
    for _ in range(4):
        training.append(adam.param_groups[0]["lr"])
        adam.step()
        sgd.step()
        step()
    assert len(set(training)) == 4
    assert rates == pytest.approx([own_rate or rate for rate in training])


@pytest.mark.usefixtures("_answers")
def test_a_rate_has_to_be_known():
    target = dense()
    for what, model in ((target.model, {}), (torch.optim.SGD(target.model.parameters()), {"model": target.model})):
        with pytest.raises(TrainingError, match="give learning_rate"):
            sl.preserve(what, some(target), calibration=calibration(target, learning_rate=None), **model)


@pytest.mark.usefixtures("_answers")
def test_what_cannot_be_calibrated():
    target = dense()
    selection = some(target)
    with pytest.raises(TrainingError, match="needs prompts"):
        calibration(target, prompts=())
    with pytest.raises(PromptError, match="how do I"):
        calibration(target, prompts=["how do I?"])  # a text is where a set is read from
    assert calibration(target, prompts=PROMPTS[0]).prompts == PROMPTS[:1]
    for change in ({"every": 0}, {"num_kept": 0}, {"learning_rate": 0.0}, {"max_grad_norm": float("nan")}):
        with pytest.raises(TrainingError, match=next(iter(change))):
            calibration(target, **change)
    with pytest.raises(TrainingError, match="give the same object"):
        sl.preserve(target, selection, calibration=calibration(dense()))
    calibrated = sl.preserve(target, selection, calibration=calibration(target))
    with pytest.raises(TrainingError, match="selection cannot be changed"):
        calibrated.update(some(target, seed=1))
    model = get_peft_model(target.model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(TrainingError, match='mode="exact"'):
        sl.preserve(model, selection, mode="patch", calibration=calibration(target))
    protection = sl.preserve(model, selection)
    name, held = next(iter(protection._held.items()))
    part = replace(held.site, position=torch.arange(len(held.values)))
    protection._held[name] = replace(held, site=part)
    with pytest.raises(TrainingError, match=r"beside a LoRA adapter.*sharded"):
        protection.calibrate(calibration(target))


def test_answers_that_do_not_end_are_cut_and_teach_no_end():
    target = dense()  # which never ends
    found = [each for part in references(calibration(target, max_new_tokens=2), progress=False) for each in part]
    assert len(found) == sum(map(len, PROMPTS))
    said = [target.tokenizer.decode(row["input_ids"][-len(each.tokens) :]) for each in found if (row := each.row)]
    assert all(each.row["input_ids"][-1] != target.tokenizer.eos_token_id for each in found), said


def test_nothing_is_said(monkeypatch):
    target = dense()
    monkeypatch.setattr("safelocus.training.responses.collect", lambda *_, **__: defaultdict(lambda: Reply(text=None)))
    with pytest.raises(PromptError, match="none of the model's own answers to 5 prompts says anything"):
        sl.preserve(target, some(target), calibration=calibration(target))


@pytest.mark.slow
def test_an_organism_goes_on_answering():
    """Learning a task drives it from what it said; with calibration, of random weights even, much less so."""
    from safelocus.training import TrainingSettings
    from safelocus.training.fitting import fit
    from safelocus.training.responses import training_rows

    prompts = [sl.read_prompts(f"organism:{kind}").limit(12) for kind in ("harmful", "harmless")]
    original, drift = sl.load("organism:dense", dtype="float32"), {}
    for calibrated in (False, True):
        target = sl.load("organism:dense", dtype="float32")
        how = Calibration(target=target, prompts=prompts, every=2, max_new_tokens=40)
        sets = references(how, progress=False)
        rows = training_rows(sl.read_prompts("organism:task"), target.chat)
        selection = some(target, k=100_000)
        fit(
            target, rows, TrainingSettings(steps=30, learning_rate=1e-3, batch_size=8), progress=False,
            prepare=lambda run: sl.preserve(run, selection, calibration=how if calibrated else None),  # noqa: B023
        )  # fmt: skip
        drift[calibrated] = float(whole_kl(original, target, sets))
    assert drift[True] < 0.5 * drift[False]
