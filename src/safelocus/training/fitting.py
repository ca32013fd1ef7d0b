"""Fit a model to rows with TRL's `SFTTrainer`, and give it back as it was but for its weights.

The trainer brings batching, accumulation, schedules, mixed precision, checkpoints, and a language-model head
that never builds all logits at once. What it leaves on the model besides the trained weights (a replaced
`forward`, changed configuration) is taken back. In several processes all call it alike, and share the rows of
each batch (`sharing`).

An unfinished run is kept in the trainer's `checkpoint-N` folders (`Checkpoints`); one is complete when it is sealed
(see `run.files`), which is done last.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig

from safelocus import distributed
from safelocus.errors import NumericalError, RunError
from safelocus.model.target import Target
from safelocus.progress import progress_bar
from safelocus.run.checking import require_checked
from safelocus.run.files import DIGESTS, seal
from safelocus.run.resume import StopAtBoundary, claim, newest
from safelocus.training.curve import LossPoint
from safelocus.training.responses import padded_rows
from safelocus.training.settings import TrainingSettings
from safelocus.training.sharing import SharingTrainer, on_own_device, seen_alone, trained_weights


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Checkpoints of one training run.

    Attributes:
        folder: where they are; the caller removes it when the run's result is saved. Of several processes each has its
            own.
        inputs: what makes it this run and no other, as far as the folder it lies in does not say so; see `Identity.of`.
        every_seconds: how often to save, at most.
    """

    folder: Path
    inputs: Mapping[str, Any] = field(default_factory=dict)
    every_seconds: float = 300.0

    def check(self) -> None:
        """Raise RunError where another run's work lies; make the folder, and say whose it is."""
        claim(self.folder, self.inputs)

    def shared(self) -> Path:
        """The first process's folder: what is the same in all processes is kept once."""
        return distributed.gather_objects(self.folder)[0]

    def latest(self, *, of_parts: bool = False) -> Path | None:
        """The newest complete checkpoint; None where the run has to begin.

        Args:
            of_parts: every process has its own part of each, in its own folder; else the first one has all.

        Raises:
            RunError: another run's work lies here; the newest was changed since it was written; the first process's
                files cannot be seen by all.
        """
        self.check()
        folder = self.folder if of_parts else self.shared()
        steps = steps_of(folder)
        if not of_parts and not distributed.in_all(steps == distributed.gather_objects(steps)[0]):
            raise RunError(
                f"{folder}: holds an interrupted training, which not every process can see. Put the output where all "
                "machines see it, or --overwrite to begin anew"
            )
        step = newest(steps)
        if step is None:
            return None
        require_checked(folder / f"checkpoint-{step}", "this checkpoint")
        return folder / f"checkpoint-{step}"


def steps_of(folder: Path) -> set[int]:
    """Of the complete checkpoints in a folder."""
    return {int(file.parent.name.rpartition("-")[2]) for file in folder.glob(f"checkpoint-*/{DIGESTS}")}


if TYPE_CHECKING:
    from datasets import Dataset


def fit(
    target: Target,
    rows: "Dataset",
    settings: TrainingSettings,
    *,
    model: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    prepare: Callable[[SharingTrainer], object] | None = None,
    trainer: type[SharingTrainer] | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
) -> list[LossPoint]:
    """Train in place for `settings.steps` steps.

    Args:
        target: whose model is trained, with its tokenizer.
        rows: from `training_rows`.
        model: what to train instead of the target's model: the same, wrapped by PEFT.
        optimizer: over whatever is to be trained; default: AdamW over all parameters that require gradients.
        callbacks: for the trainer. One that sets `control.should_training_stop` ends the training early.
        prepare: called with the trainer before training, to protect weights for example.
        trainer: a subclass with another loss.
        checkpoints: where unfinished work is kept, and resumed from; saved now and then, at the last step (what
            follows the training may be interrupted too), and at Ctrl-C. What all processes have alike the first
            one keeps; of a sharded model each keeps its rows.
        progress: show a bar.

    Returns:
        The loss of every step, those before an interruption included.

    Raises:
        NumericalError: training diverged.
        RunError: the checkpoint belongs to another run.
    """
    model = target.model if model is None else model
    progress = progress and distributed.is_main()
    with seen_alone(), tempfile.TemporaryDirectory(prefix="safelocus-") as scratch, _leaving_no_trace(target.model):
        folder, latest = Path(scratch), None
        if checkpoints is not None:
            folder = checkpoints.folder if target.is_sharded else checkpoints.shared()
            latest = checkpoints.latest(of_parts=target.is_sharded)
        watch = _Watch(
            settings.steps, progress, None if checkpoints is None else checkpoints.every_seconds,
            writes=target.is_sharded or distributed.is_main(), num_kept=2 if target.is_sharded else 1,
        )  # fmt: skip
        arguments = _arguments(settings, target, folder)
        collate = partial(padded_rows, padding=target.tokenizer.pad_token_id, device=torch.device("cpu"))
        on_own_device(arguments, target.device)
        run = (trainer or SharingTrainer)(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=target.tokenizer,
            data_collator=collate if target.chat.reads_apart else None,
            optimizers=(optimizer, None),
        )
        if target.is_sharded:  # by whomever: it has its place, and reduces its gradients itself
            run.is_distributed_loading_by_transformers = True
        run.remove_callback(PrinterCallback)
        if prepare is not None:
            prepare(run)
        for callback in (*callbacks, watch):  # after what `prepare` attached: they look at a step when it is whole
            run.add_callback(callback)
        with closing(watch), suppress(_AllDone):
            run.train(resume_from_checkpoint=None if latest is None else str(latest))
    if watch.interrupted:
        raise KeyboardInterrupt
    _check_finite(run.model)
    return [
        LossPoint(step=int(entry["step"]), loss=entry["loss"], learning_rate=entry["learning_rate"])
        for entry in run.state.log_history
        if "loss" in entry
    ]


def _arguments(settings: TrainingSettings, target: Target, folder: Path) -> SFTConfig:
    configuration = _OfPlacedModel if target.is_sharded else SFTConfig
    is_constant = settings.schedule == "constant"  # that of transformers knows no warm-up
    return configuration(
        output_dir=str(folder),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if is_constant and settings.warmup_steps else settings.schedule,
        warmup_steps=settings.warmup_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or 0.0,
        activation_checkpointing=settings.activation_checkpointing,
        seed=settings.seed,
        use_cpu=target.device.type == "cpu",
        bf16=False,  # weights are trained in the dtype that they have
        max_length=None,  # rows are cut already
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=not target.chat.reads_apart,  # it knows no ids of a decoder
        dataloader_pin_memory=target.device.type != "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )


class _OfPlacedModel(SFTConfig):
    """For a model whose weights are where they should be: shards, which may wait in the host's memory."""

    @property
    def place_model_on_device(self) -> bool:
        return False


class _AllDone(Exception):
    """The checkpoint that is resumed from is that of the last step, or of a stop: the trainer would take one more."""


class _Watch(TrainerCallback):
    """Bar, divergence, and Ctrl-C: the first one waits for the end of the step and for its checkpoint.

    All processes save and stop at the same step; `writes` says whether this one has anything to write then. The newest
    `num_kept` checkpoints stay: of shards two, since a process may be ended before the others have saved.
    """

    def __init__(self, steps: int, progress: bool, every_seconds: float | None, *, writes: bool, num_kept: int) -> None:
        self.interrupted = False
        self._writes, self._num_kept = writes, num_kept
        self._saving = False
        self._open = ExitStack()
        self._steps, self._progress, self._saves = steps, progress, bool(every_seconds)
        self._stop = StopAtBoundary(
            self._ask_to_save, every_seconds=every_seconds or 0, enabled=self._saves, in_step=True
        )  # fmt: skip

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance = self._open.enter_context(
            progress_bar("training", self._steps, enabled=self._progress, start=state.global_step)
        )
        self._open.enter_context(self._stop)
        if state.global_step >= state.max_steps or control.should_training_stop:
            raise _AllDone

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(1)
        try:
            self._stop.passed(state.global_step)
        except KeyboardInterrupt:
            self.interrupted = control.should_training_stop = True
        due = self._saving or (self._saves and state.global_step == state.max_steps)
        control.should_save = due and self._writes
        self._saving = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir)
        seal(folder / f"checkpoint-{state.global_step}")
        for step in sorted(steps_of(folder))[: -self._num_kept]:
            shutil.rmtree(folder / f"checkpoint-{step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        for name, key in (("loss", "loss"), ("gradient's norm", "grad_norm")):
            if not math.isfinite(logs.get(key, 0.0)):
                raise NumericalError(
                    f"the {name} of step {state.global_step} is {logs[key]}: training diverged. "
                    f"Lower the learning rate (now {args.learning_rate:g}), or train in bf16 or fp32, not fp16"
                )

    def close(self) -> None:
        self._open.close()

    def _ask_to_save(self, _done: int) -> None:
        self._saving = True


def _check_finite(model: Any) -> None:
    """What the last step made of the weights no later loss would show. All processes find the same."""
    trained = trained_weights(model)
    own = [name for name, weight in trained.items() if not bool(distributed.local(weight.detach()).isfinite().all())]
    if bad := distributed.united(own):
        raise NumericalError(
            f"{len(bad)} of the trained tensors hold NaN or infinity, first of them {bad[0]}: training diverged. "
            "Lower the learning rate, or train in bf16 or fp32, not fp16"
        )


@contextmanager
def _leaving_no_trace(model: Any) -> Iterator[None]:
    """Take back what a trainer changes on a model besides its weights; leave it in evaluation mode."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config(), model.generation_config)}
    saved = {key: dict(vars(config)) for key, config in configs.items()}
    forward = vars(model).get("forward")
    try:
        yield
    finally:
        for key, config in configs.items():
            vars(config).clear()
            vars(config).update(saved[key])
        vars(model).pop("forward", None)
        if forward is not None:
            model.forward = forward
        model.activation_checkpointing_disable()
        model.zero_grad(set_to_none=True)
        model.eval()
