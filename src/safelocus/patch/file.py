"""The file of a patch: one safetensors file, and nothing that runs when it is read.

    indices/TENSOR        int32 where the tensor has fewer than 2**31 elements, else int64
    new/TENSOR            in the model's dtype, aligned with the indices
    old/TENSOR            the same; absent from the small form
    header, key `safelocus.patch`
                          everything else as JSON: first `sha256`, then the format version, selection (with
                          layout and provenance), digests of the touched tensors before and after, metadata

`sha256` is of the whole file with 64 zeros in the digest's place, so a changed, missing or added byte is noticed
wherever it is. It guards against damage and against careless edits; it is not a signature.

Written under a temporary name in the same folder and renamed: a reader sees the old file or the new.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safelocus.errors import ModelError, PatchError
from safelocus.patch.checkpoint import read_header
from safelocus.selection.file import index_dtype, owned

FORMAT_VERSION = 1
_HEADER = "safelocus.patch"
_ZEROS = "0" * 64
_DIGEST = re.compile(rb'\{\\"sha256\\": \\"([0-9a-f]{64})\\"')  # quotes are escaped: JSON within JSON
_BLOCK = 1 << 20

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
    tensors = {f"indices/{name}": owned(index.to(index_dtype(sizes[name]))) for name, index in indices.items()}
    tensors |= {f"new/{name}": owned(value) for name, value in new.items()}
    tensors |= {f"old/{name}": owned(value) for name, value in (old or {}).items()}
    values = {"sha256": _ZEROS, "format_version": FORMAT_VERSION, "has_old": old is not None, **header}
    try:
        text = json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PatchError(f"the patch's metadata must be plain JSON values: {error}") from error
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={_HEADER: text})
        digest, place = _digest(temporary)
        with temporary.open("r+b") as file:
            file.seek(place)
            file.write(digest.encode())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise PatchError(f"{path}: cannot be written ({error}). Choose another place.") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], Tensors, Tensors, Tensors | None]:
    """(header, indices, new, old or None); PatchError for what is not the whole, unchanged file of a patch."""
    if not path.is_file():
        raise PatchError(f"{path}: no such file. Expected a patch, such as `safelocus patch diff` writes.")
    try:
        metadata = read_header(path)[0].get("__metadata__", {})
    except ModelError as error:
        raise PatchError(f"{error}, or make the patch again") from error
    if not isinstance(metadata, dict) or _HEADER not in metadata:
        raise PatchError(f"{path}: a safetensors file, but not a patch (its header has no {_HEADER!r})")
    try:
        header = json.loads(metadata[_HEADER])
        version, expected = header["format_version"], header["sha256"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise PatchError(f"{path}: damaged header ({error!r}). Copy or make the patch again.") from error
    if version != FORMAT_VERSION:
        raise PatchError(
            f"{path}: format version {version}, but this safelocus reads version {FORMAT_VERSION}. Upgrade "
            "safelocus, or make the patch again."
        )
    found, _ = _digest(path)
    if found != expected:
        raise PatchError(
            f"{path}: changed since it was written (its digest is {found[:16]}..., expected {str(expected)[:16]}...). "
            "Copy or make the patch again."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise PatchError(f"{path}: cannot be read ({error}). Copy or make the patch again.") from error
    old = _under("old/", tensors) if header.get("has_old") else None
    return header, _under("indices/", tensors), _under("new/", tensors), old


def _digest(path: Path) -> tuple[str, int]:
    """(hex SHA-256 of the file with zeros for the digest in it, where in the file that digest is)."""
    with path.open("rb") as file:
        match = _DIGEST.search(file.read(int.from_bytes(file.read(8), "little")))
        if match is None:
            raise PatchError(f"{path}: damaged header (no digest in it). Copy or make the patch again.")
        place = 8 + match.start(1)
        file.seek(0)
        found = hashlib.sha256(file.read(place))
        found.update(_ZEROS.encode())
        file.seek(place + len(_ZEROS))
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest(), place


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
