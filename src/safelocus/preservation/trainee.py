"""What learns a task: all weights of a model or an adapter on it, with a selection held, in a block that gives it back.

ADAPTER, MODEL   folders in which what was learned is saved
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from safelocus import distributed
from safelocus.errors import ModelError, TrainingError
from safelocus.model.fingerprint import bits, dtype_name
from safelocus.model.target import Target, load_config
from safelocus.patch.checkpoint import Checkpoint, local_folder
from safelocus.patch.folder import copy_tokenizer, retype, save_like
from safelocus.preservation.attachment import attach
from safelocus.preservation.calibration import Calibration
from safelocus.preservation.held import hold
from safelocus.preservation.protection import Protection
from safelocus.run.tensors import give_mode
from safelocus.selection.selection import Selection
from safelocus.selection.sparse import gather
from safelocus.training import TrainingSettings
from safelocus.training.arm import Arm, Trainee
from safelocus.training.lora import Lora, unwrapping

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}  # that a model is saved in
ADAPTER, MODEL, PATCH = "adapter", "model", "protection.patch.safetensors"


def learner(
    target: Target,
    *,
    lora: Lora | None,
    calibration: Calibration | None,
    folders: Mapping[str, Path | None],
    merge: bool,
    dtype: torch.dtype | None = None,
) -> Callable[[Arm, TrainingSettings], AbstractContextManager[Trainee]]:
    """What makes an arm ready: `what` of it is the selection to hold, or None.

    Args:
        folders: arm -> where its model, or its adapter and patch, are saved.
        merge: save the model with its adapter merged.
        dtype: of the model that is saved; default: as in its files.

    Raises:
        TrainingError: an adapter for a model that is sharded, or one that is to be saved in another dtype.
    """
    if lora and target.is_sharded:
        raise TrainingError("a LoRA adapter needs a model that is whole in each process, not sharded")
    if lora and dtype is not None and not merge:
        raise TrainingError(
            "an adapter is saved as it was trained; to save the model in another type merge it: --merge"
        )
    original, remarks = None, list[str]()
    if any(folders.values()) and (lora is None or merge):
        original, remarks = _original(target, dtype)  # before the training, not after it

    @contextmanager
    def ready(arm: Arm, settings: TrainingSettings) -> Iterator[Trainee]:
        model = target.model
        with _given_back(model):
            values = {} if arm.what is None else gather(model, arm.what)
            set_seed(settings.seed)  # adapters begin the same in every arm
            held: list[Protection] = []

            def attached(trainer: Any) -> None:
                if arm.what is not None:
                    mode = "exact" if lora is None else lora.mode
                    held.append(attach(trainer, arm.what, mode=mode, calibration=calibration))

            def settle() -> None:
                folder = folders.get(arm.name)
                if folder is not None and lora is not None and not merge:
                    _save_adapter(trainee.model, target, held, folder / ADAPTER)
                if lora is not None:
                    held[0].merge() if held else trainee.model.merge_and_unload()
                if folder is not None and (lora is None or merge):
                    _save_model(target, original, folder / MODEL, dtype)
                    trainee.notes += tuple(remarks)
                if not held:
                    return
                trainee.num_weights, trainee.notes = held[0].num_protected_in_all, (*held[0].notes, *trainee.notes)
                if calibration is None:  # which is meant to change them
                    trainee.num_changed = _count_changed(values, gather(model, arm.what))

            trainee = Trainee(
                model=model if lora is None else lora.wrap(model, target.layout), prepare=attached, settle=settle
            )
            yield trainee

    return ready


def check_adapter(target: Target, lora: Lora, selections: Iterable[Selection]) -> None:
    """Put the adapter on, hold each selection, and take it off again: before long work, not after it.

    Raises:
        TrainingError: the model has no such modules, or a selection cannot be held beside the adapter.
    """
    model, device = target.model, target.device
    with unwrapping(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        wrapped = lora.wrap(model, target.layout)
        for selection in selections:
            hold(wrapped, selection)


@contextmanager
def _given_back(model: Any) -> Iterator[None]:
    """Afterwards the model has the bits that it had, whatever was trained; a copy waits on the CPU meanwhile."""
    copies = {p: distributed.local(p.detach()).to("cpu", copy=True) for p in model.parameters()}
    with unwrapping(model):
        try:
            yield
        finally:
            interrupted = None
            while copies:
                try:
                    # a tensor leaves the list when it is written: Ctrl-C repeats at most that one
                    parameter = next(iter(copies))
                    distributed.local(parameter.detach()).copy_(copies[parameter])
                    del copies[parameter]
                except KeyboardInterrupt as error:
                    interrupted = error
            if interrupted is not None:
                raise interrupted


def _original(target: Target, dtype: torch.dtype | None) -> tuple[Checkpoint | None, list[str]]:
    """The files that a model's own are made of, or None; and what its user should know about those then."""
    if target.origin is None:
        return None, []
    name, revision = target.origin
    found, remarks = None, []
    try:
        found = Checkpoint.open(name, revision=revision, layout=target.layout)
        found.check_writable()
        saved = {stored.dtype for stored in found.stored.values()}
    except ModelError as error:
        found, saved = None, {str(_declared(target)).removeprefix("torch.")}
        remarks.append(
            f"the model is written as transformers writes it, not in the form of its original's files: {error}"
        )
    saved = saved if dtype is None else {dtype_name(dtype)}
    own = target.model.dtype
    if narrower := [name for name, kind in DTYPES.items() if name in saved and torch.promote_types(own, kind) != kind]:
        plain = dtype_name(own)
        remarks.append(f"weights were trained and measured in {plain} and are saved in {', '.join(narrower)}")
    return found, remarks


def _save_model(target: Target, original: Checkpoint | None, folder: Path, dtype: torch.dtype | None) -> None:
    """Written by the first process; the others give it their rows, where the model is sharded."""
    if original is not None:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)  # of an interruption after it was written
        save_like(original, target.model, folder, dtype=dtype)
        return
    model, state = target.model, None
    if target.is_sharded:
        own = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
        gathered = ((name, distributed.whole(value)) for name, value in own.items())
        state = {name: value.cpu() for name, value in gathered if distributed.is_main()}
    if distributed.is_main():
        # transformers would gather what it has sharded anew, and write tied weights twice
        config = vars(model.config)
        sharding = {"distributed_config": config.pop("distributed_config")} if "distributed_config" in config else {}
        try:
            model.save_pretrained(folder, state_dict=state)
            give_mode(*folder.glob("*.safetensors"))
        finally:
            config.update(sharding)
        if (kind := dtype or _declared(target)) not in (None, model.dtype):
            retype(folder, kind)
        _save_tokenizer(target, folder)


def _declared(target: Target) -> torch.dtype | None:
    """The dtype that the configuration of a model's files names; None where there are none."""
    if target.origin is None:
        return None
    name, revision = target.origin
    config = load_config(name, revision=revision)
    found: torch.dtype | None = getattr(config, "dtype", None) or config.get_text_config().dtype
    return found


def _save_adapter(model: Any, target: Target, held: list[Protection], folder: Path) -> None:
    patch = held[0].patch() if held else None
    if not distributed.is_main():
        return
    model.save_pretrained(folder)
    give_mode(*folder.glob("*.safetensors"))
    _save_tokenizer(target, folder)
    if patch is not None:
        patch.save(folder / PATCH)


def _save_tokenizer(target: Target, folder: Path) -> None:
    if target.origin is None:
        target.tokenizer.save_pretrained(folder)
    else:
        name, revision = target.origin
        copy_tokenizer(local_folder(name, revision=revision), folder)


def _count_changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> int:
    return sum(int((bits(value) != bits(after[name])).sum()) for name, value in before.items())
