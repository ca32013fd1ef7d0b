"""Reading, writing and restoring weights at coordinates: exact bits, whatever happens."""

import math
import signal
from dataclasses import replace

import pytest
import torch

import safelocus as sl
from safelocus.errors import SelectionError
from safelocus.model.layout import canonical_name
from safelocus.selection import sparse
from safelocus.selection.sparse import gather, restoring, scatter
from safelocus.selection.topk import random_k
from tiny_targets import dense, moe

NAME = "model.layers.0.mlp.up_proj.weight"


def some(target, k=200, seed=0):
    """k random eligible coordinates."""
    layout = target.layout
    sizes = {name: layout.tensors[name].num_weights for name in layout.eligible_tensors}
    return sl.Selection(coordinates=random_k(sizes, k, seed=seed), layout=layout)


def everything(model):
    """Exact bits of all weights, as integers."""
    return {name: parameter.detach().clone().view(integer(parameter)) for name, parameter in model.named_parameters()}


def integer(tensor):
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in everything(model).items())


def transpose_storage(model):
    """Every matrix keeps its values but lies transposed in memory: not contiguous."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.detach().t().contiguous().t()
            assert not parameter.is_contiguous()


@pytest.mark.parametrize("make", [dense, moe])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("strided", [False, True])
def test_gather_scatter_and_restore(make, dtype, strided):
    target = make()
    target.model.to(dtype)
    if strided:
        transpose_storage(target.model)
    selection = some(target)
    before = everything(target.model)
    values = gather(target.model, selection)
    own = dict(target.model.named_parameters())
    for name, value in values.items():
        assert value.dtype == dtype
        flat = own[name].detach().contiguous().view(integer(value)).flatten()
        assert torch.equal(value.view(integer(value)), flat[selection[name]])
    with restoring(target.model, selection):
        scatter(target.model, selection, {name: torch.full(v.shape, 0.5) for name, v in values.items()})
        changed = sum(int((everything(target.model)[n] != b).sum()) for n, b in before.items())
        assert changed == selection.k  # those coordinates and no others (none was 0.5 before)
        assert all(bool((v.float() == 0.5).all()) for v in gather(target.model, selection).values())
    assert unchanged(target.model, before)


def test_odd_bits_survive():
    """A NaN with a payload and a negative zero: equal numbers are not enough."""
    target = dense()
    weight = target.model.get_parameter(NAME)
    with torch.no_grad():
        weight.view(-1)[3] = -0.0
    weight.data.view(torch.int32).view(-1)[5] = 0x7FC12345
    selection = sl.Selection(coordinates={NAME: torch.tensor([3, 5, 7])}, layout=target.layout)
    before = everything(target.model)
    with restoring(target.model, selection):
        scatter(target.model, selection, {NAME: torch.tensor([1.0, 2.0, 3.0])})
        assert not unchanged(target.model, before)
    assert unchanged(target.model, before)
    assert math.isnan(weight.detach().view(-1)[5])


def test_scatter_writes_what_gather_read_from_a_sibling():
    target, other = dense(0), dense(1)
    selection = some(target)
    scatter(target.model, selection, gather(other.model, selection))
    for name, index in selection.coordinates.items():
        mine, theirs = target.model.get_parameter(name), other.model.get_parameter(name)
        same = mine.detach().view(-1) == theirs.detach().view(-1)
        assert same[index].all()
        assert not same.all()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_restored_when_the_block_raises(error):
    target = dense()
    selection = some(target)
    before = everything(target.model)

    def disturb():
        with restoring(target.model, selection) as values:
            scatter(target.model, selection, {name: torch.zeros_like(v) for name, v in values.items()})
            raise error("inside")

    with pytest.raises(error, match="inside"):
        disturb()
    assert unchanged(target.model, before)


def test_restored_after_a_real_ctrl_c():
    target = dense()
    selection = some(target)
    before = everything(target.model)

    def disturb():
        with restoring(target.model, selection) as values:
            scatter(target.model, selection, {name: torch.zeros_like(v) for name, v in values.items()})
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        disturb()
    assert unchanged(target.model, before)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_ctrl_c_while_writing_back_waits_until_all_is_back(monkeypatch, at):
    target = dense()
    selection = some(target)
    before = everything(target.model)
    write, calls = sparse.Site.write, []

    def interrupted(site, values):
        calls.append(1)
        if len(calls) == at:
            write(replace(site, index=site.index[:1]), values[:1])  # half-written
            raise KeyboardInterrupt
        write(site, values)

    def disturb():
        with restoring(target.model, selection) as values:
            scatter(target.model, selection, {name: torch.zeros_like(v) for name, v in values.items()})
            monkeypatch.setattr(sparse.Site, "write", interrupted)

    with pytest.raises(KeyboardInterrupt):
        disturb()
    assert len(calls) == len(selection.coordinates) + 1
    assert unchanged(target.model, before)


def test_nested_and_overlapping():
    target = dense()
    outer, inner = some(target, 400, seed=0), some(target, 400, seed=1)
    assert (outer & inner).k
    before = everything(target.model)
    with restoring(target.model, outer) as values:
        scatter(target.model, outer, {name: torch.ones_like(v) for name, v in values.items()})
        within = everything(target.model)
        with restoring(target.model, inner) as more:
            scatter(target.model, inner, {name: 2 * torch.ones_like(v) for name, v in more.items()})
            assert not unchanged(target.model, within)
        assert unchanged(target.model, within)
    assert unchanged(target.model, before)


def test_a_model_wrapped_by_peft():
    from peft import LoraConfig, get_peft_model

    target = dense()
    selection = some(target)
    expected = gather(target.model, selection)
    wrapped = get_peft_model(target.model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    before = everything(wrapped)
    assert any("lora_A" in name for name in before)
    found = gather(wrapped, selection)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with restoring(wrapped, selection):
        scatter(wrapped, selection, {name: torch.full_like(v, 7) for name, v in found.items()})
        touched = {n for n, b in everything(wrapped).items() if not torch.equal(b, before[n])}
        assert {canonical_name(name) for name in touched} == set(selection.coordinates)
    assert unchanged(wrapped, before)


def test_selections_that_match_nothing_or_partly_list_names():
    target, other = dense(), dense(num_hidden_layers=3)
    selection = some(other, 2000)
    with pytest.raises(SelectionError, match=r"model\.layers\.2"):
        gather(target.model, selection)
    empty = sl.Selection(coordinates={}, layout=target.layout)
    with pytest.raises(SelectionError, match="no weights"), restoring(target.model, empty):
        pass
    with pytest.raises(SelectionError, match="shape"):
        gather(dense(intermediate_size=40).model, some(target, 2000))


def test_values_that_do_not_fit_change_nothing():
    target = dense()
    selection = some(target)
    before = everything(target.model)
    values = gather(target.model, selection)
    first, last = next(iter(values)), list(values)[-1]
    with pytest.raises(SelectionError, match=first):
        scatter(target.model, selection, {name: v for name, v in values.items() if name != first})
    zeros = {name: torch.zeros_like(v) for name, v in values.items()}
    with pytest.raises(SelectionError, match="one per selected weight"):
        scatter(target.model, selection, {**zeros, last: torch.zeros(len(values[last]) + 1)})
    assert unchanged(target.model, before)


def test_weights_without_values_are_an_error():
    target = dense()
    selection = some(target)
    with pytest.raises(SelectionError, match="meta device"):
        gather(target.model.to("meta"), selection)
