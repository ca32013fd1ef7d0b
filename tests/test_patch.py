"""Patches in memory: exact bits there and back, recognised states, refusals, conversion, merging."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import safelocus as sl
from safelocus.distributed import whole
from safelocus.errors import PatchError, SelectionError
from safelocus.patch import Patch, merge
from safelocus.patch.state import bits, with_values
from safelocus.selection.sparse import gather, scatter
from safelocus.selection.topk import random_k
from several import sharded, together
from tiny_targets import dense, moe

UP = "model.layers.0.mlp.up_proj.weight"
DTYPES = [torch.float32, torch.bfloat16]


def some(target, k=200, seed=0):
    """k random eligible coordinates."""
    sizes = {name: target.layout.tensors[name].num_weights for name in target.layout.eligible_tensors}
    return sl.Selection(coordinates=random_k(sizes, k, seed=seed), layout=target.layout)


def strange(values, seed=0):
    """Other bits, among them NaN with payloads, infinity and negative zero."""
    generator = torch.Generator().manual_seed(seed)
    changed = {name: value + torch.randn(value.shape, generator=generator).to(value) for name, value in values.items()}
    for value in changed.values():
        special = {2: [0x7FC1, 0x7F81, -0x8000, 0x7F80], 4: [0x7FC00001, 0x7F800001, -0x80000000, 0x7F800000]}
        patterns = torch.tensor(special[value.element_size()], dtype=bits(value).dtype)[: value.numel()]
        bits(value)[: patterns.numel()] = patterns
    return changed


def everything(model):
    return {name: bits(parameter).clone() for name, parameter in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def made(target, k=200, seed=0):
    """(patch, bits before, bits after); the target is as before."""
    before = everything(target.model)
    selection = some(target, k, seed)
    patch = Patch.of(target, selection, new=strange(gather(target.model, selection), seed))
    scatter(target.model, selection, patch.new)
    after = everything(target.model)
    scatter(target.model, selection, patch.old)
    assert same(everything(target.model), before)
    return patch, before, after


@pytest.mark.parametrize("make", [dense, moe])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_then_revert_is_the_identity(make, dtype):
    target = make()
    target.model.to(dtype)
    patch, before, after = made(target)
    assert not same(before, after)
    outcome = patch.apply(target)
    assert outcome
    assert (outcome.num_weights, outcome.tensors) == (200, tuple(patch.new))
    assert same(everything(target.model), after)
    assert not patch.apply(target)
    assert same(everything(target.model), after)
    assert patch.revert(target.model)
    assert same(everything(target.model), before)
    assert patch.revert(target.model).num_weights == 0
    assert patch.dtypes == [dtype]
    assert "k=200" in repr(patch)


def test_a_patch_from_before_and_from_after_are_the_same():
    target = dense()
    patch, before, _ = made(target)
    patch.apply(target)
    held = everything(target.model)
    other = Patch.of(target, patch.selection, old=patch.old, metadata={"made_by": "test"})
    assert same(everything(target.model), held)
    assert (other.before, other.after) == (patch.before, patch.after)
    assert all(torch.equal(bits(other.new[name]), bits(patch.new[name])) for name in patch.new)
    other.revert(target)
    assert same(everything(target.model), before)


def test_the_patch_is_found_in_wrapped_models_too():
    target = dense()
    patch, before, after = made(target)
    wrapped = get_peft_model(target.model, LoraConfig(target_modules=["up_proj"], r=2))
    assert patch.apply(wrapped)
    assert patch.revert(torch.compile(wrapped, backend="eager"))
    plain = wrapped.unload()
    assert same(everything(plain), before)
    assert patch.apply(plain)
    assert same(everything(plain), after)


def test_a_half_written_model_is_recognised_and_finished():
    target = moe()
    patch, before, after = made(target)
    for goal, act in ((after, patch.apply), (before, patch.revert)):
        scatter(target.model, patch.selection, {n: v.clone() for n, v in patch.old.items()})
        with torch.no_grad():
            for name, parameter in target.model.named_parameters():
                if name in patch.new:
                    half = patch.selection[name][::2]
                    bits(parameter).put_(half, bits(patch.new[name])[::2])
        assert act(target)
        assert same(everything(target.model), goal)


def test_other_models_are_refused_and_left_alone():
    target = dense()
    patch, _, _ = made(target)
    other = dense(seed=1)
    held = everything(other.model)
    for act in (patch.apply, patch.revert):
        with pytest.raises(
            PatchError, match=r"14 of 14 tensors differ: .*coordinates hold neither.*allow_mismatch=True"
        ):
            act(other)
    with pytest.raises(SelectionError, match="not among the"):
        patch.apply(moe())
    with torch.no_grad():
        target.model.get_parameter(UP).view(-1)[
            int((~torch.isin(torch.arange(900), patch.selection[UP])).nonzero()[0])
        ] += 1
    with pytest.raises(PatchError, match=r"1 of 14 tensors differ: .*up_proj.*weights outside the patch differ"):
        patch.apply(target)
    assert same(everything(other.model), held)


def test_a_sibling_where_that_is_meant():
    target, sibling = dense(), dense(seed=1)
    patch, _, _ = made(target)
    outcome = patch.apply(sibling, allow_mismatch=True)
    assert outcome
    assert len(outcome.mismatches) == 14
    assert not patch.apply(sibling, allow_mismatch=True)
    with pytest.raises(PatchError, match="weights outside the patch differ"):
        patch.revert(sibling)
    assert patch.revert(sibling, allow_mismatch=True)
    held = gather(sibling.model, patch.selection)
    assert all(torch.equal(bits(held[name]), bits(patch.old[name])) for name in held)
    with torch.no_grad():
        sibling.model.get_parameter(UP).view(-1)[patch.selection[UP][0]] += 1
    with pytest.raises(PatchError, match=r"neither the old nor the new.*Only weights that hold the patch's values"):
        patch.revert(sibling, allow_mismatch=True)


@pytest.mark.parametrize("allow_mismatch", [False, True])
def test_applied_within_a_block(allow_mismatch):
    target = dense()
    patch, _, after = made(target)
    model = dense(seed=1) if allow_mismatch else target
    held = everything(model.model)
    with pytest.raises(RuntimeError), patch.applied(model, allow_mismatch=allow_mismatch) as outcome:
        assert outcome
        now = gather(model.model, patch.selection)
        assert all(torch.equal(bits(now[name]), bits(patch.new[name])) for name in now)
        raise RuntimeError
    assert same(everything(model.model), held)
    patch.apply(target)
    with patch.applied(target) as outcome:
        assert not outcome
    assert same(everything(target.model), after)


def _in_shards(folder):
    target = sharded(moe())
    before = {name: whole(parameter).clone() for name, parameter in target.model.named_parameters()}
    patch = Patch.load(folder / "patch")
    again = Patch.of(target, patch.selection, new=patch.new)
    assert (again.before, again.after) == (patch.before, patch.after)
    assert patch.apply(target)
    assert not patch.apply(target)
    for name, parameter in target.model.named_parameters():
        expected = with_values(before[name], patch.selection[name], patch.new.get(name, torch.empty(0)))
        assert torch.equal(bits(whole(parameter)), bits(expected))
    assert patch.revert(target)
    for name, parameter in target.model.named_parameters():
        assert torch.equal(bits(whole(parameter)), bits(before[name]))


@pytest.mark.slow
def test_a_model_in_shards_is_recognised_and_patched(tmp_path):
    made(moe())[0].save(tmp_path / "patch")
    together(3, _in_shards, tmp_path)


# dtypes


def test_another_dtype_is_refused_with_what_to_do():
    target = dense()
    patch, _, _ = made(target)
    target.model.to(torch.bfloat16)
    with pytest.raises(
        PatchError, match=r"is bfloat16 in the model and float32 in the patch.*patch\.to\(torch\.bfloat16\)"
    ):
        patch.apply(target)


def test_a_patch_trained_in_fp32_fits_the_bf16_model_it_began_from():
    stored = moe()
    stored.model.to(torch.bfloat16)
    before = everything(stored.model)
    trained = moe()
    trained.model.load_state_dict(stored.model.state_dict())
    selection = some(trained)
    generator = torch.Generator().manual_seed(0)
    new = {n: v + torch.randn(v.shape, generator=generator) for n, v in gather(trained.model, selection).items()}
    patch = Patch.of(trained, selection, new=new)
    rounded = patch.to(torch.bfloat16)
    assert rounded.dtypes == [torch.bfloat16]
    assert rounded.metadata == {"converted_to": "bfloat16", "num_rounded": 200, "num_lost": 0}
    assert rounded.apply(stored)
    now = gather(stored.model, selection)
    assert all(torch.equal(now[name], new[name].bfloat16()) for name in now)
    assert not rounded.apply(stored)
    assert rounded.revert(stored)
    assert same(everything(stored.model), before)
    other = moe(seed=1)
    other.model.to(torch.bfloat16)
    with pytest.raises(PatchError, match="neither as before"):
        rounded.apply(other)


def test_a_bf16_patch_fits_the_model_loaded_in_fp32_but_not_one_that_rounds_to_it():
    target = dense()
    target.model.to(torch.bfloat16)
    selection = some(target)
    new = {name: value + 1 for name, value in gather(target.model, selection).items()}
    patch = Patch.of(target, selection, new=new).to(torch.float32)
    target.model.float()
    before = everything(target.model)
    assert patch.apply(target)
    assert patch.revert(target)
    assert same(everything(target.model), before)
    with torch.no_grad():
        target.model.get_parameter(UP).mul_(1 + 2**-12)
    with pytest.raises(PatchError, match="differ"):
        patch.apply(target)


def test_old_values_that_do_not_survive_are_refused(tmp_path):
    patch, _, _ = made(dense())
    with pytest.raises(PatchError, match=r"old values of 14 tensors do not fit torch\.bfloat16"):
        patch.to(torch.bfloat16)
    patch.save(tmp_path / "small", old="digest")
    with pytest.raises(PatchError, match="new values would be rounded"):
        Patch.load(tmp_path / "small").to(torch.bfloat16)
    assert patch.to(torch.float32).metadata == {}


# what may be in one


def test_values_must_fit_the_coordinates():
    target = dense()
    patch, _, _ = made(target)
    selection = patch.selection
    for old, new in ((None, None), (patch.old, patch.new)):
        with pytest.raises(PatchError, match="give the old values of a model that was changed, or the new"):
            Patch.of(target, selection, old=old, new=new)
    with pytest.raises(PatchError, match=rf"values for {UP} are missing"):
        Patch.of(target, selection, new={n: v for n, v in patch.new.items() if n != UP})
    with pytest.raises(PatchError, match=r"bfloat16 \[\d+\]; expected torch\.float32"):
        Patch.of(target, selection, new={n: v.bfloat16() for n, v in patch.new.items()})
    with pytest.raises(PatchError, match="name different tensors"):
        replace(patch, new={UP: patch.new[UP]})
    with pytest.raises(PatchError, match="one per coordinate"):
        replace(patch, old=patch.old | {UP: patch.old[UP][:-1]})
    with pytest.raises(PatchError, match=r"old values are torch\.float32, new ones torch\.bfloat16"):
        replace(patch, new={n: v.bfloat16() for n, v in patch.new.items()})
    with pytest.raises(PatchError, match="at least one weight"):
        replace(patch, selection=sl.Selection(coordinates={}, layout=target.layout), new={}, old={})
    with pytest.raises(PatchError, match="no digest"):
        replace(patch, before=replace(patch.before, tensors={}))


# merging


@functools.cache
def two():
    """Patches of one base that overlap: (target, first, second)."""
    target = dense()
    first, second = (made(target, 400, seed)[0] for seed in (0, 1))
    return target, first, second


def as_dict(values, selection):
    return {(n, i): v for n in values for i, v in zip(selection[n].tolist(), bits(values[n]).tolist(), strict=True)}


def test_merging_is_the_union_and_says_who_wins():
    target, first, second = two()
    number = first.selection.num_common(second.selection)
    assert number > 0
    with pytest.raises(PatchError, match=rf"patch 2 sets {number} weights to other values .*--prefer"):
        merge([first, second])
    ours, theirs = (as_dict(patch.new, patch.selection) for patch in (first, second))
    for prefer, expected in (("first", theirs | ours), ("last", ours | theirs)):
        merged = merge([first, second], prefer=prefer)
        assert as_dict(merged.new, merged.selection) == expected
        assert merged.k == 800 - number
        assert merged.metadata["prefer"] == prefer
        before = everything(target.model)
        assert merged.apply(target)
        assert not merged.apply(target)
        assert merged.revert(target)
        assert same(everything(target.model), before)
        json.dumps(merged.metadata)


def test_patches_that_agree_or_do_not_meet_need_no_winner():
    target, first, _ = two()
    merged = merge([first, first, first])
    assert as_dict(merged.new, merged.selection) == as_dict(first.new, first.selection)
    coordinates = {UP: torch.arange(3)}
    apart = Patch.of(
        target,
        sl.Selection(coordinates={"model.norm.weight": torch.arange(3)}, layout=target.layout, only_eligible=False),
        new={"model.norm.weight": torch.ones(3) * 2},
    )
    up = Patch.of(target, sl.Selection(coordinates=coordinates, layout=target.layout), new={UP: torch.zeros(3)})
    both = merge([apart, up])
    assert both.k == 6
    assert both.after.tensors == up.after.tensors | apart.after.tensors


def test_a_trainer_may_have_changed_the_configuration():
    """Special tokens, caches: the weights say whether the bases are one."""
    target = dense()
    first = made(target)[0]
    target.model.config.pad_token_id = 7
    second = made(target, seed=1)[0]
    assert first.before.config != second.before.config
    merged, before = merge([first, second], prefer="last"), everything(target.model)
    assert merged.apply(target)
    assert merged.revert(target)
    assert same(everything(target.model), before)


def test_patches_of_other_bases_are_not_merged(tmp_path):
    _, first, second = two()
    with pytest.raises(PatchError, match="two or more"):
        merge([first])
    with pytest.raises(PatchError, match=r"patch 2 was made for another base: 14 of 14"):
        merge([first, made(dense(seed=1))[0]])
    with pytest.raises(PatchError, match=r"another architecture \(qwen3_moe, not llama\)"):
        merge([first, made(moe())[0]])
    with pytest.raises(PatchError, match="expected 'first' or 'last'"):
        merge([first, second], prefer="middle")
    second.save(tmp_path / "small", old="digest")
    with pytest.raises(PatchError, match="without old values"):
        merge([first, Patch.load(tmp_path / "small")])
    with pytest.raises(PatchError, match=r"no digest says what .* is after the patch .* keep them"):
        merge([first, second], prefer="last").save(tmp_path / "merged", old="digest")  # nothing would recognise it
    assert not (tmp_path / "merged").exists()


def test_patches_made_in_two_dtypes_are_merged_where_they_are_of_one_base():
    target = dense()
    target.model.to(torch.bfloat16)
    narrow = made(target)[0]
    target.model.float()
    wide = made(target, seed=1)[0]
    with pytest.raises(PatchError, match=r"in another dtype; convert it: patch\.to\(torch\.float32\)"):
        merge([wide, narrow], prefer="first")
    merged, before = merge([wide, narrow.to(torch.float32)], prefer="first"), everything(target.model)
    assert merged.apply(target)
    assert not merged.apply(target)
    assert merged.revert(target)
    assert same(everything(target.model), before)
    other = dense(seed=1)
    other.model.to(torch.bfloat16)
    fits = made(other, 2000)[0].to(torch.float32)
    with pytest.raises(PatchError, match="another base"):
        merge([made(target, 2000)[0], fits], prefer="first")
