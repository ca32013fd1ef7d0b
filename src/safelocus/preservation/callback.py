"""A protection inside a `transformers.Trainer`: its weights are restored after each optimizer step.

A trainer makes its optimizer late, and may wrap, move or shard the model first; a checkpoint that is resumed is
loaded before training begins. So the protection follows the weights when training begins, and restores them then.
"""

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from safelocus.errors import TrainingError
from safelocus.preservation.protection import Protection


class ProtectionCallback(TrainerCallback):
    """Restores after each step, when training begins (a checkpoint was loaded) and ends (the best one was)."""

    def __init__(self, protection: Protection, trainer: Trainer) -> None:
        self._protection = protection
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        self._protection.bind(model)
        calibrator = self._protection.calibrator
        if calibrator is not None and state.global_step:
            self._protection.keep(calibrator.load(_checkpoint(args, state)))
        self._protection.restore()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._protection.restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._protection.calibrate_if_due()  # the gradients are gone by now: it takes their memory

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        calibrator = self._protection.calibrator
        if calibrator is not None and (calibrator.is_sharded or state.is_world_process_zero):
            folder = _checkpoint(args, state)
            folder.mkdir(parents=True, exist_ok=True)  # the main process may be about to make it
            calibrator.save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._protection.restore()

    def remove(self) -> None:
        self._trainer.remove_callback(self)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def attach(trainer: Trainer, protection: Protection) -> Protection:
    """Make the trainer restore the protected weights; the protection, for chaining."""
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
        raise TrainingError(
            "FSDP version 1 flattens tensors, so selected weights cannot be found in them. Use FSDP2 (fsdp_version: 2)"
        )
    callback = ProtectionCallback(protection, trainer)
    trainer.add_callback(callback)
    protection.add_handle(callback)
    return protection
