"""A bank: matrices of one shape stacked as (copies, outputs, inputs), as transformers 5 keeps the
experts of a layer. Rows of its input arrive sorted by the copy they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bank(nn.Module):
    """y = x W_eᵀ for each row of x, with e the row's copy."""

    def __init__(self, weight_eoi: nn.Parameter):
        super().__init__()
        self.copies, self.out_features, self.in_features = weight_eoi.shape
        self.weight = weight_eoi

    @classmethod
    def on_meta(cls, copies: int, i: int, o: int, dtype: torch.dtype) -> Bank:
        """One without storage: the loader gives it some."""
        return cls(nn.Parameter(torch.empty(copies, o, i, device="meta", dtype=dtype)))

    def forward(self, x_si: Tensor, counts: Sequence[int]) -> Tensor:
        """(rows, inputs) → (rows, outputs); the first `counts[0]` rows belong to copy 0, ..."""
        groups = torch.split(x_si, list(counts))
        return torch.cat([F.linear(x, w) for x, w in zip(groups, self.weight, strict=True)])

    def extra_repr(self) -> str:
        """Sizes for print(model)."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"copies={self.copies}, {sizes}"


def copies(module: nn.Module) -> int | None:
    """How many matrices a bank stacks, factored or not; None for a module that is no bank."""
    found = getattr(module, "copies", None)
    return found if isinstance(found, int) else None
