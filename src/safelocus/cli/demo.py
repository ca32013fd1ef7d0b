"""`safelocus demo`: the paper's whole story on two embedded organisms, and its claims beside what was measured."""

from pathlib import Path
from typing import Annotated

import typer

from safelocus.cli import options
from safelocus.cli.output import note, print_json, results


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the runs into.")] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer prompts, doses, seeds and steps: about a minute, less is decided.")
    ] = False,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Locate, verify, enhance and preserve on two tiny models, dense and mixture-of-experts. Needs no network.

    Ends with the paper's claims beside what was just measured, and one page, report.html. Every stage's run is kept
    in a folder like that of its own command. Interrupted with Ctrl-C, the same command resumes (without --overwrite).
    """
    from safelocus.demo import FULL, QUICK, tell
    from safelocus.report.page import PAGE
    from safelocus.report.sections.claims import claims_table
    from safelocus.run import run_folder

    sizes = QUICK if quick else FULL
    if not json:
        results.print(
            "Two tiny models that refuse harmful requests, and their twins that do not. "
            f"About {'a minute' if quick else 'six minutes'} on two cores, which they share. {sizes.shortened}\n",
            highlight=False,
        )
    with run_folder(output, config={"command": "demo", "quick": quick, "seed": seed}, overwrite=overwrite) as folder:
        story = tell(folder, sizes, final=output, seed=seed, console=None if json else results)
    page = output / PAGE
    if json:
        print_json({"output": str(output), "page": str(page), **story.to_json()})
        return
    results.print(claims_table(story.claims))
    if sizes.shortened:
        results.print(f"{sizes.shortened} What is not decided here may be in the full demo.", highlight=False)
    results.print(f"Open [bold]{page}[/]: all runs on one page", highlight=False, soft_wrap=True)  # a path stays whole
    note(f"beside it: {', '.join(f'{output / name}/' for name in story.claims)}, one folder per stage")
