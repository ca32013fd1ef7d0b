"""Maps with numbers that are easy to recognise, of every kind of model."""

from safelocus.analysis.concentration import Concentration, Point
from safelocus.analysis.map import MatrixRow, Region, SafetyMap

COMPONENTS = ("query", "key", "value", "output", "gate", "up", "down")
EXPERT_COMPONENTS = ("gate", "up", "down")


def make_map(*, layers: int = 4, experts: int = 0, shared: bool = False, scores: bool = True, name: str = "tiny"):
    """A map with numbers that are easy to recognise: the value matrix of layer 2 is 4 times enriched."""
    regions: dict[str, list] = {"matrices": [], "cells": [], "experts": [], "components": [], "layers": []}
    keys = [(c, False) for c in COMPONENTS] + [(c, True) for c in EXPERT_COMPONENTS if shared]
    size = 1 / (layers * len(keys))

    def region(kind=Region, enrichment=1.0, expected=size, **fields):
        return kind(
            num_weights=round(1e6 * expected),
            num_selected=round(1e4 * expected * enrichment),
            share=expected * enrichment,
            expected=expected,
            enrichment=enrichment,
            score_mass=expected if scores else None,
            **fields,
        )

    for layer in range(layers):
        for component, is_shared in keys:
            enrichment = 4.0 if (layer, component) == (2, "value") else 0.0 if component == "key" else 0.8
            where = {"layer": layer, "component": component, "shared_expert": is_shared}
            regions["cells"].append(region(enrichment=enrichment, **where))
            matrix = f"model.layers.{layer}.self_attn.qkv_proj.weight[{component}]"
            regions["matrices"].append(region(MatrixRow, enrichment, **where, name=matrix))
        regions["layers"].append(region(layer=layer, expected=1 / layers, enrichment=2.0 if layer == 2 else 0.66))
        for expert in range(experts):
            tokens = (0 if (layer, expert) == (1, 3) else 10 * (expert + 1)) if scores else None
            enrichment = 0.0 if tokens == 0 else 0.25 * (expert + 1)
            size_of_one = 0.4 / layers / experts
            found = region(layer=layer, expert=expert, enrichment=enrichment, expected=size_of_one, tokens=tokens)
            regions["experts"].append(found)
    for component, is_shared in keys:
        enrichment = 1.9 if component == "value" else 0.8
        regions["components"].append(
            region(component=component, shared_expert=is_shared, enrichment=enrichment, expected=1 / len(keys))
        )
    points = tuple(Point(fraction=10.0**e, num_weights=10 ** (6 + e), mass=(e + 5) / 5) for e in range(-4, 1))
    curve = Concentration(
        num_weights=10**6,
        num_zero=0,
        total=5.0,
        points=points,
        mass_error=1e-7,
        gini=0.7,
        gini_error=1e-8,
    )
    return SafetyMap(
        model=name,
        method="esi",
        score_method="esi" if scores else None,
        which="top",
        ratio=0.01,
        of="model",
        granularity="weight",
        num_model_weights=1_000_000,
        num_weights=1_000_000,
        num_selected=10_000,
        selected_mass=0.31 if scores else None,
        depths=tuple(
            region(depth=depth, expected=1 / 3, enrichment=enrichment)
            for depth, enrichment in (("early", 0.6), ("middle", 1.5), ("late", 0.9))
        ),
        concentration=curve if scores else None,
        **{name: tuple(found) for name, found in regions.items()},
    )


MAPS = {
    "dense": {},
    "moe": {"experts": 8},
    "shared": {"experts": 16, "shared": True},
    "many experts": {"layers": 6, "experts": 64},
    "deep": {"layers": 80},
    "no scores": {"scores": False, "experts": 4},
}
