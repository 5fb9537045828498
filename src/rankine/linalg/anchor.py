"""Anchored goals: what a layer must do on the compressed model's inputs to give the dense
model's outputs (AA-SVD 2604.02119, without inverting a singular moment)."""

from __future__ import annotations

import torch
from torch import Tensor

from rankine.linalg.roots import symmetric


def anchored_goal(w_oi: Tensor, cross_ii: Tensor, moment_ii: Tensor, ridge: float) -> Tensor:
    """argmin_T E‖W x − T x'‖² + ridge-weighted ‖T − W‖², for dense inputs x and compressed x'.

    T = W + W (C − H') (H' + λI)⁻¹ with C = E[x x'ᵀ], H' = E[x' x'ᵀ], λ = ridge · mean(diag H').
    Where the compressed stream has no data, T = W: nothing is lost off the data.
    """
    w, h = w_oi.double(), symmetric(moment_ii)
    shift_oi = w @ cross_ii.double() - w @ h
    h.diagonal().add_(ridge * h.diagonal().mean().clamp_min(1e-30))
    lower = torch.linalg.cholesky(h)
    return w + torch.cholesky_solve(shift_oi.mT, lower).mT
