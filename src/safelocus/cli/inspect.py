"""`safelocus inspect MODEL`: how every tensor was understood, before anything is computed."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelocus.cli import options
from safelocus.cli.output import print_json, results

if TYPE_CHECKING:
    from safelocus.model.layout import Layout


def inspect(
    model: options.Model,
    no_weights: Annotated[
        bool,
        typer.Option("--no-weights", help="From the configuration alone; reads and downloads no weights."),
    ] = False,
    layout: options.LayoutFile = None,
    skip_unknown: options.SkipUnknown = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, not only the components.")] = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Print how every tensor of a model was understood: components, layers, experts, what is eligible."""
    from rich.markup import escape

    from safelocus.model.layout import Layout
    from safelocus.model.target import load, load_config

    if no_weights:
        config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
        understood = Layout.from_config(config, file=layout, skip_unknown=skip_unknown)
    else:
        understood = load(
            model, layout=layout, skip_unknown=skip_unknown, revision=revision, trust_remote_code=trust_remote_code
        ).layout
    if json:
        print_json(_summary(understood) | {"layout": understood.to_json()})
        return
    results.print(_table(model, understood))
    if understood.left_out:
        results.print(f"[bold red]left out[/]: {escape(understood.left_out)}", highlight=False, soft_wrap=True)
    if tensors:
        results.print(_tensor_table(understood))


def _summary(layout: "Layout") -> dict[str, Any]:
    components: dict[str, dict[str, int]] = {}
    for tensor in layout.tensors.values():
        for part, (component, _) in enumerate(tensor.parts):
            entry = components.setdefault(component, {"tensors": 0, "matrices": 0, "weights": 0})
            entry["tensors"] += 1
            entry["matrices"] += tensor.num_experts
            entry["weights"] += math.prod(tensor.extents(part))
    return {
        "family": layout.family,
        "matched_by": layout.matched_by,
        "num_layers": layout.num_layers,
        "num_weights": layout.num_weights,
        "num_eligible": layout.num_eligible,
        "left_out": layout.left_out,
        "components": components,
    }


def _table(name: str, layout: "Layout") -> Any:
    from rich import box
    from rich.table import Table

    from safelocus.model.layout import COMPONENTS, ELIGIBLE

    summary = _summary(layout)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{name}: family {layout.family} (matched by {layout.matched_by}), {layout.num_layers} layers",
        caption=f"{layout.num_weights:,} weights, {layout.num_eligible:,} eligible "
        f"({layout.num_eligible / layout.num_weights:.1%})"
        + (f"; tied: {', '.join(f'{a} = {b}' for a, b in layout.tied.items())}" if layout.tied else ""),
    )
    table.add_column("component", no_wrap=True)
    for heading in ("matrices", "weights", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("eligible")
    table.add_column("first tensor")
    for component in COMPONENTS:
        if component not in summary["components"]:
            continue
        entry = summary["components"][component]
        first = next(t for t in layout.tensors.values() if component in t.components)
        shape = " x ".join(f"{extent} {role}" for extent, role in zip(first.view, first.axes, strict=True))
        table.add_row(
            component,
            f"{entry['matrices']:,}",
            f"{entry['weights']:,}",
            f"{entry['weights'] / layout.num_weights:.1%}",
            "yes" if component in ELIGIBLE else "-",
            shape,
        )
    return table


def _tensor_table(layout: "Layout") -> Any:
    from rich.table import Table

    table = Table(title="tensors")
    for heading in ("tensor", "shape", "layer", "components", "axes"):
        table.add_column(heading, overflow="fold")
    for tensor in layout.tensors.values():
        table.add_row(
            tensor.name,
            " x ".join(map(str, tensor.shape)),
            "-" if tensor.layer is None else str(tensor.layer),
            ", ".join(tensor.components),
            " ".join(tensor.axes),
        )
    return table
