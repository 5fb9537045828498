"""Square roots of moments, and the one fallback for singular ones.

Legend of tensor suffixes in this room: o outputs, i inputs, r rank, n the smaller side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Eigenvalues of a moment below FLOOR x their mean are raised to it. This is the only treatment
#: of singular moments in Rankine: every root is invertible, the data's own directions keep ten
#: digits, and directions without data weigh (almost) nothing but are never lost.
FLOOR = 1e-10


def symmetric(h: Tensor) -> Tensor:
    """(H + Hᵀ)/2 in float64: what `eigh` wants, whatever rounding the accumulation left."""
    h = h.double()
    return (h + h.mT).mul_(0.5)


@dataclass(frozen=True)
class Root:
    """S = Q·diag(s) with S Sᵀ = H, kept as its eigenvectors `q_nn` and square roots `s_n`;
    `data_n`: which of them the data really took (the others were raised to the floor)."""

    q_nn: Tensor
    s_n: Tensor
    data_n: Tensor

    @classmethod
    def of(cls, h_nn: Tensor) -> Root:
        """Root of a symmetric positive semi-definite (..., n, n) moment, computed in float64."""
        values, vectors = torch.linalg.eigh(symmetric(h_nn))
        mean = values.clamp_min(0).mean(-1, keepdim=True)
        floor = torch.where(mean > 0, FLOOR * mean, torch.ones_like(mean))
        return cls(vectors, torch.maximum(values, floor).sqrt(), values > floor)

    def right(self, t: Tensor) -> Tensor:
        """T S, for a (..., m, n) matrix whose columns live in the space of H."""
        return (t.double() @ self.q_nn) * self.s_n.unsqueeze(-2)

    def times(self, t: Tensor) -> Tensor:
        """S T, for a (..., n, m) matrix."""
        return self.q_nn @ (self.s_n.unsqueeze(-1) * t.double())

    def right_inverse(self, t: Tensor) -> Tensor:
        """T S⁻¹."""
        return (t.double() / self.s_n.unsqueeze(-2)) @ self.q_nn.mT

    def right_on_data(self, t: Tensor) -> Tensor:
        """T S with zero columns where the data never went."""
        return self.right(t) * self.data_n.unsqueeze(-2)

    def right_pseudo_inverse(self, t: Tensor) -> Tensor:
        """T S⁺: no component where the data never went."""
        return self.right_inverse(t * self.data_n.unsqueeze(-2))

    def left(self, t: Tensor) -> Tensor:
        """Sᵀ T, for a (..., n, m) matrix: the P of an output metric PᵀP = H."""
        return self.s_n.unsqueeze(-1) * (self.q_nn.mT @ t.double())

    def left_inverse(self, t: Tensor) -> Tensor:
        """(Sᵀ)⁻¹ T."""
        return self.q_nn @ (t.double() / self.s_n.unsqueeze(-1))
