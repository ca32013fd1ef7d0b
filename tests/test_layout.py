from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from safelocus.errors import LayoutError
from safelocus.model.layout import COMPONENTS, ELIGIBLE, Layout, TensorLayout, canonical_name, is_adapter
from safelocus.model.layout.rules import Family, families, read_family
from tiny_models import ATTENTIONLESS, NAMES, build, config


def layout_of(name: str) -> Layout:
    return Layout.from_config(config(name))


@pytest.mark.parametrize("name", NAMES)
def test_matrices_partition_every_tensor_and_are_views(name: str) -> None:
    model = build(name)
    layout = Layout.of(model)
    parameters = {canonical_name(name): p for name, p in model.named_parameters()}
    assert list(layout.tensors) == list(parameters)
    assert layout.num_weights == model.num_parameters()
    for tensor in layout.tensors.values():
        data = parameters[tensor.name].data
        ordinals = torch.full(tensor.shape, -1)
        for ordinal, (matrix, part) in enumerate(zip(tensor.matrices, tensor.split(ordinals), strict=True)):
            assert part.untyped_storage().data_ptr() == ordinals.untyped_storage().data_ptr()
            assert (part == -1).all(), "no element is in two matrices"
            part.fill_(ordinal)
            assert part.numel() == matrix.num_weights
        assert (ordinals >= 0).all(), "no element is in none"
        assert torch.equal(tensor.matrix_of(torch.arange(data.numel())), ordinals.flatten())
        transposed = data.mT.contiguous().mT if data.ndim > 1 else data  # the same values, other strides
        for one, other in zip(tensor.split(data), tensor.split(transposed), strict=True):
            assert torch.equal(one, other)
            assert other.untyped_storage().data_ptr() == transposed.untyped_storage().data_ptr()
    names = [matrix.name for matrix in layout.matrices]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", NAMES)
def test_only_weight_matrices_of_layers_are_eligible(name: str) -> None:
    layout = layout_of(name)
    for matrix in layout.matrices:
        assert matrix.component in COMPONENTS
        assert matrix.eligible == (matrix.component in ELIGIBLE)
        if matrix.eligible:
            assert matrix.layer in range(4 if name == "nemotron_h" else 2)
            assert math.prod(layout.tensors[matrix.tensor].shape) >= matrix.num_weights > 0
            never = "norm[._]|norm$|ln_|bias|embed|wte|wpe|lm_head|router|conv1d|conv.conv|A_log|lambda|altup"
            assert re.search(never, matrix.tensor.replace("norm_attn_norm.", "")) is None
    components = {matrix.component for matrix in layout.matrices if matrix.eligible}
    if name not in ATTENTIONLESS:
        assert {"query", "key", "value", "output", "up", "down"} <= components
    assert layout.num_eligible == sum(matrix.num_weights for matrix in layout.matrices if matrix.eligible)
    assert layout.num_layers == (4 if config(name).is_encoder_decoder or name == "nemotron_h" else 2)
    assert layout.family in families()
    assert layout.matched_by == ("names" if name == "exaone_moe" else "model_type")  # a type that no family lists


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name: str) -> None:
    layout = layout_of(name)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_names_of_matrices() -> None:
    names = [matrix.name for matrix in layout_of("gpt_oss").matrices]
    assert "model.layers.1.mlp.experts.gate_up_proj[4,up]" in names
    assert "model.layers.1.mlp.experts.down_proj[4]" in names
    assert "model.layers.1.self_attn.q_proj.weight" in names
    assert "transformer.h.0.attn.c_attn.weight[value]" in [m.name for m in layout_of("gpt2").matrices]


def test_encoder_and_decoder_are_stacks_with_cross_attention_in_the_decoder() -> None:
    for name, cross in (("t5", "EncDecAttention"), ("bart", "encoder_attn")):
        layout = layout_of(name)
        eligible = [matrix for matrix in layout.matrices if matrix.eligible]
        assert {(m.stack, m.layer) for m in eligible} == {(s, n) for s in ("encoder", "decoder") for n in (0, 1)}
        assert {m.stack for m in eligible if cross in m.name} == {"decoder"}
        assert sum(cross in m.name for m in eligible) == 8
    heads = {t.stack: t.num_heads(0) for t in layout_of("bart").tensors.values() if "q_proj.weight" in t.name}
    assert heads == {"encoder": 4, "decoder": 6}


def test_shared_and_routed_experts_and_dense_layers_of_one_model() -> None:
    layout = layout_of("deepseek_v3")
    first = [matrix for matrix in layout.matrices if matrix.layer == 0 and ".mlp." in matrix.name]
    assert {(m.component, m.expert, m.shared_expert) for m in first} == {
        (component, None, False) for component in ("gate", "up", "down")
    }
    second = [matrix for matrix in layout.matrices if matrix.layer == 1 and ".mlp." in matrix.name]
    routed = [matrix for matrix in second if matrix.expert is not None]
    assert [m.component for m in routed] == ["gate", "up"] * 5 + ["down"] * 5
    assert [m.component for m in second if m.shared_expert] == ["gate", "up", "down"]
    assert [m.component for m in second if m.expert is None and not m.shared_expert] == ["router"]
    gates = [m for m in layout_of("qwen2_moe").matrices if m.component == "router" and m.layer == 0]
    assert [m.tensor.split("mlp.")[1] for m in gates] == ["gate.weight", "shared_expert_gate.weight"]


def test_experts_that_are_modules_of_their_own() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(24, 12, bias=False), nn.Linear(24, 12, bias=False)
            self.down_proj = nn.Linear(12, 24, bias=False)

    model = build("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(Mlp() for _ in range(5))
    layout, fused = Layout.of(model), layout_of("qwen3_moe")

    def places(layout: Layout) -> list[tuple[int | None, str, int | None, int]]:
        return sorted((m.layer, m.component, m.expert, m.num_weights) for m in layout.matrices if m.eligible)

    assert sorted(map(str, places(layout))) == sorted(map(str, places(fused)))
    for granularity in ("neuron", "expert", "layer", "matrix"):
        assert layout.groups(granularity).num_groups == fused.groups(granularity).num_groups


def test_tied_tensors_are_listed_and_counted_once() -> None:
    untied = layout_of("llama")
    tied = Layout.from_config(config("llama", tie_word_embeddings=True))
    assert untied.tied == {}
    assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in tied.tensors
    assert untied.num_weights - tied.num_weights == 40 * 24


def test_the_vision_tower_of_a_multimodal_model_is_other() -> None:
    text = {key: value for key, value in config("gemma3_text").to_dict().items() if key != "model_type"}
    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
    both = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    layout, alone = Layout.from_config(both), layout_of("gemma3_text")
    assert layout.num_layers == 2
    assert layout.num_eligible == alone.num_eligible
    tower = [matrix for matrix in layout.matrices if "vision_tower" in matrix.name]
    assert len(tower) > 40
    assert {(matrix.component, matrix.layer, matrix.eligible) for matrix in tower} == {("other", None, False)}


# wrappers


@pytest.mark.parametrize(
    "wrapped",
    [
        "model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
        "_orig_mod.model.layers.0.mlp.up_proj.weight",
        "module.model.layers.0.mlp.up_proj.weight",
        "module._orig_mod.base_model.model.model.layers.0._orig_mod.mlp.up_proj.base_layer.weight",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.original_module.weight",
    ],
)
def test_canonical_name(wrapped: str) -> None:
    assert canonical_name(wrapped) == "model.layers.0.mlp.up_proj.weight"
    assert not is_adapter(wrapped)


def test_a_lora_model_has_the_bare_model_s_names_and_counts() -> None:
    bare = layout_of("qwen3_moe")
    wrapped = peft.get_peft_model(
        build("qwen3_moe"),
        peft.LoraConfig(
            r=2,
            target_modules=["q_proj", "v_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            modules_to_save=["lm_head"],
            use_dora=False,
        ),
    )
    layout = Layout.of(wrapped)
    adapters = {name for name, tensor in layout.tensors.items() if "adapter" in tensor.components}
    assert {name: tensor for name, tensor in layout.tensors.items() if name not in adapters} == bare.tensors
    trainable = {canonical_name(name) for name, p in wrapped.named_parameters() if p.requires_grad}
    assert adapters == trainable
    assert len(adapters) == 2 * (2 + 2 + 2 + 2) + 1
    assert (layout.num_weights, layout.num_eligible) == (bare.num_weights, bare.num_eligible)
    assert not any(layout.tensors[name].eligible for name in adapters)
    assert layout.family == "moe"


def test_a_compiled_or_data_parallel_model() -> None:
    model = build("llama")
    assert Layout.of(torch.compile(model)) == Layout.of(model)
    parallel = nn.Module()
    parallel.module = model  # DistributedDataParallel without the processes
    assert Layout.of(parallel) == Layout.of(model)
    with pytest.raises(LayoutError, match=r"Linear has no \.config"):
        Layout.of(nn.Linear(2, 2))


def test_a_sharded_model_has_its_global_shapes() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        model = build("llama")
        whole = Layout.of(model)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)])))
        assert model.lm_head.weight.to_local().shape == (20, 24)
        assert Layout.of(model) == whole
    finally:
        torch.distributed.destroy_process_group()


# size


def test_a_model_of_671_billion_weights_takes_seconds() -> None:
    started = time.perf_counter()
    layout = Layout.from_config(AutoConfig.for_model("deepseek_v3"))
    assert time.perf_counter() - started < 20
    assert layout.num_weights == 671_026_404_352
    assert layout.num_layers == 61
    assert layout.num_eligible < layout.num_weights
    assert sum(layout.groups("matrix").sizes.tolist()) == layout.num_eligible


def test_a_fused_layout_takes_no_time() -> None:
    sizes = {"num_experts": 128, "num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768}
    with torch.device("meta"):
        model = build("qwen3_moe", **sizes, num_local_experts=128)
    started = time.perf_counter()
    layout = Layout.of(model)
    eligible = layout.num_eligible
    assert time.perf_counter() - started < 1
    assert eligible > 48 * 128 * 3 * 2048 * 768
    assert "matrices" not in vars(layout.tensors["model.layers.0.mlp.experts.gate_up_proj"]), "made on demand"
    assert len(layout.matrices) > 48 * 128 * 3


def test_flat_indices_beyond_32_bits() -> None:
    changes = {"hidden_size": 65536, "num_experts": 64, "num_local_experts": 64, "intermediate_size": 8192}
    layout = Layout.from_config(config("gpt_oss", **changes))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensor = layout.tensors[name]
    assert tensor.shape == (64, 65536, 16384)
    flat = (63 * 65536 + 65535) * 16384 + torch.tensor([0, 1, 16383])
    assert flat.min() > 2**35
    assert [tensor.matrices[i].name for i in tensor.matrix_of(flat)] == [
        f"{name}[63,{part}]" for part in ("gate", "up", "up")
    ]
    expert, part, row, column = tensor.coordinates(flat)
    assert (expert.tolist(), part.tolist()) == ([63] * 3, [0, 1, 1])
    assert (row.tolist(), column.tolist()) == ([0, 0, 8191], [65535] * 3)


# errors and user files


class Unknown(nn.Module):
    """What a model of an unknown kind may look like."""

    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.config = config("llama", **settings)
        self.config.model_type = "unheard_of"
        self.wte = nn.Embedding(40, 24)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            block = nn.Module()
            block.attn = nn.Module()
            block.attn.wq = nn.Linear(24, 32, bias=False)
            block.attn.wk, block.attn.wv = nn.Linear(24, 16, bias=False), nn.Linear(24, 16)
            block.attn.wo = nn.Linear(32, 24, bias=False)
            block.attn_norm = nn.LayerNorm(24)
            block.moe = nn.Module()
            block.moe.experts = nn.ModuleList(nn.ModuleDict({"thing": nn.Linear(24, 7)}) for _ in range(2))
            block.moe.frobnicator = nn.Parameter(torch.zeros(5, 3, 2))
            self.blocks.append(block)


def toml_in(message: str) -> str:
    return message[message.index("\n\n") + 2 :]


def test_an_unknown_model_s_error_shows_the_file_that_describes_it(tmp_path: Path) -> None:
    model = Unknown()
    with pytest.raises(LayoutError) as caught:
        Layout.of(model)
    message = str(caught.value)
    assert "model_type 'unheard_of'" in message
    assert "--layout unheard_of.toml" in message
    assert re.search(r"blocks\.\{layer\}\.moe\.experts\.\{expert\}\.thing\.weight +\(7, 24\) x 6\n", message)
    assert re.search(r"blocks\.\{layer\}\.moe\.frobnicator +\(5, 3, 2\) x 3\n", message)
    file = tmp_path / "mine.toml"
    file.write_text(toml_in(message))
    with pytest.raises(LayoutError, match=r"'\?'; choose one of query, key"):
        Layout.of(model, file=file)  # not filled in
    text = toml_in(message)
    text = re.sub(r'(thing.weight" = )"\?"', r'\1"up"', text)
    text = re.sub(r'(frobnicator" = )"\?"', r'\1{ component = "down", axes = "expert out in" }', text)
    file.write_text(text.replace("[model]", "[sizes]\nexperts = 5\n[model]"))
    layout = Layout.of(model, file=file)
    assert (layout.family, layout.matched_by, layout.num_layers) == ("mine", "file", 3)
    found = {m.name: (m.layer, m.component, m.expert) for m in layout.matrices}
    assert found["blocks.2.attn.wq.weight"] == (2, "query", None)
    assert found["blocks.2.attn.wk.weight"] == (2, "key", None)
    assert found["blocks.1.attn.wo.weight"] == (1, "output", None)
    assert found["blocks.1.attn.wv.bias"][1] == "bias"
    assert found["blocks.1.attn_norm.weight"][1] == "norm"
    assert found["wte.weight"][1] == "embedding"
    assert found["blocks.0.moe.experts.1.thing.weight"] == (0, "up", 1)
    assert found["blocks.0.moe.frobnicator[4]"] == (0, "down", 4)
    assert layout.tensors["blocks.0.attn.wq.weight"].num_heads(0) == 4


def test_one_unknown_kind_of_tensor_extends_the_family_that_knows_the_rest(tmp_path: Path) -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.novelty = nn.Linear(24, 5, bias=False)
    with pytest.raises(LayoutError, match=r"2 of 23 tensors \(1 of 13 kinds\)") as caught:
        Layout.of(model)
    text = toml_in(str(caught.value))
    assert text.startswith('extends = "llama"\n')
    assert text.count(" = ") == 2
    file = tmp_path / "novel.toml"
    file.write_text(text.replace('"?"', '"gate"'))
    layout = Layout.of(model, file=file)
    assert layout.num_eligible == layout_of("llama").num_eligible + 2 * 24 * 5


def test_a_shape_that_does_not_fit_is_an_error_that_says_which_and_why() -> None:
    model = build("qwen3")
    model.model.layers[1].self_attn.q_proj = nn.Linear(24, 64)  # as with a gate of the output beside the queries
    with pytest.raises(LayoutError) as caught:
        Layout.of(model)
    message = str(caught.value)
    assert message.startswith("model.layers.1.self_attn.q_proj.weight:")
    assert "expected: 64 = head 4 x dim 8" in message
    assert "found:    shape (64, 24)" in message


def test_a_type_that_no_family_lists_is_understood_by_its_names() -> None:
    model = build("phi3")
    expected = Layout.of(model)
    model.config.model_type = "brand_new"
    found = Layout.of(model)
    assert (found.family, found.matched_by) == ("phi3", "names")
    assert found.tensors == expected.tensors


def test_names_that_two_families_understand_differently_are_not_guessed() -> None:
    model = build("gpt_bigcode", n_inner=24)  # GPT-2 has the same names for transposed weights
    model.config.model_type = "brand_new"
    assert Layout.of(model).family == "gpt_bigcode"
    for block in model.transformer.h:
        del block.attn.c_attn  # all that is left is square
    with pytest.raises(LayoutError, match=r"can be understood in two ways.*'gpt2'.*'gpt_bigcode'"):
        Layout.of(model)


def test_a_quantised_model_is_refused() -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(20, 24, dtype=torch.int8), False)
    with pytest.raises(LayoutError, match=r"up_proj\.weight is torch\.int8: the model is quantised"):
        Layout.of(model)


def test_a_family_takes_the_layers_of_another_under_a_beginning_of_its_own(tmp_path: Path) -> None:
    """Llama's rules for other names: the same matrices; its own rules come first."""
    names = {"model.embed_tokens.weight": (40, 24), "tower.0.self_attn.q_proj.weight": (32, 24),
             "tower.0.mlp.up_proj.weight": (20, 24), "tower.0.fc1.weight": (20, 24)}  # fmt: skip
    (tmp_path / "mine.toml").write_text(
        'extends = "base"\nlayers = "tower.{layer}."\nlayer_of = { "tower.{layer}." = ["llama", "opt"] }\n'
        '[layer]\n"mlp.up_proj.weight" = "gate"\n'
    )
    family, sizes = read_family(tmp_path / "mine.toml"), Family.sizes_for
    found = {name: family.find(name, shape, sizes(family, config("llama"))) for name, shape in names.items()}
    assert [layout and layout.components for layout in found.values()] == [
        ("embedding",), ("query",), ("gate",), ("up",),
    ]  # fmt: skip
    query = found["tower.0.self_attn.q_proj.weight"]
    assert query is not None
    assert query.view == (4, 8, 24)


def test_parts_without_extent_are_none() -> None:
    """GLM-5 Next's key has no rotary part; a matrix of no weights would have no sigma."""
    tensor = layout_of("glm5_next").tensors["model.language_model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert tensor.components == ("key_value",)


def test_a_configuration_of_no_text_model_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"'vit'.*generates text"):
        Layout.from_config(AutoConfig.for_model("vit"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\n", "is not TOML"),
        ('colour = "red"', "unknown keys colour"),
        ('extends = "nobody"', "extends 'nobody', which is no family"),
        ('layer_of = { "a." = "nobody" }', "layer_of 'nobody', which is no family"),
        ('[layer]\n"x" = "up"', "needs `layers`"),
        ('[model]\n"**" = "sideways"', "component 'sideways'; choose one of query"),
        ('[model]\n"**" = { component = "up", colour = 1 }', "neither a component nor a table"),
        ('[model]\n"**" = { axes = "out in" }', "needs a component or parts"),
        ('[model]\n"**" = { component = "up", axes = "out inn" }', "name 'inn'; the roles are"),
        ('[model]\n"**" = { component = "up", axes = "in in" }', "repeat a role"),
        (
            '[model]\n"**" = { component = "up", axes = "out expert" }',
            "repeat a role, or have `expert` after",
        ),
        ('[model]\n"**" = { component = "up", axes = "(dim head) in" }', "head, part and dim in this order"),
        ('[model]\n"**" = { parts = ["gate", "up"], axes = "out in" }', "go together"),
        ('[model]\n"**" = { component = "query", axes = "(head=nobody dim) in" }', "needs 'nobody'"),
        ('[sizes]\nheads = "open(1)"', "not integer arithmetic"),
        ('[sizes]\nheads = "hidden // 0"', "divides by zero"),
        ('[sizes]\nheads = "hidden /"', "'hidden /' is not integer arithmetic"),
    ],
)
def test_a_faulty_layout_file_is_an_error_that_says_what(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(LayoutError, match=message):
        Layout.of(build("llama"), file=file)


def test_an_encoder_deeper_than_its_decoder() -> None:
    """Lists per layer are the decoder's."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": 64,
    }  # fmt: skip
    stacks = {name: {**sizes, "num_hidden_layers": number} for name, number in (("encoder", 6), ("decoder", 2))}
    found = Layout.from_config(AutoConfig.for_model("t5gemma", **stacks, vocab_size=64))
    layers = [(m.stack, m.layer) for m in found.matrices if m.component == "query"]
    assert layers.count(("encoder", 5)) == 1
    assert max(layer for stack, layer in layers if stack == "decoder") == 1


def test_a_missing_layout_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="no layout file at"):
        Layout.of(build("llama"), file=tmp_path / "nothing.toml")


def test_every_listed_type_belongs_to_one_family() -> None:
    types = [model_type for family in families().values() for model_type in family.model_types]
    assert len(types) == len(set(types))


# any layout at all


@st.composite
def tensor_layouts(draw: st.DrawFn) -> TensorLayout:
    """Layouts of all the forms that rules can have, with arbitrary extents."""
    form = draw(
        st.sampled_from(
            [
                (("out",), ("in",)),
                (("in",), ("out",)),
                (("head", "dim"), ("in",)),
                (("out",), ("head", "dim")),
                (("head", "dim"), ("out",)),
                (("part", "dim"), ("in",)),
                (("part",), ("in",)),
                (("in",), ("part", "dim")),
                (("head", "part", "dim"), ("in",)),
                (("head", "part"), ("in",)),
                (("expert",), ("part",), ("in",)),
                (("expert",), ("in",), ("out", "part")),
                (("expert",), ("in",), ("part",)),
                (("expert",), ("out",), ("in",)),
                (("expert", "out"), ("in",)),
                (("out",),),
            ]
        )
    )
    roles = [role for axis in form for role in axis]
    extents = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)) if "part" in roles else [1]
    view = [sum(extents) if role == "part" else draw(st.integers(1, 4)) for role in roles]
    names = draw(st.permutations(["query", "key", "value"]))
    components = [names[i] for i in range(len(extents))]
    sizes = iter(view)
    shape = tuple(math.prod(next(sizes) for _ in axis) for axis in form)
    if "part" not in roles:
        extents = [view[0]]
    return TensorLayout(
        name="t", shape=shape, layer=0, stack=None, expert=None, view=tuple(view), axes=tuple(roles),
        source=tuple(number for number, axis in enumerate(form) for _ in axis),
        parts=tuple(zip(components, extents, strict=True)), block="t",
    )  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(tensor_layouts())
def test_coordinates_are_those_of_the_views(tensor: TensorLayout) -> None:
    flat = torch.arange(tensor.num_weights)
    expert, part, row, column = tensor.coordinates(flat)
    views = tensor.split(flat.view(tensor.shape))
    for ordinal, (matrix, view) in enumerate(zip(tensor.matrices, views, strict=True)):
        inside = view.flatten()
        assert (tensor.matrix_of(inside) == ordinal).all()
        assert (expert[inside] == (matrix.expert or 0)).all()
        number = part[inside].unique().item()
        assert tensor.parts[number][0] == matrix.component
        # the rows and columns of a matrix are a grid: every pair once
        rows, columns = tensor.num_rows(number), tensor.num_columns(number)
        assert sorted((row[inside] * columns + column[inside]).tolist()) == list(range(rows * columns))
        # and run in the order of the view, heads outermost
        order = row[inside] * columns + column[inside]
        side = [a for a in tensor.row_axes if tensor.axes[a] != "expert"]
        if not side or not tensor.column_axes or max(side) < min(tensor.column_axes):
            assert order.tolist() == sorted(order.tolist())
    assert TensorLayout.from_json(json.loads(json.dumps(tensor.to_json()))) == tensor


# what is left out on request


def test_what_is_not_understood_is_refused_or_left_out_and_said() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.novelty = nn.Linear(24, 5, bias=False)
    with pytest.raises(LayoutError, match="--skip-unknown"):
        Layout.of(model)
    layout = Layout.of(model, skip_unknown=True)
    assert list(layout.tensors) == [name for name, _ in model.named_parameters()]
    assert layout.num_weights == model.num_parameters()
    assert layout.num_eligible == layout_of("llama").num_eligible
    assert [t.name for t in layout.tensors.values() if t.components == ("unknown",)] == [
        f"model.layers.{n}.mlp.novelty.weight" for n in (0, 1)
    ]
    share = 2 * 5 * 24 / layout.num_weights
    assert layout.left_out == (
        f"2 tensors with {share:.1%} of the weights are not understood and were left out (--skip-unknown): "
        "model.layers.{layer}.mlp.novelty.weight"
    )
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))).left_out == layout.left_out
    assert layout_of("llama").left_out is None
    model.config.model_type = "brand_new"
    assert Layout.of(model, skip_unknown=True).tensors == layout.tensors


def test_what_nobody_understands_is_not_left_out() -> None:
    with pytest.raises(LayoutError, match="not understood"):
        Layout.of(Unknown(), skip_unknown=True)


def test_a_shape_that_does_not_fit_is_left_out_on_request() -> None:
    model = build("qwen3")
    model.model.layers[1].self_attn.q_proj = nn.Linear(24, 64)
    layout = Layout.of(model, skip_unknown=True)
    assert layout.tensors["model.layers.1.self_attn.q_proj.weight"].components == ("unknown",)
    assert layout.tensors["model.layers.0.self_attn.q_proj.weight"].components == ("query",)


@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "dots1", "nemotron", "dbrx"])
def test_a_class_that_fails_on_its_own_configuration_is_said_to_be_its_own(name: str) -> None:
    with pytest.raises(LayoutError, match=rf"transformers cannot build \w+ \(model_type '{name}'\)"):
        Layout.from_config(AutoConfig.for_model(name))


LLAMA_LIKE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 100,
}  # fmt: skip


def layout_from(model_type: str, **settings: object) -> Layout:
    return Layout.from_config(AutoConfig.for_model(model_type, **settings))


def test_layers_with_different_numbers_of_heads() -> None:
    found = layout_from(
        "laguna", **LLAMA_LIKE, head_dim=8, num_experts=4, num_attention_heads_per_layer=[8, 16],
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    queries = [tensor for tensor in found.tensors.values() if tensor.components == ("query",)]
    assert [tensor.view for tensor in queries] == [(8, 8, 64), (16, 8, 64)]


@pytest.mark.parametrize(
    ("model_type", "option", "count"), [("cohere", "use_qk_norm", 4), ("stablelm", "qk_layernorm", 2 * 12)]
)
def test_norms_of_single_heads(model_type: str, option: str, count: int) -> None:
    found = layout_from(model_type, **LLAMA_LIKE, **{option: True})
    norms = [name for name, t in found.tensors.items() if re.search("self_attn.*norm", name) and not t.eligible]
    assert len(norms) == count


@pytest.mark.parametrize(
    ("wrapper", "text"),
    [
        ("internvl", {"model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 4}),
        ("llava", {"model_type": "phi"}),
    ],
)
def test_text_models_inside_of_others(wrapper: str, text: dict[str, object]) -> None:
    found = layout_from(wrapper, text_config={**LLAMA_LIKE, **text})
    bare = layout_from(str(text["model_type"]), **LLAMA_LIKE, **{k: v for k, v in text.items() if k != "model_type"})
    assert (found.family, found.num_eligible) == (bare.family, bare.num_eligible)


def test_a_projection_that_is_key_and_value_in_gemma_4s_unified_kind() -> None:
    found = layout_from(
        "gemma4_unified_text", **LLAMA_LIKE, head_dim=8, global_head_dim=16, num_global_key_value_heads=2,
        attention_k_eq_v=True, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    names = [f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1)]
    assert [found.tensors[name].components for name in names] == [("key",), ("key_value",)]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_experts_that_are_none_hold_nothing_to_select() -> None:
    found = layout_from(
        "glm4_moe", **LLAMA_LIKE, head_dim=8, n_routed_experts=4, n_shared_experts=0, n_group=1, topk_group=1,
        moe_intermediate_size=16,
    )  # fmt: skip
    empty = [tensor for tensor in found.tensors.values() if 0 in tensor.shape]
    assert len(empty) == 3
    assert not any(tensor.eligible for tensor in empty)


@pytest.mark.parametrize("heads", [8, 16])
def test_the_decoder_of_t5gemma_attends_to_the_prompt(heads: int) -> None:
    sizes = {**LLAMA_LIKE, "head_dim": 8}
    encoder = {**sizes, "num_attention_heads": heads, "num_key_value_heads": heads // 2, "hidden_size": 8 * heads}
    decoder = {**sizes, "cross_attention_hidden_size": 8 * heads}
    found = layout_from("t5gemma", encoder=encoder, decoder=decoder)
    views = {
        (part.stack, part.components, part.name.split(".")[4]): part.view
        for part in found.tensors.values()
        if "attn" in part.block
    }
    assert views["decoder", ("query",), "cross_attn"] == (8, 8, 64)
    assert views["decoder", ("key",), "cross_attn"] == (4, 8, 8 * heads)
    assert views["decoder", ("output",), "cross_attn"] == (64, 8, 8)
    assert views["encoder", ("query",), "self_attn"] == (heads, 8, 8 * heads)
    assert found.num_layers == 4


def test_known_names_of_other_shapes_are_not_left_out_of_a_family_that_they_do_not_belong_to() -> None:
    model = build("qwen3")
    model.model.layers[1].self_attn.q_proj = nn.Linear(24, 64)
    model.config.model_type = "brand_new"
    with pytest.raises(LayoutError, match="does not fit its shape"):
        Layout.of(model, skip_unknown=True)


@pytest.mark.parametrize(
    "adapter",
    [
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        peft.PolyConfig(target_modules=["q_proj"], r=2),
    ],
    ids=["tokens", "adalora", "poly"],
)
def test_an_adapter_s_own_tensors_are_told_from_the_model_s(adapter: peft.PeftConfig) -> None:
    bare = layout_of("llama")
    found = Layout.of(peft.get_peft_model(build("llama"), adapter))
    assert {name for name, tensor in found.tensors.items() if "adapter" not in tensor.components} == {*bare.tensors}
    assert found.num_weights == bare.num_weights


@pytest.mark.parametrize("tied", [True, False])
def test_learned_prompts_are_refused(tied: bool) -> None:
    model = build("llama", tie_word_embeddings=tied)
    with pytest.raises(LayoutError, match="the adapter learns prompts"):
        Layout.of(peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))
