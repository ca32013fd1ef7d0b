"""Where elements come from: pulled back through whatever rearranges tensors, exactly, and refused for what computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import core_model_loading as loading

from safelocus.errors import ModelError
from safelocus.patch.rearrangement import Rearrangement

A, B = (4, 6, 3), (4, 6, 3)


def check(make, shapes=(A, B)):
    """Following every element gives what running the code on numbered elements gives."""
    numbered, start = [], 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        numbered.append(torch.arange(start, start + size).view(shape))
        start += size
    expected = make(*numbered).flatten().long()
    with Rearrangement() as recorded:
        made = make(*(recorded.source(str(number), shape) for number, shape in enumerate(shapes)))
    found = torch.full_like(expected, -1)
    for origin in recorded.origins(made, torch.arange(expected.numel())):
        found[origin.positions] = numbered[int(origin.name)].flatten()[origin.index]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: a,
        lambda a, b: torch.stack([a, b]),
        lambda a, b: torch.stack([a, b], dim=-1),
        lambda a, b: torch.cat([b, a], dim=1),
        lambda a, b: torch.cat([b, a], dim=-1).transpose(0, 1),
        lambda a, b: torch.stack([a.mT.reshape(3, 6, 4), b.mT.clone().reshape(3, 6, 4)], dim=1),
        lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=2)[1:, :, 2:7].contiguous().squeeze(0),
        lambda a, b: a.transpose(0, 2).clone().reshape(9, 8).to(torch.int32).t().unsqueeze(0),  # keeps its strides
        lambda a, b: torch.chunk(torch.cat([a, b]), 2, dim=2)[1].contiguous(),
        lambda a, b: torch.unbind(torch.stack([a, b], dim=1), dim=1)[1].flatten(),
        lambda a, b: a[2, 3, 1],
    ],
)
def test_every_element_is_followed(make):
    check(make)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from(["transpose", "cat", "stack", "clone", "reshape", "cut"]), st.integers(0, 5)))
)
def test_any_chain_is_followed(steps):
    def make(tensor):
        for step, dim in steps[:6]:
            dim = dim % tensor.dim()
            if step == "transpose":
                tensor = tensor.transpose(dim, 0)
            elif step == "cat" and tensor.numel() < 2000:
                tensor = torch.cat([tensor, tensor], dim=dim)
            elif step == "stack" and tensor.numel() < 2000:
                tensor = torch.stack([tensor, tensor], dim=dim)
            elif step == "clone":
                tensor = tensor.clone()
            elif step == "reshape":
                tensor = tensor.reshape(tensor.shape[0], -1)
            elif step == "cut" and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 1, tensor.shape[dim] - 1)
        return tensor

    check(make, shapes=[A])


def converted(operation, tensors, targets=("out",), **options):
    made = operation.convert(tensors, source_patterns=list(tensors), target_patterns=list(targets), **options)
    return [value[0] if isinstance(value, list) else value for value in made.values()]


class Heads:
    num_attention_heads = 2


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: converted(loading.MergeModulelist(dim=0), {"x": [a, b]})[0],
        lambda a, b: converted(loading.Concatenate(dim=1), {"x": [a], "y": [b]})[0],
        lambda a, b: converted(loading.Chunk(dim=1), {"x": [a]}, ("p", "q"))[1],
        lambda a, b: converted(loading.SplitModulelist(dim=0), {"x": [a]}, ("p.*",))[2],
        lambda a, b: converted(loading.Transpose(0, 2), {"x": [a]})[0],
        lambda a, b: converted(loading.Interleave(dim=1), {"x": [a]})[0],
        lambda a, b: converted(loading.PermuteForRope(), {"x": [a.reshape(12, 6)]}, config=Heads)[0],
        lambda a, b: converted(loading.LinearToConv3d(3, (2, 1, 1)), {"x": [a.reshape(12, 6)]})[0],
    ],
)
def test_transformers_own_operations_are_followed(make):
    check(make)


def test_computing_is_refused_and_named():
    with Rearrangement() as recorded:
        shifted = torch.cat([recorded.source("a", (3,)), recorded.source("b", (2,)) + 1])
    (origin,) = recorded.origins(shifted, torch.tensor([2, 0]))
    assert (origin.name, origin.positions.tolist(), origin.index.tolist()) == ("a", [0, 1], [2, 0])
    with pytest.raises(ModelError, match=r"computed .*aten::add.*Apply the patch to the loaded model"):
        recorded.origins(shifted, torch.tensor([0, 4]))
    with pytest.raises(ModelError, match="out of sight"):
        recorded.origins(torch.empty(3, device="meta"), torch.tensor([0]))


def test_writing_in_place_is_computing():
    """Into a source, or into a tensor made for it: neither can be followed back, or undone."""
    for change in (lambda a: a.add_(1), lambda a: torch.empty(4, 3, device=a.device)[:2].copy_(a)):
        values = torch.arange(6.0).view(2, 3)
        with Rearrangement() as recorded:
            made = change(recorded.follow("a", values)).t().contiguous()
        assert recorded.computed in ("aten::add_", "aten::copy_")
        with pytest.raises(ModelError, match=recorded.computed):
            recorded.origins(made, torch.tensor([1]))


def test_indices_beyond_32_bits():
    with Rearrangement() as recorded:
        fused = torch.stack([recorded.source(str(number), (2**20, 2**12)) for number in range(3)]).transpose(1, 2)
    (origin,) = recorded.origins(fused, torch.tensor([2**33 + 2**20 + 5]))
    assert (origin.name, origin.index.tolist()) == ("2", [5 * 2**12 + 1])
