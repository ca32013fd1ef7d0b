"""How a model was understood, as numbers and as tables: by component, and tensor by tensor."""

import math
from typing import Any

from safelocus.analysis.words import UNKNOWN
from safelocus.model.layout import COMPONENTS, ELIGIBLE, Layout
from safelocus.report.grid import Grid


def summary(layout: Layout) -> dict[str, Any]:
    """Family, and counts of weights: of all, and by component."""
    components: dict[str, dict[str, int]] = {}
    for tensor in layout.tensors.values():
        for part, (component, _) in enumerate(tensor.parts):
            entry = components.setdefault(component, {"tensors": 0, "matrices": 0, "weights": 0})
            entry["tensors"] += 1
            entry["matrices"] += tensor.num_experts
            entry["weights"] += math.prod(tensor.extents(part))
    names = ("family", "matched_by", "num_layers", "num_weights", "num_eligible", "left_out")
    return {**{name: getattr(layout, name) for name in names}, "components": components}


def components_grid(name: str, layout: Layout) -> Grid:
    found = summary(layout)["components"]
    firsts = {component: tensor for tensor in reversed(layout.tensors.values()) for component in tensor.components}
    rows = [
        (
            component, "yes" if component in ELIGIBLE else UNKNOWN,
            " x ".join(f"{size} {role}" for size, role in zip(firsts[component].view, firsts[component].axes)),
            f"{found[component]['matrices']:,}", f"{found[component]['weights']:,}",
            f"{found[component]['weights'] / layout.num_weights:.1%}",
        )
        for component in COMPONENTS
        if component in found
    ]  # fmt: skip
    share = layout.num_eligible / layout.num_weights
    tied = f"; tied: {', '.join(f'{a} = {b}' for a, b in layout.tied.items())}" if layout.tied else ""
    return Grid(
        title=f"{name}: family {layout.family} (matched by {layout.matched_by}), {layout.num_layers} layers",
        headings=("component", "eligible", "first tensor", "matrices", "weights", "share"), rows=tuple(rows),
        caption=f"{layout.num_weights:,} weights, {layout.num_eligible:,} eligible ({share:.1%}){tied}", num_labels=3,
    )  # fmt: skip


def tensors_grid(layout: Layout) -> Grid:
    rows = [
        (
            tensor.name, " x ".join(map(str, tensor.shape)), UNKNOWN if tensor.layer is None else str(tensor.layer),
            ", ".join(tensor.components), " ".join(tensor.axes),
        )
        for tensor in layout.tensors.values()
    ]  # fmt: skip
    headings = ("tensor", "shape", "layer", "components", "axes")
    return Grid(title="tensors", headings=headings, rows=tuple(rows), num_labels=len(headings))
