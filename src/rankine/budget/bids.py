"""What competes for the budget: options on a curve, gathered in bids.

Units used in this room:

* bits: stored bits, metadata (masks, indices, scales, padding) included;
* loss: predicted increase of the task loss. `Option.loss` may be in any unit of its method;
  `Bid.scale` turns it into the unit in which all bids of one allocation are compared;
* keep: stored bits divided by `dense_bits` (16 per weight).

The room never looks inside a structure and knows no model: the same code serves weights,
caches and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

from rankine.errors import UserError


@dataclass(frozen=True, slots=True)
class Option:
    """One point on a curve: a structure, what it costs and what it does to the loss.

    Attributes:
        structure: a hashable value (`rankine.structures.Structure`); opaque here.
        bits: stored bits, metadata included; not negative.
        loss: predicted increase of the loss with this option alone in place; 0 for dense.
            Negative predictions are noise and count as 0.
        by: name of the method that offered it.
        seconds: optional second resource, for example predicted latency.
    """

    structure: Any
    bits: int
    loss: float
    by: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Bid:
    """One target with its curve.

    Attributes:
        target: unique id of the target.
        members: the weight paths it covers. Members of two bids are nested, equal (rivals: one
            option of one of them is chosen) or disjoint; allocators refuse anything else.
        options: the curve, in any order, with the dense option(s) on it.
        dense_bits: bits of the members at 16 per weight, the denominator of `keep`.
        scale: multiplies `Option.loss`; the score of the target for `Entropic`.
        group: for rules that work by type, such as a role ("q", "down").

    Raises:
        UserError: without members or options, or with the same member twice.
    """

    target: str
    members: tuple[str, ...]
    options: tuple[Option, ...]
    dense_bits: int
    scale: float = 1.0
    group: str = ""

    def __post_init__(self) -> None:
        if not self.members or len(set(self.members)) != len(self.members):
            raise UserError(
                f"The bid of '{self.target}' must cover one or more different weights, but its "
                f"members are {list(self.members)}. Name every weight of the target once."
            )
        if not self.options:
            raise UserError(
                f"The bid of '{self.target}' has no options. Offer at least the dense option."
            )


def total_bits(allocation: Mapping[str, Option]) -> int:
    """Stored bits of an allocation."""
    return sum(option.bits for option in allocation.values())


def total_loss(bids: Sequence[Bid], allocation: Mapping[str, Option]) -> float:
    """Scaled loss of an allocation, in the common unit of the bids.

    Summed without rounding, so the result does not depend on the order of the bids.
    """
    return fsum(
        bid.scale * max(allocation[bid.target].loss, 0.0)
        for bid in bids
        if bid.target in allocation
    )
