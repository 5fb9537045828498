"""Anchored goals: what a layer must do on the compressed model's inputs to give the dense
model's outputs (AA-SVD 2604.02119, without inverting a singular moment)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cross:
    """C = E[x x'ᵀ] of dense inputs x and compressed ones x'; with `basis_ik` of a weight's rows,
    `c_ii` is the (k, i) part QᵀC that the weight sees."""

    c_ii: Tensor
    basis_ik: Tensor | None = None

    def behind(self, w_oi: Tensor) -> Tensor:
        """W C, (o, i) float64."""
        w = w_oi if self.basis_ik is None else w_oi.to(self.basis_ik) @ self.basis_ik
        return w.double() @ self.c_ii.double()

    def tensors(self) -> dict[str, Tensor]:
        """What must be finite."""
        return {"c": self.c_ii}


def anchored_goal(w_oi: Tensor, cross: Cross, moment_ii: Tensor, ridge: float) -> Tensor:
    """argmin_T E‖W x − T x'‖² + ridge-weighted ‖T − W‖², for dense inputs x and compressed x'.

    T = W + W (C − H') (H' + λI)⁻¹ with C = E[x x'ᵀ], H' = E[x' x'ᵀ], λ = ridge · mean(diag H').
    Where the compressed stream has no data, T = W: nothing is lost off the data.
    """
    h_ii = moment_ii.double()
    shift_oi = cross.behind(w_oi).sub_(w_oi.double() @ h_ii)
    # Column by column, as LAPACK has it: factored in place, and no copy for either solve.
    lower = h_ii.mT.clone(memory_format=torch.contiguous_format).mT
    lower.diagonal().add_(ridge * h_ii.diagonal().mean().clamp_min(1e-30))
    torch.linalg.cholesky(lower, out=lower)
    shift_oi = torch.linalg.solve_triangular(lower.mT, shift_oi, upper=True, left=False)
    shift_oi = torch.linalg.solve_triangular(lower, shift_oi, upper=False, left=False)
    return shift_oi.add_(w_oi)
