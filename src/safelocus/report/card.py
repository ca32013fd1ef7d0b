"""The model card of a patch, from the results of its enhancement: what it is, how it was made, what it changed."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from safelocus.analysis.words import count
from safelocus.enhancement.result import PATCH
from safelocus.inert import code, line, markdown
from safelocus.report.training import effect, outcome_grid

_LIMITS = (
    "Training on few weights brings back refusals that the model has in it; it does not teach a model that never "
    "learned to refuse.",
    "Measured on the prompts above, with greedy answers; not on other phrasings, languages, attacks or sampling.",
    "The patch can be reverted by anyone who has it, and trained away by anyone who has the weights.",
)


def card(results: Mapping[str, Any]) -> str:
    """The Markdown of the card of an enhancement's `results.json`."""
    made, k = results["provenance"], count(results["patch"]["k"])
    model, dtype = line(str(made.get("model", "model"))), made["dtype"]
    in_shell, in_python = (quote(model) for quote in (shlex.quote, json.dumps))
    before = results["before"]
    parts = before["provenance"].get("prompts", []) + before["provenance"].get("tasks", [])
    sources = ", ".join(f"{part['source']} ({part.get('num_prompts', part.get('num_examples'))})" for part in parts)
    judges = ", ".join(judge["judge"] for judge in before["judges"])
    sections = [
        f"# Safety patch for {markdown(model)}",
        f"New values for {k} weights of {code(model)} and no others. {effect(results)} Without them it is "
        "what it was, bit for bit.",
        "## Before and after",
        outcome_grid(results).markdown(),
        "Refusal, ASR and incoherence on harmful prompts (incoherence also on harmless ones), over-refusal on harmless "
        f"ones. ASR by: {markdown(judges)}. Measured with {markdown(sources)}.",
    ]
    if results["controls"]:
        sections.append(
            "The other rows are controls: the same data, steps and settings on other weights. Only what the selected "
            "weights do beyond those of equal number says that their choice mattered."
        )
    remarks = [f"{remark[0].upper()}{remark[1:]}." for remark in results["notes"]]
    sections += [
        "## How it was made",
        "\n".join(f"- {markdown(how)}" for how in _making(results)),
        "## How to apply and revert",
        f"```\nsafelocus patch apply {PATCH} {in_shell} -o patched\n"
        f"safelocus patch revert {PATCH} patched -o original\n```",
        f'```python\nimport safelocus as sl\n\ntarget = sl.load({in_python}, dtype="{dtype}")\n'
        f'patch = sl.Patch.load("{PATCH}")\npatch.apply(target)\npatch.revert(target)\n```',
        f"Its values are {dtype}; for a folder with weights of another type add that: `--dtype`.",
        "It fits this model only; on any other it is refused.",
        "## Limits",
        "\n".join(f"- {markdown(limit)}" for limit in (*_LIMITS, *remarks)),
        "## Licence",
        f"The patch is a derivative of {code(model)}: that model's licence applies to it, and the terms of the data it "
        "was trained on. Add them here before you share it.",
    ]
    front = f"---\nlibrary_name: safelocus\ntags:\n- safety\n- patch\nbase_model: {in_python}\n---\n"
    return front + "\n" + "\n\n".join(sections) + "\n"


def _making(results: Mapping[str, Any]) -> Iterator[str]:
    """How the patch was made, line by line."""
    made, settings, training = results["provenance"], results["settings"], results["training"]
    how_found = " ".join(str(made["selection"][key]) for key in ("which", "method") if made["selection"].get(key))
    yield f"weights: {count(results['patch']['k'])}, {how_found or 'given by hand'}"
    yield f"refusals: {_set(made['data'])}"
    retained = " and ".join(_set(part) for part in made["retained"])
    if retained:
        by_itself = ", answered by the model itself" if made["own_answers"] else ""
        retained += (
            f"{by_itself}; {made['retain_rows']} with each refusal, divergence x {made['retain_kl']:g}, "
            f"loss x {made['retain_weight']:g}"
        )
    yield f"retained: {retained or 'nothing'}"
    yield (
        f"AdamW on fp32 copies of the selected weights, rate {training['learning_rate']:g} ({settings['schedule']}), "
        f"step {training['step']} of {settings['steps']}, {settings['batch_size'] * settings['accumulation']} refusals "
        f"a step, seed {settings['seed']}"
    )
    if training["back"]:
        yield f"kept: {100 * training['share']:.0f} % of the way from the original weights, by the validation part"
    if training["stopped"]:
        yield f"ended early: {training['stopped']}"
    yield f"versions: {', '.join(f'{name} {version}' for name, version in made['versions'].items())}"


def _set(part: Mapping[str, Any]) -> str:
    return f"{part['source']} ({part['num_prompts']} prompts)"
