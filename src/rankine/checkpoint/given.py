"""Models of the user's own: a module, the factory that builds one, a directory and what it goes
into. Names (`package.module:factory`) come from the user alone, never from a checkpoint."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankine import own
from rankine.checkpoint.form import PATCH
from rankine.checkpoint.load import ModelInfo, load, open_model, read_plan
from rankine.checkpoint.save import is_pretrained, patch_of
from rankine.errors import UserError


def open_given(
    model: str | nn.Module,
    into: Any = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
) -> tuple[Any, Any, ModelInfo]:
    """(model in evaluation mode, its tokenizer or None, where it came from).

    `model` is a module, "package.module:factory", or what `open_model` takes. `into` (a module, or
    a factory by itself or by name) is the architecture that the directory of a plain module goes
    into. `dtype` is for transformers' models: others come as they are. Raises UserError.
    """
    if isinstance(model, nn.Module):
        info = ModelInfo(type(model).__name__, None, patch_of(model))
        return model.to(device).eval(), None, info
    if into is not None and not is_own(model):
        if not is_plain(model):
            raise UserError(
                f"expected the directory of a plain module for --into, found none at {model}: "
                f"name the one that holds {PATCH}, or leave --into away"
            )
        place = copy.deepcopy(into) if isinstance(into, nn.Module) else built(into, "into")
        loaded = load(model, into=place).to(device).eval()
        directory = Path(model).expanduser()
        return loaded, None, ModelInfo(model, directory, read_plan(directory))
    if is_own(model):
        made = built(model, "a model").to(device).eval()
        return made, None, ModelInfo(model, None, patch_of(made))
    return open_model(model, device, dtype)


def is_plain(model: Any) -> bool:
    """The directory of a plain module, which needs something to go into?"""
    return isinstance(model, str | Path) and (Path(model).expanduser() / PATCH).is_file()


def is_own(model: str) -> bool:
    """Does this name the user's own code (and no directory that happens to be called so)?"""
    return own.is_name(model) and not Path(model).exists()


def built(factory: Any, what: str) -> nn.Module:
    """The module that a factory (by itself or by name) builds, or the module itself."""
    found = own.find(factory, what)
    made = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(made, nn.Module):
        raise UserError(
            f"expected {what} to be a function that returns a torch module, found "
            f"{type(made).__name__}"
        )
    return made


def skeleton(model: nn.Module) -> nn.Module | None:
    """A copy of a plain module's architecture, its saved tensors on meta (but for shared ones,
    which stay shared): what a directory is loaded into to be checked. None for transformers'
    models, which load by themselves."""
    if is_pretrained(model):
        return None
    tensors = list(model.state_dict(keep_vars=True).values())
    times = Counter(map(id, tensors))
    empty: dict[int, Any] = {}
    for tensor in tensors:
        made = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        if times[id(tensor)] == 1:
            empty[id(tensor)] = made
    return copy.deepcopy(model, empty)
