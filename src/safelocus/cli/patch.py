"""`safelocus patch apply | revert | diff | info | merge`: patches, and the model folders they change."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safelocus.cli import options
from safelocus.cli.output import note, print_json, results

if TYPE_CHECKING:
    from safelocus.patch import Outcome, Patch

app = typer.Typer(
    name="patch",
    help="Apply, revert, make, merge and describe patches: new values at a selection's coordinates.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

File = Annotated[Path, typer.Argument(help="Patch file.", show_default=False)]
OutputFolder = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder to write the changed copy into.", show_default=False)
]
OutputFile = Annotated[Path, typer.Option("--output", "-o", help="Patch file to write.", show_default=False)]
InPlace = Annotated[bool, typer.Option("--in-place", help="Change MODEL itself, a folder, file by file.")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-mismatch", help="Also on another model of the same shapes: a fine-tuned sibling.")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Convert the patch first, where its old values survive that.", show_default=False),
]
Old = Annotated[
    Literal["values", "digest"],
    typer.Option(help="Keep the old values, or only digests: a smaller file that cannot be reverted."),
]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier file.")]


@app.command("apply")
def apply_(
    patch: File,
    model: options.Model,
    output: OutputFolder = None,
    in_place: InPlace = False,
    allow_mismatch: AllowMismatch = False,
    dtype: Dtype = None,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Write a patch's new values into a copy of a model's folder (-o), or into the folder itself (--in-place)."""
    _change("apply", patch, model, output, in_place, allow_mismatch, dtype, revision, json)


@app.command()
def revert(
    patch: File,
    model: options.Model,
    output: OutputFolder = None,
    in_place: InPlace = False,
    allow_mismatch: AllowMismatch = False,
    dtype: Dtype = None,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Write a patch's old values: the model is what it was, bit for bit."""
    _change("revert", patch, model, output, in_place, allow_mismatch, dtype, revision, json)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="Model folder, hub id, or organism:NAME.", show_default=False)],
    after: Annotated[str, typer.Argument(help="The same, changed.", show_default=False)],
    output: OutputFile,
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", "-r", help="Take this share of the model's weights: those that changed most."),
    ] = None,
    largest: Annotated[int | None, typer.Option(min=1, help="Take this number of weights instead.")] = None,
    eligible: Annotated[
        bool, typer.Option("--eligible", help="Leave out embeddings, norms, biases and routers.")
    ] = False,
    old: Old = "values",
    layout: options.LayoutFile = None,
    skip_unknown: options.SkipUnknown = False,
    revision: options.Revision = None,
    overwrite: OverwriteFile = False,
    json: options.Json = False,
) -> None:
    """Make a patch from two checkpoints: every weight that changed, or those that changed most."""
    from safelocus import patch as patches

    _check_file(output, overwrite)
    made = patches.diff(
        before,
        after,
        ratio=ratio,
        largest=largest,
        only_eligible=eligible,
        layout=layout,
        skip_unknown=skip_unknown,
        revision=revision,
        progress=not json,
    )
    _save(made, output, old, json)


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Two or more patches of one model.", show_default=False)],
    output: OutputFile,
    prefer: Annotated[
        Literal["first", "last"] | None,
        typer.Option(help="Which patch wins where they set a weight to different values.", show_default="an error"),
    ] = None,
    old: Old = "values",
    overwrite: OverwriteFile = False,
    json: options.Json = False,
) -> None:
    """Make one patch of several."""
    from safelocus import patch as patches

    _check_file(output, overwrite)
    made = patches.merge([patches.Patch.load(path) for path in files], prefer=prefer)
    _save(made, output, old, json)


@app.command()
def info(patch: File, json: options.Json = False) -> None:
    """Say what a patch holds, where it came from, and whether it can be reverted."""
    from safelocus.analysis.map import safety_map
    from safelocus.patch import Patch
    from safelocus.report.maps import experts_grid, layers_grid

    loaded = Patch.load(patch)
    located = safety_map(None, loaded.selection)
    if json:
        counts = {
            by: {str(key): number for key, number in loaded.selection.counts_by(by).items()}
            for by in ("component", "layer")
        }
        print_json(_description(loaded, patch) | {"counts": counts, "metadata": loaded.metadata})
        return
    results.print(_table(loaded, patch))
    for grid in (layers_grid(located), experts_grid(located)):
        if grid is not None:
            results.print(grid.rich())


def _change(
    verb: Literal["apply", "revert"],
    file: Path,
    model: str,
    output: Path | None,
    in_place: bool,
    allow_mismatch: bool,
    dtype: str | None,
    revision: str | None,
    json: bool,
) -> None:
    import torch

    from safelocus.errors import RunError
    from safelocus.patch import Patch, apply_to_folder, revert_folder

    if in_place == (output is not None):
        raise RunError("say where to: either a folder for the changed copy (-o FOLDER) or --in-place")
    patch = Patch.load(file)
    if dtype is not None:
        patch = patch.to(getattr(torch, dtype))
    change = apply_to_folder if verb == "apply" else revert_folder
    outcome = change(patch, model, output=output, allow_mismatch=allow_mismatch, revision=revision, progress=not json)
    where = model if output is None else str(output)
    if json:
        print_json(_result(verb, outcome, where))
    else:
        _tell(verb, outcome, where, is_copy=output is not None)


def _result(verb: str, outcome: "Outcome", where: str) -> dict[str, Any]:
    return {
        "action": verb,
        "output": where,
        "changed": outcome.changed,
        "num_weights": outcome.num_weights,
        "num_tensors": len(outcome.tensors),
        "files": list(outcome.files),
        "mismatches": list(outcome.mismatches),
        "left_out": list(outcome.left_out),
    }


def _tell(verb: str, outcome: "Outcome", where: str, *, is_copy: bool) -> None:
    for mismatch in outcome.mismatches:
        note(f"allowed: {mismatch}")
    if outcome.left_out:
        what = "not copied" if is_copy else "left as they are"
        note(f"{what}, other forms of the weights that the patch does not change: {', '.join(outcome.left_out)}")
    if outcome.changed:
        done = "wrote" if verb == "apply" else "restored"
        files = f"{len(outcome.files)} file{'s' if len(outcome.files) != 1 else ''}"
        note(f"{where}: {done} {outcome.num_weights:,} weights of {len(outcome.tensors)} tensors in {files}")
    else:
        state = "has the patch already" if verb == "apply" else "is as it was before the patch already"
        note(f"{where}: the model {state}; {'copied as it is' if is_copy else 'nothing to do'}")


def _check_file(output: Path, overwrite: bool) -> None:
    from safelocus.errors import RunError

    if output.exists() and not overwrite:
        raise RunError(f"{output}: exists already; choose another name, or --overwrite it")
    if not output.parent.is_dir():
        raise RunError(f"{output}: the folder {output.parent} does not exist")


def _save(patch: "Patch", output: Path, old: Literal["values", "digest"], json: bool) -> None:
    from dataclasses import replace

    if old == "digest":
        patch = replace(patch, old=None)
    patch.save(output)
    if json:
        print_json({"output": str(output), **_description(patch, output)})
    else:
        note(f"wrote {output}: {patch.k:,} weights of {len(patch.new)} tensors, {output.stat().st_size:,} bytes")


def _description(patch: "Patch", file: Path) -> dict[str, Any]:
    return {
        "k": patch.k,
        "num_changed": patch.num_changed,
        "share": patch.k / patch.selection.num_weights,
        "num_tensors": len(patch.new),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in patch.dtypes],
        "bytes": file.stat().st_size,
        "model": patch.selection.provenance.model,
        "model_type": patch.before.model_type,
        "method": patch.selection.provenance.method,
        "made_by": patch.metadata.get("made_by"),
        "before": patch.before.id,
        "after": patch.after.id if len(patch.after.tensors) == len(patch.new) else None,
        "revertible": patch.old is not None,
    }


def _table(patch: "Patch", file: Path) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from safelocus.analysis.words import percent

    described = _description(patch, file)
    changed = "" if described["num_changed"] is None else f", {described['num_changed']:,} of them changed"
    rows = {
        "weights": f"{patch.k:,} ({percent(described['share'])} of the model{changed})",
        "tensors": f"{described['num_tensors']:,} ({', '.join(described['dtypes'])})",
        "size": f"{described['bytes']:,} bytes",
        "model": f"{described['model'] or 'unknown'} ({described['model_type']})",
        "selected by": described["method"],
        "made by": described["made_by"] or "unknown",
        "before": described["before"],
        "after": described["after"] or "not known without the model",
        "reverts": "yes, bit for bit" if described["revertible"] else "no: it holds no old values",
    }
    table = Table(title=Text(str(file), style="table.title"), box=box.SIMPLE, show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table
