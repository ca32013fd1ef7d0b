"""Trainers of transformers and TRL with a SparseOptimizer: they run, and only the selected weights change."""

import copy
import signal

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from safelocus.enhancement.optimizer import SparseOptimizer
from safelocus.enhancement.trainee import SparseTrainer
from safelocus.errors import RunError
from safelocus.training import TrainingSettings
from safelocus.training.fitting import Checkpoints, fit
from test_sparse import everything, some, unchanged
from test_sparse_optimizer import assert_only_selected, assert_same
from tiny_targets import PROMPTS, dense, moe

pytestmark = pytest.mark.slow  # trains, again and again

ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9)}
QUIET = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
}


def token_rows(number=12, length=9):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 300, (number, length), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def plain(target, optimizer, folder):
    arguments = TrainingArguments(output_dir=str(folder), **QUIET)
    return Trainer(target.model, arguments, train_dataset=token_rows(), optimizers=(optimizer, None))


def supervised(target, optimizer, folder):
    rows = Dataset.from_list([{"prompt": prompt, "completion": " I'm sorry"} for prompt in PROMPTS])
    return SFTTrainer(
        target.model,
        SFTConfig(output_dir=str(folder), dataloader_pin_memory=False, **QUIET),
        train_dataset=rows,
        processing_class=target.tokenizer,
        optimizers=(optimizer, None),
    )


def preferring(target, optimizer, folder):
    rows = [{"prompt": prompt, "chosen": " I'm sorry", "rejected": " Sure"} for prompt in PROMPTS]
    return DPOTrainer(
        target.model,
        ref_model=copy.deepcopy(target.model),
        args=DPOConfig(output_dir=str(folder), dataloader_pin_memory=False, **QUIET),
        train_dataset=Dataset.from_list(rows),
        processing_class=target.tokenizer,
        optimizers=(optimizer, None),
    )


@pytest.mark.parametrize("make", [dense, moe])
@pytest.mark.parametrize("trainer", [plain, supervised, preferring])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_selected_weights_change(make, trainer, dtype, tmp_path):
    target = make()
    target.model.to(dtype)
    selection, before = some(target), everything(target.model)
    # a trainer's own `max_grad_norm` (1 unless set) finds no gradients on the model, and does nothing
    with SparseOptimizer(target.model, selection, max_grad_norm=0.5, **ADAMW) as optimizer:
        run = trainer(target, optimizer, tmp_path)
        run.train()
        assert optimizer.gradient_norm > 0
    assert_only_selected(target.model, before, selection)
    assert not unchanged(target.model, before)
    rates = [entry["learning_rate"] for entry in run.state.log_history if "loss" in entry]
    assert rates == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])


def test_a_trainer_does_what_a_loop_does(tmp_path):
    """Accumulation, schedule and clipping: the optimizer's own, the trainer's default limit does not interfere."""
    target, reference = dense(), dense()
    selection = some(target)
    with SparseOptimizer(target.model, selection, max_grad_norm=0.5, **ADAMW) as optimizer:
        run = plain(target, optimizer, tmp_path)
        assert run.args.max_grad_norm == 1.0
        order = [index for batch in run.get_train_dataloader().batch_sampler for index in batch]
        run.train()
    rows = torch.tensor(token_rows()["input_ids"])
    with SparseOptimizer(reference.model, selection, max_grad_norm=0.5, **ADAMW) as optimizer:
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 3)
        reference.model.train()
        for step in range(3):
            for half in range(2):
                ids = rows[order[4 * step + 2 * half :][:2]]
                (reference.model(input_ids=ids, labels=ids).loss / 2).backward()
            optimizer.step()
            falling.step()
    for mine, theirs in zip(target.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


class CtrlC(TrainerCallback):
    """The user interrupts in the third step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("trainer", [SFTTrainer, SparseTrainer], ids=["model saved", "optimizer alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_resumes_bit_for_bit(trainer, dtype, tmp_path):
    settings = TrainingSettings(
        steps=6, batch_size=2, accumulation=2, schedule="cosine", learning_rate=1e-2, warmup_steps=1
    )

    def run(callbacks=(), **changes):
        target = dense(attention_dropout=0.1)  # random numbers have to be resumed too
        target.model.to(dtype)
        with SparseOptimizer(target.model, some(target), max_grad_norm=0.5, **ADAMW) as optimizer:
            losses = fit(
                target, token_rows(), settings, optimizer=optimizer, callbacks=callbacks, trainer=trainer,
                progress=False, **changes,
            )  # fmt: skip
        return target, losses

    reference, expected = run()
    checkpoints = Checkpoints(folder=tmp_path, inputs={"the selection": "a"})
    with pytest.raises(KeyboardInterrupt):
        run([CtrlC()], checkpoints=checkpoints)
    latest = checkpoints.latest()
    assert latest == tmp_path / "checkpoint-3"
    assert any(latest.glob("model*.safetensors")) == (trainer is SFTTrainer)
    target, losses = run(checkpoints=checkpoints)
    assert losses == expected
    assert_same(target.model, reference.model)
    with pytest.raises(RunError, match="differs in the selection"):
        run(checkpoints=Checkpoints(folder=tmp_path, inputs={"the selection": "b"}))
