"""The knapsack on a forest as an integer program, solved by HiGHS.

One binary per option. For every leaf of the forest exactly one option is taken on the path from
the leaf to its root, so each member is covered once; this part of the program is totally
unimodular, which leaves the solver only the limits to branch on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rankine.budget.forest import Floats, Ints, Tree
from rankine.budget.relaxation import Curves, Relaxation, State, total
from rankine.budget.repair import hopeful

# Branch-and-bound nodes before the solver gives up: a limit in seconds would make the result
# depend on the machine.
NODES = 10_000

# The solver's own tolerances are absolute (about 1e-6), so objectives are brought to this size.
SIZE = 1000.0

# The solver may overstep a limit by its tolerance. Then the limit is lowered by as much, and the
# program solved again, up to this many times.
TRIES = 4


def improve(
    curves: Curves, relaxation: Relaxation, cap: float, state: State, *, close: float = 0.0
) -> State:
    """The optimal cover, or `state` when nothing beats it by more than `close`.

    Only options that the bound leaves in play become variables, and the objective is

        sum(cost) - bound = sum(excess of the options) + price * slack,

    whose terms all lie between 0 and the gap that is left: the tolerance of the solver is then
    relative to the gap, however small the losses are.
    """
    cost = total(curves, state, curves.cost)
    gap = cost - relaxation.bound
    if gap <= max(close, 1e-12 * abs(cost)):
        return state
    alive = hopeful(relaxation, cost)
    weight = curves.weight[alive]
    unit = float(weight.max()) or 1.0
    scale = SIZE / gap
    allowed = cap
    for _ in range(TRIES):
        limit = _Limit(weight / unit, allowed / unit, relaxation.price * unit * scale)
        excess = relaxation.excess[alive] * scale
        taken = _solve(curves.tree, curves.node[alive], excess, [limit], gap=0.0)
        if taken is None:
            break
        trial = _state(curves, state, alive[taken])
        over = total(curves, trial, curves.weight) - cap
        if over <= 0:
            return trial if total(curves, trial, curves.cost) < cost else state
        allowed -= over
    return state


def least_cost(
    curves: Curves, start: State, limits: Sequence[tuple[Floats, float]], gap: float
) -> State | None:
    """Least cost under several limits; None when no cover satisfies all of them.

    Args:
        curves: all options, dominated ones included: an option that is large for its loss may be
            fast.
        start: any state, for the choices of nodes outside the cover.
        limits: pairs of a value per option and the most that the cover may add up to.
        gap: relative gap to the optimum at which the solver may stop.
    """
    usual = total(curves, start, curves.cost) or float(curves.cost.max()) or 1.0
    objective = curves.cost * (SIZE / usual)
    allowed = [cap for _, cap in limits]
    units = [float(values.max()) or 1.0 for values, _ in limits]
    for _ in range(TRIES):
        rows = [
            _Limit(values / unit, most / unit)
            for (values, _), most, unit in zip(limits, allowed, units, strict=True)
        ]
        taken = _solve(curves.tree, curves.node, objective, rows, gap=gap)
        if taken is None:
            return None
        state = _state(curves, start, taken)
        over = [max(total(curves, state, values) - cap, 0.0) for values, cap in limits]
        if not any(over):
            return state
        allowed = [most - excess for most, excess in zip(allowed, over, strict=True)]
    return None


class _Limit(NamedTuple):
    """A sum of values that may reach `cap`; what is left of it costs `price` per unit."""

    values: Floats
    cap: float
    price: float = 0.0


def _solve(
    tree: Tree, node: Ints, objective: Floats, limits: Sequence[_Limit], *, gap: float
) -> Ints | None:
    """Indices of the options taken, or None when the solver found no cover."""
    # Imported here: loading scipy.optimize takes longer than most allocations.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, csr_array, eye_array, hstack

    count, slacks = len(node), len(limits)
    row, column = _paths(tree, node)
    leaves = int(row.max()) + 1
    cover = coo_array((np.ones(len(row)), (row, column)), shape=(leaves, count + slacks))
    sums = hstack([csr_array(np.stack([limit.values for limit in limits])), eye_array(slacks)])
    caps = np.array([limit.cap for limit in limits])
    result = milp(
        np.append(objective, [limit.price for limit in limits]),
        integrality=np.append(np.ones(count), np.zeros(slacks)),
        bounds=Bounds(0.0, np.append(np.ones(count), np.full(slacks, np.inf))),
        constraints=[LinearConstraint(cover.tocsr(), 1.0, 1.0), LinearConstraint(sums, caps, caps)],
        # With one limit presolve gains nothing, and on some instances it prints to stdout.
        options={"mip_rel_gap": gap, "node_limit": NODES, "presolve": len(limits) > 1},
    )
    return None if result.x is None else np.flatnonzero(result.x[:count] > 0.5)


def _paths(tree: Tree, node: Ints) -> tuple[Ints, Ints]:
    """Which options stand on the path of which leaf, as (leaf row, option column) pairs."""
    order = np.argsort(node, kind="stable")
    first = np.searchsorted(node[order], np.arange(len(tree.parent) + 1))
    rows, columns = [], []
    for number, leaf in enumerate(np.flatnonzero(~tree.branching)):
        at = int(leaf)
        while at >= 0:
            options = order[first[at] : first[at + 1]]
            rows.append(np.full(len(options), number))
            columns.append(options)
            at = int(tree.parent[at])
    return np.concatenate(rows), np.concatenate(columns)


def _state(curves: Curves, state: State, taken: Ints) -> State:
    pick, split = state.pick.copy(), state.split.copy()
    pick[curves.node[taken]] = taken
    split[curves.node[taken]] = False
    above = curves.tree.parent[curves.node[taken]]
    while len(above := above[above >= 0]):
        split[above] = True
        above = curves.tree.parent[above]
    return State(pick, split)
