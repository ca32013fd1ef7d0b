"""Exact selection: against a dense stable sort, with ties, at the edges, and beyond 32 bits."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from safelocus.errors import NumericalError, SelectionError
from safelocus.selection.topk import count_eligible, histogram, pick, pick_groups, random_k
from safelocus.selection.topk.picking import pick_by_counting
from safelocus.selection.topk.shortlist import shortlist
from safelocus.selection.topk.threshold import Threshold, find_bin, find_threshold, gather, refine

# few distinct values, so that ties abound; zero both ways, denormals, neighbours, both ends of the range
VALUES = np.array(
    [
        0.0,
        -0.0,
        1e-45,
        2e-45,
        1.17549435e-38,
        0.5,
        np.nextafter(np.float32(0.5), np.float32(1)),
        1.0,
        3.4028235e38,
    ],
    dtype=np.float32,
)
PLACES = st.integers(0, len(VALUES) - 1)
SHAPES = st.lists(st.integers(0, 6), min_size=0, max_size=3).map(tuple)


@st.composite
def streams(draw):
    """Named tensors of any shape, empty and scalar ones among them."""
    tensors = {}
    for i, shape in enumerate(draw(st.lists(SHAPES, min_size=1, max_size=5))):
        size = int(np.prod(shape))
        chosen = draw(st.lists(PLACES, min_size=size, max_size=size))
        tensors[f"t{i}"] = torch.from_numpy(VALUES[np.array(chosen, dtype=int)].copy()).reshape(shape)
    return tensors


def dense_sort(tensors, k, which):
    """(tensor number, flat index) of the first k by a stable sort over everything."""
    flat = np.concatenate([t.reshape(-1).numpy() for t in tensors.values()])
    order = np.argsort(flat if which == "bottom" else -flat, kind="stable")[:k]
    owner = np.concatenate([np.full(t.numel(), i) for i, t in enumerate(tensors.values())])
    index = np.concatenate([np.arange(t.numel()) for t in tensors.values()])
    return sorted(zip(owner[order].tolist(), index[order].tolist(), strict=True))


def coordinates(tensors, picked):
    names = list(tensors)
    return [(names.index(name), i) for name, index in picked.indices.items() for i in index.tolist()]


def picked_coordinates(tensors, k, which="top"):
    return coordinates(tensors, pick(tensors, k, which=which))


@settings(deadline=None, max_examples=80)
@given(streams(), st.data(), st.sampled_from(["top", "bottom"]), st.sampled_from([None, 3, 7]))
def test_equals_a_dense_stable_sort(tensors, data, which, chunk_size):
    total = sum(t.numel() for t in tensors.values())
    for k in {0, min(1, total), data.draw(st.integers(0, total)), total}:
        picked = pick(tensors, k, which=which, chunk_size=chunk_size)
        assert coordinates(tensors, picked) == dense_sort(tensors, k, which)
        assert picked.num_weights == k
        for name, index in picked.indices.items():
            assert index.dtype == torch.int64
            assert torch.equal(picked.scores[name], tensors[name].reshape(-1)[index])


@pytest.mark.parametrize("which", ["top", "bottom"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_a_dense_sort_of_many_continuous_values(which, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {str(i): torch.rand(311, 37, generator=generator) ** 6 for i in range(5)}
    if seed % 2:  # as gradients in bfloat16 have it: few distinct values
        tensors = {name: value.bfloat16().float() for name, value in tensors.items()}
    total = 5 * 311 * 37
    for k in (1, 575, total // 2, total - 1):
        assert picked_coordinates(tensors, k, which) == dense_sort(tensors, k, which)


def same(found, expected):
    """Whether the same weights were picked, with the same bits of their scores."""
    return list(found.indices) == list(expected.indices) and all(
        torch.equal(found.indices[name], index)
        and torch.equal(found.scores[name].view(torch.int32), expected.scores[name].view(torch.int32))
        for name, index in expected.indices.items()
    )


@settings(deadline=None, max_examples=150)
@given(streams(), st.data(), st.sampled_from(["top", "bottom"]), st.sampled_from([None, 3]), st.sampled_from([1, 4]))
def test_a_shortlist_finds_what_counting_finds(tensors, data, which, chunk_size, sample):
    k = data.draw(st.integers(0, sum(t.numel() for t in tensors.values())))
    found = shortlist(tensors, k, which=which, chunk_size=chunk_size, sample=sample)
    assert found is None or same(found, pick_by_counting(tensors, k, which=which))


@pytest.mark.parametrize("k", [1, 10, 1000, 10_000])
@pytest.mark.parametrize("which", ["top", "bottom"])
def test_continuous_scores_have_a_shortlist(which, k):
    torch.manual_seed(k)
    tensors = {"a": torch.rand(300, 70) ** 4, "b": torch.rand(0), "c": torch.rand(90_000), "d": torch.rand(5, 7, 11)}
    tensors["a"][:3] = 0.0
    found = shortlist(tensors, k, which=which, sample=5000)
    assert found is not None
    assert same(found, pick_by_counting(tensors, k, which=which))


def test_a_sample_that_misleads_costs_the_shortlist_and_not_the_outcome():
    """Every sampled score is large, or small: too few reach the guess, or too many."""
    for inside, outside in ((1.0, 0.1), (0.1, 1.0)):
        stride = (100_000 // 1000) | 1
        scores = {"a": torch.full((100_000,), outside) + torch.rand(100_000) * 0.01}
        scores["a"][::stride] = inside
        assert shortlist(scores, 5000, sample=1000) is None
        assert pick(scores, 5000).num_weights == 5000


def test_excluded_weights_are_not_on_the_shortlist():
    scores = {"a": torch.rand(50_000) ** 4, "b": torch.full((50_000,), -math.inf)}
    scores["a"][::4] = -math.inf
    found = shortlist(scores, 100, sample=5000)
    assert found is not None
    assert same(found, pick_by_counting(scores, 100))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_shortlist_is_refused_to_scores_that_cannot_be_ranked(bad):
    scores = {"a": torch.rand(50_000), "b": torch.rand(50_000)}
    scores["b"][77] = bad
    with pytest.raises(NumericalError, match="'b'"):
        shortlist(scores, 100, sample=5000)


def test_ties_go_to_the_first_tensor_then_the_first_index():
    tensors = {"b": torch.tensor([1.0, 2.0, 2.0]), "a": torch.tensor([[2.0, 3.0], [2.0, 0.0]])}
    picked = pick(tensors, 3)
    assert {name: index.tolist() for name, index in picked.indices.items()} == {"b": [1, 2], "a": [1]}
    lowest = pick({"b": torch.ones(4), "a": torch.ones(4)}, 5, which="bottom")
    assert {name: index.tolist() for name, index in lowest.indices.items()} == {"b": [0, 1, 2, 3], "a": [0]}


def test_negative_zero_ties_with_zero():
    tensors = {"a": torch.tensor([-0.0, 0.0, -0.0, 1.0])}
    assert picked_coordinates(tensors, 2) == [(0, 0), (0, 3)]
    assert picked_coordinates(tensors, 2, "bottom") == [(0, 0), (0, 1)]


def test_strided_tensors_count_in_logical_order():
    value = torch.arange(12.0).reshape(3, 4)
    assert picked_coordinates({"a": value.T}, 3) == dense_sort({"a": value.T.contiguous()}, 3, "top")


@pytest.mark.parametrize("which", ["top", "bottom", "random"])
def test_excluded_weights_are_never_picked(which):
    value = torch.tensor([5.0, -torch.inf, 0.0, 3.0, -torch.inf, 7.0])
    tensors = {"a": value, "b": torch.full((3,), -torch.inf), "c": torch.ones(1)}
    assert count_eligible(value) == 4
    assert picked_coordinates(tensors, 5, which) == [(0, 0), (0, 2), (0, 3), (0, 5), (2, 0)]
    with pytest.raises(SelectionError, match="only 5 are eligible"):
        pick(tensors, 6, which=which)


def test_excluded_weights_leave_the_order_of_the_rest():
    generator = torch.Generator().manual_seed(0)
    value = torch.rand(1000, generator=generator)
    excluded = torch.rand(1000, generator=generator) < 0.3
    expected = (-value.masked_fill(excluded, -1)).argsort(stable=True)[:99].sort().values
    picked = pick({"a": value.masked_fill(excluded, -torch.inf)}, 99, chunk_size=64)
    assert torch.equal(picked.indices["a"], expected)
    expected = value.masked_fill(excluded, 2).argsort(stable=True)[:99].sort().values
    picked = pick({"a": value.masked_fill(excluded, -torch.inf)}, 99, which="bottom", chunk_size=64)
    assert torch.equal(picked.indices["a"], expected)


@pytest.mark.parametrize(
    ("bad", "count"),
    [(torch.nan, "2 NaN"), (torch.inf, "2 infinite"), (-1.0, "2 negative"), (-1e-45, "2 negative")],
)
@pytest.mark.parametrize("which", ["top", "bottom"])
def test_scores_that_cannot_be_ranked_name_the_tensor_and_their_number(bad, count, which):
    value = torch.ones(10)
    value[[3, 9]] = bad
    with pytest.raises(NumericalError, match=rf"'layer\.7'.* of 10 there are .*{count}"):
        pick({"fine": torch.ones(3), "layer.7": value}, 2, which=which, chunk_size=4)


def test_scores_of_another_dtype_are_refused():
    with pytest.raises(SelectionError, match=r"'a' are torch\.float64: expected torch\.float32"):
        pick({"a": torch.ones(3, dtype=torch.float64)}, 1)


@pytest.mark.parametrize("which", ["top", "bottom", "random"])
def test_more_than_there_are_is_an_error(which):
    with pytest.raises(SelectionError, match="cannot select 5 weights: only 4 are eligible"):
        pick({"a": torch.ones(4)}, 5, which=which)
    with pytest.raises(SelectionError, match="must not be negative"):
        pick({"a": torch.ones(4)}, -1, which=which)
    assert pick({}, 0, which=which).num_weights == 0


def test_shards_that_share_their_counts_gather_what_one_process_would():
    """The steps as several processes take them, each with a slice of every tensor's rows."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: (torch.rand(40, 7, generator=generator) * 5).round() for name in "abc"}
    k = 300
    shards = [{name: t[rank * 10 : rank * 10 + 10] for name, t in tensors.items()} for rank in range(4)]
    high_bin, above = find_bin(sum(histogram(shard) for shard in shards), k)
    low = sum(refine(shard, high_bin) for shard in shards)
    low_bin, above_in_bin = find_bin(low, k - above)
    threshold = (high_bin << 16) | low_bin
    num_ties = k - above - above_in_bin
    assert find_threshold(tensors, k) == Threshold(key=threshold, num_ties=num_ties)
    found = {name: [] for name in tensors}
    for name in tensors:
        for rank, shard in enumerate(shards):
            index, _, taken = gather(shard[name], threshold, num_ties, offset=rank * 70)
            num_ties -= taken
            found[name].append(index)
    whole = pick(tensors, k)
    for name in tensors:
        assert torch.equal(torch.cat(found[name]), whole.indices.get(name, torch.empty(0, dtype=torch.int64)))


def test_flat_indices_beyond_32_bits():
    offset = 2**31 - 2
    index, values, taken = gather(torch.tensor([1.0, 0.0, 2.0, 2.0, 2.0]), 0x40000000, 2, offset=offset, chunk_size=2)
    assert index.tolist() == [2**31, 2**31 + 1]  # the bits of 2.0 are 0x40000000: two of its three ties
    assert values.tolist() == [2.0, 2.0]
    assert taken == 2
    counts = torch.zeros(4, dtype=torch.int64)
    counts[1], counts[3] = 2**33, 2**32
    assert find_bin(counts, 2**32) == (3, 0)
    assert find_bin(counts, 2**32 + 1) == (1, 2**32)


def test_random_ordinals_beyond_32_bits():
    sizes = {"a": 3_000_000_000, "b": 0, "c": 2**33}
    drawn = random_k(sizes, 2000, seed=5)
    assert list(drawn) == ["a", "c"]
    assert sum(value.numel() for value in drawn.values()) == 2000
    for name, ordinals in drawn.items():
        assert ordinals.dtype == torch.int64
        assert bool((ordinals[1:] > ordinals[:-1]).all())
        assert int(ordinals[0]) >= 0
        assert 2**31 < int(ordinals[-1]) < sizes[name]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.data(), st.integers(0, 2**63 - 1))
def test_random_draws_are_distinct_exact_and_repeatable(sizes, data, seed):
    named = {str(i): size for i, size in enumerate(sizes)}
    total = sum(sizes)
    k = data.draw(st.integers(0, total))
    drawn = random_k(named, k, seed=seed)
    assert sum(len(set(value.tolist())) for value in drawn.values()) == k
    for name, value in drawn.items():
        assert value.tolist() == sorted(value.tolist())
        assert 0 <= int(value[0]) <= int(value[-1]) < named[name]
    # the same weights whatever tensors they are cut into
    as_one = random_k({"all": total}, k, seed=seed).get("all", torch.empty(0, dtype=torch.int64))
    starts = dict(zip(named, np.cumsum([0, *sizes]).tolist(), strict=False))
    assert [i + starts[name] for name, value in drawn.items() for i in value.tolist()] == as_one.tolist()


@pytest.mark.parametrize(("total", "k", "num_draws"), [(10, 3, 3000), (10, 7, 3000), (70, 2, 12000)])
def test_random_draws_are_uniform_over_all_subsets(total, k, num_draws):
    """Chi-square over every subset: the dense draw, its complement, and the sparse draw (70, 2)."""
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(num_draws):
        counts[tuple(random_k({"a": total}, k, seed=seed)["a"].tolist())] += 1
    num_subsets = math.comb(total, k)
    expected = num_draws / num_subsets
    statistic = sum((n - expected) ** 2 / expected for n in counts.values())
    statistic += (num_subsets - len(counts)) * expected  # subsets that were never drawn
    assert stats.chi2.sf(statistic, num_subsets - 1) > 1e-3


@pytest.mark.parametrize("k", [1000, 20_000, 39_000])
def test_repeats_are_drawn_again(k):
    """Sparse, dense, and by the complement: so many draws of 40,000 are bound to repeat some."""
    drawn = random_k({"a": 40_000}, k, seed=0)["a"].tolist()
    assert len(set(drawn)) == len(drawn) == k


def test_random_seeds_differ():
    draws = {tuple(random_k({"a": 1000}, 10, seed=seed)["a"].tolist()) for seed in range(50)}
    assert len(draws) == 50


class Columns:
    """A grouping by column of two-dimensional tensors, each tensor's columns apart."""

    def __init__(self, tensors):
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        widths = [width for _, width in self.shapes.values()]
        self.bases = dict(zip(tensors, np.cumsum([0, *widths]).tolist(), strict=False))
        self.num_groups = sum(widths)

    def sum_into(self, totals, name, values):
        base, width = self.bases[name], self.shapes[name][1]
        totals[base : base + width] += values.sum(dim=0, dtype=totals.dtype)

    def expand(self, name, per_group):
        base, (rows, width) = self.bases[name], self.shapes[name]
        return per_group[base : base + width].expand(rows, width)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3),
    st.integers(0, 1000),
    st.sampled_from(["top", "bottom"]),
    st.sampled_from(["mean", "sum"]),
    st.booleans(),
    st.data(),
)
def test_groups_equal_brute_force(shapes, seed, which, reduce, excludes, data):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, shape in enumerate(shapes):
        value = torch.randint(0, 4, shape, generator=generator).float()
        if excludes:
            value[torch.rand(shape, generator=generator) < 0.3] = -torch.inf
        tensors[f"t{i}"] = value
    members = []  # one list of (tensor number, flat index, score) per column
    for i, value in enumerate(tensors.values()):
        for column in range(value.shape[1]):
            found = [(i, r * value.shape[1] + column, float(value[r, column])) for r in range(value.shape[0])]
            members.append([m for m in found if m[2] != -np.inf])
    k = data.draw(st.integers(0, sum(map(len, members))))
    sign = -1 if which == "top" else 1
    candidates = [group for group in members if group]
    ranked = sorted(candidates, key=lambda g: sign * sum(m[2] for m in g) / (len(g) if reduce == "mean" else 1))
    expected = []
    for group in ranked:
        if len(expected) + len(group) > k:
            break
        expected += [m[:2] for m in group]
    picked = pick_groups(tensors, k, Columns(tensors), which=which, reduce=reduce)
    assert coordinates(tensors, picked) == sorted(expected)
    assert picked.num_weights <= k


def test_taking_groups_stops_at_the_first_that_would_exceed():
    tensors = {
        "large": torch.full((5, 1), 3.0),
        "huge": torch.full((6, 1), 2.0),
        "small": torch.full((1, 1), 1.0),
    }
    picked = pick_groups(tensors, 7, Columns(tensors))
    assert list(picked.indices) == ["large"]  # `small` would fit, but ranks below `huge`
    assert picked.num_weights == 5


def test_random_groups_are_drawn_among_all():
    tensors = {"a": torch.rand(2, 30)}
    drawn = [pick_groups(tensors, 10, Columns(tensors), which="random", seed=seed) for seed in range(60)]
    assert {picked.num_weights for picked in drawn} == {10}
    assert {int(i) % 30 for picked in drawn for i in picked.indices["a"]} == set(range(30))
    again = pick_groups(tensors, 10, Columns(tensors), which="random", seed=7)
    assert torch.equal(again.indices["a"], drawn[7].indices["a"])


def test_groups_refuse_scores_that_cannot_be_ranked():
    tensors = {"a": torch.tensor([[1.0, torch.nan]])}
    with pytest.raises(NumericalError, match="1 NaN"):
        pick_groups(tensors, 1, Columns(tensors))
