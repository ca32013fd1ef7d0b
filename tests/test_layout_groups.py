from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import pytest
import torch
from torch import Tensor

from safelocus.model.layout import GRANULARITIES, Groups, Layout, Matrix, TensorLayout
from tiny_models import build, config

# one of each way to store weights
MODELS = [
    "llama",
    "phi3",
    "gpt2",
    "gpt_neox",
    "falcon_40b",
    "falcon_7b",
    "gpt_oss",
    "qwen2_moe",
    "deepseek_v3",
    "t5",
]


def grid(tensor: TensorLayout, part: int, view: Tensor, matrix: Matrix) -> Tensor:
    """A matrix as [rows, columns], by moving its axes: the slow definition of row and column."""
    kept = [axis for axis, place in enumerate(matrix.index) if not isinstance(place, int)]
    rows = [kept.index(axis) for axis in tensor.row_axes if axis in kept]
    columns = [kept.index(axis) for axis in tensor.column_axes if axis in kept]
    return view.permute(*rows, *columns).reshape(tensor.num_rows(part), tensor.num_columns(part))


def key_of(
    granularity: str, tensor: TensorLayout, matrix: Matrix, shape: torch.Size, row: int, column: int
) -> Hashable:
    """What the group of a weight is, in words that make no use of ids."""
    mlp = matrix.component in ("gate", "up", "down")
    where = (matrix.stack, matrix.layer)
    match granularity:
        case "weight":
            return (matrix.name, row, column)
        case "row":
            return (matrix.name, row)
        case "column":
            return (matrix.name, column)
        case "head":
            heads = tensor.num_heads(tensor.components.index(matrix.component))
            if not heads:
                return matrix.name
            if matrix.component == "output":
                return (matrix.name, column * heads // shape[1])
            return (matrix.name, row * heads // shape[0])
        case "neuron":
            if not mlp:
                return (matrix.name, row)
            return (where, matrix.expert, matrix.shared_expert, column if matrix.component == "down" else row)
        case "expert":
            if matrix.expert is None and not matrix.shared_expert:
                return matrix.name
            return (where, matrix.expert)
        case "matrix":
            return matrix.name
        case _:
            return where


def brute_force(layout: Layout, granularity: str) -> dict[str, list[Hashable]]:
    """Eligible tensor -> key of each of its weights, in flat order."""
    keys: dict[str, list[Hashable]] = {}
    for name in layout.eligible_tensors:
        tensor = layout.tensors[name]
        flat = torch.arange(tensor.num_weights).view(tensor.shape)
        mine: list[Hashable] = [None] * tensor.num_weights
        for matrix, view in zip(tensor.matrices, tensor.split(flat), strict=True):
            part = tensor.components.index(matrix.component)
            matrix_grid = grid(tensor, part, view, matrix)
            for row, line in enumerate(matrix_grid.tolist()):
                for column, index in enumerate(line):
                    mine[index] = key_of(granularity, tensor, matrix, matrix_grid.shape, row, column)
        keys[name] = mine
    return keys


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", MODELS)
def test_ids_are_the_groups(name: str, granularity: str) -> None:
    layout = Layout.from_config(config(name))
    groups = layout.groups(granularity)
    keys = brute_force(layout, granularity)
    id_of: dict[Hashable, int] = {}
    counts: Counter[int] = Counter()
    for tensor in layout.eligible_tensors:
        ids = groups.ids(tensor, torch.arange(layout.tensors[tensor].num_weights))
        assert ids.dtype == torch.int64
        counts.update(ids.tolist())
        for key, found in zip(keys[tensor], ids.tolist(), strict=True):
            assert id_of.setdefault(key, found) == found, f"{tensor}: {key} has two ids"
    assert sorted(id_of.values()) == list(range(groups.num_groups)), "one id per group, without gaps"
    assert groups.sizes.tolist() == [counts[number] for number in range(groups.num_groups)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", MODELS)
def test_sums_and_expansion_agree_with_ids(name: str, granularity: str) -> None:
    model = build(name)
    layout = Layout.of(model)
    groups = layout.groups(granularity)
    totals, expected = torch.zeros(2, groups.num_groups, dtype=torch.float64)
    per_group = torch.rand(groups.num_groups)
    for tensor in layout.eligible_tensors:
        values = model.get_parameter(tensor).detach()
        ids = groups.ids(tensor, torch.arange(values.numel()))
        groups.sum_into(totals, tensor, values)
        expected.index_add_(0, ids, values.flatten().double())
        assert torch.equal(groups.expand(tensor, per_group), per_group[ids].view(values.shape))
        assert torch.equal(groups.expand(tensor, per_group > 0.5), (per_group > 0.5)[ids].view(values.shape))
    torch.testing.assert_close(totals, expected)


def test_matrix_ids_follow_the_eligible_matrices() -> None:
    layout = Layout.from_config(config("phi3"))
    groups = layout.groups("matrix")
    eligible = [matrix for matrix in layout.matrices if matrix.eligible]
    assert groups.num_groups == len(eligible)
    assert groups.sizes.tolist() == [matrix.num_weights for matrix in eligible]
    qkv = layout.tensors["model.layers.1.self_attn.qkv_proj.weight"]
    flat = torch.arange(qkv.num_weights)
    first = eligible.index(qkv.matrices[0])
    assert torch.equal(groups.ids(qkv.name, flat), first + qkv.matrix_of(flat))


def test_the_tensor_s_own_groups_start_at_zero() -> None:
    layout = Layout.from_config(config("gpt_neox"))
    tensor = layout.tensors["gpt_neox.layers.1.attention.query_key_value.weight"]
    flat = torch.arange(tensor.num_weights)
    for granularity, num_groups in (("head", 12), ("row", 96), ("column", 96), ("matrix", 3), ("layer", 1)):
        ids = Groups((tensor,), granularity).ids(tensor.name, flat)
        assert sorted(ids.unique().tolist()) == list(range(num_groups))


def test_an_unknown_granularity_is_an_error() -> None:
    with pytest.raises(ValueError, match="'neurons' is not one of weight, row"):
        Groups((), "neurons")


def test_groups_of_a_huge_model_take_no_memory() -> None:
    sizes = {"num_experts": 128, "num_hidden_layers": 48, "hidden_size": 4096, "moe_intermediate_size": 1536}
    layout = Layout.from_config(config("qwen3_moe", **sizes, num_local_experts=128))
    assert layout.num_eligible > 2**36
    groups = layout.groups("weight")
    assert groups.num_groups == layout.num_eligible
    last = layout.tensors[layout.eligible_tensors[-1]]
    flat = torch.tensor([last.num_weights - 1])
    assert groups.ids(last.name, flat).item() == layout.num_eligible - 1
    assert groups.sizes[-1] == 1
    neurons = layout.groups("neuron")
    assert neurons.ids(last.name, flat).item() < neurons.num_groups
    experts = layout.groups("expert")
    assert experts.num_groups == 48 * (128 + 4)
    assert experts.sizes.max() == 3 * 4096 * 1536
