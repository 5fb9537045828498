"""A checkpoint's architecture without its weights: what a plan needs, and who streams them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rankine.anatomy import describe
from rankine.checkpoint.hub import described
from rankine.checkpoint.load import (
    ModelInfo,
    _dtype,
    architecture,
    check_directory,
    directory_here,
    read_plan,
    tokenizer_of,
)
from rankine.checkpoint.save import patch_of
from rankine.checkpoint.streamed import Streamed, places_of
from rankine.patch import Patch


def open_meta(spec: str, dtype: str | torch.dtype = "auto") -> tuple[Any, Any, ModelInfo]:
    """(model on meta, its tokenizer or None, where it came from); compressed ones too.

    No weight is read, so a model larger than memory is planned in seconds. Raises UserError as
    `load` does.
    """
    from accelerate import init_empty_weights

    from rankine.checkpoint.hf import tied_in

    directory = directory_here(spec)
    if directory is not None:
        check_directory(directory)
    place = str(directory or described(spec))  # a plan downloads no weights
    cls, config = architecture(place, directory)
    with init_empty_weights(include_buffers=False):  # rotary tables are computed, not saved
        model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # registering each parameter on meta has parted them
    asked = _dtype(dtype)
    stored = asked if isinstance(asked, torch.dtype) else getattr(config, "dtype", None)
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():  # what is saved; `Module.to` would round the tables too
            tensor.data = tensor.data.to(stored or torch.float32)
    model.eval()
    patch = read_plan(directory) if directory is not None else patch_of(model)
    prefix = getattr(model, "base_model_prefix", "")
    patch.swap(model, prefix)
    Patch(tied=tied_in(model, patch, prefix)).tie(model)
    return model, tokenizer_of(place), ModelInfo(spec, directory, patch)


def open_streamed(
    directory: Path, stored: str | torch.dtype = "auto", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, ModelInfo, Streamed] | None:
    """(skeleton, tokenizer, where it came from, its weights) of a transformers checkpoint;
    `stored` as for `open_model`, `dtype` that of computation. None where its files name tensors
    otherwise than the model does: transformers then has to load them."""
    model, tokenizer, info = open_meta(str(directory), stored)
    places = places_of(model, directory)
    if places is None:
        return None
    model.requires_grad_(False)
    blocks = [block.path for block in describe(model).blocks if block.path]
    return model, tokenizer, info, Streamed(model, places, dtype, blocks)
