"""Arms of the real model's SPA table that are in no command (benchmarks/real/preserving.py), on a tiny model."""

from importlib import import_module
from pathlib import Path

import pytest

import safelocus as sl
from tiny_targets import dense

REAL = Path(__file__).parents[1] / "benchmarks" / "real"
HARMFUL = sl.read_prompts(["how to kill a cat", "how to steal", "say something bad", "hurt a person"])
ROWS = sl.read_prompts([{"prompt": f"what is {i}", "response": f"it is {i}"} for i in range(8)])


@pytest.fixture
def learned(scripts, monkeypatch, tmp_path):
    """Train an arm for six steps; returns (cell, target)."""
    scripts(REAL)
    preserving = import_module("preserving")

    def run(arm):
        target = dense()
        monkeypatch.setattr(preserving.sets, "find", lambda: HARMFUL)
        monkeypatch.setattr(preserving, "lesson", lambda task: (ROWS, ROWS))
        monkeypatch.setattr(preserving.sets, "texts", lambda: ROWS)
        monkeypatch.setattr(preserving.cells, "subject", lambda name: target)
        monkeypatch.setattr(preserving.cells, "described", lambda target: {})
        monkeypatch.setattr(preserving.cells, "RUNS", tmp_path)
        for name in ("measured", "outcome"):
            monkeypatch.setattr(preserving.cells, name, lambda *_, **__: {})
        return preserving.learned("task", 6, arm, tmp_path / "unfinished"), target

    run.arms = {arm.name: arm for arm in preserving.RIVALS}
    return run


def test_what_is_found_anew_is_frozen_as_it_is_by_then(learned, monkeypatch):
    kept = []
    update = sl.Protection.update

    def updating(protection, selection):
        before = {name: p.detach().clone() for name, p in protection.model.named_parameters()}
        kept.append((selection, before))
        update(protection, selection)

    monkeypatch.setattr(sl.Protection, "update", updating)
    cell, target = learned(learned.arms["esi-10-rescored"])
    assert len(cell["agreement"]) == len(kept) == 2
    assert all(0 < iou < 1 for iou in cell["agreement"])
    assert cell["num_protected"] == int(0.1 * target.layout.num_weights)
    selection, before = kept[-1]
    changed = 0
    for name, parameter in target.model.named_parameters():
        if name in selection:
            same = parameter.detach().flatten() == before[name].flatten()
            assert same[selection[name]].all()
            changed += int((~same).sum())
    assert changed > cell["num_protected"]  # all others are trained


def test_updates_that_lower_the_score_are_projected_and_no_others(learned):
    cell, _ = learned(learned.arms["projected"])
    assert 0 < cell["projected"] <= 6
    assert cell["num_protected"] == 0
