"""Several runs side by side: maps by relative depth and component, patterns, and measures of behaviour."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safelocus.analysis import words
from safelocus.analysis.map import SafetyMap, relative_depths
from safelocus.analysis.patterns import Pattern
from safelocus.report import colours
from safelocus.report.blocks import Lines, Part, Value
from safelocus.report.grid import Grid, Tint
from safelocus.report.maps import patterns_grid
from safelocus.report.measures import measures_grid, proportions_in
from safelocus.report.runs import ReportRun

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
        table = measures_grid("How the models behave", behaviours, heading="run")
        parts.append(Part(title=table.title, blocks=[table]))
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
    stacks = [Counter(stack for stack, layer in located.layer_keys if layer is not None) for located in maps.values()]
    deepest = dict.fromkeys(" + ".join(map(str, each.values())) or "no" for each in stacks)
    rows: list[list[Value]] = []
    for name, located in maps.items():
        depths = relative_depths(located.layer_keys)
        several = len({stack for stack, _ in depths}) > 1
        rows += [
            [f"{name}, {region.stack}" if several else name, depths[region.layer_key], region.enrichment,
             words.layer_label(region.layer_key)]
            for region in located.layers
            if region.layer_key in depths
        ]  # fmt: skip
    depth = Lines(
        title="Enrichment by relative depth",
        columns={"model": "text", "relative depth": "number", "enrichment": "times", "layer": "text"}, rows=rows,
        series="model", x="relative depth", value="enrichment", x_title="relative depth: 0 first layer, 1 last",
        x_span=(0, 1), span=(0, None), reference=1.0, wide=True,
        note=f"Layers of models with {' and '.join(deepest)} layers, laid over one another.",
    )  # fmt: skip
    return Part(
        title="Where safety lies", notes=[f"1{words.TIMES} is what size alone gives."],
        blocks=[depth, _by_component(maps), _totals(maps), patterns_grid(tested)],
    )  # fmt: skip


def _by_component(maps: Mapping[str, SafetyMap]) -> Grid:
    """Enrichment of every component, a column per model."""
    found = {name: {r.component_key: r.enrichment for r in located.components} for name, located in maps.items()}
    limit = colours.log2_limit(value for regions in found.values() for value in regions.values())
    rows = [
        (words.component_label(key), *(
            Tint(words.times(regions[key]), colours.position(regions[key], limit)) if key in regions else words.UNKNOWN
            for regions in found.values()
        ))
        for key in dict.fromkeys(key for regions in found.values() for key in regions)
    ]  # fmt: skip
    return Grid(title="Enrichment by component", headings=("component", *found), rows=tuple(rows))


def _totals(maps: Mapping[str, SafetyMap]) -> Grid:
    rows = [
        (
            name, words.count(located.num_model_weights), words.count(located.num_selected),
            words.UNKNOWN if located.selected_mass is None else words.percent(located.selected_mass),
            words.UNKNOWN if located.concentration is None else f"{located.concentration.gini:.2f}",
            *(_of_depth(located, depth) for depth in ("early", "middle", "late")),
        )
        for name, located in maps.items()
    ]  # fmt: skip
    return Grid(
        title="", headings=("model", "weights", "selected", "of all scores", "Gini", "early third", "middle", "late"),
        rows=tuple(rows), caption="thirds of the layers: their part of the selection",
    )  # fmt: skip


def _of_depth(located: SafetyMap, depth: str) -> str:
    return words.share_percent(sum(region.share for region in located.depths if region.depth == depth))
