"""Apply or revert a patch in a Hugging Face model folder, without loading the model; or save a whole model as one.

    apply_to_folder(patch, "organism:dense", output=Path("patched"))    # a copy
    apply_to_folder(patch, Path("patched"))                             # in place
    save_like(Checkpoint.open("organism:dense"), model, Path("tuned"))  # a copy with all of the model's weights

Everything is checked before anything is written, one tensor in memory at a time. Only the bytes of the patch's
weights change: headers, order and all other tensors stay as they are, so reverting gives the same files.

A copy is written under a temporary name and renamed when complete. In place, every touched file is copied, changed
and put in the place of the old one at once; after an interruption some files are changed and some are not, and
the same command (or the opposite one) finishes the job, since it recognises the tensors of either kind.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from safelocus import distributed
from safelocus.errors import PatchError, ResourceError
from safelocus.model.fingerprint import bits, dtype_name
from safelocus.model.layout import canonical_name
from safelocus.patch.checkpoint import INDEX, OTHER_WEIGHTS, Checkpoint, Stored, stored_in, weight_files
from safelocus.patch.patch import Patch
from safelocus.patch.state import Goal, Outcome, examine
from safelocus.progress import track
from safelocus.run.files import alone, renamed_to, replacing
from safelocus.run.tensors import save_tensors

# what turns text, pictures and sound into inputs, as transformers and others name it
_INPUTS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "chat_template*", "additional_chat_templates/*", "*processor_config.json",
)  # fmt: skip

Edits = dict[str, list[tuple[str, Tensor, Tensor]]]  # file -> (name in the file, flat indices, values)


def apply_to_folder(
    patch: Patch,
    model: str | Path,
    *,
    output: Path | None = None,
    allow_mismatch: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> Outcome:
    """Write the new values into a copy of a model's folder, or in place.

    Args:
        patch: in another dtype than the folder's tensors, which have one, it is converted first (see `Patch.to`).
        model: folder, hub id or `organism:NAME`; in place only a folder.
        output: folder to be; must not exist or be empty. None: in place.
        allow_mismatch: also to a model that is neither as before nor as after: a fine-tuned sibling.

    Returns:
        What was written. Where the patch is applied already: nothing; a copy is made all the same.

    Raises:
        PatchError: another model or dtype, or a place that cannot be written to. Nothing was written.
        ModelError: no such model; tensors that cannot be found in its files.
    """
    return _rewrite(patch, model, "after", output, allow_mismatch, revision, progress)


def revert_folder(
    patch: Patch,
    model: str | Path,
    *,
    output: Path | None = None,
    allow_mismatch: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> Outcome:
    """Write the old values; see `apply_to_folder` and `Patch.revert`."""
    return _rewrite(patch, model, "before", output, allow_mismatch, revision, progress)


def save_like(
    checkpoint: Checkpoint,
    model: nn.Module,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model's weights into a copy of the folder it was loaded from.

    All that is no weight of the model (tokenizer, processor, chat template, generation config, further heads) is
    copied byte for byte, and so are weights that did not change; others have the files' dtype. Several processes call
    it together; the first one writes.

    Args:
        checkpoint: of the folder that the model was loaded from.
        model: as it is now, without wrappers; it may be sharded.
        output: folder to be; must not exist or be empty.
        dtype: of all weights; default: as in the files.

    Raises:
        PatchError: a place that cannot be written to.
        ModelError: tensors that cannot be found in the files.
    """
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    names = {form: name for name in parameters if checkpoint.holds(name) for form in checkpoint.forms(name)}
    with _copied(checkpoint, output) if distributed.is_main() else nullcontext() as copy:
        if copy is not None and dtype is not None:
            retype(copy, dtype)
            checkpoint = replace(checkpoint, folder=copy, stored=stored_in(copy))
        for group in checkpoint.groups:
            values = {form: distributed.whole(parameters[names[form]].detach()) for form in group if form in names}
            if copy is None or not values:
                continue
            for key, tensor in checkpoint.in_files(values).items():
                stored = checkpoint.stored[key]
                _write_values(copy / stored.file, stored, slice(None), tensor.flatten())


def retype(folder: Path, dtype: torch.dtype) -> None:
    """Give all weights in a model's folder another dtype, and have its configuration say so."""
    sizes = 0
    for file in weight_files(folder):
        path = folder / file
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = {name: v.to(dtype) if v.is_floating_point() else v for name, v in load_file(path).items()}
        with renamed_to(path) as temporary:
            save_tensors(tensors, temporary, metadata)
        sizes += sum(value.nbytes for value in tensors.values())
    declare_dtype(folder, dtype)
    if (path := folder / INDEX).is_file():
        index = json.loads(path.read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": sizes}
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")


def declare_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Have a folder's configuration say that its weights have this dtype."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    name = dtype_name(dtype)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    if "torch_dtype" not in config:
        config["dtype"] = name
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def copy_tokenizer(source: Path, output: Path) -> None:
    """Copy what turns text and pictures into a model's inputs from its folder, byte for byte."""
    for file in _files(source):
        if any(fnmatch(file, pattern) for pattern in _INPUTS):
            (output / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, output / file)


def _rewrite(
    patch: Patch,
    model: str | Path,
    goal: Goal,
    output: Path | None,
    allow_mismatch: bool,
    revision: str | None,
    progress: bool,
) -> Outcome:
    if output is None:
        _check_place(model)
    checkpoint = Checkpoint.open(model, revision=revision, layout=patch.selection.layout)
    if output is not None:
        _check_output(output, checkpoint.folder)
    dtypes = checkpoint.dtypes
    if len(dtypes) == 1 and patch.dtypes != dtypes:  # trained in fp32, say, where the files are bf16
        patch = patch.to(*dtypes)
    patch.selection.require({name: tuple(weights.shape) for name, weights in checkpoint.model.named_parameters()})
    forms = [(name, form) for name in patch.new for form in checkpoint.forms(name)]
    checked = track(forms, "check", enabled=progress)
    tensors = ((name, checkpoint.tensor(form)) for name, form in checked)
    pending, mismatches = examine(patch, tensors, goal=goal, allow_mismatch=allow_mismatch)
    edits = _edits(checkpoint, patch, goal, pending)
    if output is None:
        _write_in_place(checkpoint, edits, progress)
    else:
        with _copied(checkpoint, output, progress) as copy:
            for file in edits:
                _write(checkpoint, copy / file, edits[file])
    outcome = patch.outcome(pending, mismatches, files=tuple(edits), left_out=tuple(_other_weights(checkpoint)))
    return replace(outcome, **{name: patch.metadata.get(name, 0) for name in ("num_rounded", "num_lost")})


def _edits(checkpoint: Checkpoint, patch: Patch, goal: Goal, names: list[str]) -> Edits:
    """What to write where in the files."""
    values = patch.new if goal == "after" else patch.old
    assert values is not None
    edits: Edits = defaultdict(list)
    for name in names:
        for form in checkpoint.forms(name):
            for piece in checkpoint.locate(form, patch.selection[name]):
                file = checkpoint.stored[piece.name].file
                edits[file].append((piece.name, piece.index, values[name][piece.positions]))
    return dict(sorted(edits.items()))


@contextmanager
def _copied(checkpoint: Checkpoint, output: Path, progress: bool = False) -> Iterator[Path]:
    """Within: a copy of the model's folder to change, which gets its name at the end."""
    left_out = tuple(_other_weights(checkpoint))
    files = [path for path in _files(checkpoint.folder) if path not in left_out]
    try:
        with replacing(output) as partial:
            _check_space(partial, sum((checkpoint.folder / file).stat().st_size for file in files))
            for file in track(files, "copy", enabled=progress):
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                _copy(checkpoint.folder / file, partial / file)
            yield partial
            for file in files:
                _sync(partial / file)
    except OSError as error:
        raise PatchError(f"{output}: cannot be written ({error.strerror or error}); choose another folder") from error


def _write_in_place(checkpoint: Checkpoint, edits: Edits, progress: bool) -> None:
    folder = checkpoint.folder
    _check_space(folder, max(((folder / file).stat().st_size for file in edits), default=0))
    try:
        with alone(folder / "weights"):
            for file in track(list(edits), "write", enabled=progress):
                temporary = (folder / file).with_name(f".{Path(file).name}.tmp")
                try:
                    _copy(folder / file, temporary)
                    _write(checkpoint, temporary, edits[file])
                    _sync(temporary)
                    os.replace(temporary, folder / file)
                finally:
                    with suppress(OSError):
                        temporary.unlink(missing_ok=True)
    except OSError as error:
        raise PatchError(
            f"{folder}: cannot be written ({error.strerror or error}). Some files may be changed already; the same "
            "command finishes the job, the opposite one undoes it"
        ) from error


def _copy(source: Path, destination: Path) -> None:
    shutil.copyfile(source, destination)
    shutil.copymode(source, destination)
    os.chmod(destination, destination.stat().st_mode | 0o200)  # the copy of a read-only file (a hub's cache) is ours


def _sync(path: Path) -> None:
    with path.open("rb") as written:
        os.fsync(written.fileno())  # before it takes the place of the old one


def _write(checkpoint: Checkpoint, path: Path, edits: list[tuple[str, Tensor, Tensor]]) -> None:
    for key, index, values in edits:
        _write_values(path, checkpoint.stored[key], index.numpy(), values)


def _write_values(path: Path, stored: Stored, index: Any, values: Tensor) -> None:
    """Overwrite elements of one tensor in a safetensors file; only their bytes change."""
    itemsize = values.element_size()
    kind = np.dtype(f"<i{itemsize}" if itemsize > 1 else "u1")
    mapped = np.memmap(path, dtype=kind, mode="r+", offset=stored.start, shape=(stored.num_bytes // itemsize,))
    mapped[index] = bits(values).numpy()


def _files(folder: Path) -> Iterator[str]:
    """Everything in the folder that belongs to the model: no hidden files, which are those of git and caches."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield str(relative)


def _other_weights(checkpoint: Checkpoint) -> Iterator[str]:
    own = {stored.file for stored in checkpoint.stored.values()}
    for file in _files(checkpoint.folder):
        if file not in own and Path(file).suffix in (".safetensors", *OTHER_WEIGHTS):
            yield file


def _check_place(model: str | Path) -> None:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise PatchError(
            f"{model}: only a folder of your own can be changed in place; write a copy: -o FOLDER, output="
        )
    if linked := sorted(path.name for path in folder.glob("*.safetensors") if path.is_symlink()):
        raise PatchError(
            f"{folder}: {linked[0]} is a link (into a cache that other programs share?); write a copy: -o FOLDER, "
            "output="
        )
    if not os.access(folder, os.W_OK):
        raise PatchError(f"{folder}: cannot be written to; write a copy: -o FOLDER, output=")


def _check_output(output: Path, source: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise PatchError(f"{output}: exists already and is not an empty folder; choose another")
    if source.resolve() in output.resolve().parents:
        raise PatchError(f"{output}: lies inside the model's own folder; choose another")


def _check_space(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(
            f"{place}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; choose another disk"
        )
