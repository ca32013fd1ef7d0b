"""Selections: what may be in one, set algebra, files, and fitting a model."""

import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from damage import drop, flip, rewrite
from safelocus.errors import SelectionError
from safelocus.model.fingerprint import Fingerprint
from safelocus.model.layout import Layout
from safelocus.run.identity import Provenance
from safelocus.selection.selection import Selection, index_dtype
from tiny_models import build, config

MOE_TENSOR = "model.layers.1.mlp.experts.gate_up_proj"
QUERY = "model.layers.0.self_attn.q_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"


@functools.cache
def layout(name="qwen3_moe"):
    return Layout.from_config(config(name))


def chosen(**indices):
    """Keyword names: `query`, `key`, `moe`."""
    names = {"query": QUERY, "key": KEY, "moe": MOE_TENSOR}
    return {names[key]: torch.tensor(value, dtype=torch.int64) for key, value in indices.items()}


def random_selection(seed=0, k=300, name="qwen3_moe", **options):
    generator = torch.Generator().manual_seed(seed)
    sizes = [layout(name).tensors[t].num_weights for t in layout(name).eligible_tensors]
    places = torch.randperm(sum(sizes), generator=generator)[:k].sort().values
    coordinates, start = {}, 0
    for tensor, size in zip(layout(name).eligible_tensors, sizes, strict=True):
        coordinates[tensor] = places[(places >= start) & (places < start + size)] - start
        start += size
    scores = {tensor: torch.rand(index.numel(), generator=generator) for tensor, index in coordinates.items()}
    return Selection(coordinates=coordinates, scores=scores, layout=layout(name), **options)


def as_set(selection):
    return {(name, i) for name, index in selection.coordinates.items() for i in index.tolist()}


# what may be in one


def test_empty_tensors_are_left_out_and_order_is_the_layouts():
    selection = Selection(coordinates=chosen(moe=[3], key=[], query=[0, 2]), layout=layout())
    assert list(selection.coordinates) == [QUERY, MOE_TENSOR]
    assert selection.k == 3
    assert selection.num_weights == layout().num_weights
    assert selection[QUERY].tolist() == [0, 2]
    assert selection[f"base_model.model.{QUERY}".replace(".weight", ".base_layer.weight")].tolist() == [0, 2]
    assert selection[KEY].dtype == torch.int64
    assert selection[KEY].tolist() == []
    with pytest.raises(SelectionError, match=r"'model\.layers\.9\.x' is not a tensor"):
        selection["model.layers.9.x"]
    assert "k=3" in repr(selection)


def test_it_is_a_mapping_over_the_tensors_that_have_selected_weights():
    selection = Selection(coordinates=chosen(moe=[3], query=[0, 2]), layout=layout())
    assert QUERY in selection
    assert f"_orig_mod.{QUERY}" in selection
    assert KEY not in selection
    assert 3 not in selection
    assert list(selection) == list(selection.keys()) == [QUERY, MOE_TENSOR]
    assert (len(selection), selection.k) == (2, 3)
    assert {name: index.tolist() for name, index in selection.items()} == {QUERY: [0, 2], MOE_TENSOR: [3]}
    assert [index.tolist() for index in selection.values()] == [[0, 2], [3]]
    assert selection.get(f"base_model.model.{QUERY}").tolist() == [0, 2]
    assert selection.get(KEY) is None
    assert selection.get("model.layers.9.x", 5) == 5
    assert selection == selection
    assert selection != Selection(coordinates=selection.coordinates, layout=layout())
    assert len({selection, selection}) == 1


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([1, 1], "not ascending and unique"),
        ([2, 1], "not ascending and unique"),
        ([-1, 2], "run from -1 to 2: expected 0 to 767"),
        ([0, 768], r"run from 0 to 768: expected 0 to 767, .*\[32, 24\]"),
    ],
)
def test_bad_indices_are_refused(indices, message):
    with pytest.raises(SelectionError, match=message):
        Selection(coordinates=chosen(query=indices), layout=layout())


def test_other_shapes_dtypes_and_names_are_refused():
    with pytest.raises(SelectionError, match=r"torch\.bool \[768\]: expected one-dimensional int64"):
        Selection(coordinates={QUERY: torch.ones(768, dtype=torch.bool)}, layout=layout())
    with pytest.raises(SelectionError, match=r"'nothing' is not a tensor .* names such as model\.layers"):
        Selection(coordinates={"nothing": torch.tensor([0])}, layout=layout())
    with pytest.raises(SelectionError, match=r"'model\.norm\.weight' is not eligible: it holds norm"):
        Selection(coordinates={"model.norm.weight": torch.tensor([0])}, layout=layout())
    by_hand = Selection(coordinates={"model.norm.weight": torch.tensor([0])}, layout=layout(), only_eligible=False)
    assert by_hand.counts_by("component")["norm"] == 1


def test_scores_must_fit_the_indices():
    for scores in ({}, {QUERY: torch.ones(3)}, {QUERY: torch.ones(2).double()}, {KEY: torch.ones(2)}):
        with pytest.raises(SelectionError, match="scores"):
            Selection(coordinates=chosen(query=[0, 2]), scores=scores, layout=layout())


# counting


def test_counts_of_matrices_layers_components_and_experts():
    _, rows, columns = layout().tensors[MOE_TENSOR].shape  # [experts, gate units then up units, inputs]
    expert = 3 * rows * columns
    gate, up = [expert + 1, expert + 2], [expert + (rows // 2) * columns + 5]
    selection = Selection(coordinates=chosen(moe=gate + up, query=[0, 767]), layout=layout())
    counts = selection.per_matrix_counts()
    assert {name: n for name, n in counts.items() if n} == {
        QUERY: 2,
        f"{MOE_TENSOR}[3,gate]": 2,
        f"{MOE_TENSOR}[3,up]": 1,
    }
    assert len(counts) == sum(matrix.eligible for matrix in layout().matrices)
    assert selection.counts_by("component") == {
        "query": 2, "key": 0, "value": 0, "output": 0, "gate": 2, "up": 1, "down": 0,
    }  # fmt: skip
    assert selection.counts_by("layer") == {0: 2, 1: 3}
    assert selection.counts_by("layer", "expert")[1, 3] == 3
    assert sum(selection.counts_by("layer", "expert").values()) == 5


# set algebra


SUBSETS = st.sets(st.integers(0, 30))


@settings(deadline=None, max_examples=60)
@given(SUBSETS, SUBSETS, SUBSETS, SUBSETS)
def test_set_algebra_is_that_of_sets(query_a, moe_a, query_b, moe_b):
    def make(query, moe):
        coordinates = chosen(query=sorted(query), moe=sorted(moe))
        # the score says which coordinate it belongs to, so misalignment shows
        scores = {name: index.float() + len(name) for name, index in coordinates.items()}
        return Selection(coordinates=coordinates, scores=scores, layout=layout())

    a, b = make(query_a, moe_a), make(query_b, moe_b)
    sets = as_set(a), as_set(b)
    for result, expected in (
        (a & b, sets[0] & sets[1]),
        (a - b, sets[0] - sets[1]),
        (a | b, sets[0] | sets[1]),
    ):
        assert as_set(result) == expected
        assert result.k == len(expected)
        assert result.which == "set"
        for name, value in result.scores.items():
            assert torch.equal(value, result[name].float() + len(name))
    assert a.num_common(b) == len(sets[0] & sets[1])
    either = len(sets[0] | sets[1])
    assert a.iou(b) == (len(sets[0] & sets[1]) / either if either else 1.0)


def test_a_set_remembers_where_it_comes_from():
    safety = random_selection(0, which="top", ratio=0.01, provenance=Provenance(method="esi", prompts_hash="p"))
    utility = random_selection(1, which="top", provenance=Provenance(method="snip"))
    difference = safety - utility
    assert difference.operation == "-"
    assert [parent["method"] for parent in difference.parents] == ["esi", "snip"]
    assert difference.parents[0]["ratio"] == 0.01
    assert difference.provenance == safety.provenance
    nested = difference & random_selection(2)
    assert nested.parents[0]["parents"] == list(difference.parents)
    json.dumps(nested.describe(), allow_nan=False)


def test_a_union_keeps_scores_only_of_one_scoring():
    same = random_selection(0) | random_selection(1)
    assert same.scores is not None
    assert (random_selection(0) | random_selection(1, provenance=Provenance(method="snip"))).scores is None


def test_operations_between_models():
    dense = random_selection(name="llama")
    with pytest.raises(SelectionError, match=r"different models: .* no counterpart"):
        random_selection() - dense
    prints = [Fingerprint.of(build("llama", seed=seed), layout("llama")) for seed in (0, 1)]
    a, b = (random_selection(0, 50, "llama", provenance=Provenance(fingerprint=p.to_json())) for p in prints)
    with pytest.raises(SelectionError, match=r"another model than this one: values of .*allow_mismatch=True"):
        a & b
    assert a.combine(b, "&", allow_mismatch=True).k == 50
    assert a.iou(b) == 1.0
    with pytest.raises(SelectionError, match="operation '\\^'"):
        a.combine(b, "^")


def test_what_cannot_be_told_of_two_models_is_kept():
    prints = [
        Fingerprint.of(build("llama", seed=seed).to(dtype), layout("llama"))
        for seed, dtype in ((0, torch.float32), (1, torch.bfloat16))
    ]
    a, b = (random_selection(0, 50, "llama", provenance=Provenance(fingerprint=p.to_json())) for p in prints)
    both = a & b
    (remark,) = both.provenance.extra["remarks"]
    assert "another dtype than when one selection was made" in remark
    assert (both & b).provenance == both.provenance  # once
    assert (a & a).provenance == a.provenance


# fitting a model


def test_require_maps_wrapped_names_to_the_models_own():
    selection = Selection(coordinates=chosen(query=[0], moe=[0]), layout=layout())
    shapes = {name: tensor.shape for name, tensor in layout().tensors.items()}
    assert selection.require(shapes) == {QUERY: QUERY, MOE_TENSOR: MOE_TENSOR}
    wrapped = {"base_model.model." + name: shape for name, shape in shapes.items()}
    lora = f"base_model.model.{QUERY}".replace("q_proj.", "q_proj.base_layer.")
    wrapped[lora] = wrapped.pop(f"base_model.model.{QUERY}")
    wrapped[lora.replace("base_layer", "lora_A.default")] = (4, 24)
    assert selection.require(wrapped) == {QUERY: lora, MOE_TENSOR: f"base_model.model.{MOE_TENSOR}"}


def test_a_selection_that_matches_nothing_or_only_partly_names_what_is_missing():
    selection = Selection(coordinates=chosen(query=[0], moe=[0]), layout=layout())
    shapes = {name: tensor.shape for name, tensor in layout().tensors.items()}
    lora_only = {f"base_model.model.{QUERY}".replace(".weight", ".lora_A.default.weight"): (4, 24)}
    with pytest.raises(SelectionError, match=rf"2 of the selection's 2 tensors .* {QUERY}, {MOE_TENSOR}\. .*lora_A"):
        selection.require(lora_only)
    partly = {name: shape for name, shape in shapes.items() if "experts" not in name}
    with pytest.raises(SelectionError, match=rf"1 of the selection's 2 tensors .* {MOE_TENSOR}\."):
        selection.require(partly)
    with pytest.raises(SelectionError, match=r"shape \[24, 32\]; the selection was made for \[32, 24\]"):
        selection.require({**shapes, QUERY: (24, 32)})
    with pytest.raises(SelectionError, match="holds no weights"):
        Selection(coordinates={}, layout=layout()).require(shapes)


def test_check_says_what_differs():
    model = build("llama")
    own = Fingerprint.of(model, layout("llama"))
    selection = random_selection(name="llama", provenance=Provenance(fingerprint=own.to_json()))
    assert selection.check(own) == []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    other = Fingerprint.of(model, layout("llama"))
    with pytest.raises(SelectionError, match=r"another model than this one: .*mlp\.up_proj.*--allow-mismatch"):
        selection.check(other)
    (remark,) = selection.check(other, allow_mismatch=True)
    assert all(difference in remark for difference in own.differences(other))
    by_hand = random_selection(name="llama")
    with pytest.raises(SelectionError, match="carries no fingerprint"):
        by_hand.check(own)
    assert by_hand.check(own, allow_mismatch=True) == ["the selection carries no fingerprint"]


# files


def full_selection():
    return random_selection(
        which="random", granularity="row", ratio=0.01, of="model", num_requested=155, seed=3,
        parents=({"k": 1},), operation="&",
        provenance=Provenance(method="esi", objective="guard", prompts_hash="abc", num_prompts=7, seed=1,
                              fingerprint={"model_type": "x"}, versions={"torch": "2"}, extra={"a": [None]}),
    )  # fmt: skip


@pytest.mark.parametrize("with_scores", [True, False])
def test_round_trip_is_exact_to_the_byte(tmp_path, with_scores):
    selection = full_selection()
    if not with_scores:
        selection = Selection(coordinates=selection.coordinates, layout=selection.layout)
    selection.save(tmp_path / "a.safetensors")
    loaded = Selection.load(tmp_path / "a.safetensors")
    assert loaded.layout == selection.layout
    assert loaded.provenance == selection.provenance
    assert loaded.describe() == selection.describe()
    assert list(loaded.coordinates) == list(selection.coordinates)
    for name, index in selection.coordinates.items():
        assert loaded[name].dtype == torch.int64
        assert torch.equal(loaded[name], index)
        if with_scores:
            assert torch.equal(loaded.scores[name], selection.scores[name])
    assert (loaded.scores is None) == (not with_scores)
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@settings(deadline=None, max_examples=25)
@given(SUBSETS, SUBSETS)
def test_any_selection_survives_the_file(tmp_path_factory, query, moe):
    path = tmp_path_factory.mktemp("s") / "s.safetensors"
    selection = Selection(coordinates=chosen(query=sorted(query), moe=sorted(moe)), layout=layout())
    selection.save(path)
    assert as_set(Selection.load(path)) == as_set(selection)


def test_indices_are_stored_in_32_bits_where_they_fit(tmp_path):
    random_selection().save(tmp_path / "s.safetensors")
    stored = load_file(tmp_path / "s.safetensors")
    assert {value.dtype for name, value in stored.items() if name.startswith("indices/")} == {torch.int32}
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64


def test_indices_of_a_huge_tensor_round_trip(tmp_path):
    """One tensor of 2**31 + 2**16 elements; only its layout exists."""
    values = json.loads(json.dumps(layout("llama").to_json()))
    tensor = next(t for t in values["tensors"] if t["name"] == QUERY)
    tensor["shape"], tensor["view"], tensor["axes"] = [32769, 65536], [32769, 65536], ["out", "in"]
    tensor["source"] = [0, 1]
    huge = Layout.from_json(values)
    last = 32769 * 65536 - 1
    selection = Selection(coordinates={QUERY: torch.tensor([0, 2**31, last])}, layout=huge)
    selection.save(tmp_path / "s.safetensors")
    assert load_file(tmp_path / "s.safetensors")[f"indices/{QUERY}"].dtype == torch.int64
    assert Selection.load(tmp_path / "s.safetensors")[QUERY].tolist() == [0, 2**31, last]


def test_views_of_shared_memory_can_be_saved(tmp_path):
    shared = torch.arange(20)
    selection = Selection(
        coordinates={QUERY: shared[:5], KEY: shared[5:9]},
        scores={QUERY: torch.ones(8)[:5], KEY: torch.ones(8)[::2]},
        layout=layout(),
    )
    selection.save(tmp_path / "s.safetensors")
    assert as_set(Selection.load(tmp_path / "s.safetensors")) == as_set(selection)


def test_files_that_are_no_selection_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(SelectionError, match="no such file"):
        Selection.load(path)
    with pytest.raises(SelectionError, match="no such file"):
        Selection.load(tmp_path)
    path.write_bytes(b"hello")
    with pytest.raises(SelectionError, match="not a safetensors file, or cut short"):
        Selection.load(path)
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(SelectionError, match="a safetensors file, but not a selection"):
        Selection.load(path)
    save_file({"a": torch.ones(3)}, path, metadata={"safelocus.selection": "{"})
    with pytest.raises(SelectionError, match="damaged header"):
        Selection.load(path)


@settings(deadline=None, max_examples=150)
@given(bit=st.integers(0, 2**32))
def test_a_changed_bit_is_noticed_wherever_it_is(tmp_path_factory, bit):
    path = tmp_path_factory.mktemp("s") / "s.safetensors"
    random_selection(k=20).save(path)
    flip(path, bit)
    with pytest.raises(SelectionError):
        Selection.load(path)


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_anywhere_is_refused(tmp_path_factory, part):
    path = tmp_path_factory.mktemp("s") / "s.safetensors"
    random_selection(k=20).save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(part * len(raw))])
    with pytest.raises(SelectionError, match="cut short"):
        Selection.load(path)


@pytest.mark.parametrize(
    ("change_header", "change_tensors", "message"),
    [
        (
            lambda h: h.update(format_version=1),
            None,
            r"format version 1, .* reads version 2\. Make the selection again",
        ),
        (
            lambda h: h.update(format_version=3),
            None,
            r"format version 3, .* reads version 2\. Upgrade safelocus, or make",
        ),
        (drop("format_version"), None, "damaged header"),
        (drop("layout"), None, "inconsistent selection .*layout"),
        (drop("provenance"), None, "inconsistent selection"),
        (lambda h: h["provenance"].update(later="x"), None, "inconsistent selection .*later"),
        (lambda h: h.update(k=7), None, "says 7 weights, the file holds 300"),
        (lambda h: h["layout"]["tensors"].pop(3), None, "inconsistent selection .*is not a tensor"),
        (None, drop(f"indices/{QUERY}"), "inconsistent selection .*scores and coordinates"),
        (None, drop(f"scores/{QUERY}"), "inconsistent selection .*scores and coordinates"),
        (None, lambda t: t[f"indices/{QUERY}"].fill_(3), "inconsistent selection .*not ascending"),
        (None, lambda t: t[f"indices/{QUERY}"].add_(768), "inconsistent selection .*expected 0 to 767"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, change_header, change_tensors, message):
    path = tmp_path / "s.safetensors"
    random_selection().save(path)
    rewrite(path)
    Selection.load(path)  # rewriting alone does no harm
    rewrite(path, change_header, change_tensors)
    with pytest.raises(SelectionError, match=message):
        Selection.load(path)


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    random_selection(0).save(path)
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safelocus.run.tensors.save_file", fail)
    with pytest.raises(SelectionError, match=r"cannot be written .*disk full"):
        random_selection(1).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_reader_of_the_earlier_file_keeps_it(tmp_path):
    path = tmp_path / "s.safetensors"
    random_selection(0).save(path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        random_selection(1).save(path)
        assert reader.read() == before
    assert path.read_bytes() != before


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(SelectionError, match=r"nowhere/s\.safetensors: cannot be written"):
        random_selection().save(tmp_path / "nowhere" / "s.safetensors")
