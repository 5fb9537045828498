"""What a block's attention, MLP and norms are, by its layout and the modules that stand there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from rankine.anatomy.layouts import Layout
from rankine.anatomy.parts import Attention, Mlp, Norm, Weight
from rankine.anatomy.reading import Reading, Rows, by_head, join, stacked

Weights = Mapping[str, Weight]


# -- fused matrices -------------------------------------------------------------------------------
def fused_rows(
    role: str, outputs: int, layout: Layout, module: nn.Module | None, config: Any
) -> Rows:
    """Where the parts of a fused matrix lie; empty for a plain one. The ratio of query to
    key-value heads is the config's, whatever was pruned."""
    if role == "gate_up":
        return stacked({"gate": outputs // 2, "up": outputs // 2})
    if role != "qkv" or module is None:
        return ()
    if layout.by_head:
        head_dim = _head_dim(module, config)
        return by_head(outputs // (3 * head_dim), head_dim)
    heads = config.num_attention_heads
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    kv = outputs // (groups + 2)
    return stacked({"q": groups * kv, "k": kv, "v": kv})


def size(weight: Weight, role: str) -> int:
    """Rows of one part of a weight: all of them where it is not fused."""
    if not weight.rows:
        return weight.shape[0]
    return sum(stop - start for part, start, stop in weight.rows if part == role)


# -- attention ------------------------------------------------------------------------------------
def attention(
    reading: Reading, layout: Layout, place: str, weights: Weights, index: int, prefix: str = ""
) -> Attention | None:
    """The record of the attention module at `place`; its weights' roles begin with `prefix`."""
    q = weights.get(prefix + "q") or weights.get(prefix + "qkv")
    if q is None or prefix + "o" not in weights:
        return None
    k, v = weights.get(prefix + "k", q), weights.get(prefix + "v", q)
    module = reading.model.get_submodule(place)
    config: Any = reading.model.config
    head_dim = _head_dim(module, config)
    rope = _rope(config, index) if layout.rotary else {}
    turned = getattr(module, "rotary_ndims", head_dim * rope.get("partial_rotary_factor", 1.0))
    return Attention(
        path=place,
        heads=size(q, "q") // head_dim,
        kv_heads=size(k, "k") // head_dim,
        head_dim=head_dim,
        scale=float(getattr(module, "scaling", head_dim**-0.5 if layout.scaled else 1.0)),
        rotary=layout.rotary,
        rotary_fraction=turned / head_dim if layout.rotary else 0.0,
        qk_norm=any(hasattr(module, name) for name in ("q_norm", "q_layernorm")),
        bias=q.bias or k.bias or v.bias,
        window=_window(module, config, index),
        q=q.path,
        k=k.path,
        v=v.path,
        o=weights[prefix + "o"].path,
        softcap=getattr(module, "attn_logit_softcapping", None),
        rotary_base=rope.get("rope_theta"),
    )


def _head_dim(module: nn.Module, config: Any) -> int:
    """Of the module that stands there; the config's where the module does not say."""
    for name in ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _layer_type(config: Any, index: int) -> str | None:
    types = getattr(config, "layer_types", None) or ()
    return types[index] if index < len(types) else None


def _rope(config: Any, index: int) -> Mapping[str, Any]:
    """A layer's rotary parameters: Gemma 3 has a set per type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    own = parameters.get(_layer_type(config, index))
    return own if isinstance(own, Mapping) else parameters


def _window(module: nn.Module, config: Any, index: int) -> int | None:
    """The layer's own word where it has one: in Qwen and Gemma only some layers slide."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window  # type: ignore[return-value]
    if _layer_type(config, index) not in (None, "sliding_attention"):
        return None
    return getattr(config, "sliding_window", None)


# -- MLP ------------------------------------------------------------------------------------------
def mlp(
    weights: Weights, activation: str, place: str | None = None, prefix: str = ""
) -> Mlp | None:
    """The record of the feed-forward layer at `place` (the module that holds its weights, if None);
    their roles begin with `prefix`."""
    fused = weights.get(prefix + "gate_up")
    up, down = fused or weights.get(prefix + "up"), weights.get(prefix + "down")
    if up is None or down is None:
        return None
    gate = fused or weights.get(prefix + "gate")
    return Mlp(
        up.path.rpartition(".")[0] if place is None else place,
        size(up, "up"),
        gate.path if gate else None,
        up.path,
        down.path,
        activation,
        up.copies,
    )


def activation(config: Any) -> str:
    """The name of the feed-forward layers' function, whatever the family calls it."""
    names = ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn")
    return str(next(found for name in names if (found := getattr(config, name, None))))


# -- norms ----------------------------------------------------------------------------------------
def norms(reading: Reading, layout: Layout, path: str) -> tuple[Norm, ...]:
    """The block's norms that are there."""
    block = reading.model.get_submodule(path)
    behind = getattr(block, "do_layer_norm_before", True) is False  # OPT 350m
    found = []
    for below, (part, where) in layout.norms.items():
        place = join(path, below)
        module = reading.module(place)
        if module is None:
            continue
        kind = "layer" if isinstance(module, nn.LayerNorm) else "rms"
        found.append(Norm(place, kind, part, "stream" if behind else where, layout.norm_offset))
    return tuple(found)
