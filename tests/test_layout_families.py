"""A matrix does what it is called: each claim about a fused tensor is tested on the model's own states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese import GPTNeoXJapaneseAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.openai.modeling_openai import Attention as OpenAIGPTAttention

from safelocus.model.layout import Layout, TensorLayout
from tiny_models import ATTENTIONLESS, MIXTURES, NAMES, build, forward, tokens

States = dict[str, Tensor]  # query, key, value of layer 0: [batch, heads, length, dim]; mixed: the heads' output
ROLES = ("query", "key", "value")
MLP = ("gate", "up", "down")

# families that do not compute attention through transformers' interface -> where their states can be seen
OWN_ATTENTION: dict[str, tuple[type[nn.Module], str]] = {
    "falcon_rw": (FalconAttention, "_split_heads"),
    "falcon_7b": (FalconAttention, "_split_heads"),
    "falcon_40b": (FalconAttention, "_split_heads"),
    "bloom": (BloomAttention, "_reshape"),
    "codegen": (CodeGenAttention, "_attn"),
    "openai-gpt": (OpenAIGPTAttention, "_attn"),
    "gpt_neox_japanese": (GPTNeoXJapaneseAttention, "_attn"),
    "gptj": (GPTJAttention, "_attn"),
    "gpt_neo": (GPTNeoSelfAttention, "_attn"),
}
ENCODER_DECODER = ("bart", "mbart", "pegasus", "marian", "m2m_100", "t5", "t5_gated")
LATENT = ("deepseek", "longcat", "kimi", "bailing", "axk2")
UNGATED = (
    *("nanochat", "nemotron", "arcee", "apertus", "phi", "starcoder2", "gptj", "codegen", "gpt_neo", "gpt2"),
    *(
        "gpt_bigcode",
        "gpt_bigcode_multi_head",
        "gpt_neox",
        "bloom",
        "persimmon",
        "mpt",
        "opt",
        "xglm",
        "biogpt",
        "bert",
        "openai-gpt",
        "gpt_neox_japanese",
    ),
    *("falcon_rw", "falcon_7b", "falcon_40b", "bart", "mbart", "pegasus", "marian", "m2m_100", "t5", "nemotron_h"),
)
# encoder-decoders do not fuse, and XGLM's is BART's attention; three have tests of their own
ATTENTION = tuple(
    name for name in NAMES if name not in (*ENCODER_DECODER, *ATTENTIONLESS, "xglm", "mpt", "jetmoe", "diffllama")
)
MLPS = tuple(name for name in NAMES if name not in ATTENTIONLESS)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """Plain attention that leaves its states on the module."""
    repeats = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2) * settings["scaling"]
    weights = (scores if mask is None else scores + mask).softmax(-1)
    mixed = (weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2).contiguous()
    module.captured = {"query": query, "key": key, "value": value}
    return mixed, weights


@pytest.fixture(scope="module", autouse=True)
def _attention_that_captures() -> None:
    AttentionInterface.register("capture", attend)
    AttentionMaskInterface.register("capture", eager_mask)


@pytest.fixture(params=ATTENTION)
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """(name, model without biases, its layout, a function that runs it and returns layer 0's states)"""
    name = request.param
    own = OWN_ATTENTION.get(name)
    model = build(name, attention="eager" if own else "capture")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "adapter" in parameter_name:  # Zamba2 has adapters of its own
                parameter.zero_()
    first: list[States] = []
    if own is not None:
        kind, method = own
        original: Callable[..., Any] = getattr(kind, method)

        def spy(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found = original(self, *args, **kwargs)
            states = args[:3] if method == "_attn" else found
            first.append(dict(zip(ROLES, (s.transpose(1, 2) if kind is FalconAttention else s for s in states))))
            return found

        monkeypatch.setattr(kind, method, spy)

    def run() -> States:
        first.clear()
        forward(model, tokens())
        if own is not None:
            return first[0]
        return next(module.captured for module in model.modules() if hasattr(module, "captured"))

    return name, model, Layout.of(model), run


def zeroed(model: PreTrainedModel, name: str, mask: Tensor) -> Any:
    """Context in which the masked weights of a tensor are zero."""

    class Zeroed:
        def __enter__(self) -> None:
            self.parameter = model.get_parameter(name)
            self.saved = self.parameter.detach().clone()
            with torch.no_grad():
                self.parameter.masked_fill_(mask, 0)

        def __exit__(self, *_: object) -> None:
            with torch.no_grad():
                self.parameter.copy_(self.saved)

    return Zeroed()


def matrix_mask(tensor: TensorLayout, ordinal: int) -> Tensor:
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    tensor.split(mask)[ordinal].fill_(True)
    return mask


def in_layer_0(layout: Layout, *components: str) -> list[tuple[TensorLayout, int, str]]:
    return in_layer(layout, 0, *components)


def in_layer(layout: Layout, layer: int, *components: str) -> list[tuple[TensorLayout, int, str]]:
    return [
        (tensor, ordinal, matrix.component)
        for tensor in layout.tensors.values()
        if tensor.layer == layer and "self_attn.1" not in tensor.name  # of two in each layer of LongCat's
        for ordinal, matrix in enumerate(tensor.matrices)
        if matrix.component in components
    ]


def test_a_zeroed_query_key_or_value_is_zero_in_the_model_and_nothing_else_changes(attention: Any) -> None:
    name, model, layout, run = attention
    before = run()
    found = in_layer_0(layout, *ROLES)
    assert {component for _, _, component in found} == set(ROLES)
    for tensor, ordinal, component in found:
        with zeroed(model, tensor.name, matrix_mask(tensor, ordinal)):
            after = run()
        touched = after[component]
        if name.startswith(LATENT) and component == "key":  # half is from kv_b, half (rotary) from kv_a
            rotary = "kv_a" in tensor.name
            zero, rest = touched[..., 6:], touched[..., :6]
            zero, rest = (zero, rest) if rotary else (rest, zero)
            assert torch.equal(rest, before["key"][..., :6] if rotary else before["key"][..., 6:])
        else:
            zero = touched
        assert zero.numel()
        assert not zero.any(), f"{tensor.name} {component}"
        for other in ROLES:
            if other != component:
                assert torch.equal(after[other], before[other]), f"{tensor.name} {component} changes {other}"


@pytest.mark.slow
def test_a_zeroed_head_is_that_head_in_the_model(attention: Any) -> None:
    name, model, layout, run = attention
    groups = layout.groups("head")
    before = run()
    checked = 0
    for tensor, ordinal, component in in_layer_0(layout, *ROLES):
        num_heads = tensor.num_heads(ordinal)
        if not num_heads:
            continue
        ids = groups.ids(tensor.name, torch.arange(tensor.num_weights)).view(tensor.shape)
        mine = ids[matrix_mask(tensor, ordinal)].unique()
        assert len(mine) == num_heads
        for head, group in enumerate(mine):
            with zeroed(model, tensor.name, ids == group):
                after = run()[component]
            if name.startswith(LATENT) and component == "key":
                after = after[..., :6]  # the rest is the rotary key that all heads share
            # Falcon repeats each key/value head for its query heads
            states = before[component]
            repeats = states.shape[1] // num_heads
            assert states.shape[1] == num_heads * repeats
            # not "changed": a norm over all heads (OLMo 2) rescales the others
            zero = [i for i in range(states.shape[1]) if not after[:, i].any()]
            assert zero == list(range(head * repeats, (head + 1) * repeats)), f"{tensor.name} head {head}"
            checked += 1
    assert checked


def test_a_head_of_the_output_projection_reads_that_head(attention: Any) -> None:
    """Without a value head, its heads' columns of the output projection read zeros, and no others do."""
    _, model, layout, run = attention
    (output, _, _), *others = in_layer_0(layout, "output")
    assert not others
    groups = layout.groups("head")
    ids = groups.ids(output.name, torch.arange(output.num_weights)).view(output.shape)
    columns = ids.select(1 - output.input_axis, 0)  # the head of each input channel
    heads = columns.unique()
    values = [(tensor, ordinal) for tensor, ordinal, _ in in_layer_0(layout, "value")]
    tensor, ordinal = values[-1]
    value_ids = groups.ids(tensor.name, torch.arange(tensor.num_weights)).view(tensor.shape)
    value_heads = value_ids[matrix_mask(tensor, ordinal)].unique()
    repeats = len(heads) // len(value_heads)
    inputs: list[Tensor] = []
    projection = model.get_submodule(output.name.removesuffix(".weight"))
    projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for number, group in enumerate(value_heads):
        inputs.clear()
        with zeroed(model, tensor.name, value_ids == group):
            run()
        silent = ~inputs[0].flatten(0, -2).any(0)
        expected = torch.isin(columns, heads[number * repeats : (number + 1) * repeats])
        assert torch.equal(silent, expected)


@pytest.mark.parametrize(("name", "layer"), [("deepseek_v3", 0), ("gemma4_shared", 1)])
def test_key_value_is_both(name: str, layer: int) -> None:
    model = build(name, attention="capture")
    layout = Layout.of(model)

    def run() -> States:
        forward(model, tokens())
        return model.model.layers[layer].self_attn.captured

    before = run()
    (matrix,) = (m for m in layout.matrices if m.component == "key_value" and m.layer == layer)
    tensor = layout.tensors[matrix.tensor]
    with zeroed(model, tensor.name, matrix_mask(tensor, tensor.matrices.index(matrix))):
        after = run()
    assert torch.equal(after["query"], before["query"])
    assert not after["value"].any()
    own = slice(None, 6) if name == "deepseek_v3" else slice(None)  # the rest: the shared rotary key
    assert before["key"][..., own].any()
    assert not after["key"][..., own].any()


def test_mpt_query_key_and_value() -> None:
    model = build("mpt")
    layout = Layout.of(model)

    class Products(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.matmul:
                seen.append(args)
            return function(*args, **(kwargs or {}))

    def run() -> States:
        seen.clear()
        with Products():
            forward(model, tokens())
        (query, key), (_, value) = seen[:2]
        return {"query": query, "key": key, "value": value}

    seen: list[Any] = []
    before = run()
    for tensor, ordinal, component in in_layer_0(layout, *ROLES):
        with zeroed(model, tensor.name, matrix_mask(tensor, ordinal)):
            after = run()
        assert not after[component].any()
        assert all(torch.equal(after[other], before[other]) for other in ROLES if other != component)


def block_output(model: PreTrainedModel, block: str) -> Callable[[], Tensor]:
    """Runs the model and returns the output of one module (of an earlier layer than anything it routes)."""

    def run() -> Tensor:
        found: list[Any] = []
        hook = model.get_submodule(block).register_forward_hook(lambda _, __, output: found.append(output))
        forward(model, tokens())
        hook.remove()
        return found[0] if isinstance(found[0], Tensor) else found[0][0]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MLPS if name != "bert"])  # whose MLP is no module
def test_an_mlp_is_linear_in_up_beside_a_gate_and_not_in_gate(name: str) -> None:
    """And without a gate it is not linear in up, which then goes through the activation."""
    model = build(name)
    layout = Layout.of(model)
    linear: dict[str, list[bool]] = {"gate": [], "up": []}
    for tensor in layout.tensors.values():
        for matrix, view in zip(tensor.matrices, tensor.split(model.get_parameter(tensor.name).data), strict=True):
            if matrix.component not in linear:
                continue
            run = block_output(model, tensor.block)
            saved = view.clone()
            outputs = []
            for scale in (-1, 0, 1):
                view.copy_(saved * scale)
                outputs.append(run())
            if not torch.equal(outputs[0], outputs[2]):  # else an expert that no token was sent to
                second = outputs[0] - 2 * outputs[1] + outputs[2]
                linear[matrix.component].append(bool(second.abs().max() < 1e-5 * outputs[2].abs().max()))
    gated = bool(linear["gate"])
    assert gated == (name not in UNGATED)
    assert linear["up"], "no up-projection had an effect"
    assert set(linear["up"]) == {gated}
    assert not any(linear["gate"])


@pytest.mark.parametrize("name", MLPS)
def test_a_neuron_is_one_hidden_unit_across_its_tensors(name: str) -> None:
    """Without its gate or its up row a unit is silent, as without its down column."""
    model = build(name)
    layout = Layout.of(model)
    groups = layout.groups("neuron")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "bias" in parameter_name or "adapter" in parameter_name:
                parameter.zero_()
    before = forward(model, tokens())
    downs = [(tensor, matrix) for tensor, matrix, _ in in_layer(layout, 1 if name == "nemotron_h" else 0, "down")]
    assert downs
    active = 0
    for down, ordinal in downs:
        ids = groups.ids(down.name, torch.arange(down.num_weights)).view(down.shape)
        group = ids[matrix_mask(down, ordinal)].unique()[3]
        outputs = {}
        for tensor in layout.tensors.values():
            if tensor.layer != down.layer or not tensor.eligible:
                continue
            chosen = groups.expand(tensor.name, torch.arange(groups.num_groups) == group)
            for other, matrix in enumerate(tensor.matrices):
                mask = chosen & matrix_mask(tensor, other)
                if mask.any():
                    with zeroed(model, tensor.name, mask):
                        outputs[matrix.component] = forward(model, tokens())
        assert set(outputs) - {"gate"} == {"up", "down"}
        if name == "gpt_oss":  # (up + 1) * gate: its up alone does not silence a unit
            del outputs["up"]
        active += not torch.equal(outputs["down"], before)
        for output in outputs.values():
            torch.testing.assert_close(output, outputs["down"], atol=1e-4, rtol=1e-4)
    assert active


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_is_reached_by_the_tokens_routed_to_it_alone(name: str) -> None:
    model = build(name)
    layout = Layout.of(model)
    layer = next(tensor.layer for tensor in layout.tensors.values() if tensor.fused_experts)
    fused = [tensor for tensor in layout.tensors.values() if tensor.fused_experts and tensor.components[0] in MLP]
    *ups, down = (tensor for tensor in fused if tensor.layer == layer)
    assert {component for up in ups for component in up.components} == ({"up"} if name in UNGATED else {"gate", "up"})
    assert down.components == ("down",)
    run = block_output(model, down.block.rpartition(".")[0])  # the whole mixture
    groups = layout.groups("expert")
    before = run().reshape(-1, layout.tensors[down.name].num_rows(0))
    num_experts = torch.zeros(len(before))
    for expert in range(5):
        ids = groups.ids(down.name, torch.arange(down.num_weights)).view(down.shape)
        (group,) = ids[matrix_mask(down, expert)].unique()
        changed = []
        for tensor in (*ups, down):
            mask = groups.expand(tensor.name, torch.arange(groups.num_groups) == group)
            expected = sum(
                matrix_mask(tensor, i) for i, matrix in enumerate(tensor.matrices) if matrix.expert == expert
            )
            assert torch.equal(mask, expected.bool())
            with zeroed(model, tensor.name, mask):
                changed.append((run().reshape(before.shape) - before).abs().amax(1) > 1e-5)
        if name != "llama4_text":  # which runs every token through every expert, scaled by 0 or its score
            assert all(torch.equal(one, changed[-1]) for one in changed)
        num_experts += changed[-1]
    if name == "longcat_flash":  # some go to experts without weights
        assert 0 < num_experts.sum() < 2 * len(before)
        return
    options = getattr(model.config, "ffn_config", model.config)
    found = (getattr(options, key, None) for key in ("num_experts_per_tok", "moe_k", "moe_top_k"))
    assert num_experts.tolist() == [next(filter(None, found))] * len(before)
