"""`safelocus inspect MODEL`: how every tensor was understood, before anything is computed."""

from dataclasses import dataclass

from safelocus.cli.command import JsonOption, command, flag
from safelocus.cli.options import HubOptions, ModelArgument
from safelocus.cli.output import print_json, results


@dataclass(frozen=True, kw_only=True)
class Inspect(ModelArgument, HubOptions, JsonOption):
    no_weights: bool = flag("From the configuration alone; reads and downloads no weights.")
    tensors: bool = flag("List every tensor, not only the components.")


@command
def inspect(given: Inspect) -> None:
    """Print how every tensor of a model was understood: components, layers, experts, what is eligible."""
    from rich.markup import escape

    from safelocus.model.layout import Layout
    from safelocus.model.quantised import Quantisation
    from safelocus.model.target import load, load_config
    from safelocus.report.artefacts import components_grid, layout_facts, tensors_grid

    config = load_config(given.model, revision=given.revision, trust_remote_code=given.trust_remote_code)
    quantised = Quantisation.of(config)
    if given.no_weights or (quantised is not None and quantised.problem):
        layout = Layout.from_config(config, file=given.layout, skip_unknown=given.skip_unknown)
    else:
        layout = load(given.model, **given.part(HubOptions)).layout
    if given.json:
        said = None if quantised is None else {
            "method": quantised.method, "usable": quantised.problem is None, "said": quantised.sentence,
        }  # fmt: skip
        print_json(layout_facts(layout) | {"quantised": said, "layout": layout.to_json()})
        return
    results.print(components_grid(given.model, layout).rich())
    if quantised is not None:
        results.print(f"[bold]quantised[/]: {escape(quantised.sentence)}", highlight=False, soft_wrap=True)
    if layout.left_out:
        results.print(f"[bold red]left out[/]: {escape(layout.left_out)}", highlight=False, soft_wrap=True)
    if given.tensors:
        results.print(tensors_grid(layout).rich())
