"""One safetensors file with a JSON header and its own digest: selections, patches, and tensors of unfinished work.

    header, key `safelocus.KIND`   JSON: first `xxh3_128`, then `format_version`, and what the kind says of itself

The digest is of the whole file with 32 zeros in its place, so a changed, missing or added byte is noticed wherever it
is. Written under a temporary name in the same folder and renamed: a reader sees the old file or the new.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safelocus.errors import RunError, SafelocusError
from safelocus.run.files import renamed_to

_PREFIX = "safelocus."
_ZEROS = "0" * 32
_DIGEST = re.compile(rb'"safelocus\.\w+":"\{\\"xxh3_128\\": \\"([0-9a-f]{32})\\"')  # JSON within JSON
_MAX_HEADER = 100_000_000  # that of safetensors
_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A kind of such files.

    Attributes:
        kind: "selection", "patch", ...
        version: that is written and read.
        made_by: what makes one, in words.
        error: raised for a file that cannot be read or written, or is not what was written.
    """

    kind: str
    version: int
    made_by: str
    error: type[SafelocusError] = RunError

    def write(self, path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a file; an earlier one is replaced."""
        values = {"xxh3_128": _ZEROS, "format_version": self.version, **header}
        try:
            text = json.dumps(values, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise self.error(f"what a {self.kind} says of itself must be plain JSON values: {error}") from error
        try:
            with renamed_to(path) as temporary:
                save_tensors(tensors, temporary, {_PREFIX + self.kind: text})
                with temporary.open("r+b") as file:
                    found = own_digest(temporary)
                    assert found is not None
                    file.seek(found.place)
                    file.write(found.found.encode())
        except (OSError, SafetensorError) as error:
            raise self.error(f"{path}: cannot be written ({error}). Choose another place.") from error

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(header, tensors) of a whole, unchanged file."""
        again = f"Copy the {self.kind} again, or make it again."
        if not path.is_file():
            raise self.error(f"{path}: no such file. Expected a {self.kind}, such as {self.made_by} writes.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if _PREFIX + self.kind not in metadata:
                    raise self.error(
                        f"{path}: a safetensors file, but not a {self.kind}. Expected one of {self.made_by}."
                    )
                header = self._header(path, metadata[_PREFIX + self.kind])
                digest = own_digest(path)
                if digest is None:
                    raise self.error(f"{path}: damaged header (no digest in it). {again}")
                if digest.found != digest.expected:
                    raise self.error(
                        f"{path}: changed since it was written (its digest is {digest.found[:16]}..., expected "
                        f"{digest.expected[:16]}...). {again}"
                    )
                return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise self.error(f"{path}: not a safetensors file, or cut short ({error}). {again}") from error

    def _header(self, path: Path, text: str) -> dict[str, Any]:
        try:
            header: dict[str, Any] = json.loads(text)
            version = header["format_version"]
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
            raise self.error(f"{path}: damaged header ({error!r}). Make the {self.kind} again.") from error
        if version != self.version:
            newer = isinstance(version, int) and version > self.version
            raise self.error(
                f"{path}: format version {version}, but this safelocus reads version {self.version}. "
                f"{'Upgrade safelocus, or make' if newer else 'Make'} the {self.kind} again."
            )
        return header


@dataclass(frozen=True, kw_only=True)
class OwnDigest:
    """Of a file: the digest in it, where that is, and what it should be."""

    expected: str
    place: int
    found: str


def own_digest(path: Path) -> OwnDigest | None:
    """The digest in a file, and that of its bytes; None where there is none in it."""
    with path.open("rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), _MAX_HEADER)
        match = _DIGEST.search(file.read(length))
        if match is None:
            return None
        place = 8 + match.start(1)
        file.seek(0)
        found = xxhash.xxh3_128(file.read(place) + _ZEROS.encode())
        file.seek(place + len(_ZEROS))
        while block := file.read(_BLOCK):
            found.update(block)
    return OwnDigest(expected=match[1].decode(), place=place, found=found.hexdigest())


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, for whoever the umask lets read a new file."""
    save_file({name: owned(value) for name, value in tensors.items()}, path, metadata)
    give_mode(path)


def give_mode(*files: Path) -> None:
    """Give files that safetensors wrote the mode of any new file: by itself it writes for their owner alone."""
    for file in files:
        beside = file.with_name(f".{file.name}.tmp")
        beside.touch()
        file.chmod(beside.stat().st_mode)
        beside.unlink()


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def owned(tensor: Tensor) -> Tensor:
    """A contiguous tensor with memory of its own: safetensors refuses views and shared storage."""
    shares = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if shares else tensor.contiguous()
