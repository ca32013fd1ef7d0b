"""Scores: how many weights a ratio is, selecting by weight and by group, statistics, and the folder."""

import dataclasses
import functools
import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import flip
from safelocus.errors import NumericalError, RunError, SelectionError
from safelocus.model.layout import GRANULARITIES, Layout
from safelocus.run.files import seal
from safelocus.run.identity import Provenance
from safelocus.scoring.scores import Scores
from safelocus.scoring.statistics import QUANTILES, MatrixStatistics, matrix_statistics
from safelocus.selection.ratio import count_for_ratio
from tiny_models import config

FAMILIES = ("llama", "phi3", "qwen3_moe", "gpt_oss", "gpt_neox", "deepseek_v2")
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@functools.cache
def layout(name="qwen3_moe"):
    return Layout.from_config(config(name))


def random_tensors(name="qwen3_moe", seed=0, levels=None):
    """Scores of the eligible tensors; with `levels` only so many distinct values, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for tensor in layout(name).eligible_tensors:
        value = torch.rand(layout(name).tensors[tensor].shape, generator=generator)
        tensors[tensor] = (value * levels).floor() if levels else value
    return tensors


def make(name="qwen3_moe", tensors=None, **options):
    tensors = random_tensors(name) if tensors is None else tensors
    statistics = [
        statistic
        for tensor, value in tensors.items()
        for statistic in matrix_statistics(layout(name).tensors[tensor], value)
    ]
    values = {"provenance": Provenance(method="esi", seed=0), "per_prompt": [0.25, -1.5], **options}
    return Scores(tensors=tensors, layout=layout(name), statistics=statistics, **values)


def as_set(selection):
    return {(name, i) for name, index in selection.coordinates.items() for i in index.tolist()}


# a mapping over tensor names


def test_it_is_a_mapping_over_the_eligible_tensors():
    scores = make()
    assert list(scores) == layout().eligible_tensors
    assert len(scores) == len(scores.tensors)
    assert scores[f"base_model.model.{GATE_UP}"] is scores.tensors[GATE_UP] is dict(scores.items())[GATE_UP]
    assert f"_orig_mod.{GATE_UP}" in scores
    assert "model.norm.weight" not in scores
    assert scores.get("model.norm.weight") is None
    with pytest.raises(SelectionError, match=r"'model\.norm\.weight' is not an eligible tensor"):
        scores["model.norm.weight"]
    assert scores == scores
    assert scores != make()


def test_scores_without_tensors_are_an_empty_mapping():
    scores = make(tensors={}, per_prompt=[])
    assert (len(scores), list(scores)) == (0, [])
    with pytest.raises(SelectionError, match="only statistics were kept"):
        scores[GATE_UP]


# how many weights a ratio is


@dataclasses.dataclass
class Sizes:
    """As much of a layout as counting needs."""

    num_weights: int
    num_eligible: int


@pytest.mark.parametrize(
    ("ratio", "num_weights", "expected"),
    [
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.57, 100, 57),
        (0.01, 1_265_152, 12_651),
        (0.1, 10**15 + 10, 10**14 + 1),
        (0.3, 10**17 + 10, 3 * 10**16 + 3),  # beyond the integers that a float can hold
        (1e-3, 7_241_732_096, 7_241_732),
        (np.float32(0.29), 100, 29),
        (np.float64(0.29), 100, 29),
        (Fraction(1, 3), 10, 3),
        (Decimal("0.29"), 100, 29),
        (1, 10, 10),
        (1.0, 10, 10),
    ],
)
def test_floor_is_exact(ratio, num_weights, expected):
    assert count_for_ratio(Sizes(num_weights, num_weights), ratio) == expected


@given(st.integers(1, 10**6), st.integers(10**6, 10**12))
def test_floor_is_that_of_the_decimal_as_written(numerator, num_weights):
    ratio = float(f"{numerator / 10**6:.6f}")
    assert count_for_ratio(Sizes(num_weights, num_weights), ratio) == numerator * num_weights // 10**6


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0, r"in \(0, 1\], found 0$"),
        (-0.1, "found -0.1"),
        (1.5, r"found 1\.5\. For 1\.5 % write 0\.015"),
        (float("nan"), "found nan"),
        (float("inf"), "found inf"),
        (Decimal("NaN"), "found NaN"),
        ("0.01", "must be a number .* found '0.01'"),
        (None, "found None"),
        (True, "found True"),
        (1e-9, "less than one weight"),
    ],
)
def test_ratios_that_make_no_sense(ratio, message):
    with pytest.raises(SelectionError, match=message):
        count_for_ratio(Sizes(1000, 900), ratio)


def test_more_than_is_eligible_gives_both_numbers_and_the_largest_usable_ratio():
    with pytest.raises(SelectionError, match=r"is 900, but only 857 .* largest usable ratio is 0\.857000"):
        count_for_ratio(Sizes(1000, 857), 0.9)
    with pytest.raises(SelectionError, match=r"largest usable ratio is 0\.666666;") as error:
        count_for_ratio(Sizes(3_000_000, 2_000_000), 0.7)
    assert count_for_ratio(Sizes(3_000_000, 2_000_000), Decimal("0.666666")) == 1_999_998
    assert "0.7" in str(error.value)
    assert count_for_ratio(Sizes(1000, 857), 0.9, of="eligible") == 771
    with pytest.raises(SelectionError, match="ratio of 'layer': expected"):
        count_for_ratio(Sizes(1000, 857), 0.9, of="layer")


# selecting


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("which", ["top", "bottom"])
def test_weights_are_those_of_a_dense_sort_over_the_model(name, which):
    scores = make(name, random_tensors(name, levels=50))
    selection = scores.select(0.03, which=which)
    k = int(Fraction("0.03") * layout(name).num_weights)
    names = layout(name).eligible_tensors
    flat = torch.cat([scores.tensors[tensor].reshape(-1) for tensor in names])
    order = flat.sort(descending=which == "top", stable=True).indices[:k].tolist()
    places = [(tensor, i) for tensor in names for i in range(layout(name).tensors[tensor].num_weights)]
    assert as_set(selection) == {places[i] for i in order}
    assert selection.k == selection.num_requested == k
    for tensor, index in selection.coordinates.items():
        assert torch.equal(selection.scores[tensor], scores.tensors[tensor].reshape(-1)[index])
    assert (selection.which, selection.ratio, selection.of, selection.seed) == (which, 0.03, "model", None)
    assert dataclasses.replace(selection.provenance, extra=scores.provenance.extra) == scores.provenance


def test_order_of_the_given_tensors_does_not_matter():
    tensors = random_tensors(levels=3)
    backwards = dict(reversed(tensors.items()))
    assert as_set(make(tensors=tensors).select(0.1)) == as_set(make(tensors=backwards).select(0.1))


def test_random_has_the_same_size_and_depends_on_the_seed_only():
    scores = make()
    top, drawn = scores.select(0.05), scores.select(0.05, which="random", seed=1)
    assert drawn.k == top.k
    assert drawn.seed == 1
    assert as_set(drawn) == as_set(make(tensors=random_tensors(seed=9)).select(0.05, which="random", seed=1))
    assert as_set(drawn) != as_set(scores.select(0.05, which="random", seed=2))
    for name, index in drawn.coordinates.items():
        assert torch.equal(drawn.scores[name], scores.tensors[name].reshape(-1)[index])


def test_everything_eligible():
    scores = make()
    everything = scores.select(1, of="eligible")
    assert everything.k == layout().num_eligible
    assert as_set(scores.select(1, of="eligible", which="random")) == as_set(everything)


def group_members(name, granularity):
    """(tensor, flat index, ...) of each group, through the layout's ids."""
    groups = layout(name).groups(granularity)
    members = {}
    for tensor in layout(name).eligible_tensors:
        ids = groups.ids(tensor, torch.arange(layout(name).tensors[tensor].num_weights))
        for i, group in enumerate(ids.tolist()):
            members.setdefault(group, []).append((tensor, i))
    return [members[group] for group in sorted(members)]


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("which", ["top", "bottom"])
@pytest.mark.parametrize("granularity", [g for g in GRANULARITIES if g != "weight"])
@pytest.mark.parametrize("name", ["phi3", "qwen3_moe", "gpt_oss"])
def test_groups_equal_brute_force(name, granularity, which, reduce):
    scores = make(name, random_tensors(name, levels=8))
    flat = {tensor: value.reshape(-1).tolist() for tensor, value in scores.tensors.items()}
    members = group_members(name, granularity)
    sign = -1 if which == "top" else 1

    def rank(group):
        total = sum(flat[tensor][i] for tensor, i in group)
        return sign * (total / len(group) if reduce == "mean" else total)

    expected, k = set(), int(Fraction("0.5") * layout(name).num_weights)
    for group in sorted(members, key=rank):
        if len(expected) + len(group) > k:
            break
        expected.update(group)
    selection = scores.select(0.5, granularity=granularity, which=which, reduce=reduce)
    assert as_set(selection) == expected
    assert selection.num_requested == k
    assert 0 < selection.k <= k
    assert selection.granularity == granularity


@pytest.mark.parametrize("granularity", ["row", "head", "neuron", "expert", "matrix"])
def test_random_groups_are_whole(granularity):
    selection = make().select(0.4, granularity=granularity, which="random", seed=4)
    chosen = as_set(selection)
    for group in group_members("qwen3_moe", granularity):
        assert chosen.issuperset(group) or chosen.isdisjoint(group)


def test_a_group_that_does_not_fit_is_an_error_that_gives_sizes():
    groups = layout().groups("layer")
    with pytest.raises(SelectionError, match=rf"a layer holds {int(groups.sizes.min()):,} to .* more than the 155"):
        make().select(0.01, granularity="layer")


def test_where_restricts_to_matrices_inside_fused_tensors_too():
    scores = make(tensors=random_tensors(levels=20))

    def where(matrix):
        return matrix.component == "up" and matrix.expert in (1, 4)

    selection = scores.select(0.1, of="eligible", where=where)
    everything = scores.select(1, of="eligible")
    places = as_set(everything)
    kept = {matrix.name for matrix in layout().matrices if where(matrix)}
    allowed = set()
    for name in layout().eligible_tensors:
        tensor = layout().tensors[name]
        ordinals = tensor.matrix_of(torch.arange(tensor.num_weights)).tolist()
        allowed |= {(name, i) for i, o in enumerate(ordinals) if tensor.matrices[o].name in kept}
    k = len(allowed) // 10
    order = {name: i for i, name in enumerate(layout().eligible_tensors)}
    flat = {name: value.reshape(-1).tolist() for name, value in scores.tensors.items()}
    ranked = sorted(allowed, key=lambda p: (-flat[p[0]][p[1]], order[p[0]], p[1]))
    assert as_set(selection) == set(ranked[:k])
    assert set(selection.counts_by("component")) >= {"up"}
    assert as_set(scores.select(1, of="eligible", where=where)) == allowed
    assert as_set(scores.select(0.1, of="eligible", where=where, which="random")) < allowed
    assert as_set(scores.select(0.9, of="eligible", where=where, granularity="row")) < allowed < places
    assert selection.provenance.extra["where"] == "4 of 38 matrices"


def test_where_that_leaves_too_little_or_nothing():
    scores = make()
    num_down = sum(m.num_weights for m in layout().matrices if m.component == "down")
    with pytest.raises(SelectionError, match=f"only {num_down:,} are eligible"):
        scores.select(0.9, where=lambda m: m.component == "down")
    with pytest.raises(SelectionError, match="true for none"):
        scores.select(0.1, where=lambda m: False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "best"}, "which='best': expected"),
        ({"granularity": "block"}, "granularity 'block': expected one of weight, row"),
        ({"reduce": "max"}, "reduce='max'"),
        ({"of": "layer"}, "ratio of 'layer'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(SelectionError, match=message):
        make().select(0.1, **options)


def test_scores_with_nan_name_the_tensor():
    tensors = random_tensors()
    statistics = make().statistics
    tensors[GATE_UP][2, 3, 4] = torch.nan
    scores = Scores(tensors=tensors, layout=layout(), statistics=statistics, provenance=Provenance())
    for granularity in ("weight", "row"):
        with pytest.raises(NumericalError, match=f"'{GATE_UP}'.* 1 NaN"):
            scores.select(0.1, granularity=granularity)


def test_nothing_is_selected_from_scores_that_are_all_zero():
    nothing = {name: torch.zeros_like(tensor) for name, tensor in random_tensors().items()}
    for which in ("top", "bottom"):
        with pytest.raises(NumericalError, match=r"every esi score of .* is zero: nothing to select"):
            make(tensors=nothing).select(0.01, which=which)
    assert make(tensors=nothing).select(0.01, which="random").k == make().select(0.01).k


def test_scores_of_zero_are_told_and_never_all_there_is():
    """As those of experts that no token reached."""
    tensors = random_tensors()
    tensors[GATE_UP][2] = 0
    scores = make(tensors=tensors)
    assert "remarks" not in scores.select(0.01).provenance.extra
    assert "remarks" not in scores.select(0.01, which="random").provenance.extra
    for chosen in (scores.select(0.01, which="bottom"), scores.select(1, of="eligible")):
        num_zero = sum(int((value == 0).sum()) for value in chosen.scores.values())
        (remark,) = chosen.provenance.extra["remarks"]
        assert remark.startswith(f"{num_zero:,} of the {chosen.k:,} weights selected have a score of zero")

    def dead(matrix):
        return matrix.tensor == GATE_UP and matrix.expert == 2

    assert (scores.select(0.01) | scores.select(0.01, which="bottom")).scores is not None  # they are of one scoring
    with pytest.raises(NumericalError, match=r"every esi score of the .* weights that rank first is zero"):
        scores.select(0.5, of="eligible", where=dead)


def test_tensors_must_be_exactly_the_eligible_ones():
    tensors = random_tensors()
    with pytest.raises(SelectionError, match=f"missing or not eligible: {GATE_UP}"):
        make(tensors={name: value for name, value in tensors.items() if name != GATE_UP})
    with pytest.raises(SelectionError, match=r"not eligible: model\.norm\.weight"):
        Scores(tensors=tensors | {"model.norm.weight": torch.ones(24)}, layout=layout(), statistics=[],
               provenance=Provenance())  # fmt: skip
    for wrong in (tensors[GATE_UP].double(), tensors[GATE_UP][1:]):
        with pytest.raises(SelectionError, match=f"scores of '{GATE_UP}' are .* expected torch.float32"):
            Scores(tensors=tensors | {GATE_UP: wrong}, layout=layout(), statistics=[], provenance=Provenance())


# statistics


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("exact_up_to", [1 << 16, 0])
def test_statistics_equal_those_of_each_matrix_alone(name, exact_up_to, monkeypatch):
    monkeypatch.setattr("safelocus.scoring.statistics._EXACT_UP_TO", exact_up_to)
    monkeypatch.setattr("safelocus.scoring.statistics._BATCH", 500)  # several experts together, wide ones in pieces
    for tensor_name in layout(name).eligible_tensors:
        tensor = layout(name).tensors[tensor_name]
        generator = torch.Generator().manual_seed(1)
        value = torch.rand(tensor.shape, generator=generator) ** 8
        value[torch.rand(tensor.shape, generator=generator) < 0.1] = 0
        number = tensor.num_matrices
        found = matrix_statistics(
            tensor,
            value,
            sigma=[i + 0.5 for i in range(number)],
            gradient_norm=[float(i) for i in range(number)],
        )
        assert [s.matrix for s in found] == [m.name for m in tensor.matrices]
        assert [s.sigma for s in found] == [i + 0.5 for i in range(number)]
        assert [s.gradient_norm for s in found] == [float(i) for i in range(number)]
        for statistic, matrix in zip(found, tensor.split(value), strict=True):
            flat = matrix.reshape(-1).numpy()
            assert statistic.num_weights == flat.size
            assert statistic.mean == pytest.approx(flat.mean(dtype=np.float64), rel=1e-12)
            assert statistic.max == flat.max()
            for quantile in QUANTILES:
                expected = np.quantile(flat, float(quantile), method="inverted_cdf")
                assert statistic.quantiles[quantile] == pytest.approx(expected, rel=0 if exact_up_to else 2**-9)


def test_quantiles_of_a_large_matrix_are_within_the_stated_error():
    tensor = Layout.from_config(config("llama", intermediate_size=5000)).tensors["model.layers.0.mlp.up_proj.weight"]
    value = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)).exp_().sub_(1).pow_(12)
    assert value.numel() > 1 << 16
    (statistic,) = matrix_statistics(tensor, value)
    flat = value.reshape(-1).numpy()
    for quantile, found in statistic.quantiles.items():
        expected = np.quantile(flat, float(quantile), method="inverted_cdf")
        assert found == pytest.approx(expected, rel=2**-9)
        assert found <= statistic.max
    assert matrix_statistics(tensor, torch.zeros(tensor.shape))[0].quantiles["0.5"] == 0.0


def test_tokens_belong_to_experts():
    tensor = layout().tensors[GATE_UP]
    found = matrix_statistics(tensor, torch.ones(tensor.shape), tokens=[10, 11, 12, 13, 14])
    assert [(s.expert, s.component, s.tokens) for s in found][:3] == [
        (0, "gate", 10),
        (0, "up", 10),
        (1, "gate", 11),
    ]
    assert matrix_statistics(tensor, torch.ones(tensor.shape))[0].tokens is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_statistics_refuse_scores_that_cannot_be_ranked(bad):
    tensor = layout().tensors[GATE_UP]
    value = torch.ones(tensor.shape)
    value[4, 0, 0] = bad
    with pytest.raises(NumericalError, match=GATE_UP):
        matrix_statistics(tensor, value)


# the folder


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 60_000))
def test_round_trip_is_exact_for_any_shard_size(tmp_path_factory, shard_bytes):
    folder = tmp_path_factory.mktemp("run") / "scores"
    scores = make()
    scores.save(folder, shard_bytes=shard_bytes)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # tensors too are for all who may read
    loaded = Scores.load(folder)
    assert list(loaded.tensors) == list(scores.tensors)
    assert all(torch.equal(loaded.tensors[name], value) for name, value in scores.tensors.items())
    assert loaded.layout == scores.layout
    assert loaded.statistics == scores.statistics
    assert loaded.provenance == scores.provenance
    assert loaded.per_prompt == scores.per_prompt
    assert as_set(loaded.select(0.1)) == as_set(scores.select(0.1))
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == [f"scores-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    largest = max(value.numel() * 4 for value in scores.tensors.values())
    header = 2000
    assert max(path.stat().st_size for path in folder.glob("*.safetensors")) < max(shard_bytes, largest) + header
    assert [path.name for path in folder.parent.iterdir()] == ["scores"]


def test_strided_scores_are_saved_in_logical_order(tmp_path):
    tensors = {name: value.transpose(-1, -2).contiguous().transpose(-1, -2) for name, value in random_tensors().items()}
    make(tensors=tensors).save(tmp_path / "scores")
    loaded = Scores.load(tmp_path / "scores")
    assert all(torch.equal(loaded.tensors[name], value) for name, value in tensors.items())


def test_statistics_alone(tmp_path):
    make().save(tmp_path / "scores", tensors=False)
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["digests.json", "scores.json"]
    loaded = Scores.load(tmp_path / "scores")
    assert loaded.statistics == make().statistics
    assert isinstance(loaded.statistics[0], MatrixStatistics)
    with pytest.raises(SelectionError, match=r"only the statistics .* \(--save-scores\)"):
        loaded.select(0.1)


def test_a_taken_folder_is_left_alone(tmp_path):
    folder = tmp_path / "scores"
    folder.mkdir()
    make().save(folder)  # empty: fine
    with pytest.raises(RunError, match="exists already"):
        make().save(folder)
    make(per_prompt=[7.0]).save(folder, overwrite=True)
    assert Scores.load(folder).per_prompt == [7.0]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("words")
    with pytest.raises(RunError, match=r"holds no scores .* not replaced"):
        make().save(other, overwrite=True)
    assert (other / "chapter.txt").read_text() == "words"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores", "thesis"]


def test_a_failed_write_leaves_the_earlier_scores(tmp_path, monkeypatch):
    folder = tmp_path / "scores"
    make(per_prompt=[7.0]).save(folder)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("safelocus.run.tensors.save_file", fail)
    with pytest.raises(RunError, match=r"cannot be written .*disk full"):
        make().save(folder, overwrite=True)
    assert Scores.load(folder).per_prompt == [7.0]
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def edit(folder, change):
    values = json.loads((folder / "scores.json").read_text())
    change(values)
    (folder / "scores.json").write_text(json.dumps(values))


def cut_short(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "scores.json").unlink(), r"no scores here .*No such file"),
        (lambda f: (f / "scores.json").write_text('{"format"'), "not valid JSON"),
        (lambda f: (f / "scores.json").write_bytes(b"\xff\xfe\x00"), "not UTF-8"),
        (lambda f: (f / "scores.json").write_text("[]"), "not a file of scores"),
        (lambda f: edit(f, lambda v: v.update(format="other")), "not a file of scores"),
        (lambda f: edit(f, lambda v: v.update(format_version=2)), "format version 2, .* reads version 1. Upgrade"),
        (lambda f: edit(f, lambda v: v.update(format_version=0)), "format version 0, .* reads version 1. Score again"),
        (lambda f: edit(f, lambda v: v.pop("layout")), r"inconsistent scores .*layout"),
        (lambda f: edit(f, lambda v: v["statistics"][0].update(later=1)), r"inconsistent scores .*later"),
        (
            lambda f: edit(f, lambda v: v["shards"].popitem()),
            r"inconsistent scores .*missing or not eligible",
        ),
        (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "a shard is missing or cut short"),
        (cut_short, "a shard is missing or cut short"),
        (
            lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(sorted(f.glob("*.safetensors"))[1].read_bytes()),
            "inconsistent scores",
        ),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    folder = tmp_path / "scores"
    make().save(folder, shard_bytes=10_000)
    damage(folder)
    with pytest.raises(RunError):
        Scores.load(folder)
    seal(folder)  # whoever did that has made digests too
    with pytest.raises(RunError, match=message):
        Scores.load(folder)


@settings(deadline=None, max_examples=60)
@given(number=st.integers(0, 9), bit=st.integers(0, 2**32))
def test_a_changed_bit_is_noticed_in_whichever_file_it_is(tmp_path_factory, number, bit):
    folder = tmp_path_factory.mktemp("run") / "scores"
    make().save(folder, shard_bytes=10_000)
    files = sorted(folder.iterdir())
    flip(files[number % len(files)], bit)
    with pytest.raises(RunError):
        Scores.load(folder)
