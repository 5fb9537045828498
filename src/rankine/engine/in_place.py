"""In place, or not at all: a module that was handed over is as it was where a verb fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankine.patch import Patch

#: Called with the patch that is about to be applied.
Hold = Callable[[Patch], None]


@contextmanager
def in_place(model: Any) -> Iterator[Hold]:
    """Undo inside's changes to `model`, if it is a module, when inside raises: modules, tensors,
    config. Values that a patch overwrites are kept from when `hold(patch)` is called."""
    if not isinstance(model, nn.Module):
        yield lambda patch: None
        return
    config = getattr(model, "config", None)
    owners = [*model.modules(), *([config] if hasattr(config, "__dict__") else [])]
    attributes = [(owner, _shallow(vars(owner))) for owner in owners]
    tensors = [*model.parameters(), *model.buffers()]
    data = [(tensor, tensor.data) for tensor in tensors]  # `to` and a cast replace it
    values: list[tuple[Tensor, Tensor]] = []

    def hold(patch: Patch) -> None:
        replaced = tuple(f"{path}." for path in patch.modules)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in patch.tensors and not name.startswith(replaced):
                values.append((tensor, tensor.detach().clone()))

    try:
        yield hold
    except BaseException:
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for tensor, old in data:
            tensor.data = old
        for owner, held in attributes:
            vars(owner).clear()
            vars(owner).update(held)
        raise


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """With containers of their own: a module's registries are dictionaries."""
    kinds = (dict, list, set)
    return {n: copy.copy(v) if isinstance(v, kinds) else v for n, v in attributes.items()}
