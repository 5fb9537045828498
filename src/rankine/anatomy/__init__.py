"""What a model is made of, per architecture family; by path, so compressed models read alike."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import nn

from rankine.anatomy.generic import generic
from rankine.anatomy.layouts import FAMILIES, Layout
from rankine.anatomy.parts import Anatomy, Attention, Block, Mlp, Norm, Target, Weight
from rankine.anatomy.targets import weight_targets
from rankine.anatomy.units import Units, ffn_units, hidden_units, kv_groups
from rankine.anatomy.walk import LayoutError, family

__all__ = [
    "Anatomy",
    "Attention",
    "Block",
    "Layout",
    "Mlp",
    "Norm",
    "Target",
    "Units",
    "Weight",
    "describe",
    "ffn_units",
    "generic",
    "hidden_units",
    "kv_groups",
    "register",
    "weight_targets",
]

Describe = Callable[[nn.Module], Anatomy]
#: A model's one stack of blocks, or its stacks in the order they run (an encoder, its decoder).
Layouts = Layout | tuple[Layout, ...]

_log = logging.getLogger(__name__)
_registered: dict[type[nn.Module] | str, Describe | Layouts] = {}


def register(key: type[nn.Module] | str, description: Describe | Layouts) -> None:
    """Describe your own architecture: a module class (its subclasses too) or a
    `config.model_type`, and a function model → Anatomy, or a `Layout` (a tuple of them where an
    encoder has a decoder). The latest one wins, also over a built-in family (docs/anatomy.md)."""
    _registered[key] = description


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of a model, dense or compressed, on any device, meta included.

    A registered class comes first, then a registered model type, then the built-in families. An
    unknown model, or one that does not follow its family's layout (with a logged warning), gets
    the generic walk.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", "") or "")
    description = _description(model, model_type)
    if description is None:
        return generic(model)
    if isinstance(description, Layout):
        description = (description,)
    if not isinstance(description, tuple):
        return description(model)
    try:
        return family(model, description, model_type or type(model).__name__)
    except LayoutError as mismatch:
        _log.warning(
            "expected the layout of %s, found %s: reading it as an unknown model (register it to "
            "describe its attention)",
            model_type or type(model).__name__,
            mismatch,
        )
        return generic(model)


def _description(model: nn.Module, model_type: str) -> Describe | Layouts | None:
    for cls in type(model).__mro__:
        if cls in _registered:
            return _registered[cls]
    return _registered.get(model_type) or FAMILIES.get(model_type)
