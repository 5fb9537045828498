"""A sum of structures: quantized + low-rank, sparse + low-rank, ... Each term takes the residual
of those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankine.errors import UserError
from rankine.metric import Metric
from rankine.structures.base import (
    Parts,
    Structure,
    dtype_of,
    from_json,
    has_bias,
    weight_shape,
)

MOST_TERMS = 16
#: Attributes of the module that no term may take.
OWN = frozenset(("structure", "weight", "bias", "in_features", "out_features", "training"))


@dataclass(frozen=True, init=False)
class Sum(Structure):
    """`Sum(base=Quantized(3), low_rank=LowRank(16))`: named terms, each a child module."""

    kind: ClassVar[str] = "sum"

    terms: tuple[tuple[str, Structure], ...]

    def __init__(self, **terms: Structure):
        plain = all(isinstance(term, Structure) for term in terms.values())
        if not 2 <= len(terms) <= MOST_TERMS or not plain:
            raise UserError(
                f"expected two to {MOST_TERMS} named structures to add, found {terms!r:.200}"
            )
        for name in terms:  # each becomes an attribute of the module
            if not name.isidentifier() or name in OWN or hasattr(nn.Module, name):
                raise UserError(f"expected plain names of the terms of a sum, found {name!r:.40}")
        if not all(t.mergeable for t in terms.values()):
            raise UserError("a sum adds weights: no term may have a function inside")
        object.__setattr__(self, "terms", tuple(terms.items()))

    @property
    def trainable(self) -> tuple[str, ...]:  # type: ignore[override]
        """The low-rank and other trainable parts of each term."""
        return tuple(f"{name}.{part}" for name, term in self.terms for part in term.trainable)

    def encode(self, w: Tensor, metric: Metric, start: Parts | None = None) -> Parts:
        """Greedy: the first term fits the goal, each later one what is left of it."""
        parts: Parts = {}
        rest = w
        for name, term in self.terms:
            fitted = term.encode(rest, metric)
            rest = rest - term.decode(fitted).to(rest.dtype)
            parts.update({f"{name}.{k}": v for k, v in fitted.items()})
        return parts

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The sum of the decoded terms."""
        decoded = [term.decode(_below(parts, name)) for name, term in self.terms]
        return torch.stack(decoded).sum(0) if len(decoded) > 2 else decoded[0] + decoded[1]

    def bits(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """The sum of the terms' bits."""
        return sum(term.bits(shape, dtype) for _, term in self.terms)

    def module(self, like: nn.Module) -> nn.Module:
        """`SumLinear`: one child per term."""
        return SumLinear(self, like)

    def to_json(self) -> dict[str, Any]:
        """Terms nested under their names."""
        return {"kind": self.kind, "terms": {name: t.to_json() for name, t in self.terms}}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Structure:
        if set(fields) != {"terms"} or not isinstance(fields["terms"], Mapping):
            raise UserError(f'expected a sum with "terms", found {fields!r:.80}')
        return cls(**{name: from_json(term) for name, term in fields["terms"].items()})


def _below(parts: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = name + "."
    return {k[len(prefix) :]: v for k, v in parts.items() if k.startswith(prefix)}


class SumLinear(nn.Module):
    """y = Σ terms(x) + bias."""

    def __init__(self, structure: Sum, like: nn.Module):
        super().__init__()
        self.structure = structure
        self.out_features, self.in_features = weight_shape(like)
        dtype = dtype_of(like)
        bare = nn.Linear(self.in_features, self.out_features, False, device="meta", dtype=dtype)
        for name, term in structure.terms:
            self.add_module(name, term.module(bare))
        bias = torch.empty(self.out_features, dtype=dtype, device="meta")
        self.bias = nn.Parameter(bias) if has_bias(like) else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) → (..., outputs)."""
        children = [getattr(self, name) for name, _ in self.structure.terms]
        y = children[0](x)
        for child in children[1:]:
            y = y + child(x)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        """The dense weight, rebuilt at each access."""
        children = [getattr(self, name) for name, _ in self.structure.terms]
        return sum((c.weight for c in children[1:]), start=children[0].weight)
