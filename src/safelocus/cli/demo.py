"""`safelocus demo`: a chat model learns to refuse, or the paper's whole story on two embedded organisms."""

from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from safelocus.cli.command import RunOptions, command, flag, option
from safelocus.cli.output import mind, note, print_json, results


@dataclass(frozen=True, kw_only=True)
class Demo(RunOptions):
    output: Path = option("Folder to write the runs into.", "-o", default=Path("runs/demo"))
    model: str = option("A chat model that refuses little: folder, hub id or smollm2.", default="smollm2")
    organisms: bool = flag("Two tiny embedded models in its place, and more of the story.")
    quick: bool = flag("These, with fewer prompts, doses, seeds and steps: about a minute.")


@command
def demo(given: Demo) -> None:
    """Find 1 % of a chat model's weights, train them to refuse, and apply the patch.

    With --organisms, or where smollm2 is not at hand (`make demo` gets it): locate, verify, enhance and preserve on two
    tiny models, dense and mixture-of-experts. Needs no network.

    Ends with the paper's claims beside what was just measured, and one page, report.html. Every stage's run is kept
    in a folder like that of its own command. Interrupted with Ctrl-C, the same command resumes (without --overwrite).
    """
    from safelocus.demo import FULL, QUICK, ChatSizes, OrganismSizes, tell
    from safelocus.errors import ModelError, SafelocusError
    from safelocus.model.target import resolve
    from safelocus.report.page import PAGE
    from safelocus.report.verdicts import claims_table
    from safelocus.run.folder import run_folder

    if (organisms := given.organisms or given.quick) and given.model != "smollm2":
        raise SafelocusError(
            f"--model {given.model}: --organisms and --quick are about models of their own; leave one out"
        )
    if not organisms:
        try:
            resolve(given.model)
        except ModelError as error:
            if given.model != "smollm2":
                raise
            mind([f"{error}. The organisms stand in for it"])
            organisms = True
    sizes: OrganismSizes | ChatSizes = QUICK if given.quick else FULL if organisms else ChatSizes()
    model = None if organisms else given.model
    if not given.json:
        said = (
            "Two tiny models that refuse harmful requests, and their twins that do not. About "
            f"{'a minute' if given.quick else 'six minutes'} on two cores, which they share."
            if organisms
            else f"{model}: a chat model that answers whatever it is asked."
            f"{' About three minutes on two cores.' if model == 'smollm2' else ''}"
        )
        results.print(f"{said} {sizes.shortened}\n", highlight=False, markup=False)
    asked = {"organisms": True, "quick": given.quick} if organisms else {"model": model}
    config = {"command": "demo", **asked, "seed": given.seed}
    with run_folder(given.output, config=config, overwrite=given.overwrite) as folder:
        console = None if given.json else results
        story = tell(folder, sizes, final=given.output, model=model, seed=given.seed, console=console)
    page = given.output / PAGE
    if given.json:
        print_json({"output": str(given.output), "page": str(page), **story.to_json()})
        return
    results.print(claims_table(story.claims))
    if sizes.shortened:
        more = " What is not decided here may be in the full demo." if organisms else ""
        results.print(f"{sizes.shortened}{more}", highlight=False)
    results.print(
        f"Open [bold]{escape(str(page))}[/]: all runs on one page", highlight=False, soft_wrap=True
    )  # a path stays whole
    note(f"beside it: {', '.join(f'{given.output / name}/' for name in story.claims)}, one folder per stage")
