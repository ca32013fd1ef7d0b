"""A verification: its cells, and what follows from them.

On disk: `results.json` (`baseline`, `cells`, `pooled`, `rankings`, `verdicts`, `provenance`) and `cells.jsonl`,
which holds the outcome of every prompt in every cell: "1", "0", or "-" where it could not be told.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from safelocus.run.files import read_json, read_lines, reading, seal, write_json, write_lines
from safelocus.verification.cells import Cell, Cells, observation
from safelocus.verification.ranking import Rank, rank
from safelocus.verification.verdict import VerificationVerdict, verdict_of

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Verification(Cells):
    """Baseline and cells, ranked and judged. Make one with `verify`.

    Attributes:
        baseline: the undisturbed model.
        cells: in the order they were measured.
        provenance: model, scorers, prompts, judges, settings, versions.
        notes: what a reader should know, in whole sentences.
    """

    notes: tuple[str, ...] = ()

    @cached_property
    def verdicts(self) -> dict[str, VerificationVerdict]:
        """Intervention -> what the first scorer's cells say, in numbers and plain words."""
        interventions = dict.fromkeys(setting.intervention for setting in self.settings)
        return {name: verdict_of(self, self.scorers[0], name) for name in interventions}

    @property
    def verdict(self) -> VerificationVerdict:
        """The verdict under the first intervention."""
        return next(iter(self.verdicts.values()))

    @cached_property
    def rankings(self) -> dict[str, list[Rank]]:
        """Intervention -> the scorers, those first whose top weights break most safety per utility lost."""
        return {name: rank(self, name) for name in self.verdicts}

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "baseline": self.baseline.to_json(),
            "cells": [cell.to_json() for cell in self.cells],
            "pooled": [pooled.to_json() for pooled in self.pooled],
            "rankings": {name: [entry.to_json() for entry in entries] for name, entries in self.rankings.items()},
            "verdicts": {name: verdict.to_json() for name, verdict in self.verdicts.items()},
            "notes": list(self.notes),
            "provenance": self.provenance,
        }

    def save(self, folder: Path) -> None:
        """Write `results.json` and `cells.jsonl`."""
        rows = [
            {"baseline": {**self.baseline.to_json(), "outcomes": self.baseline.outcomes}},
            *(c.to_line() for c in self.cells),
        ]
        write_lines(folder / "cells.jsonl", rows)
        write_json(folder / "results.json", self.to_json())
        seal(folder, ["cells.jsonl", "results.json"])

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote; RunError for a folder that holds no verification."""
        folder = Path(folder)
        with reading(folder, "verify"):
            results = read_json(folder / "results.json")
            first, *rows = read_lines(folder / "cells.jsonl")
            return cls(
                baseline=observation(first["baseline"]),
                cells=[Cell.from_line(row) for row in rows],
                provenance=results["provenance"],
                notes=tuple(results["notes"]),
            )
