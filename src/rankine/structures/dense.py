"""A plain weight: untouched, or of another width (what pruning and Nyström emit)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rankine.budget import Option
from rankine.errors import UserError
from rankine.metric import Metric
from rankine.structures.bank import Bank, copies
from rankine.structures.base import (
    Parts,
    Structure,
    dtype_of,
    has_bias,
    meta_embedding,
    meta_linear,
    weight_shape,
)


@dataclass(frozen=True)
class Dense(Structure):
    """The dense weight. `shape` (outputs, inputs) when it differs from what stood there; `view`
    "table" for an embedding, whose weight is stored as (inputs, outputs)."""

    kind: ClassVar[str] = "dense"
    trainable: ClassVar[tuple[str, ...]] = ("weight",)
    shape: tuple[int, int] | None = None
    view: str = "channel"

    def __post_init__(self) -> None:
        if self.view not in ("channel", "table"):
            raise UserError(f'expected view "channel" or "table", found {self.view!r}')
        if self.shape is not None and not _is_shape(self.shape):
            raise UserError(f"expected shape as (outputs, inputs), found {self.shape!r:.60}")

    def encode(self, w: Tensor, metric: Metric, start: Parts | None = None) -> Parts:
        """The weight itself."""
        if self.shape is not None and tuple(w.shape[-2:]) != self.shape:
            raise ValueError(f"expected a weight of shape {self.shape}, found {tuple(w.shape)}")
        return {"weight": w.mT if self.view == "table" else w}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight itself."""
        return parts["weight"].mT if self.view == "table" else parts["weight"]

    def bits(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """numel × bits of the dtype."""
        o, i = self.shape or tuple(shape[-2:])
        return math.prod(shape[:-2]) * o * i * dtype.itemsize * 8

    def curve(self, w: Tensor, metric: Metric, dtype: torch.dtype | None = None) -> list[Option]:
        """One point, without loss."""
        return [Option(self, self.bits(w.shape, dtype or w.dtype), 0.0)]

    def module(self, like: nn.Module) -> nn.Module:
        """A plain linear layer, embedding or bank."""
        o, i = self.shape or weight_shape(like)
        if (count := copies(like)) is not None:
            return Bank.on_meta(count, i, o, dtype_of(like))
        if self.view == "table":
            padding = getattr(like, "padding_idx", None)
            return meta_embedding(i, o, padding, dtype_of(like))
        return meta_linear(i, o, has_bias(like), dtype_of(like))


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, tuple) or len(shape) != 2:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape)
