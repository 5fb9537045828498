"""The subspaces that weights see: where statistics on their smaller side are measured."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from rankine.anatomy import Weight
from rankine.checkpoint.streamed import Weights
from rankine.errors import UserError
from rankine.structures.base import matrix


class Bases:
    """Orthonormal bases of weights' smaller sides. One is made once for as long as anybody holds
    it."""

    def __init__(self, model: nn.Module, weights: Weights):
        self._model, self._weights = model, weights
        self._held: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def __call__(self, weight: Weight) -> Tensor:
        """(n, k) basis of the larger side that the weight, as it stands, sees: of its row space
        where it is wide, of its column space where it is tall; at least float32.

        Raises UserError where the weight holds NaN or infinity.
        """
        basis_nk = self._held.get(weight.path)
        if basis_nk is None:
            basis_nk = self._held[weight.path] = self._of(weight)
        return basis_nk

    @torch.no_grad()
    def _of(self, weight: Weight) -> Tensor:
        with self._weights.standing(weight.path):
            w_oi = matrix(self._model.get_submodule(weight.path)).detach()
            w_oi = w_oi.to(torch.promote_types(w_oi.dtype, torch.float32))
            if not bool(torch.isfinite(w_oi).all()):
                raise UserError(
                    f"expected finite weights, found NaN or infinity in {weight.path}: exclude "
                    "it, or get the model from its source again"
                )
            basis_nk, _ = torch.linalg.qr(w_oi.mT if w_oi.shape[0] <= w_oi.shape[1] else w_oi)
        return basis_nk
