"""The allocator of the house: least loss under a budget, or fewest bits under a loss.

Targets offer curves and exactly one option is taken per target: a multiple-choice knapsack, on a
forest where targets contain targets. Three stages, each skipped when the one before it closed the
gap to the bound:

1. relaxation: the best price per bit, a bound on the optimum, a cover close to it;
2. repair: exchanges between the options that the bound leaves in play;
3. integer program (HiGHS) over the same options, when the instance is small: relaxation alone is
   often not optimal when there are few targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from rankine.budget.bids import Bid, Option
from rankine.budget.exact import improve, least_cost
from rankine.budget.forest import Forest
from rankine.budget.planting import plant
from rankine.budget.relaxation import (
    Curves,
    State,
    exchanged,
    lightest,
    relax,
    select,
    total,
    undominated,
)
from rankine.budget.repair import repair
from rankine.errors import BudgetError, UserError

ROUNDING = 1e-12

# A relative gap to the bound that is worth an integer program even when the instance is large.
WIDE = 1e-3


@dataclass(frozen=True)
class Knapsack:
    """Minimise the sum of scaled losses under a sum of bits, or the reverse.

    Attributes:
        exact: instances with at most this many undominated options are solved to optimality.
            Larger ones end after the repair if that comes within 0.1 % of the bound (mostly it
            comes within 0.01 %), and else go to the integer program too. Raise it to trade time
            for the last fraction of a percent.
        seconds: optional limit on the sum of `Option.seconds`. Such instances always go to the
            integer program, to optimality when small and to within 0.01 % when not.

    The result depends on nothing but the bids, their order (which breaks ties) and the budget.
    """

    exact: int = 2048
    seconds: float | None = None

    def allocate(self, bids: Sequence[Bid], bits: int) -> dict[str, Option]:
        """Least loss within `bits`.

        Raises:
            BudgetError: when the smallest options together take more, stating how much.
            UserError: for bids that make no sense (see `Bid`).
        """
        forest = plant(bids)
        return self._choose(forest, float(bits), reverse=False) if bids else {}

    def smallest(self, bids: Sequence[Bid], loss: float) -> dict[str, Option]:
        """Fewest bits with a total scaled loss of at most `loss`.

        Sums of losses may round differently in their last digits, so `loss` is read with a
        relative tolerance of 1e-12: `smallest(bids, total_loss(bids, allocation))` takes no more
        bits than `allocation`.

        Raises:
            BudgetError: when even the least loss of all targets together is larger.
            UserError: for bids that make no sense (see `Bid`).
        """
        if not loss >= 0:
            raise UserError(f"The loss must be a number of at least 0, found {loss}.")
        forest = plant(bids)
        if not bids:
            return {}
        return self._choose(forest, loss * (1 + ROUNDING), reverse=True)

    def dual_bound(self, bids: Sequence[Bid], bits: int) -> float:
        """A lower bound on the total scaled loss of any allocation within `bits`.

        It is the value of the linear relaxation (a limit in seconds is left out of it).

        Raises:
            BudgetError: when the smallest options together take more than `bits`.
        """
        forest = plant(bids)
        if not bids:
            return 0.0
        relaxation = relax(undominated(forest), _whole(float(bits), _step(forest)))
        if relaxation is None:
            forest.refuse(bits)
        return max(relaxation.bound, 0.0)

    def _choose(self, forest: Forest, cap: float, *, reverse: bool) -> dict[str, Option]:
        limited = self.seconds is not None
        # Dominated in bits and loss is not dominated in seconds.
        curves = select(forest, np.arange(len(forest.bits))) if limited else undominated(forest)
        curves = exchanged(curves) if reverse else curves
        step = _step(forest)
        limit = cap if reverse else _whole(cap, step)
        relaxation = relax(curves, limit)
        if relaxation is None:
            _refuse(forest, curves, cap, reverse)
        if self.seconds is not None:
            state = self._two_limits(forest, curves, relaxation.state, limit, self.seconds)
        else:
            # Where bits are the cost, a gap of less than a step is none.
            close = 0.999 * step if reverse else 0.0
            state = repair(curves, relaxation, limit, close=close)
            cost = total(curves, state, curves.cost)
            if len(curves.cost) <= self.exact or cost > (1 + WIDE) * relaxation.bound:
                state = improve(curves, relaxation, limit, state, close=close)
        return forest.allocation(curves.index[state.pick[curves.tree.taken(state.split)]])

    def _two_limits(
        self, forest: Forest, curves: Curves, start: State, cap: float, seconds: float
    ) -> State:
        second = forest.seconds()[curves.index]
        gap = 0.0 if len(curves.cost) <= self.exact else 1e-4
        limits = [(curves.weight, cap), (second, seconds)]
        state = least_cost(curves, start, limits, gap)
        if state is not None:
            return state
        fastest = least_cost(replace(curves, cost=second), start, limits[:1], 0.0) or start
        least = total(curves, fastest, second)
        if least <= seconds:  # the solver gave up on the loss, so take what surely fits
            return fastest
        raise BudgetError(
            f"The limit is {seconds:g} seconds, but the fastest choice within the budget takes "
            f"{least:g}. Allow {least:g} seconds or more, or change the budget."
        )


def _step(forest: Forest) -> int:
    """The divisor that all sizes share, often a large one: a tighter bound for nothing."""
    return int(np.gcd.reduce(forest.bits)) or 1


def _whole(bits: float, step: int) -> float:
    """The part of a budget that can be spent."""
    return float(int(bits) // step * step)


def _refuse(forest: Forest, curves: Curves, cap: float, reverse: bool) -> NoReturn:
    if not reverse:
        forest.refuse(cap)
    least = lightest(curves)
    raise BudgetError(
        f"The loss may be at most {cap:g}, but the best options of all targets together lose "
        f"{least:g}. Allow {least:g} or more, or let the targets offer larger options."
    )
