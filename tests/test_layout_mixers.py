"""Layers other than attention and MLP: each logical matrix is what the modelling code itself splits off.

A matrix without one row computes a state without that channel, where the model splits its projections, and leaves the
states of the tensor's other matrices as they were; a head that goes in is that head's columns of the output projection.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel

from safelocus.model.layout import Layout, TensorLayout
from test_layout_families import States, attend, matrix_mask, zeroed
from tiny_models import build, forward, tokens

SPLITS = (torch.split, torch.Tensor.split, torch.Tensor.chunk, torch.chunk)
MAMBA2 = (("ssm_gate", "", "ssm_dt"), ("ssm_x", "ssm_b", "ssm_c"))
# name -> (mixer, what its splits give in turn ("": another split's input), the axis of their channels)
MIXERS: dict[str, tuple[str, tuple[tuple[str, ...], ...], int]] = {
    "qwen3_next": ("layers.1.linear_attn", (("query", "key", "value", "output_gate"), ("beta", "decay")), 2),
    "qwen3_next_uneven": ("layers.1.linear_attn", (("query", "key", "value", "output_gate"), ("beta", "decay")), 2),
    "qwen3_5_text": ("layers.1.linear_attn", (("query", "key", "value"),), 2),
    "qwen3_5_uneven": ("layers.1.linear_attn", (("query", "key", "value"),), 2),
    "olmo_hybrid": ("layers.1.linear_attn", (), 2),  # nothing to split; its heads are checked
    "lfm2": ("layers.1.conv", (("conv_b", "conv_c", "conv_x"),), 1),
    "lfm2_moe": ("layers.1.conv", (("conv_b", "conv_c", "conv_x"),), 1),
    "granitemoehybrid": ("layers.1.mamba", MAMBA2, 2),
    "falcon_h1": ("layers.1.mamba", MAMBA2, 2),
    "nemotron_h": ("layers.2.mixer", MAMBA2, 2),
    "bamba": ("layers.1.mamba", MAMBA2, 2),
    "zamba2": ("layers.1.mamba", MAMBA2, 2),
    "mamba2": ("layers.1.mixer", MAMBA2, 2),
    "jamba": ("layers.1.mamba", (("ssm_x", "ssm_gate"), ("ssm_dt", "ssm_b", "ssm_c")), 0),
    "mamba": ("layers.1.mixer", (("ssm_x", "ssm_gate"), ("ssm_dt", "ssm_b", "ssm_c")), 0),
    "falcon_mamba": ("layers.1.mixer", (("ssm_x", "ssm_gate"), ("ssm_dt", "ssm_b", "ssm_c")), 0),
    "minimax": ("layers.1.self_attn", (("query", "key", "value"),), 2),
}


class Mixer:
    """A model's mixer, run with the model: its splits' states [batch * length, channels], and its output's input."""

    def __init__(self, name: str) -> None:
        self.model: PreTrainedModel = build(name)
        place, self.splits, self.axis = MIXERS[name]
        self.module = self.model.base_model.get_submodule(place)
        with torch.no_grad():
            for parameter_name, parameter in self.module.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.zero_()
        prefix = next(name for name, module in self.model.named_modules() if module is self.module)
        self.tensors = [
            t for n, t in Layout.of(self.model).tensors.items() if n.startswith(f"{prefix}.") and t.eligible
        ]
        self.output = next(t for t in self.tensors if t.components[0].endswith("output"))

    def run(self) -> tuple[States, Tensor]:
        calls: list[Any] = []
        inside: list[bool] = []
        inputs: list[Tensor] = []

        class Splits(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                found = function(*args, **(kwargs or {}))
                if inside and function in SPLITS:
                    calls.append(found)
                return found

        projection = self.model.get_submodule(self.output.name.removesuffix(".weight"))
        hooks = [
            self.module.register_forward_pre_hook(lambda *_: inside.append(True)),
            self.module.register_forward_hook(lambda *_: inside.clear()),
            projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())),
        ]
        with Splits():
            forward(self.model, tokens())
        for hook in hooks:
            hook.remove()
        states = {}
        for names, given in zip(self.splits, calls):
            assert len(names) == len(given)
            for component, state in zip(names, given):
                axis = self.axis if self.axis else (1 if state.shape[1] != 7 else 2)  # Mamba-1: one split is transposed
                state = state.movedim(axis, 2) if axis != 2 else state
                states[component] = state.reshape(14, -1)
        return states, inputs[0].reshape(14, -1)


@pytest.mark.parametrize("name", MIXERS)
def test_a_row_is_a_channel_of_what_the_model_splits_off(name: str) -> None:
    mixer = Mixer(name)
    before, _ = mixer.run()
    seen = set()
    for tensor in mixer.tensors:
        for ordinal, component in enumerate(tensor.components):
            if component not in before or "dt_proj" in tensor.name:
                continue
            seen.add(component)
            rows = rows_of(tensor, ordinal)
            num_rows = tensor.num_rows(ordinal)
            assert before[component].shape[1] == num_rows
            for row in {0, 1, num_rows // 2, num_rows - 1}:
                with zeroed(mixer.model, tensor.name, rows == row):
                    after, _ = mixer.run()
                silent = ~after[component].any(0)
                assert silent.nonzero().flatten().tolist() == [row], f"{component} row {row}"
                for other in set(tensor.components) - {component}:
                    assert torch.equal(after[other], before[other]), f"{component} changes {other}"
    assert seen == set(before) - {""}


@pytest.mark.parametrize("name", MIXERS)
def test_a_head_of_the_output_projection_reads_that_head_of_the_mixer(name: str) -> None:
    mixer = Mixer(name)
    groups = Layout.of(mixer.model).groups("head")
    output = mixer.output
    columns = groups.ids(output.name, torch.arange(output.num_weights)).view(output.shape)[0]
    if not output.num_heads(0):
        columns = torch.arange(output.num_columns(0))  # each channel by itself
    heads = columns.unique()
    (tensor, ordinal) = next(
        (t, i) for t in mixer.tensors for i, c in enumerate(t.components) if c in ("value", "ssm_x", "conv_x")
    )
    rows = rows_of(tensor, ordinal)
    span = tensor.num_rows(ordinal) // len(heads)
    if tensor.num_heads(ordinal) == len(heads):
        mine = groups.ids(tensor.name, torch.arange(tensor.num_weights)).view(tensor.shape)[rows >= 0].unique()
        assert len(mine) == len(heads)
    for head in {0, 1, len(heads) - 1}:
        with zeroed(mixer.model, tensor.name, (rows >= 0) & (rows // span == head)):
            _, read = mixer.run()
        assert torch.equal(~read.any(0), columns == heads[head])


def rows_of(tensor: TensorLayout, ordinal: int) -> Tensor:
    """The row of each weight within a matrix, -1 outside of it: [shape]."""
    _, part, row, _ = tensor.coordinates(torch.arange(tensor.num_weights))
    return torch.where(part == ordinal, row, -1).view(tensor.shape)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text", "afmoe"])
def test_the_gate_of_attention_gates_its_head(name: str) -> None:
    """A head whose gate's weights are zero is halved (sigmoid of 0) on its way to the output projection."""
    model = build(name)
    layout = Layout.of(model)
    tensor, ordinal = next(
        (t, i)
        for t in layout.tensors.values()
        for i, c in enumerate(t.components)
        if c == "output_gate" and t.layer == 0
    )
    output = next(t for t in layout.tensors.values() if t.components == ("output",) and t.layer == 0)
    inputs: list[Tensor] = []
    model.get_submodule(output.name.removesuffix(".weight")).register_forward_pre_hook(lambda _, a: inputs.append(a[0]))
    outputs: list[Tensor] = []
    AttentionInterface.register("gated", lambda *a, **k: (outputs.append(attend(*a, **k)[0]), (outputs[-1], None))[1])
    model.set_attn_implementation("gated")
    num_heads = tensor.num_heads(ordinal)
    rows, span = rows_of(tensor, ordinal), tensor.num_rows(ordinal) // num_heads
    forward(model, tokens())
    ungated, gated = outputs[0].flatten(2), inputs[0]
    assert not torch.allclose(gated, ungated / 2)
    for head in range(num_heads):
        inputs.clear()
        with zeroed(model, tensor.name, (rows >= 0) & (rows // span == head)):
            forward(model, tokens())
        mine = torch.arange(ungated.shape[-1]) // span == head
        torch.testing.assert_close(inputs[0][..., mine], ungated[..., mine] / 2)
        torch.testing.assert_close(inputs[0][..., ~mine], gated[..., ~mine])


def test_experts_of_attention_are_their_own() -> None:
    """JetMoE: without its query, an expert attends evenly; attention's experts and the MLP's are not one group."""
    model = build("jetmoe")
    layout = Layout.of(model)
    tensors = {t.components: t for t in layout.tensors.values() if t.layer == 0}
    query, output, both = tensors[("query",)], tensors[("output",)], tensors[("key", "value")]
    groups = layout.groups("expert")
    place = {
        components: groups.ids(tensors[components].name, torch.arange(tensors[components].num_weights))
        .unique()
        .tolist()
        for components in (("query",), ("output",), ("gate", "up"), ("down",))
    }
    assert place[("query",)] == place[("output",)] != place[("gate", "up")] == place[("down",)]
    assert len(place[("query",)]) == len(place[("down",)]) == 5

    AttentionInterface.register("seen", lambda *a, **k: (seen.append(a[1:4]), attend(*a, **k))[1])
    model.set_attn_implementation("seen")
    seen: list[tuple[Tensor, ...]] = []
    forward(model, tokens())
    before = seen[0]
    silent = torch.zeros(before[0].shape[:3], dtype=torch.bool)
    for expert in range(5):
        seen.clear()
        with zeroed(model, query.name, matrix_mask(query, expert)):
            forward(model, tokens())
        mine = ~seen[0][0].any(-1)
        assert not (silent & mine).any(), "each expert has queries of its own"
        silent |= mine
        assert all(torch.equal(a, b) for a, b in zip(seen[0][1:], before[1:]))
    assert silent.all()
    for ordinal, place_of in ((0, 1), (1, 2)):
        seen.clear()
        with zeroed(model, both.name, matrix_mask(both, ordinal)):
            forward(model, tokens())
        assert not seen[0][place_of].any()
        assert torch.equal(seen[0][3 - place_of], before[3 - place_of])
    assert output.num_heads(0) == query.num_heads(0) == 2


def test_a_pair_of_heads_is_one_head_of_the_output_of_differential_attention() -> None:
    model = build("diffllama")
    layout = Layout.of(model)
    groups = layout.groups("head")
    query, output = (
        next(t for t in layout.tensors.values() if t.components == (component,) and t.layer == 0)
        for component in ("query", "output")
    )
    ids = groups.ids(query.name, torch.arange(query.num_weights)).view(query.shape)
    columns = groups.ids(output.name, torch.arange(output.num_weights)).view(output.shape)[0]
    inputs: list[Tensor] = []
    model.get_submodule(output.name.removesuffix(".weight")).register_forward_pre_hook(lambda _, a: inputs.append(a[0]))
    forward(model, tokens())
    before = inputs[0]
    assert len(columns.unique()) == len(ids.unique()) // 2 == 4
    for head, group in enumerate(ids.unique()):
        inputs.clear()
        with zeroed(model, query.name, ids == group):
            forward(model, tokens())
        changed = (inputs[0] - before).abs().amax((0, 1)) > 1e-6
        assert torch.equal(changed, columns == columns.unique()[head % 4])


def test_the_learned_low_rank_path_of_gemma3n() -> None:
    """Laurel: left down to the rank, right up again; nothing of AltUp or of the embeddings per layer is eligible."""
    layout = Layout.of(build("gemma3n_text"))
    found = {
        t.name.split("layers.0.")[1]: t for t in layout.tensors.values() if t.components == ("laurel",) and t.layer == 0
    }
    assert {name: (t.num_rows(0), t.num_columns(0)) for name, t in found.items()} == {
        "laurel.linear_left.weight": (5, 24),
        "laurel.linear_right.weight": (24, 5),
    }
    assert not any(t.eligible for n, t in layout.tensors.items() if "altup" in n or "per_layer" in n)


@pytest.mark.parametrize("name", MIXERS)
def test_what_a_recurrence_is_made_of_is_never_eligible(name: str) -> None:
    mixer = Mixer(name)
    kinds = {n for n, module in mixer.module.named_modules() if isinstance(module, nn.Conv1d)}
    own = {n for n, _ in mixer.module.named_parameters(recurse=False)}
    eligible = {t.name for t in mixer.tensors}
    prefix = mixer.output.name.rsplit(".", 2)[0]
    assert not {f"{prefix}.{n}.weight" for n in kinds} & eligible
    assert not {f"{prefix}.{n}" for n in own} & eligible
    assert own <= {"A_log", "D", "dt_bias"}
