"""`safelocus demo`: where safety sits in the embedded organisms, dense and mixture-of-experts."""

import time
from pathlib import Path
from typing import Annotated

import typer

from safelocus.cli import options
from safelocus.cli.output import note, print_json, results

ORGANISMS = ("organism:dense", "organism:moe")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the run into.")] = Path("runs/demo"),
    ratio: options.Ratio = 0.01,
    limit: Annotated[int, typer.Option(help="Harmful prompts per organism.", min=1)] = 64,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Locate safety in two tiny models that refuse harmful requests, and draw the map. Needs no network."""
    from rich.rule import Rule

    from safelocus.objective import Guard
    from safelocus.prompts import read_prompts
    from safelocus.report.map import SafetyMap, safety_map
    from safelocus.report.outputs import print_map, write_map
    from safelocus.run import run_folder
    from safelocus.scoring import score
    from safelocus.target import load

    resolved = {"command": "demo", "ratio": ratio, "limit": limit, "seed": seed}
    maps: list[tuple[str, SafetyMap]] = []
    with run_folder(output, config=resolved, overwrite=overwrite) as folder:
        prompts = read_prompts("organism:harmful").limit(limit, seed=seed)
        guard = Guard.load("organism:guard", max_new_tokens=32)
        for name in ORGANISMS:
            target = load(name)
            start = time.monotonic()
            scores = score(target, prompts, objective=guard, batch_size=32, progress=not json)
            selection = scores.select(ratio)
            seconds = time.monotonic() - start
            drawn = safety_map(scores, selection)
            maps.append((name, drawn))
            stem = name.partition(":")[2]
            scores.save(folder / stem / "scores")
            selection.save(folder / stem / "selection.safetensors")
            if not json:
                results.print(Rule(f"[bold]{name}[/]"))
                results.print(
                    f"{target.layout.num_weights:,} weights. The guard read {len(prompts)} answers to harmful "
                    f"requests; {scores.mean_safety:+.2f} is the mean log-odds of safe. Scored in {seconds:.1f} s.",
                    highlight=False,
                )
                print_map(results, drawn)
        written = write_map(folder, maps, place=output)
    if json:
        print_json({"output": str(output), "maps": {name: drawn.to_json() for name, drawn in maps}})
        return
    note("")
    note(f"Open {output / 'report.html'} for the maps; beside it: {', '.join(written)}")
