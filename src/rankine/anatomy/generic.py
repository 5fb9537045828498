"""Reading a model that nobody described."""

from __future__ import annotations

from torch import nn

from rankine.anatomy.parts import Anatomy, Block
from rankine.anatomy.reading import Reading, join, operator
from rankine.anatomy.walk import base_prefix, first, outside_of, plain_role


def generic(model: nn.Module) -> Anatomy:
    """Any model: the longest list of same-class modules that hold linear layers gives the blocks
    (the outermost, then the first, of several); every weight is a step of its own, in
    registration order. Without such a list the whole model is one block at "" ."""
    reading = Reading.of(model)
    stack = _stack(reading)
    size = len(reading.model.get_submodule(stack)) if stack else 1  # type: ignore[arg-type]
    paths = [join(stack, str(i)) if stack else "" for i in range(size)]
    blocks = tuple(_block(reading, path, i) for i, path in enumerate(paths))
    outside = outside_of(reading, blocks)
    return Anatomy(
        family="generic",
        blocks=blocks,
        outside=outside,
        prefix=base_prefix(model),
        embedding=first(outside, "embedding"),
        head=first(outside, "head"),
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
    start = join(path, "0") + "."
    return len({type(m) for m in modules}) == 1 and any(p.startswith(start) for p in linear)


def _block(reading: Reading, path: str, index: int) -> Block:
    inside = reading.below(path)
    if not path:  # the whole model: tables stay outside, as they do elsewhere
        inside = [p for p in inside if operator(reading.leaves[p]) != "embedding"]
    steps = [(reading.weight(p, plain_role(reading, p), index),) for p in inside]
    return Block(path, index, None, None, tuple(steps))
