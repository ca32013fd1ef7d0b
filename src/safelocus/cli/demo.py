"""`safelocus demo`: a chat model learns to refuse, or the paper's whole story on two embedded organisms."""

from pathlib import Path
from typing import Annotated

import typer

from safelocus.cli import options
from safelocus.cli.output import note, print_json, results


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the runs into.")] = Path("runs/demo"),
    model: Annotated[
        str, typer.Option(help="A chat model that refuses little: folder, hub id or smollm2.")
    ] = "smollm2",
    organisms: Annotated[
        bool, typer.Option("--organisms", help="Two tiny embedded models in its place, and more of the story.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="These, with fewer prompts, doses, seeds and steps: about a minute.")
    ] = False,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    config: options.Config = None,
) -> None:
    """Find 1 % of a chat model's weights, train them to refuse, and apply the patch.

    With --organisms, or where smollm2 is not at hand (`make demo` gets it): locate, verify, enhance and preserve on two
    tiny models, dense and mixture-of-experts. Needs no network.

    Ends with the paper's claims beside what was just measured, and one page, report.html. Every stage's run is kept
    in a folder like that of its own command. Interrupted with Ctrl-C, the same command resumes (without --overwrite).
    """
    from safelocus.demo import FULL, QUICK, ChatSizes, OrganismSizes, tell
    from safelocus.errors import ModelError
    from safelocus.model.target import resolve
    from safelocus.report.page import PAGE
    from safelocus.report.verdicts import claims_table
    from safelocus.run.folder import run_folder

    if not (organisms := organisms or quick):
        try:
            resolve(model)
        except ModelError as error:
            if model != "smollm2":
                raise
            note(f"[bold]mind:[/] {error}. The organisms stand in for it")
            organisms = True
    sizes: OrganismSizes | ChatSizes = QUICK if quick else FULL if organisms else ChatSizes()
    if not json:
        said = (
            "Two tiny models that refuse harmful requests, and their twins that do not. About "
            f"{'a minute' if quick else 'six minutes'} on two cores, which they share."
            if organisms
            else f"{model}: a chat model that answers whatever it is asked. About six minutes on two cores."
        )
        results.print(f"{said} {sizes.shortened}\n", highlight=False)
    asked = {"organisms": True, "quick": quick} if organisms else {"model": model}
    with run_folder(output, config={"command": "demo", **asked, "seed": seed}, overwrite=overwrite) as folder:
        story = tell(
            folder, sizes, final=output, model=None if organisms else model, seed=seed,
            console=None if json else results,
        )  # fmt: skip
    page = output / PAGE
    if json:
        print_json({"output": str(output), "page": str(page), **story.to_json()})
        return
    results.print(claims_table(story.claims))
    if sizes.shortened:
        more = " What is not decided here may be in the full demo." if organisms else ""
        results.print(f"{sizes.shortened}{more}", highlight=False)
    results.print(f"Open [bold]{page}[/]: all runs on one page", highlight=False, soft_wrap=True)  # a path stays whole
    note(f"beside it: {', '.join(f'{output / name}/' for name in story.claims)}, one folder per stage")
