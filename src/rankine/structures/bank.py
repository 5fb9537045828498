"""A bank: matrices of one shape stacked as (copies, outputs, inputs), as transformers 5 keeps the
experts of a layer. Rows of its input arrive sorted by the copy they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankine.structures.base import Structure, weight_shape


@dataclass(frozen=True)
class Routing:
    """Whose rows they are: the first `counts[0]` belong to copy 0, the next `counts[1]` to copy 1;
    row s came from token `tokens_s[s]` of `total`."""

    counts: Sequence[int]
    tokens_s: Tensor
    total: int


def grouped(x_si: Tensor, weight_eoi: Tensor, routing: Routing) -> Tensor:
    """(rows, inputs) → (rows, outputs), each row by the matrix of its copy."""
    groups = torch.split(x_si, list(routing.counts))
    # Of many experts few see a token: the others' matrices are not even looked at.
    parts = [F.linear(x, weight_eoi[e]) for e, x in enumerate(groups) if len(x)]
    return torch.cat(parts) if parts else x_si.new_zeros(0, weight_eoi.shape[-2])


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

    def forward(self, x_si: Tensor, routing: Routing) -> Tensor:
        """(rows, inputs) → (rows, outputs)."""
        return grouped(x_si, self.weight, routing)

    def extra_repr(self) -> str:
        """Sizes for print(model)."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"copies={self.copies}, {sizes}"


class LowRankBank(nn.Module):
    """y = B_e A_e x: the two factors are banks themselves."""

    def __init__(
        self, structure: Structure, rank: int, copies: int, i: int, o: int, dtype: torch.dtype
    ):
        super().__init__()
        self.structure = structure
        self.copies, self.out_features, self.in_features = copies, o, i
        self.down = Bank.on_meta(copies, i, rank, dtype)
        self.up = Bank.on_meta(copies, rank, o, dtype)

    def forward(self, x_si: Tensor, routing: Routing) -> Tensor:
        """(rows, inputs) → (rows, outputs)."""
        return self.up(self.down(x_si, routing), routing)

    @property
    def weight(self) -> Tensor:
        """The dense (copies, outputs, inputs) weights, rebuilt at each access."""
        parts = {"down.weight": self.down.weight, "up.weight": self.up.weight}
        return self.structure.decode(parts)


def copies(module: nn.Module) -> int | None:
    """How many matrices a bank stacks, factored or not; None for a module that is no bank."""
    found = getattr(module, "copies", None)
    return found if isinstance(found, int) else None


def full_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of what a module stands for: (outputs, inputs), with its copies before them."""
    count = copies(module)
    return weight_shape(module) if count is None else (count, *weight_shape(module))
