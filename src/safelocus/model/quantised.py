"""Quantised files of a model: what can be done with them, said from its configuration before anything is loaded.

Single weights are scored, trained and changed here, so quantised ones become ordinary ones when they are loaded, where
transformers has a way back. They are those that the quantised model computes with, not those that it was made from:
scores and selections are of them, and a patch goes onto an unquantised folder.

Input: a configuration. Output: None for ordinary files, else a `Quantisation`.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Self

import torch

from safelocus.errors import ModelError

# method, as transformers calls it -> package that reads it, where that is none of ours
_WHILE_LOADING = {"fp8": None, "mxfp8": None, "mxfp4": None, "compressed-tensors": "compressed_tensors"}
_AFTERWARDS = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How the weights in a model's files are quantised.

    Attributes:
        method: as transformers calls it: "fp8", "mxfp4", "bitsandbytes_4bit", "gptq", ...
    """

    method: str

    @classmethod
    def of(cls, config: Any) -> Self | None:
        """What a model's configuration says of it; None for ordinary weights."""
        found = _settings(config)
        if found is None:
            return None
        bits = next((name for name in ("4bit", "8bit") if found.get(f"load_in_{name}")), None)
        method = str(getattr(found.get("quant_method"), "value", found.get("quant_method", "unknown")))
        return cls(method=method if bits is None else f"bitsandbytes_{bits}")

    @property
    def problem(self) -> str | None:
        """Why nothing can be done with it, in a sentence; None where it can be turned back."""
        known = _WHILE_LOADING | _AFTERWARDS
        if self.method not in known:
            return (
                f"the weights are quantised ({self.method}), and transformers has no way back to ordinary ones, which "
                "are what is scored, trained and changed. Use the unquantised model. An adapter that was trained on "
                "this one is protected with that: docs/preserve.md"
            )
        package = known[self.method]
        if package is not None and find_spec(package) is None:
            return (
                f"the weights are quantised ({self.method}), and turning them back needs the package {package}: "
                f"pip install {package.replace('_', '-')}; or use the unquantised model"
            )
        return None

    @property
    def sentence(self) -> str:
        """What can be done with it."""
        return self.problem or (
            f"the weights are quantised ({self.method}) and become ordinary ones when they are loaded: they are "
            "scored, verified, trained and measured so, and take the memory of those. A model that is saved is not "
            "quantised, and a patch goes onto an unquantised folder"
        )

    def prepare(self, config: Any, name: object, *, shard: bool = False) -> None:
        """Have transformers turn the weights back while it loads them: changes the configuration.

        Raises:
            ModelError: there is no way back, or not in several processes that share the model.
        """
        if self.problem is not None:
            raise ModelError(f"{name}: {self.problem}")
        if shard:
            raise ModelError(f"{name}: quantised weights ({self.method}) are not sharded; leave out --shard")
        settings, text = _settings(config) or {}, config.get_text_config(decoder=True)
        if text is not config:
            vars(text).pop("quantization_config", None)  # transformers forgets that of the whole alone
        config.quantization_config = {**settings, "dequantize": True} if self.method in _WHILE_LOADING else settings

    def settle(self, model: Any, dtype: torch.dtype | None) -> Any:
        """The loaded model, whose weights are ordinary ones, and are saved as such.

        Args:
            dtype: asked for; transformers leaves weights that were not quantised as they are in the files.
        """
        if self.method in _AFTERWARDS:
            model = model.dequantize()
        # else saving would quantise again, protected weights too
        model._weight_conversions = None
        for tensor in [*model.parameters(), *model.buffers()] if dtype is not None else ():
            is_kept = tensor.dtype == torch.float32 or not tensor.is_floating_point()  # by its class, in full precision
            if dtype == torch.float32 or not is_kept:
                tensor.data = tensor.data.to(dtype if tensor.is_floating_point() else tensor.dtype)
        return model


def _settings(config: Any) -> dict[str, Any] | None:
    """Of the whole, or of its language model alone."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return found if found is None or isinstance(found, dict) else dict(found.to_dict())
