"""What methods share when they bid and fit: pure functions on goals, metrics and structures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankine.anatomy import Target, Weight
from rankine.budget import Bid, Option
from rankine.errors import UserError
from rankine.linalg.anchor import anchored_goal
from rankine.metric import Metric
from rankine.statistics import InputMoment, Need, OutputGradient
from rankine.structures import Dense, LowRank, Structure

if TYPE_CHECKING:  # protocols; a floor above
    from rankine.method import Evidence, Source


def expect(holds: bool, what: str, found: object) -> None:
    """Raises UserError where a knob is out of its range: "expected `what`, found `found`"."""
    if not holds:
        raise UserError(f"expected {what}, found {found}")


def stored_parts(
    choice: Structure, goal: Tensor, metric: Metric, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The parts as they will be stored: floating ones in `dtype`."""
    parts = choice.encode(goal, metric)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in parts.items()}


def rebuilt(choice: Structure, stored: dict[str, Tensor]) -> Tensor:
    """The matrix that stored parts stand for, without the rounding of multiplying them."""
    return choice.decode({n: t.double() if t.is_floating_point() else t for n, t in stored.items()})


#: A pivoted form may add this share to a target's loss by rounding; else two factors are stored.
PIVOT_HARM = 0.01


def unless_rounding_hurts(
    choice: LowRank,
    stored: dict[str, Tensor],
    goal: Tensor,
    metric: Metric,
    dtype: torch.dtype,
) -> tuple[LowRank, dict[str, Tensor]]:
    """The pivoted form, or the largest two factors within its bits where rounding its
    coefficients adds more than PIVOT_HARM to the loss of the same rank in two factors, and more
    than the lower rank does."""
    plain = dataclasses.replace(choice, pivoted=False)
    reference = metric.loss(goal, rebuilt(plain, stored_parts(plain, goal, metric, dtype)))
    loss = metric.loss(goal, rebuilt(choice, stored))
    if loss <= (1 + PIVOT_HARM) * reference:
        return choice, stored
    bits = choice.bits(goal.shape, dtype)
    rank = max(
        r
        for r in range(1, choice.rank + 1)
        if dataclasses.replace(plain, rank=r).bits(goal.shape, dtype) <= bits
    )
    smaller = dataclasses.replace(plain, rank=rank)
    parts = stored_parts(smaller, goal, metric, dtype)
    better = metric.loss(goal, rebuilt(smaller, parts)) < loss
    return (smaller, parts) if better else (choice, stored)


def bits_of_tied(target: Target, choice: Structure, dtype: torch.dtype) -> int:
    """What output layers that share a factored table store of their own: its `up`, turned."""
    if target.kind != "table" or not isinstance(choice, LowRank):
        return 0
    heads = sum(weight.operator != "embedding" for weight in target.weights)
    return heads * choice.rank * target.shape[0] * dtype.itemsize * 8


def two_sided(
    weight: Weight, evidence: Evidence, need: OutputGradient, shrink_in: float, shrink_out: float
) -> Metric:
    """‖G^{1/2} (W − Ŵ) H^{1/2}‖² with both moments shrunk towards the identity; half of it
    predicts the loss per term (KFAC)."""
    inputs = evidence.inputs(weight).shrunk(shrink_in)
    outputs = evidence.gradient(weight, need).shrunk(shrink_out)
    return Metric(inputs, outputs, scale=0.5)


@dataclass(frozen=True)
class TwoSided:
    """The knobs and verbs of methods in the two-sided metric: inherit it before `Compressor`.

    - `shrink_in`, `shrink_out`: weight of the scaled identity in each moment.
    - `middle`: share of each sequence's positions whose gradients count.
    - `clip`: a position's gradient norm is kept within this factor of its sequence's mean; None: as
      it is.
    """

    shrink_in: float = 0.1
    shrink_out: float = 0.3
    middle: float = 0.75
    clip: float | None = 10.0

    def __post_init__(self) -> None:
        for side in ("shrink_in", "shrink_out"):
            value = getattr(self, side)
            expect(0 <= value <= 1, f"{side} between 0 and 1", value)
        expect(0 < self.middle <= 1, "middle above 0 and at most 1", self.middle)
        expect(self.clip is None or self.clip >= 1, "clip of at least 1, or none", self.clip)

    @property
    def gradient(self) -> OutputGradient:
        """The statistic of the output side."""
        return OutputGradient(self.middle, self.clip, compact=True)

    def needs(self, target: Target) -> frozenset[Need]:
        """Both sides."""
        return frozenset({InputMoment(compact=True), self.gradient})

    def metric(self, target: Target, evidence: Evidence) -> Metric:
        """Half the squared two-sided norm predicts the loss per token."""
        shrinks = (self.shrink_in, self.shrink_out)
        return two_sided(target.weights[0], evidence, self.gradient, *shrinks)


def anchored(weight: Weight, source: Source, evidence: Evidence, ridge: float) -> Tensor:
    """The weight; on an anchored stream, shifted to give the dense outputs (linalg.anchor)."""
    w_oi, cross = source.weight(weight), source.cross(weight)
    if cross is None:
        return w_oi
    return anchored_goal(w_oi, cross, evidence.inputs(weight).h_nn, ridge)


def dense_bid(target: Target, goal: Tensor, dtype: torch.dtype, options: Sequence[Option]) -> Bid:
    """A bid with the dense weight as its last option, so that nothing ever grows."""
    dense = Option(Dense(), goal.numel() * dtype.itemsize * 8, 0.0)
    kept = tuple(option for option in options if option.bits < dense.bits)
    role = target.weights[0].role
    return Bid(target.id, target.members, (*kept, dense), goal.numel() * 16, group=role)
