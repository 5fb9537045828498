"""Second moments as forms: what both sides of a metric are made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rankine.linalg.roots import FLOOR, Root


@dataclass(frozen=True)
class Gram:
    """A positive semi-definite (n, n) form H: dense, diagonal, or diagonal plus (`sign` −1: minus)
    u uᵀ. Leading batch dimensions (experts, heads) pass through.

    A dense form may be known on a subspace only: with `basis_nk` (orthonormal columns Q) dense_nn
    is the (k, k) matrix QᵀHQ and the form Q·dense·Qᵀ + `rest_1` (I − QQᵀ), `rest_1` being the mean
    of the trace that is left. It is exact for matrices whose rows lie in the subspace. It may
    also stand for `gain` times that, plus `ridge_1` · I, without a copy: what `shrink` returns.
    """

    dense_nn: Tensor | None = None
    diagonal_n: Tensor | None = None
    rank_one_n: Tensor | None = None
    sign: float = 1.0
    gain: float = 1.0
    ridge_1: Tensor | None = None
    basis_nk: Tensor | None = None
    rest_1: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.dense_nn is None) == (self.diagonal_n is None):
            raise ValueError("a Gram is dense_nn or diagonal_n (plus an optional rank_one_n)")

    # -- the form itself ------------------------------------------------------------------------
    def dense(self) -> Tensor:
        """The form as a float64 (..., n, n) matrix."""
        if self.dense_nn is not None:
            h = self.dense_nn.double()
            if self.basis_nk is not None:
                q = self.basis_nk.double()
                h = q @ h @ q.mT - self._rest * (q @ q.mT)
                h.diagonal().add_(self._rest)
            if self.ridge_1 is None:
                return h
            h = self.gain * h
            h.diagonal(dim1=-2, dim2=-1).add_(self.ridge_1)
            return h
        assert self.diagonal_n is not None
        h = torch.diag_embed(self.diagonal_n.double())
        if self.rank_one_n is not None:
            u = self.rank_one_n.double()
            h = h + self.sign * u.unsqueeze(-1) * u.unsqueeze(-2)
        return h

    def diagonal(self) -> Tensor:
        """(..., n) float64 diagonal."""
        if self.dense_nn is not None:
            d = self.dense_nn.diagonal(dim1=-2, dim2=-1).double()
            if self.basis_nk is not None:
                q = self.basis_nk.double()
                d = ((q @ self.dense_nn.double() - self._rest * q) * q).sum(-1) + self._rest
            return self.gain * d if self.ridge_1 is None else self.gain * d + self.ridge_1
        assert self.diagonal_n is not None
        d = self.diagonal_n.double()
        return d if self.rank_one_n is None else d + self.sign * self.rank_one_n.double().square()

    def mean_diagonal(self) -> Tensor:
        """(..., 1) float64 mean of the diagonal."""
        if self.dense_nn is None or self.basis_nk is None:
            return self.diagonal().mean(-1, keepdim=True)
        n, k = self.basis_nk.shape
        trace = self.dense_nn.diagonal().double().sum(-1, keepdim=True) + (n - k) * self._rest
        return self.gain * trace / n + (0.0 if self.ridge_1 is None else self.ridge_1)

    def shrink(self, amount: float) -> Gram:
        """(1 − a) H + a · mean(diag H) · I: Ledoit-Wolf's target, as KFAC-SVD uses it."""
        dense = self if self.dense_nn is not None else Gram(self.dense())
        ridge = amount * dense.mean_diagonal()
        if dense.ridge_1 is not None:
            ridge = ridge + (1 - amount) * dense.ridge_1
        return dataclasses.replace(dense, gain=(1 - amount) * dense.gain, ridge_1=ridge)

    def times(self, t: Tensor) -> Tensor:
        """T H for a (..., m, n) matrix, float64; no root, no copy of H. Directions without data
        weigh the floor of `roots`, as under every root."""
        t = t.double()
        if self._plain:
            return t * self._scale_n.square().unsqueeze(-2)
        if self.dense_nn is not None:
            known, around = self._inside(t), self._around
            th = known @ self.dense_nn.double()
            if self.basis_nk is not None:
                th = (th - self._rest * known) @ self.basis_nk.double().mT
            return th.mul_(self.gain).add_(t * around.unsqueeze(-2))
        assert self.diagonal_n is not None
        assert self.rank_one_n is not None
        u = self.rank_one_n.double()
        along = self.sign * (t @ u.unsqueeze(-1))
        return t * (self.diagonal_n.double() + self._floor).unsqueeze(-2) + along * u.unsqueeze(-2)

    def congruence(self, t: Tensor) -> Tensor:
        """T H Tᵀ for a (..., m, n) matrix: (..., m, m), float64."""
        t = t.double()
        if self.dense_nn is None or self.basis_nk is None:
            return self.times(t) @ t.mT
        known = self._inside(t)
        inside = (known @ self.dense_nn.double() - self._rest * known) @ known.mT
        return inside.mul_(self.gain).add_(self._around * (t @ t.mT))

    def _inside(self, t: Tensor) -> Tensor:
        return t if self.basis_nk is None else t @ self.basis_nk.double()

    @property
    def _rest(self) -> Tensor:
        """(1,) what a direction outside the basis weighs, before `gain` and `ridge_1`."""
        assert self.rest_1 is not None
        return self.rest_1

    @property
    def _around(self) -> Tensor:
        """(..., 1) what every direction weighs beside dense_nn."""
        around = self._floor if self.ridge_1 is None else self._floor + self.ridge_1
        return around if self.basis_nk is None else around + self.gain * self._rest

    # -- its root: H = S Sᵀ ---------------------------------------------------------------------
    @cached_property
    def _root(self) -> Root:
        return Root.of(self.dense())

    @property
    def _plain(self) -> bool:
        return self.diagonal_n is not None and self.rank_one_n is None

    @cached_property
    def _floor(self) -> Tensor:
        """(..., 1) what a direction without data weighs: the same as an eigenvalue of a root."""
        mean = self.mean_diagonal()
        return torch.where(mean > 0, FLOOR * mean, torch.ones_like(mean))

    @cached_property
    def _scale_n(self) -> Tensor:
        return torch.maximum(self.diagonal(), self._floor).sqrt()

    @cached_property
    def _data_n(self) -> Tensor:
        return self.diagonal() > self._floor

    def right(self, t: Tensor) -> Tensor:
        """T S."""
        return t.double() * self._scale_n.unsqueeze(-2) if self._plain else self._root.right(t)

    def times_root(self, t: Tensor) -> Tensor:
        """S T."""
        return t.double() * self._scale_n.unsqueeze(-1) if self._plain else self._root.times(t)

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
