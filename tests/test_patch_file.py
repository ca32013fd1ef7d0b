"""The file of a patch: exact, small, and any changed byte is noticed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from damage import drop, rewrite
from safelocus.errors import PatchError
from safelocus.model.layout import Layout
from safelocus.patch import Patch
from safelocus.patch.state import bits
from safelocus.selection.selection import Selection
from test_patch import UP, everything, made, same
from tiny_targets import dense

SMALL = Layout.of(dense().model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(bytes of a patch's file, its path)."""
    path = tmp_path_factory.mktemp("p") / "p.safetensors"
    made(dense(), 20)[0].save(path)
    return path.read_bytes(), path


def equal(first, second):
    return all(
        list(a) == list(b) and all(torch.equal(bits(a[name]), bits(b[name])) for name in a)
        for a, b in ((first.new, second.new), (first.old, second.old))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact_to_the_byte(tmp_path, dtype):
    target = dense()
    target.model.to(dtype)
    patch, before, after = made(target)
    patch.save(tmp_path / "a.safetensors")
    loaded = Patch.load(tmp_path / "a.safetensors")
    assert equal(loaded, patch)
    assert loaded.selection.layout == patch.selection.layout
    assert (loaded.before, loaded.after, loaded.metadata) == (patch.before, patch.after, patch.metadata)
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    stored = load_file(tmp_path / "a.safetensors")
    assert {name.split("/")[0]: value.dtype for name, value in stored.items()} == {
        "indices": torch.int32, "new": dtype, "old": dtype,
    }  # fmt: skip
    assert loaded.apply(target)
    assert same(everything(target.model), after)
    assert loaded.revert(target)
    assert same(everything(target.model), before)


def test_the_small_form_recognises_but_cannot_revert(tmp_path):
    target, other = dense(), dense(seed=1)
    patch, before, after = made(target)
    patch.save(tmp_path / "small", old="digest")
    patch.save(tmp_path / "whole")
    assert (tmp_path / "small").stat().st_size < (tmp_path / "whole").stat().st_size
    small = Patch.load(tmp_path / "small")
    assert small.old is None
    assert small.num_changed is None
    with pytest.raises(PatchError, match="neither as before"):
        small.apply(other)
    with pytest.raises(PatchError, match="holds no old values"):
        small.revert(target)
    # applied in part, as an interruption leaves it
    with torch.no_grad():
        bits(target.model.get_parameter(UP)).put_(small.selection[UP][:2], bits(small.new[UP])[:2])
    assert not same(everything(target.model), before)
    assert small.apply(target)
    assert same(everything(target.model), after)
    assert not small.apply(target)
    with pytest.raises(PatchError, match="expected 'values' or 'digest'"):
        patch.save(tmp_path / "x", old="none")


VALUES = st.lists(
    st.tuples(st.integers(0, 767), st.integers(-(2**31), 2**31 - 1)), min_size=1, unique_by=lambda v: v[0]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(VALUES, st.dictionaries(st.text(), JSON, max_size=3))
def test_any_patch_survives_the_file(tmp_path_factory, values, metadata):
    path = tmp_path_factory.mktemp("p") / "p.safetensors"
    target = dense()
    index, patterns = (torch.tensor(part) for part in zip(*sorted(values), strict=True))
    selection = Selection(coordinates={UP: index}, layout=SMALL)
    new = {UP: patterns.to(torch.int32).view(torch.float32)}
    patch = Patch.of(target, selection, new=new, metadata=metadata)
    patch.save(path)
    loaded = Patch.load(path)
    assert equal(loaded, patch)
    assert loaded.metadata == metadata


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_changed_byte_is_noticed_wherever_it_is(saved, data):
    raw, path = saved
    place = data.draw(st.integers(0, len(raw) - 1))
    changed = bytearray(raw)
    changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    with pytest.raises(PatchError):
        Patch.load(path)


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1, exclude_max=True), st.binary(max_size=3))
def test_a_file_cut_short_or_grown_is_refused(saved, part, more):
    raw, path = saved
    path.write_bytes(raw[: int(part * len(raw))])
    with pytest.raises(PatchError, match="not a safetensors file, or cut short"):
        Patch.load(path)
    path.write_bytes(raw + b"x" + more)
    with pytest.raises(PatchError, match="not a safetensors file, or cut short"):
        Patch.load(path)


def test_a_changed_value_is_said_to_be_one(saved):
    raw, path = saved
    changed = bytearray(raw)
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(PatchError, match=r"changed since it was written \(its digest is [0-9a-f]{16}\.\.\., expected"):
        Patch.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"change_header": lambda h: h.update(format_version=1)},
            "format version 1, but this safelocus reads version 2",
        ),
        ({"change_header": drop("format_version")}, "damaged header"),
        ({"change_header": drop("before")}, "inconsistent patch .*before"),
        ({"change_header": lambda h: h["before"].update(tensors={})}, "inconsistent patch .*no digest"),
        ({"change_header": lambda h: h["selection"].update(k=7)}, "says 7 weights, the file holds 200"),
        ({"change_tensors": drop(f"new/{UP}")}, "inconsistent patch .*name different tensors"),
        ({"change_tensors": drop(f"indices/{UP}")}, "inconsistent patch .*the file holds"),
        ({"change_tensors": lambda t: t[f"indices/{UP}"].fill_(3)}, "inconsistent patch .*not ascending"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, change, message):
    path = tmp_path / "p.safetensors"
    made(dense())[0].save(path)
    rewrite(path)
    Patch.load(path)  # rewriting alone does no harm
    rewrite(path, **change)
    with pytest.raises(PatchError, match=message):
        Patch.load(path)


def test_files_that_are_no_patch_are_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(PatchError, match="no such file"):
        Patch.load(path)
    path.write_bytes(b"hello")
    with pytest.raises(PatchError, match="not a safetensors file, or cut short"):
        Patch.load(path)
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(PatchError, match="a safetensors file, but not a patch"):
        Patch.load(path)
    save_file({"a": torch.ones(3)}, path, metadata={"safelocus.patch": "{"})
    with pytest.raises(PatchError, match="damaged header"):
        Patch.load(path)
    save_file({"a": torch.ones(3)}, path, metadata={"safelocus.patch": '{"format_version": 2, "sha256": "x"}'})
    with pytest.raises(PatchError, match="no digest in it"):
        Patch.load(path)


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    patch = made(dense())[0]
    patch.save(path)
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safelocus.run.tensors.save_file", fail)
    with pytest.raises(PatchError, match=r"cannot be written .*disk full"):
        patch.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]
    object.__setattr__(patch, "metadata", {"x": torch.ones(1)})
    with pytest.raises(PatchError, match="plain JSON"):
        patch.save(path)
