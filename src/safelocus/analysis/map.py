"""Where a selection lies: every logical matrix, and sums over layers, components, experts and depth.

    share      = selected weights of a region / selected weights of the model
    expected   = weights of the region / all weights that could have been selected
    enrichment = share / expected: 1 is what blind chance gives, 2 twice as much
    score mass = sum of the region's scores / sum of all scores

Input: `Scores` and a `Selection` of the same model, or the selection alone (then everything about
scores is None). Output: a frozen `SafetyMap` of plain numbers, which tables, figures and the page draw.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import torch

from safelocus.analysis.concentration import Concentration, concentration
from safelocus.errors import SelectionError
from safelocus.model.layout import COMPONENTS, Matrix
from safelocus.scoring.scores import MatrixStatistics, Scores
from safelocus.selection.selection import Selection

DEPTHS = ("early", "middle", "late")
_CHUNK = 1 << 22  # coordinates whose scores are gathered at once

LayerKey = tuple[str | None, int | None]  # (stack, layer); (None, None) outside layers
ComponentKey = tuple[str, bool]  # (component, whether of shared experts)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the model. What it is summed over is None: the value matrices of all layers have no layer.

    `tokens` (of one routed expert): how many tokens of prompts and answers the router sent there; 0 means
    that its scores are zero for want of data, not for want of importance.
    """

    stack: str | None = None
    layer: int | None = None
    component: str | None = None
    expert: int | None = None
    shared_expert: bool = False
    depth: str | None = None  # "early", "middle" or "late" third of a stack's layers
    num_weights: int
    num_selected: int
    share: float
    expected: float
    enrichment: float
    score_mass: float | None = None
    tokens: int | None = None

    @property
    def layer_key(self) -> LayerKey:
        return self.stack, self.layer

    @property
    def component_key(self) -> ComponentKey:
        assert self.component is not None
        return self.component, self.shared_expert

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class MatrixRow(Region):
    """One logical matrix. `sigma` and `gradient_norm` as in the scores' statistics."""

    name: str
    sigma: float | None = None
    gradient_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class SafetyMap:
    """Everything the tables, figures and page say, as plain numbers.

    Attributes:
        model, objective, num_prompts: what was scored; None where unknown.
        method: the score that weights were selected by, "esi" for instance; "manual" if by none.
        score_method: the score that `score_mass`, `selected_mass` and `concentration` speak of.
        which, ratio, of, granularity, operation: how weights were selected, as in `Selection`.
        where: what the selection was restricted to, in words.
        left_out: what of the model was not understood and skipped, in words.
        num_model_weights, num_weights, num_selected: of the model, eligible, selected.
        selected_mass: part of the sum of all scores that the selection holds.
        matrices: one row per eligible matrix, in model order.
        cells: layer x component, the routed experts of a layer taken together.
        experts: layer x routed expert, the components taken together.
        components, layers, depths: totals.
        concentration: of all scores.
    """

    model: str | None
    method: str
    objective: str | None = None
    num_prompts: int | None = None
    score_method: str | None = None
    which: str
    ratio: float | None = None
    of: str | None = None
    granularity: str
    operation: str | None = None
    where: str | None = None
    left_out: str | None = None
    num_model_weights: int
    num_weights: int
    num_selected: int
    selected_mass: float | None
    matrices: tuple[MatrixRow, ...]
    cells: tuple[Region, ...]
    experts: tuple[Region, ...]
    components: tuple[Region, ...]
    layers: tuple[Region, ...]
    depths: tuple[Region, ...]
    concentration: Concentration | None

    @cached_property
    def layer_keys(self) -> list[LayerKey]:
        return [region.layer_key for region in self.layers]

    @cached_property
    def component_keys(self) -> list[ComponentKey]:
        return [region.component_key for region in self.components]

    @cached_property
    def cell(self) -> dict[tuple[LayerKey, ComponentKey], Region]:
        """`cells` by place; a layer without the component has no entry."""
        return {(region.layer_key, region.component_key): region for region in self.cells}

    @cached_property
    def expert(self) -> dict[tuple[LayerKey, int], Region]:
        """`experts` by place; dense layers have no entry."""
        return {(region.layer_key, region.expert): region for region in self.experts if region.expert is not None}

    @cached_property
    def num_experts(self) -> int:
        """Routed experts of a layer; 0 in a dense model."""
        return 1 + max((number for _, number in self.expert), default=-1)

    @cached_property
    def unrouted(self) -> list[Region] | None:
        """The routed experts that were given no token; None where tokens were not counted."""
        counted = [region for region in self.experts if region.tokens is not None]
        return [region for region in counted if region.tokens == 0] if counted else None

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`; `from_json` restores an equal map."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in _REGIONS:
            values[name] = [region.to_json() for region in values[name]]
        values["concentration"] = self.concentration.to_json() if self.concentration else None
        values["unrouted"] = None if self.unrouted is None else [[*r.layer_key, r.expert] for r in self.unrouted]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        fields = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        for name, kind in _REGIONS.items():
            fields[name] = tuple(kind.from_json(region) for region in values[name])
        if values["concentration"] is not None:
            fields["concentration"] = Concentration.from_json(values["concentration"])
        return cls(**fields)


_REGIONS: dict[str, type[Region]] = {
    "matrices": MatrixRow, "cells": Region, "experts": Region, "components": Region, "layers": Region, "depths": Region,
}  # fmt: skip


def safety_map(scores: Scores | None, selection: Selection) -> SafetyMap:
    """Locate a selection in its model.

    Args:
        scores: of the same model; adds score mass, sigma, tokens and the concentration curve.
        selection: the K selected weights, K > 0.

    Raises:
        SelectionError: the selection is empty, or belongs to a model of another layout than the scores.
        NumericalError: the scores are all zero, or not finite.

    Example:
        >>> import safelocus as sl
        >>> target = sl.load("organism:dense")
        >>> scores = sl.score(target, ["How do I build a bomb?"], objective=sl.Refusal(), progress=False)
        >>> located = safety_map(scores, scores.select(ratio=0.01))
        >>> round(sum(region.share for region in located.layers), 6)
        1.0
    """
    layout = selection.layout
    if selection.k == 0:
        raise SelectionError("the selection holds no weights: there is nothing to map. Select with a higher ratio.")
    if scores is not None and scores.layout.tensors != layout.tensors:
        raise SelectionError(
            "scores and selection belong to models of different layout "
            f"({len(scores.layout.tensors)} and {len(layout.tensors)} tensors). "
            "Map a selection with the scores it came from."
        )
    # what could have been selected: all that is eligible, and whatever else a hand-made selection names
    names = [name for name, tensor in layout.tensors.items() if tensor.eligible or name in selection.coordinates]
    num_selected = selection.per_matrix_counts()
    statistics = {s.matrix: s for s in scores.statistics} if scores is not None else {}
    curve = concentration(scores.tensors) if scores is not None and scores.tensors else None
    rows = _rows([m for name in names for m in layout.tensors[name].matrices], num_selected, statistics)
    order = {component: place for place, component in enumerate(COMPONENTS)}
    return SafetyMap(
        **_description(scores, selection),
        num_model_weights=layout.num_weights,
        num_weights=sum(row.num_weights for row in rows),
        num_selected=selection.k,
        selected_mass=_selected_mass(scores, selection, curve),
        matrices=tuple(rows),
        cells=_sum(rows, lambda row: (*row.layer_key, row.component, row.shared_expert), _CELL),
        experts=_sum((r for r in rows if r.expert is not None), lambda r: (*r.layer_key, r.expert), _EXPERT),
        components=tuple(
            sorted(
                _sum(rows, lambda row: (row.component, row.shared_expert), _COMPONENT),
                key=lambda region: (region.shared_expert, order[region.component or "other"]),
            )
        ),
        layers=_sum(rows, lambda row: row.layer_key, _LAYER),
        depths=_depths(rows),
        concentration=curve,
    )


def enrichment_of(regions: Sequence[Region]) -> float:
    """Of regions taken together."""
    return sum(region.share for region in regions) / sum(region.expected for region in regions)


def relative_depths(layers: Iterable[LayerKey]) -> dict[LayerKey, float]:
    """Where the middle of each layer lies in its stack: 0 at the first layer's input, 1 at the last one's output."""
    stacks: dict[str | None, set[int]] = {}
    for stack, layer in layers:
        if layer is not None:
            stacks.setdefault(stack, set()).add(layer)
    return {
        (stack, layer): (place + 0.5) / len(found)
        for stack, found in stacks.items()
        for place, layer in enumerate(sorted(found))
    }


def thirds(layers: Iterable[LayerKey]) -> dict[LayerKey, str]:
    """Early, middle or late: the third of its stack that each layer's middle lies in."""
    return {layer: DEPTHS[int(3 * depth)] for layer, depth in relative_depths(layers).items()}


def _rows(
    matrices: Sequence[Matrix], num_selected: Mapping[str, int], statistics: Mapping[str, MatrixStatistics]
) -> list[MatrixRow]:
    all_weights, all_selected = sum(m.num_weights for m in matrices), sum(num_selected.values())
    all_scores = sum(s.mean * s.num_weights for s in statistics.values())
    rows = []
    for matrix in matrices:
        statistic, selected = statistics.get(matrix.name), num_selected[matrix.name]
        share, expected = selected / all_selected, matrix.num_weights / all_weights
        rows.append(MatrixRow(
            name=matrix.name, stack=matrix.stack, layer=matrix.layer, component=matrix.component, expert=matrix.expert,
            shared_expert=matrix.shared_expert, num_weights=matrix.num_weights, num_selected=selected, share=share,
            expected=expected, enrichment=share / expected,
            score_mass=statistic.mean * statistic.num_weights / all_scores if statistic and all_scores else None,
            sigma=statistic.sigma if statistic else None,
            gradient_norm=statistic.gradient_norm if statistic else None,
            tokens=statistic.tokens if statistic else None,
        ))  # fmt: skip
    return rows


_LAYER = ("stack", "layer")
_COMPONENT = ("component", "shared_expert")
_CELL = _LAYER + _COMPONENT
_EXPERT = (*_LAYER, "expert")


def _sum(
    rows: Iterable[MatrixRow], key: Callable[[MatrixRow], tuple[Any, ...]], fields: tuple[str, ...]
) -> tuple[Region, ...]:
    """Regions made of the rows of one key each, in the order in which keys first appear."""
    groups: dict[tuple[Any, ...], list[MatrixRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    regions = []
    for found, members in groups.items():
        share, expected = sum(row.share for row in members), sum(row.expected for row in members)
        masses = [row.score_mass for row in members if row.score_mass is not None]
        # gate, up and down of an expert see the same tokens
        tokens = [row.tokens for row in members if row.tokens is not None] if fields == _EXPERT else []
        regions.append(Region(
            **dict(zip(fields, found, strict=True)), num_weights=sum(row.num_weights for row in members),
            num_selected=sum(row.num_selected for row in members), share=share, expected=expected,
            enrichment=share / expected, score_mass=sum(masses) if masses else None,
            tokens=max(tokens) if tokens else None,
        ))  # fmt: skip
    return tuple(regions)


def _depths(rows: Sequence[MatrixRow]) -> tuple[Region, ...]:
    """Thirds of each stack."""
    third = thirds(row.layer_key for row in rows)
    inside = [row for row in rows if row.layer is not None]
    return _sum(inside, lambda row: (row.stack, third[row.layer_key]), ("stack", "depth"))


def _selected_mass(scores: Scores | None, selection: Selection, curve: Concentration | None) -> float | None:
    """Part of the sum of all scores that lies at the selection's coordinates."""
    if scores is None or curve is None:
        return None
    total = 0.0
    for name, flat_index in selection.coordinates.items():
        if name in scores.tensors:
            flat = scores.tensors[name].detach().reshape(-1)
            total += sum(
                float(flat[part.to(flat.device)].sum(dtype=torch.float64)) for part in flat_index.split(_CHUNK)
            )
    return total / curve.total


def _description(scores: Scores | None, selection: Selection) -> dict[str, Any]:
    """The fields of the map that say what was scored and selected."""
    made = selection.provenance
    copied = {name: getattr(selection, name) for name in ("which", "ratio", "of", "granularity", "operation")}
    return copied | {
        "model": made.model, "objective": made.objective_label, "num_prompts": made.num_prompts, "method": made.method,
        "score_method": scores.provenance.method if scores is not None else None,
        "where": made.extra.get("where"), "left_out": selection.layout.left_out,
    }  # fmt: skip
