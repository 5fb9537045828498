"""Pivoting factorization: a rank-r matrix as r of its own rows and coefficients for the others.

PIFA (2025): Ŵ = B A. Choose r pivot rows p so that B_p is well conditioned; then Ŵ_p = B_p A and
Ŵ_rest = (B_rest B_p⁻¹) Ŵ_p. It stores r(i + o) − r² numbers instead of r(i + o).
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor


def encode(b_or: Tensor, a_ri: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows_ri, coefficients_sr, pivots_r): pivot rows of BA, the other o − r rows in terms of
    them, and the pivots' row indices (int32, ascending). Two-dimensional float64 arithmetic."""
    b, a = b_or.double(), a_ri.double()
    o, r = b.shape
    # Orthonormal columns first: pivoting must see the row space's geometry, not factor scaling.
    q_or = torch.linalg.qr(b)[0]
    _, _, order = scipy.linalg.qr(q_or.mT.cpu().numpy(), mode="economic", pivoting=True)
    pivots = torch.as_tensor(order[:r].copy(), dtype=torch.int64).sort().values
    pivots = _swap_until_bounded(q_or, pivots)
    rest = others(pivots, o)
    coefficients = torch.linalg.solve(q_or[pivots].mT, q_or[rest].mT).mT
    return b[pivots] @ a, coefficients, pivots.to(torch.int32)


def _swap_until_bounded(q_or: Tensor, pivots: Tensor, bound: float = 2.0) -> Tensor:
    """Exchange rows while a coefficient exceeds `bound`: each swap multiplies the volume of the
    pivot block by that coefficient, so this ends (Gu and Eisenstat's strong rank-revealing rule).
    Bounded coefficients bound the rounding that the encoding adds."""
    o = q_or.shape[0]
    for _ in range(4 * q_or.shape[1]):
        rest = others(pivots, o)
        if len(rest) == 0:
            break
        c = torch.linalg.solve(q_or[pivots].mT, q_or[rest].mT).mT
        worst = int(c.abs().argmax())
        row, column = divmod(worst, c.shape[1])
        if abs(float(c[row, column])) <= bound:
            break
        pivots = pivots.clone()
        pivots[column] = rest[row]
        pivots = pivots.sort().values
    return pivots


def others(pivots: Tensor, o: int) -> Tensor:
    """Ascending indices of the rows that are not pivots."""
    mask = torch.ones(o, dtype=torch.bool, device=pivots.device)
    mask[pivots.long()] = False
    return mask.nonzero().squeeze(-1)


def decode(rows_ri: Tensor, coefficients_sr: Tensor, pivots_r: Tensor) -> Tensor:
    """The dense (o, i) matrix."""
    o = rows_ri.shape[0] + coefficients_sr.shape[0]
    dense = rows_ri.new_empty(o, rows_ri.shape[1])
    dense[pivots_r.long()] = rows_ri
    dense[others(pivots_r, o)] = coefficients_sr @ rows_ri
    return dense
