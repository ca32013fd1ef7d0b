"""`preserve`: attach a protection to whatever trains a model.

Input: a `Trainer` (transformers, TRL), one or several optimizers, or a model; and a selection. Output: a
`Protection`. Before anything is attached, the selection must have been made for this model, and the weights
must be ones that can be written one by one.

A trainer makes its optimizer late, and may wrap, move or shard the model first; a checkpoint that is resumed is
loaded before training begins. So the protection follows the weights when training begins, and restores them then.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from safelocus.errors import SelectionError, TrainingError, some
from safelocus.model.fingerprint import Fingerprint
from safelocus.model.target import Target
from safelocus.preservation.calibration import Calibration
from safelocus.preservation.lora import check_initialisation
from safelocus.preservation.protection import Protection, check_uncorrected
from safelocus.selection.selection import Selection
from safelocus.selection.sparse import selected_parameters
from safelocus.training.lora import LoraMode

Rate = Callable[[], float]  # of the step that was just taken
_QUANTISED = ("Params4bit", "Int8Params")  # of bitsandbytes


def preserve(
    what: Any,
    selection: Selection,
    *,
    model: nn.Module | None = None,
    allow_mismatch: bool = False,
    mode: LoraMode = "exact",
    exact_gradient: bool = False,
    calibration: Calibration | None = None,
) -> Protection:
    """Keep the selected weights as they are now while everything else is trained (SPA).

    Args:
        what: a `transformers.Trainer` or any of TRL's (before `train()`); an optimizer, or several that share the
            work, with `model`; or a model, whose weights are restored by `protection.restore()` or at the end of
            `with`.
        selection: which weights, made for this model.
        model: whose weights an optimizer trains.
        allow_mismatch: also a selection that was made for another model with the same tensors (a fine-tuned
            sibling), or that does not say for which.
        mode: with LoRA. "exact": the weights cancel the adapter after each step, so the effective weights never
            change. "patch": the adapter trains freely, and `protection.patch()` or `.merge()` correct it afterwards.
        exact_gradient: with LoRA in mode "exact": leave the protected weights out of the adapter's gradient too. It
            learns better where 10 % or more is protected, and a step takes about half as long again.
        calibration: between the training's steps, train the protected weights alone to keep the model's answers
            (see `Calibration`), at its own learning rate; without one at the training's, beneath an adapter at a tenth
            of that. They no longer keep their bits then.

    Returns:
        The protection. It holds as long as it is attached; `remove()` ends it. Where this raises, nothing is attached,
        and the weights are as they were.

    Raises:
        SelectionError: the selection was made for another model, or the weights are quantised.
        TrainingError: nothing that is selected is trained, the optimizer trains another model, the adapter is none that
            can be protected from, or the base already cancels it, for an earlier protection.

    Example:
        >>> trainer = SFTTrainer(model, args=config, train_dataset=rows)                     # doctest: +SKIP
        >>> protection = sl.preserve(trainer, sl.Selection.load("safety.safetensors"))     # doctest: +SKIP
        >>> trainer.train()                                                                # doctest: +SKIP
    """
    how: Any = {"mode": mode, "exact_gradient": exact_gradient, "calibration": calibration}
    optimizers = _optimizers(what)
    if optimizers and model is None:
        raise TrainingError("an optimizer does not know its model: preserve(optimizer, selection, model=model)")
    if not optimizers and model is not None:
        raise TrainingError("model= belongs to an optimizer; a trainer or a model brings its own")
    if not optimizers and not isinstance(what, nn.Module | Target | Trainer):
        raise TrainingError(
            f"preserve takes a transformers.Trainer (TRL's are), a torch optimizer or a model; found {type(what)}"
        )
    module: Any = what if isinstance(what, nn.Module) else what.model if model is None else model
    _check_kind(module)
    check_initialisation(module)
    check_uncorrected(module)
    remarks = _check_made_for(module, selection, allow_mismatch)
    if isinstance(what, Trainer):
        protection = attach(what, selection, **how)
    else:
        protection = _protection(module, selection, partial(_follow, optimizers), **how)
    protection.notes[:0] = remarks
    return protection


def attach(trainer: Trainer, selection: Selection, **how: Any) -> Protection:
    """`preserve` for a trainer and a selection that is known to be its model's; the options are the same."""
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
        raise TrainingError(
            "FSDP version 1 flattens tensors, so selected weights cannot be found in them. Use FSDP2 (fsdp_version: 2)"
        )

    def follow(protection: Protection) -> Rate | None:
        callback = ProtectionCallback(protection, trainer)
        trainer.add_callback(callback)
        protection.add_handle(callback)
        # the optimizer may be made when training begins
        name = trainer.args.optim if trainer.optimizer is None else type(trainer.optimizer).__name__
        return (lambda: callback.rate) if _is_adam(str(name)) else None

    model: Any = trainer.model
    return _protection(model, selection, follow, **how)


def _protection(
    model: nn.Module,
    selection: Selection,
    follow: Callable[[Protection], Rate | None],
    *,
    calibration: Calibration | None = None,
    **lora: Any,
) -> Protection:
    """Protect the weights, and let `follow` attach that to what trains them, whose rate it knows; all, or nothing."""
    protection = Protection(model, selection, **lora)
    try:
        if num_rest := selection.k - protection.num_protected_in_all:
            protection.notes.append(
                f"{num_rest:,} of the {selection.k:,} selected weights lie in tensors that are not trained; they need "
                "no protection"
            )
        if protection.is_adapted and (num_changed := protection.check()):
            protection.notes.append(
                f"the adapter changed {num_changed:,} of the selected weights before; they have the base's values again"
            )
        protection.restore()
        rate = follow(protection)
        if calibration is not None:
            protection.calibrate(calibration, training_rate=rate)
    except BaseException:
        protection.remove(restore_base=True)
        raise
    return protection


def _rate(optimizers: Iterable[Any]) -> float:
    """The highest learning rate that they have now."""
    return max(float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups)


def _is_adam(name: str) -> bool:
    return "adam" in name.lower()


def _follow(optimizers: Sequence[torch.optim.Optimizer], protection: Protection) -> Rate | None:
    """Restore and calibrate after the steps of optimizers, if any; the rate of those of Adam's kind, if any."""
    if not optimizers:
        return None
    _check_trained_by(optimizers, protection)
    hook = _AfterStep(protection, len(optimizers))
    for optimizer in optimizers:
        protection.add_handle(optimizer.register_step_post_hook(hook))
        for after in _after_switches(optimizer, protection):
            protection.add_handle(after)
    alike = [optimizer for optimizer in optimizers if _is_adam(type(optimizer).__name__)]
    return partial(_rate, alike) if alike else None


class ProtectionCallback(TrainerCallback):
    """Restores after each step, when training begins (a checkpoint was loaded) and ends (the best one was)."""

    def __init__(self, protection: Protection, trainer: Trainer) -> None:
        self._protection = protection
        self._trainer = trainer
        self._resumed_from = Path()
        self.rate = 0.0  # of the latest step, where it is calibrated
        self._resuming = _After(trainer, "_load_optimizer_and_scheduler", self._note)  # called whatever loads weights
        self._switches: list[_After] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        self._protection.bind(model)
        for after in self._switches:
            after.remove()
        self._switches = _after_switches(getattr(optimizer, "optimizer", optimizer), self._protection)
        if state.global_step:
            self._take_up(self._resumed_from)
        self._protection.restore()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any) -> None:
        if self._protection.calibrator is not None:
            self.rate = _rate([optimizer])
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
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._take_up(Path(state.best_model_checkpoint))
        self._protection.restore()

    def remove(self) -> None:
        self._trainer.remove_callback(self)
        for after in (self._resuming, *self._switches):
            after.remove()

    def _note(self, checkpoint: Any) -> None:
        self._resumed_from = Path(checkpoint)

    def _take_up(self, checkpoint: Path) -> None:
        """The calibrated values of a checkpoint, whose other weights the trainer has loaded."""
        if (calibrator := self._protection.calibrator) is not None:
            self._protection.keep(calibrator.load(checkpoint))


class _After:
    """Calls `then` after each call of a method of one object, with the same arguments, until `remove`."""

    def __init__(self, owner: Any, name: str, then: Callable[..., object]) -> None:
        self._owner, self._name, self._method = owner, name, getattr(owner, name)

        @wraps(self._method)
        def called(*arguments: Any, **options: Any) -> Any:
            found = self._method(*arguments, **options)
            then(*arguments, **options)
            return found

        setattr(owner, name, called)

    def remove(self) -> None:
        setattr(self._owner, self._name, self._method)


def _after_switches(optimizer: Any, protection: Protection) -> list[_After]:
    """Restore when an optimizer goes between training and evaluation: schedule-free ones move all weights then."""
    names = [name for name in ("train", "eval") if callable(getattr(optimizer, name, None))]
    return [_After(optimizer, name, lambda *_, **__: protection.restore()) for name in names]


class _AfterStep:
    """Restores after the step of any optimizer, and calibrates after those of the training, whatever their number.

    A step of the training is over when every optimizer has taken its own, or when one takes its next.
    """

    def __init__(self, protection: Protection, num_optimizers: int) -> None:
        self._protection, self._num_optimizers = protection, num_optimizers
        self._stepped: set[int] = set()

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._protection.restore()
        is_next = id(optimizer) in self._stepped
        self._stepped = {id(optimizer)} if is_next else {*self._stepped, id(optimizer)}
        is_whole = len(self._stepped) == self._num_optimizers
        if is_whole:
            self._stepped = set()
        if is_next or is_whole:
            self._protection.calibrate_if_due()


def _optimizers(what: Any) -> list[torch.optim.Optimizer]:
    """The optimizers given, out of accelerate's wrapper; none where it is something else."""
    given = list(what) if isinstance(what, Sequence) else [what]
    if not given or not all(isinstance(each, torch.optim.Optimizer) for each in given):
        return []
    return [getattr(each, "optimizer", each) for each in given]


def _check_trained_by(optimizers: Sequence[torch.optim.Optimizer], protection: Protection) -> None:
    groups = chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
    given = {id(parameter) for group in groups for parameter in group["params"]}
    if strangers := given - {id(parameter) for parameter in protection.model.parameters()}:
        raise TrainingError(
            f"{len(strangers)} of the {len(given)} tensors that the optimizer trains are not parameters of the given "
            f"{type(protection.model).__name__}: weights restored there would not be the trained ones. Give the model "
            "whose parameters the optimizer got; one with weights of its own (fp32 masters) cannot be protected so"
        )
    trained = dict(protection.trained())
    left = [name for name, own in trained.items() if not any(id(parameter) in given for parameter in own)]
    if len(left) == len(trained):
        raise TrainingError(f"the optimizer trains none of the {len(left)} selected tensors ({some(left)})")
    if left:
        protection.notes.append(
            f"the optimizer does not train {len(left)} of the {len(trained)} protected tensors ({some(left)}). If "
            "another one does, give both: preserve([first, second], ...)"
        )


def _check_kind(model: nn.Module) -> None:
    """SelectionError for weights that cannot be written one by one, which says what can be done."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") and not parameter.numel():
            raise SelectionError(
                f"{name} is partitioned by DeepSpeed ZeRO-3, which keeps no plain tensor of it. Use ZeRO-2 or FSDP2"
            )
        if type(parameter).__name__ in _QUANTISED or not parameter.is_floating_point():
            raise SelectionError(
                f"{name} is quantised ({type(parameter).__name__}, {parameter.dtype}): single weights have no place "
                "of their own in it. Load the base in bf16 and train LoRA on that; or train the adapter on the "
                "quantised base, load it afterwards on the base in bf16, and correct it there: "
                'preserve(model, selection, mode="patch").patch()'
            )


def _check_made_for(model: nn.Module, selection: Selection, allow_mismatch: bool) -> list[str]:
    """Compare the selected tensors with those of the model that was scored; what could not be compared, in words.

    Only these count, and no configuration: trainers change that (special tokens, caches).
    """
    own = Fingerprint.of_tensors(
        model.config, selected_parameters(model, selection).items(), like=selection.provenance.fingerprint
    )
    return selection.check(own, allow_mismatch=allow_mismatch, only_tensors=True)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
