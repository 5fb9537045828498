"""Reading a model's blocks: by a family's layout, or by the generic walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from rankine.anatomy.layouts import HEADS, Layout
from rankine.anatomy.parts import Anatomy, Attention, Block, Mlp, Weight
from rankine.anatomy.reading import Reading, join, operator


class LayoutError(Exception):
    """A model that does not keep its parts where its family does."""


# -- by layout ------------------------------------------------------------------------------------
def family(model: nn.Module, layout: Layout, name: str) -> Anatomy:
    """The anatomy by a layout; raises LayoutError where the model does not follow it."""
    reading = Reading.of(model)
    prefix = _prefix(model)
    base = prefix if prefix and reading.module(prefix) is not None else ""
    stack = join(base, layout.blocks)
    modules = reading.module(stack)
    if not isinstance(modules, nn.ModuleList):
        raise LayoutError(f'no list of blocks at "{stack}"')
    blocks = tuple(
        _family_block(reading, layout, join(stack, str(index)), index)
        for index in range(len(modules))
    )
    outside = _outside(reading, blocks)

    def place(path: str | None) -> str | None:
        whole = join(base, path) if path else ""
        return whole if whole and reading.module(whole) is not None else None

    return Anatomy(
        family=name,
        blocks=blocks,
        outside=outside,
        prefix=prefix,
        embedding=place(layout.embedding),
        head=_first(outside, "head"),
        norm=place(layout.norm),
    )


def _prefix(model: nn.Module) -> str:
    return str(getattr(model, "base_model_prefix", "") or "")


def _family_block(reading: Reading, layout: Layout, path: str, index: int) -> Block:
    found = (_step(reading, path, step, index) for step in layout.steps)
    steps = tuple(step for step in found if step)
    weights = {weight.role: weight for step in steps for weight in step}
    known = {weight.path for weight in weights.values()}
    for stranger in reading.below(path):
        if stranger not in known:
            raise LayoutError(f'an unexpected weight at "{stranger}"')
    attention = _attention(reading, layout, path, weights)
    return Block(path, index, attention, _mlp(reading, layout, path, weights), steps)


def _step(reading: Reading, block: str, step: Mapping[str, str], index: int) -> tuple[Weight, ...]:
    """The weights of one step; those inside a structured module (a latent attention) are gone."""
    places = {role: join(block, below) for role, below in step.items()}
    visible = {role: place for role, place in places.items() if not reading.hidden(place)}
    for place in visible.values():
        if place not in reading.leaves:
            raise LayoutError(f'no linear layer at "{place}"')
    return tuple(
        reading.weight(place, role, index, reads=next(iter(visible.values())))
        for role, place in visible.items()
    )


def _attention(
    reading: Reading, layout: Layout, path: str, weights: Mapping[str, Weight]
) -> Attention | None:
    q = weights.get("q") or weights.get("qkv")
    if q is None or "o" not in weights:
        return None
    k, v = weights.get("k", q), weights.get("v", q)
    place = join(path, layout.attention)
    module = reading.model.get_submodule(place)
    config: Any = reading.model.config
    head_dim = _head_dim(module, config)
    rows = {role: stop - start for role, start, stop in q.rows}
    return Attention(
        path=place,
        heads=rows.get("q", q.shape[0]) // head_dim,
        kv_heads=rows.get("k", k.shape[0]) // head_dim,
        head_dim=head_dim,
        scale=float(getattr(module, "scaling", head_dim**-0.5)),
        rotary=layout.rotary,
        rotary_fraction=_rotary_fraction(config) if layout.rotary else 0.0,
        qk_norm=hasattr(module, "q_norm"),
        bias=q.bias or k.bias or v.bias,
        window=_window(module, config),
        q=q.path,
        k=k.path,
        v=v.path,
        o=weights["o"].path,
    )


def _head_dim(module: nn.Module, config: Any) -> int:
    """Of the module that stands there; the config's where the module does not say."""
    for name in ("head_dim", "attention_head_size"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rotary_fraction(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("partial_rotary_factor", 1.0))


def _window(module: nn.Module, config: Any) -> int | None:
    """The layer's own word where it has one: in Qwen only some layers slide."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window  # type: ignore[return-value]
    return getattr(config, "sliding_window", None)


def _mlp(reading: Reading, layout: Layout, path: str, weights: Mapping[str, Weight]) -> Mlp | None:
    if "up" not in weights or "down" not in weights:
        return None
    config: Any = reading.model.config
    activation = getattr(config, "hidden_act", None) or config.activation_function
    gate = weights.get("gate")
    return Mlp(
        join(path, layout.mlp),
        weights["up"].shape[0],
        gate.path if gate else None,
        weights["up"].path,
        weights["down"].path,
        str(activation),
    )


# -- without a layout -----------------------------------------------------------------------------
def generic(model: nn.Module) -> Anatomy:
    """Any model: the longest list of same-class modules that hold linear layers gives the blocks
    (the outermost, then the first, of several); every weight is a step of its own, in
    registration order. Without such a list the whole model is one block at "" ."""
    reading = Reading.of(model)
    stack = _stack(reading)
    size = len(reading.model.get_submodule(stack)) if stack else 1  # type: ignore[arg-type]
    paths = [join(stack, str(i)) if stack else "" for i in range(size)]
    blocks = tuple(_generic_block(reading, path, i) for i, path in enumerate(paths))
    outside = _outside(reading, blocks)
    return Anatomy(
        family="generic",
        blocks=blocks,
        outside=outside,
        prefix=_prefix(model),
        embedding=_first(outside, "embedding"),
        head=_first(outside, "head"),
    )


def _stack(reading: Reading) -> str:
    best, length = "", 0
    lists: list[str] = []
    for path, module in reading.model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in lists)
        if inside or not isinstance(module, nn.ModuleList) or not _uniform(reading, path, module):
            continue
        lists.append(path)
        if len(module) > length:
            best, length = path, len(module)
    return best


def _uniform(reading: Reading, path: str, modules: nn.ModuleList) -> bool:
    """Are these same-class modules, with linear layers inside?"""
    linear = [p for p, m in reading.leaves.items() if operator(m) != "embedding"]
    first = join(path, "0") + "."
    return len({type(m) for m in modules}) == 1 and any(p.startswith(first) for p in linear)


def _generic_block(reading: Reading, path: str, index: int) -> Block:
    inside = reading.below(path)
    if not path:  # the whole model: tables stay outside, as they do elsewhere
        inside = [p for p in inside if operator(reading.leaves[p]) != "embedding"]
    steps = [(reading.weight(p, _generic_role(reading, p), index),) for p in inside]
    return Block(path, index, None, None, tuple(steps))


def _generic_role(reading: Reading, path: str) -> str:
    return "embedding" if operator(reading.leaves[path]) == "embedding" else "linear"


# -- outside the blocks ---------------------------------------------------------------------------
def _outside(reading: Reading, blocks: Sequence[Block]) -> tuple[Weight, ...]:
    inside = {weight.path for block in blocks for weight in block.weights}
    paths = [path for path in reading.leaves if path not in inside]
    head = next((path for path in HEADS if path in paths), None)
    return tuple(
        reading.weight(path, "head" if path == head else _generic_role(reading, path), -1)
        for path in paths
    )


def _first(weights: Sequence[Weight], role: str) -> str | None:
    return next((weight.path for weight in weights if weight.role == role), None)
