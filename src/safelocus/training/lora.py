"""A LoRA adapter to train: put on a model, and taken off it without a trace.

"All linear layers" are those of the language model's eligible weights: attention, MLPs, shared and routed experts (also
where those are one tensor). Not routers, which decide for all tokens at once; not vision towers; not the output head.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from safelocus.errors import TrainingError
from safelocus.model.layout import Layout
from safelocus.model.layout.unknown import collapse

LoraMode = Literal["exact", "patch"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA adapter to train instead of all weights.

    Attributes:
        rank: of each update.
        alpha: its scale, over the rank; default: twice the rank.
        modules: names of the modules that get one, as PEFT reads them; default: all linear layers (see `lora`), but for
            Mamba's `out_proj` and `dt_proj`, whose weights its code and kernels use past an adapter on them.
        mode: how weights are protected from it, see `preserve`.
    """

    rank: int = 16
    alpha: int | None = None
    modules: tuple[str, ...] = ()
    mode: LoraMode = "exact"

    def wrap(self, model: Any, layout: Layout) -> Any:
        """The model with the adapter, whose modules are put into it.

        Raises:
            TrainingError: there are no such modules, or the output layer is among them.
        """
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        linear, experts = linear_layers(model, layout)
        modules: Iterable[str] = self.modules or linear
        # those that PEFT would put elsewhere are named by their weight, which it leaves where it is
        renamed = [name for name in modules if name in linear and _is_renamed(name.rpartition(".")[2], model)]
        config = LoraConfig(
            r=self.rank, lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            target_modules=[name for name in modules if name not in renamed],
            target_parameters=[f"{name}.weight" for name in renamed] + ([] if self.modules else experts),
        )  # fmt: skip
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for an attribute that has a new name
                warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)  # its own patterns
                warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)  # GPT-2's, which it sets right itself
                wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise TrainingError(f"no LoRA adapter could be made for {', '.join(self.modules)}: {error}") from error
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise TrainingError("the trainer computes the loss past an adapter on the output layer; leave that out")
        return wrapped

    def left_out(self, model: Any, layout: Layout) -> str | None:
        """Which linear layers and experts get no adapter, in a sentence; None where that is the output head alone."""
        if self.modules:
            return None
        linear, experts = linear_layers(model, layout)
        adapted = {*(f"{name}.weight" for name in linear), *experts}
        kinds: dict[str, list[str]] = {}
        for name, tensor in layout.tensors.items():
            is_linear = isinstance(model.get_submodule(name.rpartition(".")[0]), linear_classes())
            is_matrix = len(tensor.shape) > 1 and (is_linear or tensor.eligible or "router" in tensor.components)
            if is_matrix and name not in adapted and "head" not in tensor.components:
                kinds.setdefault(tensor.components[0], []).append(collapse(name, stacks=False))
        said = [f"{component} ({len(names)}: {_listed(names)})" for component, names in kinds.items()]
        return f"matrices without an adapter: {'; '.join(said)}" if said else None


@contextmanager
def unwrapping(model: Any) -> Iterator[None]:
    """Within: an adapter may be put on the model. Afterwards: nothing of it is left, and parameters require gradients
    as they did.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        vars(model).pop("peft_config", None)
        for name, module in reversed(list(model.named_modules())):  # those within others first
            if isinstance(module, BaseTunerLayer):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, module.get_base_layer())
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


def linear_layers(model: Any, layout: Layout) -> tuple[list[str], list[str]]:
    """(modules, stacks of experts) of a bare model, by name."""
    mamba = [name for name, module in model.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")]
    passed_by = {f"{name}.{kind}_proj" for name in mamba for kind in ("out", "dt")}
    modules, experts = [], []
    for name in layout.eligible_tensors:
        owner, _, kind = name.rpartition(".")
        if isinstance(model.get_submodule(owner), linear_classes()) and kind == "weight":
            if owner not in passed_by:
                modules.append(owner)
        elif layout.tensors[name].fused_experts and len(layout.tensors[name].shape) == 3:
            experts.append(name)
    return modules, experts


def linear_classes() -> tuple[type[nn.Module], ...]:
    """Of modules that are a matrix, GPT-2's among them."""
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, Conv1D)


def _is_renamed(name: str, model: Any) -> bool:
    """Whether PEFT takes modules of this name for experts (or a router) of an older transformers, and adapts those."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # experts that are one tensor, of which it is a part
        return True
    return config.target_modules != {name}


def _listed(names: list[str]) -> str:
    kinds = list(dict.fromkeys(names))
    return ", ".join(kinds[:3]) + (f" and {len(kinds) - 3} other kinds" if len(kinds) > 3 else "")
