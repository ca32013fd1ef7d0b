"""Patches: applying 1 % of new weights to a model in memory, and to a folder.

    apply    to a model in memory; tensors are recognised by their digest first; per weight
    again    the same, where the patch is in it already: recognising alone
    folder   a patched copy of a folder of safetensors files; per weight

Baseline of *apply*: the digest of every tensor to be changed, then copying all weights of a second model over them.
Limit: reading the weights once (`sum`).
Baseline of *folder*: read all files, write the values, and save all tensors. Limit: copying the files.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from machine import Machine
from models import build, num_bytes, num_weights, select
from rows import Row
from safetensors.torch import load_file, save_file

import safelocus as sl
from safelocus.model.fingerprint import Fingerprint
from safelocus.model.layout import Layout
from safelocus.patch.folder import apply_to_folder
from safelocus.selection import sparse

_FILE_BYTES = "256MB"


def measure(kind: str, size: str, machine: Machine) -> list[Row]:
    model = build(kind, size, device=machine.device, dtype=machine.dtype)
    selection, weights, held = select(model), num_weights(model), num_bytes(model)
    old = sparse.gather(model, selection)
    patch = sl.Patch.of(model, selection, new={name: value.cpu() + 1 for name, value in old.items()})
    layout = Layout.of(model)
    parameters = list(model.parameters())
    actions = {
        "apply": lambda: patch.apply(model),
        "again": lambda: patch.apply(model),
        "revert": lambda: patch.revert(model),
        "read": lambda: [parameter.sum() for parameter in parameters],
    }
    if 2 * held < machine.memory:
        dense = {name: value.detach().clone() for name, value in model.state_dict().items()}

        @torch.no_grad()
        def baseline() -> None:
            Fingerprint.of(model, layout)
            model.load_state_dict(dense)

        actions["dense"] = baseline
    times = machine.alternate(actions)
    actions.clear()
    shared = {"kind": kind, "weights": weights, "units": weights}
    rows = [
        Row(
            what=what,
            ours=times[what],
            baseline=times.get("dense"),
            limit=times["read"],
            bytes=held,
            **shared,
        )
        for what in ("apply", "again")
    ]
    if not machine.is_cuda and 3 * held < machine.memory:
        rows.append(_folder(model, patch, machine, shared, held))
    return rows


def _folder(model, patch, machine: Machine, shared: dict, held: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="safelocus-benchmark-") as scratch:
        source, output = Path(scratch) / "model", Path(scratch) / "patched"
        model.save_pretrained(source, max_shard_size=_FILE_BYTES)
        files = sorted(source.glob("*.safetensors"))

        def fresh(write) -> None:
            shutil.rmtree(output, ignore_errors=True)
            write()

        def copy() -> None:
            output.mkdir()
            for file in files:
                shutil.copyfile(file, output / file.name)

        def by_hand() -> None:
            output.mkdir()
            for file in files:
                tensors = load_file(file)
                for name, tensor in tensors.items():
                    if name in patch.new:
                        tensor.view(-1)[patch.selection[name]] = patch.new[name]
                save_file(tensors, output / file.name, {"format": "pt"})

        times = machine.alternate(
            {
                "folder": lambda: fresh(lambda: apply_to_folder(patch, source, output=output)),
                "by hand": lambda: fresh(by_hand),
                "copy": lambda: fresh(copy),
            },
            rounds=min(machine.rounds, 3),
        )
        return Row(
            what="folder", ours=times["folder"], baseline=times["by hand"], limit=times["copy"], bytes=held, **shared
        )
