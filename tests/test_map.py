"""The map against brute force: every number counted again with dense masks."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config, Qwen2MoeConfig, Qwen3MoeConfig, T5Config

from safelocus.analysis.concentration import FRACTIONS, concentration
from safelocus.analysis.map import SafetyMap, safety_map
from safelocus.errors import NumericalError, SelectionError
from safelocus.model.layout import Layout
from safelocus.scoring.scores import Provenance, Scores, matrix_statistics
from safelocus.selection.selection import Selection

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "dense": lambda: LlamaConfig(**SMALL),
    "fused": lambda: Phi3Config(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "moe": lambda: Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=8),
    "shared": lambda: Qwen2MoeConfig(**SMALL, **EXPERTS, shared_expert_intermediate_size=24, mlp_only_layers=[0]),
    "encoder-decoder": lambda: T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=50, num_decoder_layers=2
    ),
}
UNROUTED = {(1, 2), (3, 0)}  # (layer, expert)


def random_scores(layout: Layout, seed: int = 0) -> Scores:
    """Half-normal scores whose scale differs by matrix; experts without tokens score zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors, statistics = {}, []
    for name in layout.eligible_tensors:
        tensor = layout.tensors[name]
        values = torch.randn(tensor.shape, generator=generator).abs_()
        for matrix, view in zip(tensor.matrices, tensor.split(values), strict=True):
            view.mul_(torch.rand(1, generator=generator) ** 2)
            if (matrix.layer, matrix.expert) in UNROUTED:
                view.zero_()
        tokens = None
        if tensor.fused_experts:
            tokens = [0 if (tensor.layer, e) in UNROUTED else 10 * e + 5 for e in range(tensor.num_experts)]
        given = {"sigma": [0.5] * tensor.num_matrices, "gradient_norm": [2.0] * tensor.num_matrices}
        statistics += matrix_statistics(tensor, values, **given, tokens=tokens)
        tensors[name] = values
    provenance = Provenance(method="esi", model="tiny", objective="refusal", num_prompts=7)
    return Scores(tensors=tensors, layout=layout, statistics=statistics, provenance=provenance)


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request):
    scores = random_scores(Layout.from_config(CONFIGS[request.param]()))
    selection = scores.select(0.05)
    return scores, selection, safety_map(scores, selection)


def brute_force(scores: Scores, selection: Selection) -> list[dict]:
    """One dict per eligible matrix, counted with a boolean mask over the whole tensor."""
    rows = []
    for name in scores.layout.eligible_tensors:
        tensor = scores.layout.tensors[name]
        mask = torch.zeros(tensor.num_weights, dtype=torch.bool)
        mask[selection[name]] = True
        masks, values = tensor.split(mask.view(tensor.shape)), tensor.split(scores.tensors[name])
        for i, matrix in enumerate(tensor.matrices):
            row = {"matrix": matrix, "selected": int(masks[i].sum()), "mass": float(values[i].double().sum())}
            rows.append(row)
    return rows


def test_matrices_match_brute_force(case):
    scores, selection, located = case
    rows = brute_force(scores, selection)
    all_weights = sum(row["matrix"].num_weights for row in rows)
    all_mass = sum(row["mass"] for row in rows)
    assert [row.name for row in located.matrices] == [row["matrix"].name for row in rows]
    assert located.num_weights == all_weights == scores.layout.num_eligible
    assert located.num_model_weights == scores.layout.num_weights
    assert located.num_selected == selection.k
    for found, row in zip(located.matrices, rows, strict=True):
        assert found.num_selected == row["selected"]
        assert found.share == pytest.approx(row["selected"] / selection.k)
        assert found.expected == pytest.approx(row["matrix"].num_weights / all_weights)
        assert found.enrichment == pytest.approx(found.share / found.expected)
        assert found.score_mass == pytest.approx(row["mass"] / all_mass, abs=1e-9)
        assert (found.layer, found.component, found.expert, found.stack, found.shared_expert) == (
            row["matrix"].layer,
            row["matrix"].component,
            row["matrix"].expert,
            row["matrix"].stack,
            row["matrix"].shared_expert,
        )
        assert (found.sigma, found.gradient_norm) == (0.5, 2.0)


@pytest.mark.parametrize("regions", ["cells", "layers", "components", "depths", "experts"])
def test_sums_match_brute_force(case, regions):
    scores, selection, located = case
    rows = brute_force(scores, selection)
    all_mass = sum(row["mass"] for row in rows)
    found = getattr(located, regions)
    assert bool(found) == (regions != "experts" or any(row["matrix"].expert is not None for row in rows))
    for region in found:
        members = [row for row in rows if _inside(row["matrix"], region, located)]
        assert region.num_selected == sum(row["selected"] for row in members)
        assert region.num_weights == sum(row["matrix"].num_weights for row in members)
        assert region.score_mass == pytest.approx(sum(row["mass"] for row in members) / all_mass, abs=1e-9)
        assert region.enrichment == pytest.approx(
            region.num_selected / selection.k * located.num_weights / region.num_weights
        )


def _inside(matrix, region, located: SafetyMap) -> bool:
    if region.depth is not None:
        layers = sorted({row.layer for row in located.matrices if row.stack == matrix.stack})
        middle = (layers.index(matrix.layer) + 0.5) / len(layers)
        return matrix.stack == region.stack and ["early", "middle", "late"][int(middle * 3)] == region.depth
    if region.layer is not None and (matrix.stack, matrix.layer) != (region.stack, region.layer):
        return False
    if region.expert is not None and matrix.expert != region.expert:
        return False
    key = (matrix.component, matrix.shared_expert)
    return region.component is None or key == (region.component, region.shared_expert)


def test_shares_sum_to_one(case):
    _, _, located = case
    for regions in (located.matrices, located.cells, located.layers, located.components, located.depths):
        for value in ("share", "expected", "score_mass"):
            assert math.fsum(getattr(region, value) for region in regions) == pytest.approx(1.0)


def test_cells_are_unique_and_complete(case):
    _, _, located = case
    assert len(located.cell) == len(located.cells)
    assert len(located.expert) == len(located.experts)
    assert {layer for layer, _ in located.cell} == set(located.layer_keys)
    assert {component for _, component in located.cell} == set(located.component_keys)


def test_json_round_trip(case):
    _, _, located = case
    assert SafetyMap.from_json(json.loads(json.dumps(located.to_json(), allow_nan=False))) == located


def test_selected_mass_is_the_sum_at_the_coordinates(case):
    scores, selection, located = case
    total = sum(float(t.double().sum()) for t in scores.tensors.values())
    held = sum(float(value.double().sum()) for value in selection.scores.values())
    assert located.selected_mass == pytest.approx(held / total)


def test_experts_and_their_tokens():
    scores = random_scores(Layout.from_config(CONFIGS["moe"]()))
    located = safety_map(scores, scores.select(0.05))
    assert located.num_experts == 4
    assert len(located.experts) == 16
    assert {(region.layer, region.expert) for region in located.unrouted} == UNROUTED
    assert located.expert[(None, 2), 3].tokens == 35  # not the sum over gate, up and down
    assert {row.tokens for row in located.matrices if row.expert is None} == {None}
    assert located.to_json()["unrouted"] == [[None, 1, 2], [None, 3, 0]]


def test_shared_experts_and_dense_layers_stand_apart():
    scores = random_scores(Layout.from_config(CONFIGS["shared"]()))
    located = safety_map(scores, scores.select(0.05))
    assert ("up", True) in located.component_keys
    assert ("up", False) in located.component_keys
    assert ((None, 0), ("up", True)) not in located.cell  # layer 0 is dense
    assert ((None, 0), 0) not in located.expert


def test_stacks_stand_apart():
    scores = random_scores(Layout.from_config(CONFIGS["encoder-decoder"]()))
    located = safety_map(scores, scores.select(0.05))
    assert located.layer_keys == [
        ("encoder", 0),
        ("encoder", 1),
        ("encoder", 2),
        ("decoder", 0),
        ("decoder", 1),
    ]
    assert [(r.stack, r.depth) for r in located.depths if r.stack == "decoder"] == [
        ("decoder", "early"),
        ("decoder", "late"),
    ]


def test_selection_alone():
    scores = random_scores(Layout.from_config(CONFIGS["moe"]()))
    selection = scores.select(0.05)
    alone, both = safety_map(None, selection), safety_map(scores, selection)
    assert [row.num_selected for row in alone.matrices] == [row.num_selected for row in both.matrices]
    assert alone.concentration is None
    assert alone.selected_mass is None
    assert alone.unrouted is None
    assert alone.score_method is None
    assert all(row.score_mass is None and row.sigma is None and row.tokens is None for row in alone.matrices)
    assert SafetyMap.from_json(json.loads(json.dumps(alone.to_json()))) == alone


def test_scores_without_tensors_keep_the_mass_of_matrices():
    scores = random_scores(Layout.from_config(CONFIGS["dense"]()))
    selection = scores.select(0.05)
    statistics_only = Scores(
        tensors={}, layout=scores.layout, statistics=scores.statistics, provenance=scores.provenance
    )
    located = safety_map(statistics_only, selection)
    assert located.concentration is None
    assert located.matrices == safety_map(scores, selection).matrices


def test_random_selection_is_not_enriched():
    scores = random_scores(Layout.from_config(CONFIGS["dense"]()))
    located = safety_map(scores, scores.select(0.5, which="random", seed=3))
    assert located.which == "random"
    for region in located.components:
        sigma = math.sqrt(1 / (region.num_weights * 0.5))
        assert region.enrichment == pytest.approx(1.0, abs=5 * sigma)


def test_weights_that_were_not_eligible_count_where_they_are_selected():
    layout = Layout.from_config(CONFIGS["dense"]())
    embedding = next(name for name, tensor in layout.tensors.items() if tensor.components == ("embedding",))
    coordinates = {embedding: torch.arange(10), layout.eligible_tensors[0]: torch.arange(30)}
    located = safety_map(None, Selection(coordinates=coordinates, layout=layout, only_eligible=False))
    assert located.num_weights == layout.num_eligible + layout.tensors[embedding].num_weights
    outside = located.cell[(None, None), ("embedding", False)]
    assert outside.share == pytest.approx(0.25)
    assert math.fsum(region.share for region in located.layers) == pytest.approx(1.0)
    assert sum(region.num_selected for region in located.depths) == 30  # what has no layer has no depth


def test_where_it_comes_from_is_told():
    scores = random_scores(Layout.from_config(CONFIGS["dense"]()))
    located = safety_map(scores, scores.select(0.02, of="eligible", where=lambda m: m.component == "down"))
    assert (located.model, located.method, located.score_method) == ("tiny", "esi", "esi")
    assert (located.ratio, located.of, located.which, located.granularity) == (
        0.02,
        "eligible",
        "top",
        "weight",
    )
    assert located.where == "4 of 28 matrices"
    both = scores.select(0.05) & scores.select(0.01)
    assert (safety_map(scores, both).which, safety_map(scores, both).operation) == ("set", "&")


def test_errors_say_what_to_do():
    layout = Layout.from_config(CONFIGS["dense"]())
    scores = random_scores(layout)
    with pytest.raises(SelectionError, match="holds no weights"):
        safety_map(scores, Selection(coordinates={}, layout=layout))
    other = random_scores(Layout.from_config(CONFIGS["moe"]()))
    with pytest.raises(SelectionError, match="different layout"):
        safety_map(other, scores.select(0.05))


SHAPES = {
    "half-normal": lambda g: torch.randn(20_000, generator=g).abs_(),
    "lognormal": lambda g: torch.randn(20_000, generator=g).mul_(3).exp_(),
    "uniform": lambda g: torch.rand(20_000, generator=g),
    "ties": lambda g: torch.randint(0, 4, (20_000,), generator=g).float(),
    "mostly zero": lambda g: torch.randn(20_000, generator=g).sub_(3).clamp_(min=0),
    "one holds all": lambda g: torch.zeros(20_000).index_fill_(0, torch.tensor([77]), 3.0),
    "all equal": lambda g: torch.full((20_000,), 0.3),
    "tiny and huge": lambda g: torch.tensor([1e-44, 1e-30, 3e38, 3e38, 1.0] * 4000),
    "seven": lambda g: torch.rand(7, generator=g),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_concentration_against_a_full_sort(shape):
    scores = SHAPES[shape](torch.Generator().manual_seed(0))
    found = concentration({"a": scores[:5], "b": scores[5:].view(1, -1)})
    ordered = np.sort(scores.double().numpy())[::-1]
    held, n = np.cumsum(ordered) / ordered.sum(), len(ordered)
    assert found.num_weights == n
    assert found.num_zero == int((ordered == 0).sum())
    assert found.total == pytest.approx(ordered.sum())
    assert [p.fraction for p in found.points] == [f for f in FRACTIONS if math.floor(f * n + 1e-6) >= 1]
    for point in found.points:
        missing = held[point.num_weights - 1] - point.mass
        assert -1e-12 <= missing <= found.mass_error + 1e-12
    assert found.points[-1].mass == pytest.approx(1.0)
    rank = np.arange(1, n + 1)
    gini = float(np.sum((2 * rank - n - 1) * ordered[::-1]) / (n * ordered.sum()))
    assert -1e-12 <= gini - found.gini <= found.gini_error + 1e-12
    assert found.mass_error <= 2**-11
    assert found.gini_error <= 2**-11


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=200), st.integers(1, 200))
def test_concentration_holds_its_bounds(values, cut):
    scores = torch.tensor(values, dtype=torch.float32)
    if not bool(scores.any()):
        with pytest.raises(NumericalError, match="every score is zero"):
            concentration({"a": scores})
        return
    found = concentration({"a": scores[:cut], "b": scores[cut:]})
    ordered = np.sort(scores.double().numpy())[::-1]
    held = np.cumsum(ordered) / ordered.sum()
    assert all(-1e-9 <= held[point.num_weights - 1] - point.mass <= found.mass_error + 1e-9 for point in found.points)


def test_concentration_in_chunks_is_that_of_the_whole(monkeypatch):
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    whole = concentration({"a": scores})
    monkeypatch.setattr("safelocus.analysis.concentration._CHUNK_CPU", 7)
    chunked = concentration({"a": scores})
    assert [p.mass for p in chunked.points] == pytest.approx([p.mass for p in whole.points], rel=1e-12)
    assert chunked.gini == pytest.approx(whole.gini, rel=1e-9)


def test_round_fractions_are_on_the_curve():
    found = concentration({"a": torch.rand(100_000, generator=torch.Generator().manual_seed(0))})
    numbers = {point.fraction: point.num_weights for point in found.points}
    assert {1e-4, 1e-3, 1e-2, 1e-1, 1.0} <= set(numbers)
    assert numbers[1e-2] == 1000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_concentration_refuses_what_is_no_score(bad):
    with pytest.raises(NumericalError, match="'b'"):
        concentration({"a": torch.ones(3), "b": torch.tensor([1.0, bad])})
    with pytest.raises(NumericalError, match="float32"):
        concentration({"a": torch.ones(3, dtype=torch.float64)})


def test_negative_zero_is_zero():
    assert concentration({"a": torch.tensor([-0.0, 1.0])}).points[-1].mass == pytest.approx(1.0)
