"""Sizes by name: the numbers of a configuration, and integer arithmetic over them.

Rules for tensors (`rules`) say "heads * head_dim"; configurations call the same number
num_attention_heads, n_head or num_heads, keep it in a part for text, or have it differ by layer. And what else a
configuration says of its model (`text_config`, `listed_by_layer`, `auto_class`).
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from safelocus.errors import LayoutError

# names used in rules <- the configuration's names for the same thing, first found wins
_ALIASES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "kv_n_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    # of state-space models
    "ssm_heads": ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads"),
    "ssm_head_dim": ("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim"),
    "ssm_groups": ("mamba_n_groups", "mamba_ngroups", "n_groups"),
    "ssm_state": ("mamba_d_state", "ssm_state_size", "state_size"),
    "dt_rank": ("mamba_dt_rank", "time_step_rank"),
}
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.Gt: operator.gt,
    ast.Not: operator.not_,
}


class Sizes(dict[str, Any]):
    """Numbers of a configuration, by name; missing ones are an error that says so."""

    layers: list[Sizes] | None = None  # of each layer, where layers differ

    def of_layer(self, layer: int | None) -> Sizes:
        """Those of a layer; where an encoder has more than the lists, which are the decoder's, these here."""
        return self if layer is None or self.layers is None or layer >= len(self.layers) else self.layers[layer]

    def evaluate(self, expression: str | int) -> Any:
        node: ast.expr | None = None
        with suppress(SyntaxError, ValueError):
            node = ast.parse(str(expression).strip(), mode="eval").body
        return self._evaluate(node, str(expression))

    def _evaluate(self, node: ast.expr | None, expression: str) -> Any:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name):
                if self.get(name) is None:
                    raise LayoutError(f"the size {expression!r} needs {name!r}, which the configuration lacks")
                return self[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                divisor = self._evaluate(right, expression)
                if type(op) is ast.FloorDiv and divisor == 0:
                    raise LayoutError(f"the size {expression!r} divides by zero")
                return _OPERATORS[type(op)](self._evaluate(left, expression), divisor)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._evaluate(operand, expression)
            case ast.BoolOp(op=op, values=operands):
                values = [self._evaluate(operand, expression) for operand in operands]
                return all(values) if isinstance(op, ast.And) else any(values)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](self._evaluate(left, expression), self._evaluate(right, expression))
        raise LayoutError(f"the size {expression!r} is not integer arithmetic over the configuration's numbers")


def text_config(config: Any) -> Any:
    """The part of a multimodal configuration that describes the language model; else the whole."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def sizes_of(config: Any) -> Sizes:
    """The integers and booleans of a configuration (its text part), with the names that rules use.

    Those of an encoder and a decoder with configurations of their own also as "encoder_heads", "decoder_heads", ...
    """
    text = text_config(config)
    parts = [text, *filter(None, (getattr(text, name, None) for name in ("attn_config", "ffn_config")))]
    sizes = Sizes(
        {key: value for part in reversed(parts) for key, value in vars(part).items() if isinstance(value, int)}
    )
    for name, keys in _ALIASES.items():
        found = next((v for key in keys for part in parts if (v := _number(part, key)) is not None), None)
        if found is not None:
            sizes[name] = found
    if "heads" in sizes:
        sizes.setdefault("kv_heads", sizes["heads"])
        if "hidden" in sizes and sizes["heads"]:
            sizes.setdefault("head_dim", sizes["hidden"] // sizes["heads"])
    for stack in ("encoder", "decoder"):  # with a configuration of its own
        if hasattr(part := getattr(config, stack, None), "get_text_config"):
            sizes |= {f"{stack}_{name}": size for name, size in sizes_of(part).items()}
    return sizes


def listed_by_layer(config: Any) -> list[dict[str, Any]]:
    """What a configuration lists per layer: numbers by their name, kinds (`layer_types`) as conditions by theirs."""
    num_layers = getattr(config, "num_hidden_layers", None)
    listed = {k: v for k, v in vars(config).items() if isinstance(v, list) and k != "architectures"}
    lists = {k: v for k, v in listed.items() if v and len(v) == num_layers}
    kinds = {kind for values in lists.values() for kind in values if isinstance(kind, str)}
    return [
        {kind: any(values[layer] == kind for values in lists.values()) for kind in kinds}
        | {name: values[layer] for name, values in lists.items() if isinstance(values[layer], int)}
        for layer in range(num_layers if lists and num_layers else 0)
    ]


def _number(config: Any, key: str) -> int | None:
    try:
        value = getattr(config, key, None)  # not vars(): properties and renamed attributes count
    except (RuntimeError, ValueError):  # differs between layers
        return None
    return value if isinstance(value, int) else None


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a model: `AutoModelForCausalLM` or another; None where none generates text.

    A vision-language model that is not among the text models is loaded whole, and used with text alone.

    Example:
        >>> from transformers import AutoConfig
        >>> auto_class(AutoConfig.for_model("qwen2_5_vl")).__name__
        'AutoModelForImageTextToText'
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM if type(config) in AutoModelForSeq2SeqLM._model_mapping else None
    autos = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((auto for auto in autos if type(config) in auto._model_mapping), None)
