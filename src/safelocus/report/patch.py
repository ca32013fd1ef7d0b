"""What a patch holds and where it came from, as facts and as a table."""

from pathlib import Path
from typing import Any

from safelocus.analysis.words import percent
from safelocus.patch import Patch
from safelocus.report.grid import Grid


def facts(patch: Patch, file: Path) -> dict[str, Any]:
    """What a patch in a file is."""
    return {
        "k": patch.k,
        "num_changed": patch.num_changed,
        "share": patch.k / patch.selection.num_weights,
        "num_tensors": len(patch.new),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in patch.dtypes],
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
    described = facts(patch, file)
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
