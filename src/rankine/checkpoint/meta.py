"""A checkpoint's architecture without its weights: what a plan needs."""

from __future__ import annotations

from typing import Any

import torch

from rankine.checkpoint.load import (
    EMBEDDED,
    ModelInfo,
    _dtype,
    _model_class,
    check_directory,
    local_directory,
    tokenizer_of,
)
from rankine.checkpoint.save import patch_of
from rankine.errors import UserError


def open_meta(spec: str, dtype: str | torch.dtype = "auto") -> tuple[Any, Any, ModelInfo]:
    """(model on meta, its tokenizer or None, where it came from); compressed ones too.

    No weight is read, so a model larger than memory is planned in seconds. Raises UserError as
    `load` does.
    """
    import transformers

    where = spec
    if spec == EMBEDDED:
        from rankine.tasks.embedded import embedded_model_dir

        where = str(embedded_model_dir())
    directory = local_directory(where)
    if directory is not None:
        check_directory(directory)
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory or where))
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"expected a transformers model at {spec}, found: {first}") from None
    cls = _model_class(transformers, config)
    with torch.device("meta"):
        model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    asked = _dtype(dtype)
    stored = asked if isinstance(asked, torch.dtype) else getattr(config, "dtype", None)
    model = model.to(stored or torch.float32).eval()
    patch = patch_of(model)
    patch.swap(model, getattr(model, "base_model_prefix", ""))
    return model, tokenizer_of(where), ModelInfo(spec, directory, patch)
