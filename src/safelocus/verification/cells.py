"""Cells: what the target did before and after each disturbance.

A *cell* is one disturbance: a selection (top, bottom, random), an intervention and a seed, measured on the
same prompts as the undisturbed *baseline*. Cells of one selection, scorer and setting differ only in seeds
and random draws; `Cells.pool` takes them together.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Self

import numpy as np

from safelocus.evaluation.measures import Measure, is_measure
from safelocus.verification.pooling import Outcomes, difference, level

SELECTIONS = ("top", "bottom", "random")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How many weights were disturbed, and how.

    Attributes:
        ratio: share of the weights; None for a selection that was not made by ratio.
        k: number of weights.
        intervention, noise: what was done, and how strongly in sigma (None where that does not apply).
    """

    ratio: float | None
    k: int
    intervention: str
    noise: float | None

    def __str__(self) -> str:
        size = f"{self.k:,} weights" if self.ratio is None else f"{100 * self.ratio:g} %"
        return f"{size}, {self.intervention}" if self.noise is None else f"{size}, {self.noise:g} sigma"


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Behaviour in one state of the model.

    Attributes:
        measures: name -> measure, as in `Evaluation.measures`.
        outcomes: name -> one character per prompt, in the baseline's order: "1", "0" or "-" (unscorable).
    """

    measures: dict[str, Measure]
    outcomes: dict[str, str] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return {name: measure.to_json() for name, measure in self.measures.items()}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One disturbance and what the model did under it.

    Attributes:
        selection: "top", "bottom" or "random".
        scorer: whose top or bottom; None for random selections, which are nobody's.
        setting: size and intervention.
        seed: of the noise.
        draw: number of the random selection; None for the others.
        observed: measures and outcomes.
    """

    selection: str
    scorer: str | None
    setting: Setting
    seed: int
    draw: int | None
    observed: Observation

    @property
    def key(self) -> tuple[Any, ...]:
        """Identity within a verification."""
        return (self.selection, self.scorer, self.setting, self.seed, self.draw)

    def to_json(self) -> dict[str, Any]:
        return {
            "selection": self.selection,
            "scorer": self.scorer,
            **asdict(self.setting),
            "seed": self.seed,
            "draw": self.draw,
            **self.observed.to_json(),
        }

    def to_line(self) -> dict[str, Any]:
        """With the outcomes, for `cells.jsonl`."""
        return {**self.to_json(), "outcomes": self.observed.outcomes}

    @classmethod
    def from_line(cls, values: Mapping[str, Any]) -> Self:
        setting = Setting(**{field.name: values[field.name] for field in fields(Setting)})
        return cls(
            selection=values["selection"],
            scorer=values["scorer"],
            setting=setting,
            seed=values["seed"],
            draw=values["draw"],
            observed=observation(values),
        )


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Cells of one selection, scorer and setting together; intervals account for seeds and prompts.

    Attributes:
        measures: name -> level.
        changes: name -> level minus baseline, paired by prompt.
        num_cells: seeds, times random draws.
    """

    selection: str
    scorer: str | None
    setting: Setting
    num_cells: int
    measures: dict[str, Measure]
    changes: dict[str, Measure]

    def to_json(self) -> dict[str, Any]:
        return {
            "selection": self.selection,
            "scorer": self.scorer,
            **asdict(self.setting),
            "num_cells": self.num_cells,
            **{name: measure.to_json() for name, measure in self.measures.items()},
            "changes": {name: measure.to_json() for name, measure in self.changes.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Baseline and cells, and how they pool: what `Verification` says of them."""

    baseline: Observation
    cells: list[Cell] = field(repr=False)
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def scorers(self) -> list[str]:
        """In the order given; the first is the one that the verdict is about."""
        return list(dict.fromkeys(cell.scorer for cell in self.cells if cell.scorer is not None))

    @cached_property
    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(cell.setting for cell in self.cells))

    @cached_property
    def measure_names(self) -> list[str]:
        """Measures that are proportions over prompts."""
        return [name for name in self.baseline.outcomes if self.baseline.measures[name].value is not None]

    def outcomes(self, name: str, selection: str, scorer: str | None, setting: Setting) -> Outcomes:
        """[cells, prompts] of one measure, NaN where unscorable; no rows where there are no such cells."""
        rows = [cell.observed.outcomes[name] for cell in self._of(selection, scorer, setting)]
        return np.array([_numbers(row) for row in rows]).reshape(len(rows), len(self.baseline.outcomes[name]))

    def changes(self, name: str, selection: str, scorer: str | None, setting: Setting) -> Outcomes:
        """[cells, prompts]: outcome minus the baseline's."""
        return self.outcomes(name, selection, scorer, setting) - _numbers(self.baseline.outcomes[name])

    def pool(self, selection: str, scorer: str | None, setting: Setting) -> Pooled | None:
        """All cells of these together; None where there are none."""
        cells = self._of(selection, scorer, setting)
        if not cells:
            return None
        return Pooled(
            selection=selection,
            scorer=scorer if selection != "random" else None,
            setting=setting,
            num_cells=len(cells),
            measures={n: level(self.outcomes(n, selection, scorer, setting)) for n in self.measure_names},
            changes={n: difference(self.changes(n, selection, scorer, setting)) for n in self.measure_names},
        )

    def perplexity(self, selection: str, scorer: str | None, setting: Setting) -> Measure | None:
        """As a multiple of the baseline's: geometric mean over the cells, the least and the most of them.

        Where a cell's perplexity is no number at any text, it is as broken as can be: there is no mean and no most
        then, and no least where that is all of them. None where it was not measured.
        """
        states = [self.baseline, *(cell.observed for cell in self._of(selection, scorer, setting))]
        found = [state.measures.get("perplexity") for state in states]
        before = None if found[0] is None else found[0].value
        after = [measure.value for measure in found[1:] if measure is not None]
        if not before or not after:
            return None
        ratios = np.array([value for value in after if value is not None]) / before
        least = float(ratios.min()) if len(ratios) else None
        if len(ratios) < len(after):
            return Measure(value=None, low=least, high=None, n=0)
        return Measure(value=float(np.exp(np.log(ratios).mean())), low=least, high=float(ratios.max()), n=len(ratios))

    @cached_property
    def pooled(self) -> list[Pooled]:
        """Every setting: top and bottom of each scorer, then random."""
        found = [
            self.pool(selection, scorer, setting)
            for setting in self.settings
            for selection, scorer in [
                *((which, scorer) for scorer in self.scorers for which in ("top", "bottom")),
                ("random", None),
            ]
        ]
        return [pooled for pooled in found if pooled is not None]

    def _of(self, selection: str, scorer: str | None, setting: Setting) -> list[Cell]:
        wanted = None if selection == "random" else scorer
        return self._grouped.get((selection, wanted, setting), [])

    @cached_property
    def _grouped(self) -> dict[tuple[str, str | None, Setting], list[Cell]]:
        groups: dict[tuple[str, str | None, Setting], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault((cell.selection, cell.scorer, cell.setting), []).append(cell)
        return groups


def observation(values: Mapping[str, Any]) -> Observation:
    """From a line of `cells.jsonl`."""
    measures = {name: Measure.from_json(value) for name, value in values.items() if is_measure(value)}
    return Observation(measures=measures, outcomes=dict(values["outcomes"]))


def _numbers(outcomes: str) -> Outcomes:
    return np.array([{"1": 1.0, "0": 0.0, "-": np.nan}[character] for character in outcomes])
