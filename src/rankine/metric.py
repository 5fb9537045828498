"""The norm an error is measured in: ‖P (W − Ŵ) S‖_F. Services, no solver.

S Sᵀ is the second moment (or covariance) of the layer's inputs, Pᵀ P that of its output
gradients. Identity, diagonal, whitening, Fisher and two-sided (KFAC) are instances. With an
output side in units of the loss, half the squared norm predicts the increase of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from rankine.linalg.gram import Gram

T = TypeVar("T")


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
    _kept: dict[str, tuple[Tensor, object]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
        error = goal_oi.double() - approx_oi.double()
        weighed = error if self.inputs is None else self.inputs.times(error)
        other = error if self.outputs is None else self.outputs.times(error.mT).mT
        return self.scale * (weighed * other).sum((-2, -1)).clamp_min(0)

    def once(self, goal_oi: Tensor, what: str, make: Callable[[], T]) -> T:
        """`make()`, or what it gave for this very goal before: the curve and the fit of a target
        share one decomposition. Keeps only the last goal's."""
        kept = self._kept.get(what)
        if kept is None or kept[0] is not goal_oi:
            self._kept.clear()
            kept = self._kept[what] = (goal_oi, make())
        return kept[1]  # type: ignore[return-value]

    def implied_bias(self, goal_oi: Tensor, approx_oi: Tensor) -> Tensor | None:
        """(W − Ŵ) μ: what a centred fit adds to the layer's bias (LoRD 2309.14021 step 3)."""
        if self.mean_i is None:
            return None
        return (goal_oi.double() - approx_oi.double()) @ self.mean_i.double()


__all__ = ["Gram", "Metric"]
