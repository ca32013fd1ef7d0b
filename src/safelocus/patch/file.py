"""The file of a patch: one safetensors file (see `run.tensors`), and nothing that runs when it is read.

indices/TENSOR        int32 where the tensor has fewer than 2**31 elements, else int64
new/TENSOR            in the model's dtype, aligned with the indices
old/TENSOR            the same; absent from the small form
header                everything else as JSON: selection (with layout and provenance), digests of the touched tensors
                      before and after, metadata
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from safelocus.errors import PatchError
from safelocus.run.tensors import TensorFile, under
from safelocus.selection.file import index_dtype

FORMAT_VERSION = 2  # 1 had a SHA-256
_FILE = TensorFile(kind="patch", version=FORMAT_VERSION, made_by="`safelocus patch diff`", error=PatchError)

Tensors = dict[str, Tensor]


def write(
    path: Path,
    header: Mapping[str, Any],
    indices: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor] | None,
) -> None:
    """Write a patch; `sizes` are the numbers of elements of the tensors. An earlier file is replaced."""
    tensors = {f"indices/{name}": index.to(index_dtype(sizes[name])) for name, index in indices.items()}
    tensors |= {f"new/{name}": value for name, value in new.items()}
    tensors |= {f"old/{name}": value for name, value in (old or {}).items()}
    _FILE.write(path, {"has_old": old is not None, **header}, tensors)


def read(path: Path) -> tuple[dict[str, Any], Tensors, Tensors, Tensors | None]:
    """(header, indices, new, old or None); PatchError for what is not the whole, unchanged file of a patch."""
    header, tensors = _FILE.read(path)
    old = under("old/", tensors) if header.get("has_old") else None
    return header, under("indices/", tensors), under("new/", tensors), old
