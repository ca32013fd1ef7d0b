"""Words and numbers as terminal, page and files print them: one spelling for all."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from safelocus.analysis.map import ComponentKey, LayerKey, Region, SafetyMap, enrichment_of

TIMES = "\N{MULTIPLICATION SIGN}"
UNKNOWN = "\N{EN DASH}"  # in tables
_METHODS = {
    "esi": "ESI", "snip": "SNIP", "wanda": "Wanda", "gradient": "gradient", "magnitude": "magnitude",
    "random": "random score",
}  # fmt: skip
MEASURES = {
    "refusal": "refusal", "asr": "ASR", "partial": "partial refusal", "over_refusal": "over-refusal",
    "utility": "utility", "incoherent": "incoherent", "task": "task",
}  # fmt: skip
_KINDS = {
    "selection": "selected weights", "full": "all weights", "lora": "LoRA", "random": "random", "bottom": "bottom",
}  # fmt: skip
_OPERATIONS = {"&": "intersection", "-": "difference", "|": "union"}
_EVEN = 1.15  # below this enrichment there is nothing to point at
_NEIGHBOUR = 0.5  # a layer beside the most enriched one belongs to it from this part of its excess on


def percent(share: float) -> str:
    """Two significant digits and no more decimals than needed: "31 %", "1.1 %", "0.042 %"."""
    value = 100 * share
    if value == 0 or value >= 99.95:
        return f"{value:.0f} %"
    if value >= 9.95:
        return f"{value:.0f} %" if value < 99 else f"{value:.1f} %"
    digits = next((digits for digits in range(1, 12) if value >= 0.95 * 10.0 ** (1 - digits)), 12)
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + " %"


def share_percent(share: float) -> str:
    """For columns of shares, where the smallest do not matter: "<0.01 %" below that."""
    return "<0.01 %" if 0 < share < 0.0001 else percent(share)


def times(enrichment: float) -> str:
    """An enrichment in at most four digits: "0×", "0.04×", "0.43×", "2.3×", "14×"."""
    if enrichment == 0:
        return f"0{TIMES}"
    if enrichment < 0.01:
        return f"<.01{TIMES}"
    if enrichment < 0.995:
        return f"{enrichment:.2f}{TIMES}"
    return f"{enrichment:.1f}{TIMES}" if enrichment < 9.95 else f"{enrichment:.0f}{TIMES}"


def numbers_of(measure: Any) -> Mapping[str, Any]:
    """The JSON of a measure or a difference, given as either's JSON or itself; empty where it is unknown."""
    values = measure if measure is None or isinstance(measure, Mapping) else measure.to_json()
    return {} if values is None or values["value"] is None else values


def interval(measure: Any, *, ends: bool = True) -> str:
    """A measure, a difference or either's JSON in percent: "67 [51,83]"; a dash where it is unknown.

    Args:
        ends: with the interval; else "67".
    """
    if not (values := numbers_of(measure)):
        return UNKNOWN
    shown = f"{100 * values['value']:.0f}"
    if ends and values["low"] is not None and values["high"] is not None:
        shown += f" [{100 * values['low']:.0f},{100 * values['high']:.0f}]"
    return re.sub(r"-0(?![0-9])", "0", shown)


def in_words(measure: Any, *, ends: bool = True) -> str:
    """ "67 % [51, 83]", or "67 %"; a dash where it is unknown."""
    value, bracket, rest = interval(measure, ends=ends).partition(" [")
    return value if value == UNKNOWN else f"{value} %{bracket}{rest.replace(',', ', ')}"


def p_value(p: float) -> str:
    """ "0.023", "<0.001", "1"."""
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def count(number: int) -> str:
    """Thousands apart: "12,672"."""
    return f"{number:,}"


def layer_label(key: LayerKey) -> str:
    """ "3", "encoder 3", or "none" for what lies outside the layers."""
    stack, layer = key
    number = "none" if layer is None else str(layer)
    return f"{stack} {number}" if stack else number


def component_label(key: ComponentKey) -> str:
    """ "value", "key/value", "shared up", "ssm-x"."""
    component, shared = key
    return ("shared " if shared else "") + {"key_value": "key/value"}.get(component, component.replace("_", "-"))


def expert_label(region: Region) -> str:
    """ "layer 3 expert 5"."""
    return f"layer {layer_label(region.layer_key)} expert {region.expert}"


def method_label(method: str | None) -> str:
    """ "ESI", "SNIP", ..."""
    return _METHODS.get(method or "", method or "score")


def kind_label(kind: str) -> str:
    """What was trained: "selected weights", "random", "LoRA", "SNIP"."""
    return _KINDS.get(kind) or method_label(kind)


def measure_label(name: str) -> str:
    """ "over-refusal", "ASR by guard meta-llama/Llama-Guard-3-8B", "utility, gsm8k"."""
    kind, _, of = name.partition("@")
    label = MEASURES.get(kind, kind.replace("_", " "))
    return f"{label} by {of}" if of and kind == "asr" else f"{label}, {of}" if of else label


def selection_label(located: SafetyMap) -> str:
    """What was selected: "top 1 % of the model's weights by ESI"."""
    unit = "" if located.granularity == "weight" else f" as whole {_plural(located.granularity)}"
    part = _part(located) + unit + (f" within {located.where}" if located.where else "")
    if located.which == "set":
        return f"{_OPERATIONS.get(located.operation or '', 'combination')} of selections, {part}"
    if located.which in ("top", "bottom"):
        return f"{located.which} {part} by {method_label(located.method)}"
    return f"random {part}" if located.which == "random" else f"selection of {part}"


def title(located: SafetyMap) -> str:
    """Model, method and ratio: "organism:dense: top 1 % of the model's weights by ESI"."""
    return f"{located.model}: {selection_label(located)}" if located.model else capital(selection_label(located))


def unrouted_note(located: SafetyMap) -> str:
    """ "3 of 48 were never given a token"."""
    number = len(located.unrouted or [])
    was = "was" if number == 1 else "were"
    return f"{count(number)} of {count(len(located.experts))} {was} never given a token"


def summary_lines(located: SafetyMap) -> list[str]:
    """Two to four plain sentences with the numbers that matter, after what was left out, if anything."""
    lines = (
        f"Mind: {located.left_out}." if located.left_out else "",
        _mass(located),
        _enriched(located),
        _depth(located),
        _experts(located),
    )
    return [line for line in lines if line]


def _mass(located: SafetyMap) -> str:
    number = f"{count(located.num_selected)} weights"
    plain = located.granularity == "weight" and located.where is None
    if located.which == "top" and plain and located.ratio is not None:
        what = f"The {_ratio(located.ratio)} with the highest {method_label(located.method)} ({number})"
    else:
        what = f"The {selection_label(located)} ({number})"
    if located.selected_mass is None:
        part = percent(located.num_selected / located.num_weights)
        return f"{what} are {part} of all {count(located.num_weights)} eligible weights."
    return f"{what} hold {percent(located.selected_mass)} of all {method_label(located.score_method)}."


def _enriched(located: SafetyMap) -> str:
    component = max(located.components, key=lambda region: region.enrichment)
    found = []
    if component.enrichment >= _EVEN:
        label = component_label(component.component_key)
        found.append(f"{label} matrices ({times(component.enrichment)} what their size would give)")
    if (run := _enriched_layers(located.layers)) and (enrichment := enrichment_of(run)) >= _EVEN:
        found.append(f"{_run_label(run)} ({times(enrichment)})")
    if not found:
        return f"It is spread evenly: no component and no layer holds {_EVEN:g}{TIMES} what its size would give."
    return f"Most enriched: {', '.join(found)}."


def _enriched_layers(layers: Sequence[Region]) -> list[Region]:
    """The most enriched layer with those around it that are nearly as enriched; alone where they even it out."""
    layers = [region for region in layers if region.layer is not None]
    if len(layers) < 2:
        return []
    best = max(range(len(layers)), key=lambda i: layers[i].enrichment)
    least = 1 + _NEIGHBOUR * (layers[best].enrichment - 1)
    first = last = best
    while first > 0 and layers[first - 1].enrichment >= least and layers[first - 1].stack == layers[best].stack:
        first -= 1
    while (
        last + 1 < len(layers) and layers[last + 1].enrichment >= least and layers[last + 1].stack == layers[best].stack
    ):
        last += 1
    run = list(layers[first : last + 1])
    return run if enrichment_of(run) >= _EVEN else [layers[best]]


def _run_label(run: Sequence[Region]) -> str:
    first, last = layer_label(run[0].layer_key), run[-1].layer
    return f"layer {first}" if len(run) == 1 else f"layers {first}-{last}"


def _depth(located: SafetyMap) -> str:
    if len(located.depths) != 3 or len({region.stack for region in located.depths}) > 1:
        return ""  # several stacks have thirds of their own: that is a table, not a sentence
    names = [f"{region.depth}" for region in located.depths]
    shares = [percent(region.share) for region in located.depths]
    return f"The {_and(names)} third of the layers hold {_and(shares)} of the selection."


def _experts(located: SafetyMap) -> str:
    if not located.experts:
        return ""
    best = max(located.experts, key=lambda region: region.enrichment)
    text = f"Of the routed experts the most enriched is {expert_label(best)} ({times(best.enrichment)})"
    if located.unrouted is None:
        return text + "."
    return f"{text}; {unrouted_note(located)}." if located.unrouted else f"{text}; every one was given tokens."


def _part(located: SafetyMap) -> str:
    if located.ratio is None:
        return f"{percent(located.num_selected / located.num_model_weights)} of the model's weights"
    whole = "eligible" if located.of == "eligible" else "model's"
    return f"{_ratio(located.ratio)} of the {whole} weights"


def _ratio(ratio: float) -> str:
    return f"{100 * ratio:.4g} %"  # as it was asked for, not rounded


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _plural(granularity: str) -> str:
    return {"matrix": "matrices"}.get(granularity, f"{granularity}s")


def capital(text: str) -> str:
    """With a capital at the start; nothing else changes."""
    return text[:1].upper() + text[1:]
