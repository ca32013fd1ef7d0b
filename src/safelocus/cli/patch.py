"""`safelocus patch apply | revert | diff | info | merge`: patches, and the model folders they change."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from safelocus.cli.command import JsonOption, argument, command, flag, option
from safelocus.cli.options import LayoutOptions, ModelArgument, RevisionOption
from safelocus.cli.output import check_file, note, print_json, results

if TYPE_CHECKING:
    from safelocus.patch import Outcome, Patch

app = typer.Typer(
    name="patch",
    help="Apply, revert, make, merge and describe patches: new values at a selection's coordinates.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True, kw_only=True)
class Info(JsonOption):
    patch: Path = argument("Patch file.")


@dataclass(frozen=True, kw_only=True)
class Change(ModelArgument, RevisionOption, JsonOption):
    patch: Path = argument("Patch file.")
    output: Path | None = option("Folder to write the changed copy into.", "-o")
    in_place: bool = flag("Change MODEL itself, a folder, file by file.")
    allow_mismatch: bool = flag("Also on another model of the same shapes: a fine-tuned sibling.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "Convert the patch to this first, where the model's files have several.", shown="that of the model's files"
    )


@dataclass(frozen=True, kw_only=True)
class Made(JsonOption):
    output: Path = option("Patch file to write.", "-o")
    old: Literal["values", "digest"] = option(
        "Keep the old values, or only digests: a smaller file that cannot be reverted.", default="values"
    )
    overwrite: bool = flag("Replace an earlier file.")


@dataclass(frozen=True, kw_only=True)
class DiffOptions(LayoutOptions):
    """What `diff` of the library takes as it is given."""

    ratio: float | None = option("Take this share of the model's weights: those that changed most.", "-r")
    largest: int | None = option("Take this number of weights instead.", min=1)
    only_eligible: bool = flag("Leave out embeddings, norms, biases and routers.", "--eligible")


@dataclass(frozen=True, kw_only=True)
class Diff(DiffOptions, Made):
    before: str = argument("Model folder, hub id, or organism:NAME.")
    after: str = argument("The same, changed.")


@dataclass(frozen=True, kw_only=True)
class Merge(Made):
    files: list[Path] = argument("Two or more patches of one model.")
    prefer: Literal["first", "last"] | None = option(
        "Which patch wins where they set a weight to different values.", shown="an error"
    )


@app.command("apply")
@command
def apply_(given: Change) -> None:
    """Write a patch's new values into a copy of a model's folder (-o), or into the folder itself (--in-place)."""
    _change("apply", given)


@app.command()
@command
def revert(given: Change) -> None:
    """Write a patch's old values: the model is what it was, bit for bit."""
    _change("revert", given)


@app.command()
@command
def diff(given: Diff) -> None:
    """Make a patch from two checkpoints: every weight that changed, or those that changed most."""
    from safelocus import patch as patches

    check_file(given.output, given.overwrite)
    _save(given, patches.diff(given.before, given.after, progress=not given.json, **given.part(DiffOptions)))


@app.command()
@command
def merge(given: Merge) -> None:
    """Make one patch of several."""
    from safelocus import patch as patches

    check_file(given.output, given.overwrite)
    _save(given, patches.merge([patches.Patch.load(path) for path in given.files], prefer=given.prefer))


@app.command()
@command
def info(given: Info) -> None:
    """Say what a patch holds, where it came from, and whether it can be reverted."""
    from safelocus.analysis.map import safety_map
    from safelocus.patch import Patch
    from safelocus.report.artefacts import patch_facts, patch_grid
    from safelocus.report.maps import experts_grid, layers_grid

    patch = Patch.load(given.patch)
    if given.json:
        counts = {
            by: {str(key): number for key, number in patch.selection.counts_by(by).items()}
            for by in ("component", "layer")
        }
        print_json(patch_facts(patch, given.patch) | {"counts": counts, "metadata": patch.metadata})
        return
    results.print(patch_grid(patch, given.patch).rich())
    located = safety_map(None, patch.selection)
    for grid in (layers_grid(located), experts_grid(located)):
        if grid is not None:
            results.print(grid.rich())


def _change(verb: Literal["apply", "revert"], given: Change) -> None:
    import torch

    from safelocus.errors import RunError
    from safelocus.patch import Patch, apply_to_folder, revert_folder

    if given.in_place == (given.output is not None):
        raise RunError("say where to: either a folder for the changed copy (-o FOLDER) or --in-place")
    patch = Patch.load(given.patch)
    if given.dtype is not None:
        patch = patch.to(getattr(torch, given.dtype))
    change = apply_to_folder if verb == "apply" else revert_folder
    outcome = change(
        patch, given.model, output=given.output, allow_mismatch=given.allow_mismatch, revision=given.revision,
        progress=not given.json,
    )  # fmt: skip
    where = given.model if given.output is None else str(given.output)
    if given.json:
        print_json(_result(verb, outcome, where))
    else:
        _tell(verb, outcome, where, is_copy=given.output is not None)


def _result(verb: str, outcome: "Outcome", where: str) -> dict[str, Any]:
    return {
        "action": verb,
        "output": where,
        "changed": outcome.changed,
        "num_weights": outcome.num_weights,
        "num_tensors": len(outcome.tensors),
        "files": list(outcome.files),
        "mismatches": list(outcome.mismatches),
        "num_rounded": outcome.num_rounded,
        "num_lost": outcome.num_lost,
        "left_out": list(outcome.left_out),
    }


def _tell(verb: str, outcome: "Outcome", where: str, *, is_copy: bool) -> None:
    for mismatch in outcome.mismatches:
        note(f"allowed: {mismatch}")
    if outcome.num_rounded and verb == "apply":
        note(f"rounded to the dtype of the model's files: {outcome.num_rounded:,} new values")
    if outcome.num_lost and verb == "apply":
        note(f"too small for that dtype, so that nothing is left of them: {outcome.num_lost:,} changes")
    if outcome.left_out:
        what = "not copied" if is_copy else "left as they are"
        kinds = "weights in other forms, or the state of a trainer, which the patch does not change"
        note(f"{what}, {kinds}: {', '.join(outcome.left_out)}")
    if outcome.changed:
        done = "wrote" if verb == "apply" else "restored"
        files = f"{len(outcome.files)} file{'s' if len(outcome.files) != 1 else ''}"
        note(f"{where}: {done} {outcome.num_weights:,} weights of {len(outcome.tensors)} tensors in {files}")
    else:
        held = " as far as its dtype can hold it" if outcome.num_lost else ""
        state = f"has the patch already{held}" if verb == "apply" else "is as it was before the patch already"
        note(f"{where}: the model {state}; {'copied as it is' if is_copy else 'nothing to do'}")


def _save(given: Made, patch: "Patch") -> None:
    from safelocus.report.artefacts import patch_facts

    if given.old == "digest":
        patch = replace(patch, old=None)
    patch.save(given.output)
    if given.json:
        print_json({"output": str(given.output), **patch_facts(patch, given.output)})
        return
    size = given.output.stat().st_size
    note(f"wrote {given.output}: {patch.k:,} weights of {len(patch.new)} tensors, {size:,} bytes")
