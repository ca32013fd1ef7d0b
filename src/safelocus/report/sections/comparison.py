"""Several runs side by side: maps by relative depth and component, patterns, and measures of behaviour."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelocus.report import text
from safelocus.report.blocks import Cell, Figure, Listing, Part, Table
from safelocus.report.map import SafetyMap, relative_depths
from safelocus.report.patterns import Pattern
from safelocus.report.runs import ReportRun
from safelocus.report.sections.measures import dots, listing, proportions_in
from safelocus.report.sections.patterns import patterns_grid

_MOST_STATES = 8  # as many marks as can be told apart in one chart
_BEHAVIOUR = ("evaluate", "enhance", "preserve")  # runs that measure how a model behaves


def comparison_parts(runs: Sequence[ReportRun]) -> list[Part]:
    """Nothing where there is nothing to compare."""
    maps = {name: run.maps[model] for name, run, model in named(runs)}
    tested = {name: run.patterns[model] for name, run, model in named(runs)}
    behaviours = _behaviours(runs)
    parts = []
    if len(maps) > 1:
        parts.append(_depth_part(maps, tested))
    if sum(run.kind in _BEHAVIOUR for run in runs) > 1:
        few = len(behaviours) <= _MOST_STATES
        figure = dots("How the models behave", behaviours, series="run") if few else None
        table = listing(behaviours, heading="run")
        parts.append(Part(title="How the models behave", blocks=[figure, table] if figure else [table]))
    return parts


def named(runs: Sequence[ReportRun]) -> Iterator[tuple[str, ReportRun, str]]:
    """(name, run, model) of every map: named by its model, or with the run where models repeat."""
    found = [(run, model) for run in runs for model in run.maps]
    models = [model for _, model in found]
    for run, model in found:
        yield (model if models.count(model) == 1 else f"{run.name}: {model}"), run, model


def _behaviours(runs: Sequence[ReportRun]) -> dict[str, Mapping[str, Any]]:
    """Every state of a model whose behaviour was measured: evaluations, and before and after of trainings."""
    found: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        if run.kind == "evaluate":
            found[run.name] = run.results
        elif run.kind in _BEHAVIOUR:
            found |= {f"{run.name}, {state}": run.results[state] for state in ("before", "after")}
    return {name: values for name, values in found.items() if proportions_in(values)}


def _depth_part(maps: Mapping[str, SafetyMap], tested: Mapping[str, Sequence[Pattern]]) -> Part:
    deepest = [max(1, len([k for k in located.layer_keys if k[1] is not None])) for located in maps.values()]
    rows: list[list[Cell]] = []
    for name, located in maps.items():
        depths = relative_depths(located.layer_keys)
        several = len({stack for stack, _ in depths}) > 1
        rows += [
            [f"{name}, {region.stack}" if several else name, depths[region.layer_key], region.enrichment,
             text.layer_label(region.layer_key)]
            for region in located.layers
            if region.layer_key in depths
        ]  # fmt: skip
    depth = Figure(
        kind="lines",
        title="Enrichment by relative depth",
        table=Table(
            columns={"model": "text", "relative depth": "number", "enrichment": "times", "layer": "text"}, rows=rows
        ),
        options={
            "series": "model", "x": "relative depth", "value": "enrichment", "x_type": "linear", "x_range": [0, 1],
            "x_title": "relative depth: 0 first layer, 1 last", "reference": 1.0, "range": [0, None],
        },
        note=f"Layers of models with {' and '.join(map(str, dict.fromkeys(deepest)))} layers, laid over one another.",
        wide=True,
    )  # fmt: skip
    components: list[list[Cell]] = [
        [text.component_label(region.component_key), name, region.enrichment]
        for name, located in maps.items()
        for region in located.components
    ]
    by_component = Figure(
        kind="dots",
        title="Enrichment by component",
        table=Table(columns={"component": "text", "model": "text", "enrichment": "times"}, rows=components),
        options={"group": "component", "series": "model", "value": "enrichment", "reference": 1.0, "range": [0, None]},
        wide=True,
    )
    return Part(
        title="Where safety lies",
        notes=["1\N{MULTIPLICATION SIGN} is what size alone gives."],
        blocks=[depth, by_component, _totals(maps), Listing.of(patterns_grid(tested))],
    )


def _totals(maps: Mapping[str, SafetyMap]) -> Listing:
    rows = [
        (
            name,
            text.count(located.num_model_weights),
            text.count(located.num_selected),
            text.UNKNOWN if located.selected_mass is None else text.percent(located.selected_mass),
            text.UNKNOWN if located.concentration is None else f"{located.concentration.gini:.2f}",
            *(_of_depth(located, depth) for depth in ("early", "middle", "late")),
        )
        for name, located in maps.items()
    ]
    headings = ("model", "weights", "selected", "of all scores", "Gini", "early third", "middle", "late")
    return Listing(headings=headings, rows=rows, note="thirds of the layers: their part of the selection")


def _of_depth(located: SafetyMap, depth: str) -> str:
    return text.share_percent(sum(region.share for region in located.depths if region.depth == depth))
