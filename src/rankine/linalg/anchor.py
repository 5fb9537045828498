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
    h = symmetric(moment_ii)
    n = h.shape[-1]
    eye = torch.eye(n, dtype=h.dtype, device=h.device)
    damped = h + ridge * h.diagonal().mean().clamp_min(1e-30) * eye
    shift = w_oi.double() @ (cross_ii.double() - h)
    return w_oi.double() + torch.linalg.solve(damped, shift.mT).mT
