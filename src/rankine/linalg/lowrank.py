"""The one weighted low-rank solver: minimise ‖P (T − B A) S‖_F over rank r, where S Sᵀ = H weighs
the inputs and Pᵀ P = G the outputs (Eckart-Young in both norms).

It decomposes the Gram matrix of M = P T S on its smaller side and needs a root on that side alone:
a wide weight (o ≤ i) costs P and P (T H Tᵀ) Pᵀ, a tall one S and Sᵀ (Tᵀ G T) S. The factors take
the output-side form B = P⁻¹ U_r, A = U_rᵀ P T = Bᵀ G T. No inverse of S appears, so directions
without data are not lost: at full rank B A = T on any moment (LoRD 2309.14021 and SVD-LLM
2403.07378 are instances).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankine.linalg.gram import Gram
from rankine.linalg.roots import symmetric

#: Below this fraction of the largest squared singular value a Gram eigenvalue is rounding noise.
NOISE = 1e-13
#: And below this one its direction is better found through P T than through Tᵀ G T.
FAINT = 1e-9


@dataclass(frozen=True)
class Solution:
    """One decomposition, from which every rank follows.

    `squared_n` (..., n): squared singular values of M, largest first, n = min(o, i).
    """

    squared_n: Tensor
    _pair: Callable[[int], tuple[Tensor, Tensor]]

    @property
    def tails(self) -> Tensor:
        """(..., n + 1) squared errors of rank 0, 1, ..., n."""
        reversed_sums = self.squared_n.flip(-1).cumsum(-1).flip(-1)
        return torch.cat([reversed_sums, torch.zeros_like(reversed_sums[..., :1])], -1)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Balanced (B_or, A_ri) of the given rank, float64."""
        return balance(*self._pair(rank))


def weighted(t_oi: Tensor, inputs: Gram | None = None, outputs: Gram | None = None) -> Solution:
    """Decompose T in the metric; `None` is the identity on that side. Ranks beyond the data's own
    directions take what is largest in (I − UUᵀ) P T, so that a larger rank still buys something."""
    t_oi = t_oi.double()
    return (_wide if t_oi.shape[-2] <= t_oi.shape[-1] else _tall)(t_oi, inputs, outputs)


def _wide(t_oi: Tensor, inputs: Gram | None, outputs: Gram | None) -> Solution:
    """P's root, then the (o, o) Gram of M; its eigenvectors are the left directions."""
    pt_oi = t_oi if outputs is None else outputs.left(t_oi)
    gram_oo = pt_oi @ pt_oi.mT if inputs is None else inputs.congruence(pt_oi)
    squared_n, u_oo = _eigen(gram_oo)

    def pair(rank: int) -> tuple[Tensor, Tensor]:
        return _output_side(u_oo[..., :rank], squared_n[..., :rank], pt_oi, outputs)

    return Solution(squared_n, pair)


def _tall(t_oi: Tensor, inputs: Gram | None, outputs: Gram | None) -> Solution:
    """S's root, then the (i, i) Gram of M; its eigenvectors V give U = M V / σ. Of the outputs
    only Tᵀ G T is asked: B = P⁻¹ U = T S V / σ, made orthonormal in G itself, and A = Bᵀ G T."""
    form_ii = t_oi.mT @ t_oi if outputs is None else outputs.congruence(t_oi.mT)
    # Sᵀ (Tᵀ G T) S
    inner_ii = form_ii if inputs is None else inputs.left(inputs.right(form_ii))
    squared_n, v_ii = _eigen(inner_ii)

    def pair(rank: int) -> tuple[Tensor, Tensor]:
        v_ir, squared_r = v_ii[..., :rank], squared_n[..., :rank]
        if outputs is not None and bool((squared_r > FAINT * squared_n[..., :1]).all()):
            x_ir = v_ir if inputs is None else inputs.times_root(v_ir)
            x_ir = x_ir / squared_r.sqrt().unsqueeze(-2)
            lower = torch.linalg.cholesky(symmetric(x_ir.mT @ form_ii @ x_ir))
            x_ri = torch.linalg.solve_triangular(lower, x_ir.mT, upper=False)
            return t_oi @ x_ri.mT, x_ri @ form_ii
        pt_oi = t_oi if outputs is None else outputs.left(t_oi)
        u_or = _orthonormal(_right(pt_oi, inputs) @ v_ir)
        return _output_side(u_or, squared_r, pt_oi, outputs)

    return Solution(squared_n, pair)


def _right(t_oi: Tensor, inputs: Gram | None) -> Tensor:
    return t_oi if inputs is None else inputs.right(t_oi)


def _eigen(gram_nn: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues, eigenvectors) of M's Gram matrix, largest first, noise set to zero."""
    values, vectors = torch.linalg.eigh(symmetric(gram_nn))
    squared_n = values.flip(-1).clamp_min(0)
    return torch.where(squared_n > NOISE * squared_n[..., :1], squared_n, 0), vectors.flip(-1)


def _output_side(
    u_or: Tensor, squared_r: Tensor, pt_oi: Tensor, outputs: Gram | None
) -> tuple[Tensor, Tensor]:
    """B = P⁻¹ U, A = Uᵀ P T, directions that the data leaves open chosen for P T itself."""
    if bool((squared_r == 0).any()):
        u_or = _complete(u_or, squared_r, pt_oi)
    return (u_or if outputs is None else outputs.left_inverse(u_or)), u_or.mT @ pt_oi


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


def balance(b_or: Tensor, a_ri: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each component so that its two factors have equal norms; the product is unchanged."""
    norm_b = torch.linalg.vector_norm(b_or, dim=-2)
    norm_a = torch.linalg.vector_norm(a_ri, dim=-1)
    usable = (norm_a > 0) & (norm_b > 0)
    scale = torch.where(usable, (norm_a / norm_b.clamp_min(1e-300)).sqrt(), 1.0)
    return b_or * scale.unsqueeze(-2), a_ri / scale.unsqueeze(-1)
