"""Agreement of selections and of scores."""

import functools
import json
from math import gcd

import numpy as np
import pytest
import torch
from scipy import stats

from safelocus.errors import SelectionError
from safelocus.model.layout import Layout
from safelocus.run.identity import Provenance
from safelocus.scoring.comparison import Overlap, compare
from safelocus.scoring.scores import Scores
from safelocus.selection.selection import Selection
from tiny_models import config


@functools.cache
def layout(name="qwen3_moe"):
    return Layout.from_config(config(name))


def make(seed=0, name="qwen3_moe", like=None, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for tensor in layout(name).eligible_tensors:
        value = torch.rand(layout(name).tensors[tensor].shape, generator=generator)
        tensors[tensor] = value if like is None else like.tensors[tensor] + noise * value
    return Scores(tensors=tensors, layout=layout(name), statistics=[], provenance=Provenance(method=f"m{seed}"))


def flat(scores, component=None):
    values = []
    for name, value in scores.tensors.items():
        tensor = scores.layout.tensors[name]
        for matrix, part in zip(tensor.matrices, tensor.split(value), strict=True):
            if component in (None, matrix.component):
                values.append(part.reshape(-1).numpy())
    return np.concatenate(values)


def as_set(selection, keep):
    return {
        (name, i)
        for name, index in selection.coordinates.items()
        for i, o in zip(index.tolist(), selection.layout.tensors[name].matrix_of(index).tolist(), strict=True)
        if keep(selection.layout.tensors[name].matrices[o])
    }


def test_overlaps_equal_those_of_sets_everywhere():
    a, b = make(0).select(0.1), make(1).select(0.2)
    compared = compare(a, b)
    eligible = [m for m in layout().matrices if m.eligible]
    regions = {"overall": (compared.overall, lambda m: True)}
    regions |= {f"layer {i}": (compared.layers[str(i)], lambda m, i=i: m.layer == i) for i in (0, 1)}
    regions |= {c: (found, lambda m, c=c: m.component == c) for c, found in compared.components.items()}
    assert list(compared.layers) == ["0", "1"]
    assert list(compared.components) == ["query", "key", "value", "output", "gate", "up", "down"]
    for found, keep in regions.values():
        ours, theirs = as_set(a, keep), as_set(b, keep)
        assert (found.num_a, found.num_b, found.num_both) == (len(ours), len(theirs), len(ours & theirs))
        assert found.num_weights == sum(m.num_weights for m in eligible if keep(m))
        assert found.iou == len(ours & theirs) / len(ours | theirs)
    assert compared.overall.iou == a.iou(b)
    assert compared.a["method"] == "m0"
    json.dumps(compared.to_json(), allow_nan=False)


def test_expected_iou_is_what_random_selections_have():
    scores = make()
    found = [
        compare(scores.select(0.2, which="random", seed=s), scores.select(0.3, which="random", seed=1000 + s)).overall
        for s in range(40)
    ]
    measured = [overlap.iou for overlap in found]
    error = np.std(measured) / np.sqrt(len(measured))
    assert abs(np.mean(measured) - found[0].expected_iou) < 4 * error


def test_nothing_selected_on_either_side():
    assert Overlap.of(100, 0, 0, 0) == Overlap(
        num_weights=100, num_a=0, num_b=0, num_both=0, iou=None, expected_iou=None
    )
    assert Overlap.of(100, 5, 0, 0).iou == 0.0
    assert Overlap.of(10, 10, 10, 10).expected_iou == 1.0


def test_encoder_and_decoder_layers_are_kept_apart():
    scores = make(name="t5")
    compared = compare(scores.select(0.1), scores.select(0.2))
    assert list(compared.layers) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    assert sum(overlap.num_a for overlap in compared.layers.values()) == compared.overall.num_a


def test_what_is_not_eligible_counts_where_it_was_selected():
    name = next(n for n, t in layout("llama").tensors.items() if t.components == ("norm",))
    by_hand = Selection(coordinates={name: torch.tensor([0, 3])}, layout=layout("llama"), only_eligible=False)
    compared = compare(by_hand, make(name="llama").select(0.01))
    assert compared.components["norm"].num_a == 2
    assert compared.overall.num_a == 2


def test_rank_correlation_is_spearmans():
    a = make(0)
    b = make(1, like=a, noise=0.7)
    found = compare(a, b, ratio=0.05)
    assert found.correlation.stride == 1
    assert found.correlation.num_ranked == found.correlation.num_weights == layout().num_eligible
    assert found.correlation.rho == pytest.approx(stats.spearmanr(flat(a), flat(b)).statistic, rel=1e-9)
    for component, correlation in found.components.items():
        expected = stats.spearmanr(flat(a, component), flat(b, component)).statistic
        assert correlation.rho == pytest.approx(expected, rel=1e-9)
        assert correlation.num_ranked == flat(a, component).size
    assert found.top.overall.iou == a.select(0.05).iou(b.select(0.05))
    assert found.ratio == 0.05
    json.dumps(found.to_json(), allow_nan=False)


def test_large_models_are_sampled_at_a_stride_that_meets_every_row_and_column():
    a = make(0)
    b = make(1, like=a, noise=0.7)
    found = compare(a, b, max_ranked=3000)
    whole = compare(a, b).correlation.rho
    stride = found.correlation.stride
    assert stride >= layout().num_eligible / 3000
    assert all(gcd(stride, size) == 1 for n in layout().eligible_tensors for size in layout().tensors[n].shape)
    names = layout().eligible_tensors
    joined = [np.concatenate([s.tensors[n].reshape(-1).numpy() for n in names])[::stride] for s in (a, b)]
    assert found.correlation.num_ranked == joined[0].size <= 3000
    assert found.correlation.rho == pytest.approx(stats.spearmanr(*joined).statistic, rel=1e-9)
    assert found.correlation.rho == pytest.approx(whole, abs=0.05)
    assert sum(c.num_ranked for c in found.components.values()) == found.correlation.num_ranked
    assert found.components["query"].num_weights > found.components["query"].num_ranked


def test_a_stride_may_exceed_a_tensor():
    a, b = make(0), make(1)
    found = compare(a, b, max_ranked=10)
    assert found.correlation.stride > min(value.numel() for value in a.tensors.values())
    assert found.correlation.num_ranked == len(flat(a)[:: found.correlation.stride])


def test_equal_scores_have_no_ranks():
    constant = make()
    for value in constant.tensors.values():
        value.fill_(0.5)
    found = compare(constant, make(1))
    assert found.correlation.rho is None
    assert compare(make(1), make(1)).correlation.rho == pytest.approx(1.0)


def test_what_cannot_be_compared():
    scores = make()
    with pytest.raises(SelectionError, match="cannot compare Scores with Selection"):
        compare(scores, scores.select(0.1))
    with pytest.raises(SelectionError, match="different models"):
        compare(scores, make(name="llama"))
    with pytest.raises(SelectionError, match="different models"):
        compare(scores.select(0.1), make(name="llama").select(0.1))


def test_selections_whose_layouts_divide_a_tensor_otherwise(tmp_path):
    """Regions are those of the first."""
    file, name = tmp_path / "mine.toml", "model.layers.0.mlp.gate_up_proj.weight"
    file.write_text('extends = "phi3"\n[model]\n"model.layers.{layer}.mlp.gate_up_proj.weight" = "up"\n')
    whole = Layout.from_config(config("phi3"), file=file)
    a, b = (Selection(coordinates={name: torch.arange(10)}, layout=each) for each in (layout("phi3"), whole))
    for found, components in ((compare(a, b), ["gate"]), (compare(b, a), ["up"])):
        assert (found.overall.num_a, found.overall.num_b, found.overall.iou) == (10, 10, 1.0)
        assert [key for key, overlap in found.components.items() if overlap.num_b] == components
