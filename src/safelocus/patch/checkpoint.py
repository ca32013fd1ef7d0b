"""A model folder read tensor by tensor, in the form that its tensors have in memory, without loading the model.

Checkpoint files may name and divide the weights in another way than the loaded model (experts one by one, query,
key and value joined, prefixes). The rules are transformers' own: every name in the files is renamed, and every
group of tensors converted, by the functions that `from_pretrained` calls. So:

    checkpoint = Checkpoint.open("organism:moe")
    checkpoint.tensor("model.layers.0.mlp.experts.gate_up_proj")             # as in memory, in the files' dtype
    checkpoint.locate("model.layers.0.mlp.experts.gate_up_proj", index)      # where its elements lie in the files

    checkpoint.in_files({"model.layers.0.mlp.experts.gate_up_proj": values})  # name in the files -> what they hold then

One tensor of the model is in memory at a time (and what its conversion needs: about twice as much more for fused
experts).
"""

import json
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from safelocus.errors import ModelError, first_line
from safelocus.model.fingerprint import bits
from safelocus.model.layout import Layout
from safelocus.model.layout.sizes import auto_class
from safelocus.model.quantised import Quantisation
from safelocus.model.target import load_config, resolve
from safelocus.patch.rearrangement import Origin, Rearrangement
from safelocus.run.files import inside

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# weights in forms that are not changed: stale copies of the old ones beside changed safetensors would mislead
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # others are quantised or no weights


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor in a file: where its bytes are."""

    file: str
    dtype: str  # as torch calls it
    shape: tuple[int, ...]
    start: int  # first byte, from the beginning of the file
    num_bytes: int


@dataclass(kw_only=True, eq=False)
class _Group:
    """Tensors of the files that become one or more tensors of the model together."""

    first: str  # name in memory (the first, where there are several)
    converter: Any = None  # transformers' WeightConverter; None: only the name changes
    keys: dict[str, list[str]] = field(
        default_factory=lambda: defaultdict(list)
    )  # source pattern -> names in the files


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A Hugging Face model folder; see the module.

    Attributes:
        name: as it was given.
        folder: where it is on disk.
        model: the model without weights (meta device).
        layout: of that model.
        stored: name in the files -> where it is.
    """

    name: str
    folder: Path
    model: Any
    layout: Layout
    stored: dict[str, Stored]

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        layout: Layout | Path | None = None,
        skip_unknown: bool = False,
    ) -> Self:
        """Read configuration and headers; no weights.

        `layout`: the model's, where it is known already, or a TOML file for an architecture unknown here.

        Raises:
            ModelError: no such model, no safetensors, damaged or quantised files.
            LayoutError: an architecture that is not understood.
        """
        from transformers import AutoModelForCausalLM

        folder = local_folder(name, revision=revision)
        config = load_config(folder)
        if (quantised := Quantisation.of(config)) is not None:
            raise ModelError(
                f"{name}: the weights in its files are quantised ({quantised.method}); single ones are changed in the "
                "unquantised model's folder (bf16, fp16 or fp32)"
            )
        auto = auto_class(config) or AutoModelForCausalLM
        try:
            with torch.device("meta"):
                model = auto.from_config(config)
        except ValueError as error:
            raise ModelError(f"{name}: transformers cannot build this model: {first_line(error)}") from error
        return cls(
            name=str(name),
            folder=folder,
            model=model,
            layout=layout if isinstance(layout, Layout) else Layout.of(model, file=layout, skip_unknown=skip_unknown),
            stored=stored_in(folder),
        )

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of the weights in the files; one, unless the model mixes them."""
        found = {tensor.dtype for tensor in self.stored.values()}
        return [getattr(torch, dtype) for dtype in _DTYPES.values() if dtype in found]

    def holds(self, name: str) -> bool:
        """Whether a tensor of the model is in the files, under its own name or one that it is tied to."""
        return bool(self._forms(name))

    def forms(self, name: str) -> list[str]:
        """Names in memory under which the files hold a tensor: its own, and those it is tied to.

        Raises ModelError when they hold it under none.
        """
        found = self._forms(name)
        if not found:
            near = [key for key in self.stored if key.split(".")[-2:] == name.split(".")[-2:]] or list(self.stored)
            raise ModelError(
                f"{self.name}: no tensor in the files becomes {name!r} when the model is loaded. Found names such as "
                f"{', '.join(near[:3])}. Apply the patch to the loaded model and save that instead"
            )
        return found

    def _forms(self, name: str) -> list[str]:
        aliases = [alias for alias, listed in self.layout.tied.items() if listed == name]
        return [form for form in (name, *aliases) if form in self._groups]

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is in memory, but in the files' dtype. `name` is one of `forms`."""
        handles: dict[str, Any] = {}
        return self._checked(name, self._convert(self._groups[name], lambda key: self._read(key, handles))[name])

    @property
    def groups(self) -> list[list[str]]:
        """Names in memory: those that are made together of the same tensors in the files."""
        found: dict[int, list[str]] = {}
        for name, group in self._groups.items():
            found.setdefault(id(group), []).append(name)
        return list(found.values())

    def check_writable(self) -> None:
        """Raise ModelError where a weight in memory is not in the files, or is computed and not merely rearranged."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:  # others are tables made anew, such as sinusoidal positions
                self.forms(name)
        for names in self.groups:
            with Rearrangement() as recorded:
                self._convert(self._groups[names[0]], lambda key: recorded.source(key, self.stored[key].shape))
            if recorded.computed is not None:
                raise ModelError(f"{self.name}: {names[0]} is computed from the files' tensors ({recorded.computed})")

    @torch.no_grad()
    def in_files(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the files hold once the tensors of one of `groups` have these values: name in the files -> tensor.

        A weight that is what the files' value is in the values' dtype keeps that value to the bit; any other gets the
        new one in the files' dtype. Empty where none is another.
        """
        group, handles = self._groups[next(iter(values))], dict[str, Any]()
        files = {key: self._read(key, handles) for keys in group.keys.values() for key in keys}
        with Rearrangement() as recorded:
            made = self._convert(group, lambda key: recorded.follow(key, files[key]))
        changed = False
        for name, value in values.items():
            stored = self._checked(name, made[name])
            value = value.to(stored.device)
            is_new = bits(stored.to(value.dtype)) != bits(value.contiguous())
            changed = changed or bool(is_new.any())
            stored.copy_(torch.where(is_new, value.to(stored.dtype), stored))
        recorded.undo()
        return files if changed else {}

    def locate(self, name: str, index: Tensor) -> list[Origin]:
        """Where the elements at flat indices of a tensor in memory lie in the files. `name` is one of `forms`."""
        with Rearrangement() as recorded:
            made = self._convert(self._groups[name], lambda key: recorded.source(key, self.stored[key].shape))[name]
        self._checked(name, made)
        origins = recorded.origins(made, index)
        assert sum(origin.positions.numel() for origin in origins) == index.numel()
        return origins

    @cached_property
    def _groups(self) -> dict[str, _Group]:
        """Name in memory -> the group of files' tensors that it is made from."""
        found: dict[str, _Group] = {}
        for group in _grouped(self.model, list(self.stored)):
            made = [group.first]
            if group.converter is not None:
                # without values: only the names of what it makes are of interest
                made = list(self._convert(group, lambda key: torch.empty(self.stored[key].shape, device="meta")))
            found |= dict.fromkeys(made, group)
        return found

    def _convert(self, group: _Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors in memory that a group becomes, made from what `read` gives for each name in the files."""
        if group.converter is None:
            keys = group.keys[group.first]
            if len(keys) > 1:
                raise ModelError(f"{self.name}: several tensors in the files become {group.first}: {', '.join(keys)}")
            return {group.first: read(keys[0])}
        converter = deepcopy(group.converter)
        for pattern, keys in group.keys.items():
            for key in keys:
                converter.add_tensor(group.first, key, pattern, read(key))
        try:
            made = converter.convert(group.first, model=self.model, config=self.model.config)
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise ModelError(f"{self.name}: {group.first} cannot be made from the files' tensors: {error}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _read(self, key: str, handles: dict[str, Any]) -> Tensor:
        """A tensor by its name in the files; `handles` keeps files open."""
        file = self.stored[key].file
        if file not in handles:
            handles[file] = safe_open(self.folder / file, framework="pt")
        found: Tensor = handles[file].get_tensor(key)
        return found

    def _checked(self, name: str, value: Tensor) -> Tensor:
        expected = tuple(self.model.get_parameter(name).shape)
        if tuple(value.shape) != expected:
            raise ModelError(
                f"{self.name}: {name} has shape {list(value.shape)} in the files; expected {list(expected)}, as the "
                "configuration says"
            )
        return value


def local_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a model: as it is, inside the package, or downloaded from the hub."""
    where = resolve(name)
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download

    left_out = [*(f"*{ending}" for ending in OTHER_WEIGHTS), "consolidated*", "original/*"]
    try:
        return Path(snapshot_download(where, revision=revision, ignore_patterns=left_out))
    except Exception as error:  # of whichever clients the hub's package uses; not all are its own, or OSErrors
        raise ModelError(f"{name}: cannot be downloaded: {first_line(error)}") from error


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up the model."""
    if (folder / SINGLE).is_file():  # which transformers takes, whatever else is there
        return [SINGLE]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            return [inside(folder, name).relative_to(folder).as_posix() for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{folder / INDEX}: damaged ({error!r}); copy it again") from error
    raise ModelError(f"{folder}: neither {SINGLE} nor {INDEX}; expected a Hugging Face model folder with safetensors")


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(header, number of bytes before the tensors' data) of a complete safetensors file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if 8 + length + end != path.stat().st_size:
            raise ValueError(f"expected {8 + length + end} bytes, found {path.stat().st_size}")
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a complete safetensors file ({error}); download or copy it again") from error
    return header, 8 + length


def stored_in(folder: Path) -> dict[str, Stored]:
    """Name in the files -> where it is, from their headers."""
    found = {}
    for file in weight_files(folder):
        header, begin = read_header(folder / file)
        for key, entry in header.items():
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                found[key] = Stored(
                    file=file, dtype=_DTYPES.get(entry["dtype"], entry["dtype"]), shape=tuple(entry["shape"]),
                    start=begin + start, num_bytes=end - start,
                )  # fmt: skip
    return found


def _grouped(model: Any, keys: list[str]) -> list[_Group]:
    """Which tensors of the files become which of the model: the decisions of transformers' own loader.

    The steps are those of `convert_and_load_state_dict_in_model`, without the values.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, _Group] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            continue  # not a weight of this model; a tensor that is needed and missing is found by name
        converter = None if pattern is None else by_pattern[pattern]
        group = groups.setdefault(name, _Group(first=name, converter=converter))
        group.keys[name if pattern is None else pattern].append(key)
    return list(groups.values())
