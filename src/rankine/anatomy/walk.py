"""Reading a model's blocks by its family's layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankine.anatomy import records
from rankine.anatomy.layouts import HEADS, Layout
from rankine.anatomy.parts import Anatomy, Block, Weight
from rankine.anatomy.reading import Reading, join, operator


class LayoutError(Exception):
    """A model that does not keep its parts where its family does."""


def family(model: nn.Module, layouts: Sequence[Layout], name: str) -> Anatomy:
    """The anatomy by the layouts of a family's stacks, those that are there; raises LayoutError
    where the model does not follow them."""
    reading = Reading.of(model)
    prefix = base_prefix(model)
    base = prefix if prefix and reading.module(prefix) is not None else ""
    blocks = tuple(_blocks(reading, layouts, base))
    outside = outside_of(reading, blocks)

    def place(path: str | None) -> str | None:
        whole = join(base, path) if path else ""
        return whole if whole and reading.module(whole) is not None else None

    return Anatomy(
        family=name,
        blocks=blocks,
        outside=outside,
        prefix=prefix,
        embedding=place(layouts[0].embedding),
        head=first(outside, "head"),
        norm=place(layouts[-1].norm),
        softcap=getattr(model.config, "final_logit_softcapping", None),
    )


def base_prefix(model: nn.Module) -> str:
    """Where a head's class keeps its base model; "" for any other module."""
    return str(getattr(model, "base_model_prefix", "") or "")


# -- blocks ---------------------------------------------------------------------------------------
def _blocks(reading: Reading, layouts: Sequence[Layout], base: str) -> Iterator[Block]:
    index = 0
    for number, layout in enumerate(layouts):
        stack = join(base, layout.blocks)
        modules = reading.module(stack)
        if not isinstance(modules, nn.ModuleList):
            continue
        for depth in range(len(modules)):
            place = Place(join(stack, str(depth)), index, depth, number)
            yield _block(reading, layout, place)
            index += 1
    if index == 0:
        raise LayoutError(f'no list of blocks at "{join(base, layouts[0].blocks)}"')


@dataclass(frozen=True)
class Place:
    """Where a block stands: its path, its index among all blocks and in its own stack, and the
    number of that stack."""

    path: str
    index: int
    depth: int
    stack: int


def _block(reading: Reading, layout: Layout, place: Place) -> Block:
    """The block by its layout, or by what the layout says of those that do not follow it."""
    try:
        return _block_by(reading, layout, place)
    except LayoutError:
        if layout.otherwise is None:
            raise
        return _block(reading, layout.otherwise, place)


def _block_by(reading: Reading, layout: Layout, place: Place) -> Block:
    path = place.path
    found = (_step(reading, layout, place, step) for step in layout.steps)
    steps = tuple(step for step in found if step)
    weights = {weight.role: weight for step in steps for weight in step}
    known = {weight.path for weight in weights.values()}
    for stranger in reading.below(path):  # T5's first block holds a table of position biases
        if stranger not in known and operator(reading.leaves[stranger]) != "embedding":
            raise LayoutError(f'an unexpected weight at "{stranger}"')
    cross = None
    if layout.cross is not None:
        at = join(path, layout.cross)
        cross = records.attention(reading, layout, at, weights, place.depth, "cross_")
    at = join(path, layout.attention)
    act = records.activation(reading.model.config)
    block: Any = reading.model.get_submodule(path)
    return Block(
        path,
        place.index,
        records.attention(reading, layout, at, weights, place.depth),
        records.mlp(weights, act, join(path, layout.mlp)),
        steps,
        cross=cross,
        shared=records.mlp(weights, act, prefix="shared_"),
        norms=records.norms(reading, layout, path),
        parallel=getattr(block, "use_parallel_residual", layout.parallel),
        stack=place.stack,
    )


def _step(
    reading: Reading, layout: Layout, place: Place, step: Mapping[str, str]
) -> tuple[Weight, ...]:
    """The weights of one step; those inside a structured module (a latent attention) are gone."""
    places = {role: join(place.path, below) for role, below in step.items()}
    visible = {role: at for role, at in places.items() if not reading.hidden(at)}
    for at in visible.values():
        if at not in reading.leaves:
            raise LayoutError(f'no linear layer at "{at}"')
    module = reading.module(join(place.path, layout.attention))
    config = reading.model.config
    return tuple(
        reading.weight(
            at,
            role,
            place.index,
            reads=next(iter(visible.values())),
            rows=records.fused_rows(role, reading.outputs(at), layout, module, config),
        )
        for role, at in visible.items()
    )


# -- outside the blocks ---------------------------------------------------------------------------
def outside_of(reading: Reading, blocks: Sequence[Block]) -> tuple[Weight, ...]:
    """The weights that no block holds, in registration order."""
    inside = {weight.path for block in blocks for weight in block.weights}
    paths = [path for path in reading.leaves if path not in inside]
    head = next((path for path in HEADS if path in paths), None)
    return tuple(
        reading.weight(path, "head" if path == head else plain_role(reading, path), -1)
        for path in paths
    )


def plain_role(reading: Reading, path: str) -> str:
    """embedding | linear."""
    return "embedding" if operator(reading.leaves[path]) == "embedding" else "linear"


def first(weights: Sequence[Weight], role: str) -> str | None:
    """Path of the first weight of a role."""
    return next((weight.path for weight in weights if weight.role == role), None)
