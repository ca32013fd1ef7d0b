"""What a model was, to the bit: so that a selection or patch never lands on another model unnoticed.

The fingerprint holds a digest of the architecture's configuration and, per tensor, the shape, the
dtype and a 128-bit digest (xxh3) of the values' bytes. Names are canonical (wrappers of PEFT,
torch.compile and FSDP stripped; adapters left out), so a wrapped model has its base's fingerprint.
The digest guards against mistakes, not against forgery.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import xxhash
from torch import Tensor, nn

from safelocus.distributed import whole
from safelocus.layout import Layout, canonical_name, is_adapter

# Attributes of a config that do not change what the weights are.
_VOLATILE = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures",
    "_attn_implementation", "_experts_implementation", "_attn_implementation_autoset", "name_or_path",
}  # fmt: skip
_MAX_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Identity of a model's weights.

    Attributes:
        model_type: the configuration's `model_type`.
        config: hex digest of the configuration (without paths, versions and run-time switches).
        tensors: canonical name -> (shape, dtype, hex digest of the bytes).
    """

    model_type: str
    config: str
    tensors: Mapping[str, tuple[tuple[int, ...], str, str]]

    @classmethod
    def of(cls, model: nn.Module, layout: Layout) -> Self:
        """Read every parameter once (16 GB of weights take a few seconds) and digest it."""
        named = ((canonical_name(name), parameter) for name, parameter in model.named_parameters())
        own = ((name, parameter) for name, parameter in named if name in layout.tensors and not is_adapter(name))
        return cls.of_tensors(model.config, own)

    @classmethod
    def of_tensors(cls, config: Any, tensors: Iterable[tuple[str, Tensor]]) -> Self:
        """From canonical names and values, which may come one by one, and may be some of the model's only."""
        read = {
            name: (tuple(value.shape), str(value.dtype).removeprefix("torch."), digest(whole(value.detach())))
            for name, value in tensors
        }
        return cls(model_type=config.model_type, config=_config_digest(config), tensors=read)

    @property
    def id(self) -> str:
        """One short name for the whole: 16 hexadecimal digits."""
        return xxhash.xxh3_64_hexdigest(json.dumps(self.to_json(), sort_keys=True).encode())

    def differences(self, other: "Fingerprint") -> list[str]:
        """What differs, in words, most fundamental first; empty when the models are the same."""
        found = []
        if self.model_type != other.model_type:
            found.append(f"model type: {self.model_type} against {other.model_type}")
        elif self.config != other.config:
            found.append("configuration values differ")
        only_self = [name for name in self.tensors if name not in other.tensors]
        only_other = [name for name in other.tensors if name not in self.tensors]
        for names, where in ((only_self, "first"), (only_other, "second")):
            if names:
                found.append(f"{len(names)} tensors exist only in the {where}: {_some(names)}")
        shared = [name for name in self.tensors if name in other.tensors]
        for position, what in enumerate(("shape", "dtype", "values")):
            changed = [n for n in shared if self.tensors[n][position] != other.tensors[n][position]]
            if changed:
                found.append(f"{what} of {len(changed)} of {len(shared)} tensors differ: {_some(changed)}")
                break  # another shape or dtype always means other bytes too
        return found

    def to_json(self) -> dict[str, Any]:
        tensors = {name: [list(shape), dtype, digest] for name, (shape, dtype, digest) in self.tensors.items()}
        return {"model_type": self.model_type, "config": self.config, "tensors": tensors}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        tensors = {name: (tuple(shape), dtype, digest) for name, (shape, dtype, digest) in data["tensors"].items()}
        return cls(model_type=data["model_type"], config=data["config"], tensors=tensors)


def digest(value: Tensor) -> str:
    """128 bits of a tensor's bytes, in hexadecimal."""
    flat = value.contiguous().view(-1)
    if flat.numel() == 0:
        return xxhash.xxh3_128_hexdigest(b"")
    return xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).cpu().numpy().data)


def _config_digest(config: Any) -> str:
    def stable(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): stable(item) for key, item in value.items() if key not in _VOLATILE}
        return value

    return xxhash.xxh3_128_hexdigest(json.dumps(stable(config.to_dict()), sort_keys=True, default=str).encode())


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:_MAX_LISTED])
    return listed + (f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else "")
