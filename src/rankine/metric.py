"""The norm an error is measured in: ‖P (W − Ŵ) S‖_F. Services, no solver.

S Sᵀ is the second moment (or covariance) of the layer's inputs, Pᵀ P that of its output
gradients. Identity, diagonal, whitening, Fisher and two-sided (KFAC) are instances. With an
output side in units of the loss, half the squared norm predicts the increase of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from rankine.linalg.roots import FLOOR, Root


@dataclass(frozen=True)
class Gram:
    """A positive semi-definite (n, n) form: dense, diagonal, or diagonal plus u uᵀ. Leading
    batch dimensions (experts, heads) pass through."""

    dense_nn: Tensor | None = None
    diagonal_n: Tensor | None = None
    rank_one_n: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.dense_nn is None) == (self.diagonal_n is None):
            raise ValueError("a Gram is dense_nn or diagonal_n (plus an optional rank_one_n)")

    @cached_property
    def _root(self) -> Root:
        return Root.of(self.dense())

    @property
    def _plain(self) -> bool:
        return self.diagonal_n is not None and self.rank_one_n is None

    @cached_property
    def _floor(self) -> Tensor:
        """The diagonal meets the same floor as an eigenvalue."""
        assert self.diagonal_n is not None
        mean = self.diagonal_n.double().mean(-1, keepdim=True)
        return torch.where(mean > 0, FLOOR * mean, torch.ones_like(mean))

    @cached_property
    def _scale_n(self) -> Tensor:
        return torch.maximum(self.diagonal(), self._floor).sqrt()

    @cached_property
    def _data_n(self) -> Tensor:
        return self.diagonal() > self._floor

    def dense(self) -> Tensor:
        """The form as a float64 (..., n, n) matrix."""
        if self.dense_nn is not None:
            return self.dense_nn.double()
        assert self.diagonal_n is not None
        h = torch.diag_embed(self.diagonal_n.double())
        if self.rank_one_n is not None:
            u = self.rank_one_n.double()
            h = h + u.unsqueeze(-1) * u.unsqueeze(-2)
        return h

    def diagonal(self) -> Tensor:
        """(..., n) float64 diagonal."""
        if self._plain:
            assert self.diagonal_n is not None
            return self.diagonal_n.double()
        return self.dense().diagonal(dim1=-2, dim2=-1)

    def shrink(self, amount: float) -> Gram:
        """(1 − a) H + a · mean(diag H) · I: Ledoit-Wolf's target, as KFAC-SVD uses it."""
        h = self.dense()
        n = h.shape[-1]
        mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye = torch.eye(n, dtype=h.dtype, device=h.device)
        return Gram((1 - amount) * h + amount * mean[..., None, None] * eye)

    def right(self, t: Tensor) -> Tensor:
        """T S."""
        return t.double() * self._scale_n.unsqueeze(-2) if self._plain else self._root.right(t)

    def right_inverse(self, t: Tensor) -> Tensor:
        """T S⁻¹."""
        if self._plain:
            return t.double() / self._scale_n.unsqueeze(-2)
        return self._root.right_inverse(t)

    def right_on_data(self, t: Tensor) -> Tensor:
        """T S with zero columns where the data never went."""
        return (
            self.right(t) * self._data_n.unsqueeze(-2)
            if self._plain
            else self._root.right_on_data(t)
        )

    def right_pseudo_inverse(self, t: Tensor) -> Tensor:
        """T S⁺: no component where the data never went."""
        if self._plain:
            return self.right_inverse(t) * self._data_n.unsqueeze(-2)
        return self._root.right_pseudo_inverse(t)

    def left(self, t: Tensor) -> Tensor:
        """P T with P = Sᵀ."""
        return t.double() * self._scale_n.unsqueeze(-1) if self._plain else self._root.left(t)

    def left_inverse(self, t: Tensor) -> Tensor:
        """P⁻¹ T."""
        if self._plain:
            return t.double() / self._scale_n.unsqueeze(-1)
        return self._root.left_inverse(t)


@dataclass(frozen=True)
class Metric:
    """Services on an (o, i) goal: both sides optional, `mean_i` set when the input side is a
    covariance (centred): the fit then owes the layer the bias `implied_bias` returns.

    `off_data` says what a solver does with directions the inputs never took: "keep" (a weight:
    full rank recovers it) or "zero" (a residual: no component in the null space).
    """

    inputs: Gram | None = None
    outputs: Gram | None = None
    mean_i: Tensor | None = None
    off_data: str = "keep"
    scale: float = field(default=1.0)

    def whiten(self, t_oi: Tensor) -> Tensor:
        """P T S, float64."""
        t = self.left(t_oi)
        return self.inputs.right(t) if self.inputs is not None else t

    def unwhiten(self, m_oi: Tensor) -> Tensor:
        """P⁻¹ M S⁻¹, float64."""
        m = self.left_inverse(m_oi)
        return self.inputs.right_inverse(m) if self.inputs is not None else m

    def left(self, t_oi: Tensor) -> Tensor:
        """P T, float64."""
        return self.outputs.left(t_oi) if self.outputs is not None else t_oi.double()

    def left_inverse(self, t_oi: Tensor) -> Tensor:
        """P⁻¹ T, float64."""
        return self.outputs.left_inverse(t_oi) if self.outputs is not None else t_oi.double()

    @property
    def gram_in(self) -> Gram | None:
        """S Sᵀ, or None for the identity."""
        return self.inputs

    @property
    def gram_out(self) -> Gram | None:
        """Pᵀ P, or None for the identity."""
        return self.outputs

    def diagonal(self) -> Tensor | None:
        """(i,) diagonal of S Sᵀ: what a diagonal method sees of this metric."""
        return self.inputs.diagonal() if self.inputs is not None else None

    def loss(self, goal_oi: Tensor, approx_oi: Tensor) -> Tensor:
        """scale · ‖P (goal − approx) S‖²_F as a float64 scalar (per leading dimension)."""
        error = self.whiten(goal_oi.double() - approx_oi.double())
        return self.scale * error.square().sum((-2, -1))

    def implied_bias(self, goal_oi: Tensor, approx_oi: Tensor) -> Tensor | None:
        """(W − Ŵ) μ: what a centred fit adds to the layer's bias (LoRD 2309.14021 step 3)."""
        if self.mean_i is None:
            return None
        return (goal_oi.double() - approx_oi.double()) @ self.mean_i.double()
