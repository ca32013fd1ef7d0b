"""Run folders of every kind, with numbers that are easy to recognise."""

import json
from pathlib import Path

from transformers import LlamaConfig, Qwen3MoeConfig

from safelocus.analysis.map import SafetyMap, safety_map
from safelocus.model.layout import Layout
from test_map import EXPERTS, SMALL, random_scores


def map_run(folder: Path, maps: list[tuple[str, SafetyMap]]) -> Path:
    return _write(folder, {"maps": {name: located.to_json() for name, located in maps}})


def score_run(folder: Path, kind: str) -> Path:
    """A map with the selection it is of."""
    config = LlamaConfig(**SMALL) if kind == "dense" else Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=8)
    scores = random_scores(Layout.from_config(config))
    selection = scores.select(0.1)
    map_run(folder, [("tiny", safety_map(scores, selection))])
    selection.save(folder / "selection.safetensors")
    (folder / "run.toml").write_text(f'command = "score"\nmodel = "tiny-{kind}"\nrefusal = true\n')
    return folder


def measure(value: float, n: int = 48) -> dict:
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": n}


def measures(asr: float, *, over_refusal: float = 0.0, utility: float = 0.9) -> dict:
    return {
        "asr": measure(asr),
        "refusal": measure(1 - asr),
        "over_refusal": measure(over_refusal),
        "utility": measure(utility),
        "incoherent": measure(0.02),
    }


def enhance_run(folder: Path) -> Path:
    """As `enhance` writes it: before, after, controls, curve, losses and sweep, with responses."""
    kinds = ("selection", "random", "magnitude")
    rates = (1e-4, 1e-3, 3e-3)
    results = {
        "before": measures(0.96),
        "after": measures(0.04, over_refusal=0.06),
        "training": {
            "num_weights": 12709,
            "learning_rate": 1e-3,
            "step": 80,
            "share": 0.7,
            "back": [{"step": 80, "share": share, **measures(share / 4)} for share in (1.0, 0.9, 0.8, 0.7)],
        },
        "controls": {
            kind: {**measures(0.7), "num_weights": 12709, "learning_rate": 3e-3, "step": 100} for kind in kinds[1:]
        },
        "curve": [{"step": step, **measures(0.96 - 0.009 * step)} for step in (0, 50, 100)],
        "losses": [{"step": step, "loss": 3.0 / step, "learning_rate": 1e-3} for step in range(1, 11)],
        "sweep": [
            {"kind": kind, "learning_rate": rate, "chosen": rate == 1e-3, "step": 80, "share": 0.7, **measures(0.5)}
            for kind in kinds
            for rate in rates
        ],
        "notes": ["the <b>data</b> are few"],
        "provenance": {"model": "organism:dense-unaligned", "versions": {"safelocus": "0.1.0"}},
    }
    _write(folder, results)
    for state, answer in (("before", "Sure <script>alert(1)</script>"), ("after", "I cannot help with that")):
        (folder / state).mkdir()
        rows = [
            {
                "set": "harmful", "prompt": f"a request that is not shown, {number}", "system": None,
                "response": answer,
                "refused": state == "after", "incoherent": None,
                "judgements": {"refusal": {"verdict": "safe" if state == "after" else "harmful"}},
            }
            for number in range(45)
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / state / "responses.jsonl").write_text(text, encoding="utf-8")
    return folder


def preserve_run(folder: Path) -> Path:
    """As `preserve` writes it: before, after, unprotected, controls, and curves."""
    steps = (0, 100, 200)
    return _write(
        folder,
        {
            "before": {**measures(0.0), "task": measure(0.3)},
            "after": {**measures(0.08), "task": measure(0.85), "num_protected": 127091},
            "controls": {"random": {**measures(0.7), "task": measure(0.86), "num_protected": 127091}},
            "unprotected": {
                **measures(0.8),
                "task": measure(0.88),
                "curve": [{"step": step, **measures(step / 250)} for step in steps],
            },
            "curve": [{"step": step, **measures(step / 2500)} for step in steps],
            "provenance": {"model": "organism:dense"},
        },
    )


def _write(folder: Path, results: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder
