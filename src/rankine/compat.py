"""Every private name of transformers, peft and torch that we touch; nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def declare_tied(model: Any, tied: Mapping[str, str]) -> None:
    """Tell transformers (5.16 to 5.23) that target parameters share their source's storage.

    `_tied_weights_keys` alone is ignored when `tie_word_embeddings` is False, and the tensors
    would load unshared and newly initialised; `all_tied_weights_keys` is what loading reads.
    """
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):
        if hasattr(model, name):
            old = getattr(model, name) or {}
            setattr(model, name, {**dict(old), **tied})
