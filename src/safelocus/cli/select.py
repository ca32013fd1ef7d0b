"""`safelocus select SCORES`: exactly K weights, or whole groups of them, from saved scores."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from safelocus.cli import options
from safelocus.cli.output import note, print_json, results


def select(
    scores: Annotated[Path, typer.Argument(help="Run folder of `score`, or its scores folder.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Selection file to write.", show_default=False)],
    ratio: options.Ratio = 0.01,
    of: options.Of = "model",
    which: Annotated[Literal["top", "bottom", "random"], typer.Option(help="Which weights to take.")] = "top",
    granularity: Annotated[
        Literal["weight", "row", "column", "head", "neuron", "expert", "matrix", "layer"],
        typer.Option(help="Take single weights, or whole groups ranked by their mean score."),
    ] = "weight",
    minus: Annotated[
        list[Path] | None,
        typer.Option(help="Leave out the weights of this selection (of utility, say); may be repeated."),
    ] = None,
    intersect: Annotated[
        list[Path] | None, typer.Option("--and", help="Keep only the weights that this selection has too.")
    ] = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Select weights from saved scores. Set operations apply after the ratio, so K may fall below it."""
    from safelocus.analysis.map import safety_map
    from safelocus.errors import RunError
    from safelocus.report.maps import print_map
    from safelocus.scoring.scores import Scores
    from safelocus.selection.selection import Selection

    if output.exists() and not overwrite:
        raise RunError(f"{output}: exists already; choose another name, or --overwrite it")
    if not output.parent.is_dir():
        raise RunError(f"{output}: the folder {output.parent} does not exist")
    loaded = Scores.load(scores_folder(scores))
    selection = loaded.select(ratio, of=of, which=which, granularity=granularity, seed=seed)
    for path in minus or []:
        selection = selection - Selection.load(path)
    for path in intersect or []:
        selection = selection & Selection.load(path)
    selection.save(output)
    drawn = safety_map(loaded, selection)
    if json:
        print_json({"output": str(output), "k": selection.k, "map": drawn.to_json()})
        return
    print_map(results, drawn)
    note(f"wrote {output}: {selection.k:,} weights")


def scores_folder(path: Path) -> Path:
    """The scores inside a run folder, or the folder itself."""
    return path / "scores" if (path / "scores").is_dir() else path
