"""Pattern tests: they find what was planted, and nothing where there is nothing."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from made_runs import map_run
from safelocus.analysis.map import SafetyMap, safety_map
from safelocus.analysis.patterns import patterns
from safelocus.model.layout import Layout
from safelocus.selection.selection import Selection
from test_map import EXPERTS, SMALL
from tiny_models import config

LAYERS = 12
DENSE = LlamaConfig(**{**SMALL, "num_hidden_layers": LAYERS})
MOE = Qwen3MoeConfig(**{**SMALL, "num_hidden_layers": LAYERS}, **EXPERTS, head_dim=8)


def located(configuration, density, seed: int = 0) -> SafetyMap:
    """A map whose matrices have the densities that a function of (matrix, generator) gives them."""
    layout = Layout.from_config(configuration)
    generator = np.random.default_rng(seed)
    coordinates = {}
    for name in layout.eligible_tensors:
        tensor = layout.tensors[name]
        mask = torch.zeros(tensor.shape, dtype=torch.bool)
        for matrix, view in zip(tensor.matrices, tensor.split(mask), strict=True):
            chance = min(0.9, density(matrix, generator))
            view.copy_(torch.from_numpy(generator.random(tuple(view.shape)) < chance))
        coordinates[name] = mask.view(-1).nonzero().view(-1)
    return safety_map(None, Selection(coordinates=coordinates, layout=layout))


def noisy(matrix, generator) -> float:
    return 0.05 * float(np.exp(0.5 * generator.normal()))


def by_name(found):
    return {pattern.name: pattern for pattern in found}


def test_planted_value_matrices_are_found():
    found = by_name(
        patterns(located(DENSE, lambda m, g: noisy(m, g) * (6 if m.component == "value" else 1)), draws=999)
    )
    value = found["value matrices"]
    assert value.p_holm < 0.01
    assert value.low < value.fold < value.high
    assert value.low > 2
    assert value.claimed
    assert found["MLP matrices"].p > 0.5
    assert found["middle layers"].p_holm > 0.05


def test_planted_middle_layers_are_found():
    drawn = located(DENSE, lambda m, g: noisy(m, g) * (5 if 4 <= m.layer < 8 else 1), seed=1)
    found = by_name(patterns(drawn, draws=999))
    assert found["middle layers"].p_holm < 0.02
    assert found["middle layers"].p_rotation == pytest.approx(1 / LAYERS)
    assert found["value matrices"].p_holm > 0.05  # rich layers are no evidence for any component


def test_planted_late_experts_are_found():
    def late(matrix, generator):
        return noisy(matrix, generator) * (6 if matrix.expert is not None and matrix.layer >= 8 else 1)

    found = by_name(patterns(located(MOE, late), draws=999))
    assert found["late-layer expert MLPs"].claimed
    assert found["late-layer expert MLPs"].p_holm < 0.05
    assert not found["value matrices"].claimed


def test_late_layers_alone_are_no_late_experts():
    found = by_name(patterns(located(MOE, lambda m, g: noisy(m, g) * (6 if m.layer >= 8 else 1)), draws=999))
    assert found["late-layer expert MLPs"].p > 0.05


def test_fold_and_share_are_those_of_the_map():
    drawn = located(DENSE, noisy)
    found = by_name(patterns(drawn, draws=99))
    value = next(region for region in drawn.components if region.component == "value")
    middle = next(region for region in drawn.depths if region.depth == "middle")
    assert found["value matrices"].fold == pytest.approx(value.enrichment)
    assert found["value matrices"].share == pytest.approx(value.share)
    assert found["middle layers"].fold == pytest.approx(middle.enrichment)


def test_layers_without_attention_are_resampled_apart():
    """Of a hybrid model: a resample without a single value matrix would have no fold."""
    kinds = ["full_attention", "conv", "conv", "conv"]
    hybrid = config("lfm2", num_hidden_layers=8, layer_types=kinds * 2)
    found = by_name(
        patterns(located(hybrid, lambda m, g: noisy(m, g) * (6 if m.component == "value" else 1)), draws=99)
    )
    value = found["value matrices"]
    assert 1 < value.low <= value.fold <= value.high
    alone = by_name(patterns(located(config("lfm2"), noisy), draws=99))["value matrices"]
    assert (alone.low, alone.high) == (None, None)  # one layer has some


def test_layers_without_experts_are_not_turned_among_those_with_some():
    """Every other layer is dense; the expert layers' densities rise, so only the last turn is as rich as they are."""
    mixed = Qwen3MoeConfig(
        **{**SMALL, "num_hidden_layers": LAYERS}, **{**EXPERTS, "decoder_sparse_step": 2}, head_dim=8
    )
    found = by_name(patterns(located(mixed, lambda m, g: 0.02 * (m.layer + 1)), draws=99))
    assert found["late-layer expert MLPs"].p_rotation == pytest.approx(1 / (LAYERS // 2))


def test_holm_never_lowers_and_keeps_the_order():
    found = patterns(located(DENSE, noisy), draws=199)
    ordered = sorted(found, key=lambda pattern: pattern.p)
    assert all(pattern.p_holm >= pattern.p for pattern in found)
    assert [p.p_holm for p in ordered] == sorted(p.p_holm for p in ordered)
    assert ordered[0].p_holm == pytest.approx(min(1.0, 3 * ordered[0].p))


@pytest.mark.slow
def test_without_a_pattern_few_are_found(monkeypatch):
    """Layers that differ by chance, matrices that differ by chance: p below 0.05 in about one of twenty."""

    def null(matrix, generator):
        layer = np.random.default_rng(matrix.layer + 1000 * null.seed).normal()
        return 0.05 * float(np.exp(0.7 * layer + 0.7 * generator.normal()))

    monkeypatch.setattr("safelocus.analysis.patterns.NUM_RESAMPLES", 2)
    rejected = {"value matrices": 0, "MLP matrices": 0, "middle layers": 0}
    for seed in range(60):
        null.seed = seed
        for pattern in patterns(located(DENSE, null, seed), draws=99):
            rejected[pattern.name] += pattern.p <= 0.05
    assert max(rejected.values()) <= 8  # of 60: 3 expected; above 8 with a chance of 1 in 200


def test_the_command_prints_table_and_json(tmp_path, run):
    drawn = located(DENSE, noisy)
    folder = map_run(tmp_path / "run", [("tiny", drawn)])
    code, out, _ = run("report", folder, "--table", "patterns", "--json")
    assert code == 0
    found = json.loads(out)["patterns"]["tiny"]
    assert [pattern["name"] for pattern in found] == ["value matrices", "MLP matrices", "middle layers"]
    code, out, _ = run("report", folder, "--table", "patterns")
    assert code == 0
    assert "middle layers" in out
    assert run("report", folder, "--table", "other")[0] == 2


def test_the_command_writes_a_page(tmp_path, run):
    first = map_run(tmp_path / "first", [("tiny", located(DENSE, noisy))])
    second = map_run(tmp_path / "second", [("other", located(MOE, noisy))])
    code, out, _ = run("report", first, second, "-o", tmp_path / "page.html", "--json")
    assert code == 0
    assert json.loads(out)["bytes"] == (tmp_path / "page.html").stat().st_size < 6_000_000
    assert run("report", first)[0] == 0
    assert (first / "report.html").is_file()
    code, _, err = run("report", first, second)
    assert code == 2
    assert "-o PAGE.html" in err
    assert run("report", tmp_path / "nowhere", "-o", tmp_path / "x.html")[0] == 2
    assert run("report", first, "-o", tmp_path / "no" / "x.html")[0] == 2
