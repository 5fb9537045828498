"""The one weighted low-rank solver: minimise ‖P (T − B A) S‖_F over rank r.

It works on the smaller Gram matrix of M = P T S and takes the output-side form B = P⁻¹U_r,
A = U_rᵀ P T. No inverse of S appears, so directions without data are not lost: at full rank
B A = T on any moment (Eckart-Young; LoRD 2309.14021 and SVD-LLM 2403.07378 are instances).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Below this fraction of the largest squared singular value a Gram eigenvalue is rounding noise.
NOISE = 1e-13


@dataclass(frozen=True)
class Spectrum:
    """One decomposition, from which every rank follows.

    `u_on` (..., o, n): orthonormal left singular vectors of M, largest first, n = min(o, i);
    `squared_n` (..., n): squared singular values; `tail(r)` is the squared error of rank r.
    """

    u_on: Tensor
    squared_n: Tensor

    @property
    def tails(self) -> Tensor:
        """(..., n + 1) squared errors of rank 0, 1, ..., n."""
        reversed_sums = self.squared_n.flip(-1).cumsum(-1).flip(-1)
        return torch.cat([reversed_sums, torch.zeros_like(reversed_sums[..., :1])], -1)


def spectrum(m_oi: Tensor, t_oi: Tensor | None = None) -> Spectrum:
    """Left singular vectors and squared singular values of M, by the smaller Gram matrix.

    `t_oi` (P T, the unweighted goal) completes the basis where M has no data: the remaining
    left directions are those of (I − UUᵀ) P T, so that a larger rank still buys something.
    """
    m_oi = m_oi.double()
    o, i = m_oi.shape[-2:]
    if o <= i:
        values, vectors = torch.linalg.eigh(m_oi @ m_oi.mT)
        u_on, squared_n = vectors.flip(-1), values.flip(-1).clamp_min(0)
    else:
        values, vectors = torch.linalg.eigh(m_oi.mT @ m_oi)
        squared_n = values.flip(-1).clamp_min(0)
        u_on = _orthonormal(m_oi @ vectors.flip(-1))
    squared_n = torch.where(squared_n > NOISE * squared_n[..., :1], squared_n, 0)
    if t_oi is not None and bool((squared_n[..., -1] == 0).any()):
        u_on = _complete(u_on, squared_n, t_oi.double())
    return Spectrum(u_on, squared_n)


def _orthonormal(y_on: Tensor) -> Tensor:
    """Orthonormal basis of the columns, leading columns first, signs as the columns had them."""
    q, r = torch.linalg.qr(y_on)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
    return q * signs.unsqueeze(-2)


def _complete(u_on: Tensor, squared_n: Tensor, t_oi: Tensor) -> Tensor:
    """Replace the arbitrary columns behind the data's own by the best ones for T itself."""
    if u_on.dim() > 2:
        flat = [
            _complete(u, s, t)
            for u, s, t in zip(
                u_on.flatten(0, -3), squared_n.flatten(0, -2), t_oi.flatten(0, -3), strict=True
            )
        ]
        return torch.stack(flat).reshape(u_on.shape)
    kept = int((squared_n > 0).sum())
    n = u_on.shape[-1]
    if kept == n:
        return u_on
    u_or = u_on[:, :kept]
    rest_oi = t_oi - u_or @ (u_or.mT @ t_oi)
    left, _, _ = torch.linalg.svd(rest_oi, full_matrices=False)
    # A second projection: the residual is orthogonal only up to its own rounding.
    return _orthonormal(torch.cat([u_or, left[:, : n - kept]], -1))


def factors(
    spec: Spectrum, rank: int, pt_oi: Tensor, out_inverse: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Balanced (B_or, A_ri) of the given rank; `out_inverse` applies P⁻¹ to (o, r) columns."""
    u_or = spec.u_on[..., :rank]
    return balance(out_inverse(u_or), u_or.mT @ pt_oi.double())


def balance(b_or: Tensor, a_ri: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each component so that its two factors have equal norms; the product is unchanged."""
    norm_b = torch.linalg.vector_norm(b_or, dim=-2)
    norm_a = torch.linalg.vector_norm(a_ri, dim=-1)
    usable = (norm_a > 0) & (norm_b > 0)
    scale = torch.where(usable, (norm_a / norm_b.clamp_min(1e-300)).sqrt(), 1.0)
    return b_or * scale.unsqueeze(-2), a_ri / scale.unsqueeze(-1)
