"""A LoRA adapter to train: put on a model, and taken off it without a trace."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from safelocus.errors import TrainingError

LoraMode = Literal["exact", "patch"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA adapter to train instead of all weights.

    Attributes:
        rank: of each update.
        alpha: its scale, over the rank; default: twice the rank.
        modules: names of the modules that get one; default: all linear layers, but for the output projections of Mamba,
            whose fused kernels compute past an adapter on them.
        mode: how weights are protected from it, see `preserve`.
    """

    rank: int = 16
    alpha: int | None = None
    modules: tuple[str, ...] = ()
    mode: LoraMode = "exact"

    def wrap(self, model: Any) -> Any:
        """The model with the adapter, whose modules are put into it.

        Raises:
            TrainingError: there are no such modules, or the output layer is among them.
        """
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = LoraConfig(
            r=self.rank, lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            target_modules=list(self.modules) if self.modules else "all-linear",
            exclude_modules=None if self.modules else [
                f"{name}.out_proj" for name, module in model.named_modules()
                if hasattr(module, "A_log") and hasattr(module, "D")
            ] or None,
        )  # fmt: skip
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for an attribute that has a new name
                warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)  # its own patterns
                wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise TrainingError(f"no LoRA adapter could be made for {', '.join(self.modules)}: {error}") from error
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise TrainingError("the trainer computes the loss past an adapter on the output layer; leave that out")
        return wrapped


def unwrap(model: Any) -> None:
    """Take out what an adapter leaves: its layers where they are still there, its configuration always."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    vars(model).pop("peft_config", None)
    for name, module in reversed(list(model.named_modules())):  # those within others first
        if isinstance(module, BaseTunerLayer):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())
