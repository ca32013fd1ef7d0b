"""Training in several processes: every one runs the whole trainer over the same batches, and they share the rows.

    loss of process p      N * sum over its rows of nll / tokens of the whole batch
    gradient               mean over the N processes = that of a single process, rounding aside

So order of the rows, batches, steps, learning rates and what is logged are those of a single process, whatever the
number of processes, also where the rows cannot be divided evenly. The trainer knows of no other process: what wraps
models for several (DDP) would move every gradient, where a few weights are trained.

A checkpoint holds what is trained: of a sharded model this process's rows. (The trainer would save a model as its
files are, and not find fused experts in them again.)
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch.nn.functional import cross_entropy
from trl import SFTTrainer

from safelocus import distributed
from safelocus.run.tensors import TensorFile
from safelocus.training.responses import IGNORED, ResponseBatch

FEW_VALUES = 1 << 26  # logits that may be in memory at once, in place of TRL's tiles: 256 MB in fp32
_LOGGER = logging.getLogger("transformers.training_args")
_TRAINED = "trained.safetensors"
_FILE = TensorFile(kind="trained", version=1, made_by="an interrupted training")
_STATES = (PartialState, AcceleratorState, GradientState)
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


class SharingTrainer(SFTTrainer):
    """SFTTrainer whose batches all processes share; alone, it is SFTTrainer."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if distributed.world_size() == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        assert num_items_in_batch is not None, "a mean over this process's tokens is no part of that over all"
        loss = super().training_step(model, _own_rows(inputs), num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last pass of an optimizer step
            distributed.average_gradients(model.parameters())
        return distributed.all_reduce_sum(loss) / distributed.world_size()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if distributed.world_size() > 1:  # gradients are averaged, and so is what counts no items: routers' balance
            num_items_in_batch = num_items_in_batch / distributed.world_size()
        batch = ResponseBatch(inputs=inputs, labels=inputs["labels"])
        few = batch.num_values(model) <= FEW_VALUES and self.args.device.type == "cpu"
        few |= "decoder_ids" in inputs  # TRL trains no encoders
        if not few or return_outputs or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # TRL's head works through all positions on a CPU, twice, and takes gradients in fp32
        total = cross_entropy(batch.logits(model), batch.tokens, reduction="sum")
        return total / max(len(batch.tokens) if num_items_in_batch is None else num_items_in_batch, 1)

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*arguments)
        _save_by_rows(optimizer)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What is trained, by the names and shapes of the model in memory: those of its files may be others."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        _FILE.write(
            folder / _TRAINED,
            {},
            {name: distributed.local(p.detach()) for name, p in trained_weights(self.model).items()},
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        own = trained_weights(self.model)
        with torch.no_grad():
            for name, value in _FILE.read(Path(resume_from_checkpoint) / _TRAINED)[1].items():
                distributed.local(own[name]).copy_(value)

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """Nothing is put off: gradients that wait for the last pass of a step wait whole, all of them at once."""
        return nullcontext()


def trained_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that require gradients, by their names in memory."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _save_by_rows(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer's state, as it is saved and loaded, have this process's rows for what is sharded.

    Said twice, it is as said once.
    """

    def to_rows(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        rows = {
            index: {key: distributed.local(value) if isinstance(value, Tensor) else value for key, value in of.items()}
            for index, of in state["state"].items()
        }
        return state | {"state": rows}

    def from_rows(loaded: torch.optim.Optimizer) -> None:
        for parameter in filter(distributed.is_sharded, loaded.state):
            for key, value in loaded.state[parameter].items():
                # all but the number of steps
                if not distributed.is_sharded(value) and value.shape == distributed.local(parameter).shape:
                    loaded.state[parameter][key] = distributed.of_rows(value, parameter)

    optimizer.register_state_dict_post_hook(to_rows)
    optimizer.register_load_state_dict_post_hook(from_rows)


def _own_rows(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's rows of a batch. One that has none takes the first, without a token that counts."""
    num_rows = len(inputs["input_ids"])
    own = distributed.share(range(num_rows))
    rows = {name: values[own or [0]] for name, values in inputs.items()}
    return rows if own else rows | {"labels": torch.full_like(rows["labels"], IGNORED)}


@contextmanager
def seen_alone() -> Iterator[None]:
    """Within: trainers take this process for the only one. Nothing happens where it is."""
    if distributed.world_size() == 1:
        yield
        return
    hidden = {
        name: os.environ.pop(name) for name in [*os.environ] if name in _OF_LAUNCHERS or name.startswith("ACCELERATE_")
    }
    saved = [dict(state._shared_state) for state in _STATES]
    level = _LOGGER.level
    try:
        _LOGGER.setLevel(logging.ERROR)  # it would tell of processes that are not used
        for state in _STATES:
            state._shared_state.clear()
        yield
    finally:
        _LOGGER.setLevel(level)
        for state, values in zip(_STATES, saved, strict=True):
            state._shared_state.clear()
            state._shared_state.update(values)
        os.environ.update(hidden)


def on_own_device(arguments: Any, device: torch.device) -> None:
    """The model stays on the accelerator that it is on; a trainer by itself takes the first, or all of the machine.

    Args:
        arguments: of the trainer, changed.
    """
    if device.type != "cpu":
        arguments.__dict__["_setup_devices"] = device  # a cached property, which `device` shows
        arguments._n_gpu = 1
        torch.accelerator.set_device_index(device)
