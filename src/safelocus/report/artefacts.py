"""Artefacts as tables: how a model was understood, how far two selections or scores agree, what a patch holds."""

import math
from pathlib import Path
from typing import Any

from safelocus.analysis.words import UNKNOWN, percent
from safelocus.model.fingerprint import dtype_name
from safelocus.model.layout import COMPONENTS, ELIGIBLE, Layout
from safelocus.patch import Patch
from safelocus.report.grid import Grid
from safelocus.scoring.comparison import ScoreComparison, SelectionComparison


def layout_facts(layout: Layout) -> dict[str, Any]:
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
    found = layout_facts(layout)["components"]
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


def overlap_grid(title: str, comparison: SelectionComparison) -> Grid:
    parts = {"all": comparison.overall, **comparison.components}
    parts |= {f"layer {name}": overlap for name, overlap in comparison.layers.items()}
    rows = [
        (name, f"{each.num_a:,}", f"{each.num_b:,}", f"{each.num_both:,}", _iou(each.iou), _iou(each.expected_iou))
        for name, each in parts.items()
    ]
    return Grid(
        title=title, headings=("where", "in A", "in B", "both", "IoU", "chance"), rows=tuple(rows),
        caption="chance: IoU of two random selections of these sizes", sections=(1, 1 + len(comparison.components)),
    )  # fmt: skip


def correlation_grid(title: str, comparison: ScoreComparison) -> Grid:
    rows = [
        (
            name, UNKNOWN if each.rho is None else f"{each.rho:.3f}",
            f"{each.num_ranked:,} of {each.num_weights:,}",
        )
        for name, each in {"all": comparison.correlation, **comparison.components}.items()
    ]  # fmt: skip
    headings = ("where", "Spearman's rho", "weights ranked")
    return Grid(title=f"{title}: rank correlation of scores", headings=headings, rows=tuple(rows))


def _iou(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def patch_facts(patch: Patch, file: Path) -> dict[str, Any]:
    """What a patch in a file is."""
    return {
        "k": patch.k,
        "num_changed": patch.num_changed,
        "share": patch.k / patch.selection.num_weights,
        "num_tensors": len(patch.new),
        "dtypes": [dtype_name(dtype) for dtype in patch.dtypes],
        "bytes": file.stat().st_size,
        "model": patch.selection.provenance.model,
        "model_type": patch.before.model_type,
        "method": patch.selection.provenance.method,
        "made_by": patch.metadata.get("made_by"),
        "before": patch.before.id,
        "after": patch.after.id if len(patch.after.tensors) == len(patch.new) else None,
        "revertible": patch.old is not None,
    }


def patch_grid(patch: Patch, file: Path) -> Grid:
    described = patch_facts(patch, file)
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
    return Grid(title=str(file), headings=("fact", "value"), rows=tuple(rows.items()), num_labels=2)
