"""Local search from the relaxation's cover: spend the slack, exchange between neighbours.

A move puts one option in place of what covers its node now: another option of the same target, a
parent for its children, or a child (and its siblings' standing choices) for the parent. Each round
applies the best pair of moves in different trees, or the best single one, that still fits.
Moves whose excess is larger than the gap to the dual bound cannot be part of a better cover, so
few options take part, and trees whose root is out of question fall apart into smaller ones.
"""

from __future__ import annotations

import numpy as np

from rankine.budget.forest import Floats, Ints, Tree
from rankine.budget.relaxation import Curves, Relaxation, State, total

# With more moves than this, single ones are tried first: they close most of a large gap, and few
# moves are left for the pairs.
MANY = 2000


def hopeful(relaxation: Relaxation, cost: float) -> Ints:
    """Options that a cover cheaper than `cost` may contain."""
    gap = max(cost - relaxation.bound, 0.0)
    rounding = 1e-12 * (abs(cost) + abs(relaxation.bound))
    return np.flatnonzero(relaxation.excess <= gap + rounding)


def repair(
    curves: Curves, relaxation: Relaxation, cap: float, *, close: float = 0.0, rounds: int = 1000
) -> State:
    """Improve a cover until no exchange helps, or its gap to the bound is below `close`."""
    tree, state = curves.tree, relaxation.state
    cost = total(curves, state, curves.cost)
    alive = hopeful(relaxation, cost)
    group = _groups(tree, curves.node, alive)
    for _ in range(rounds):
        if cost - relaxation.bound <= max(close, 1e-12 * abs(cost)):
            break
        node = curves.node[alive]
        lighter, slack = _changes(tree, state, curves.weight, alive, node, cap)
        cheaper, _ = _changes(tree, state, curves.cost, alive, node, 0.0)
        moves = _best_single(lighter, cheaper, slack) if len(alive) > MANY else []
        moves = moves or _best_pair(lighter, cheaper, group[node], slack)
        gain = float(cheaper[moves].sum()) if moves else 0.0
        if gain >= -1e-12 * abs(cost):
            break
        for move in moves:
            state = _apply(tree, state, int(node[move]), int(alive[move]))
        cost = total(curves, state, curves.cost)
        alive = hopeful(relaxation, cost)
    return state


def _groups(tree: Tree, node: Ints, alive: Ints) -> Ints:
    """For every node the topmost ancestor (or itself) with a hopeful option.

    Above that node the cover is settled, so moves in different groups do not touch each other.
    """
    living = np.zeros(len(tree.parent), dtype=bool)
    living[node[alive]] = True
    group = np.where(living, np.arange(len(living)), -1)
    for level in tree.levels[1:]:
        above = group[tree.parent[level]]
        group[level] = np.where(above >= 0, above, group[level])
    return group


def _changes(
    tree: Tree, state: State, values: Floats, alive: Ints, node: Ints, cap: float
) -> tuple[Floats, float]:
    """What each move adds to the sum of `values`, and what is left of `cap` now."""
    now = tree.totals(values[state.pick], state.split)
    detour = np.zeros(len(now))
    for depth in range(1, len(tree.levels)):
        inner = tree.children_sum(now, depth)
        below = tree.levels[depth]
        above = tree.parent[below]
        detour[below] = detour[above] + inner[above] - now[above]
    return detour[node] + values[alive] - now[node], cap - float(now[tree.roots].sum())


def _apply(tree: Tree, state: State, node: int, option: int) -> State:
    """Take one option, and split whatever stands above its node."""
    pick, split = state.pick.copy(), state.split.copy()
    pick[node], split[node] = option, False
    while (node := int(tree.parent[node])) >= 0:
        split[node] = True
    return State(pick, split)


def _best_single(weight: Floats, cost: Floats, slack: float) -> list[int]:
    """The move that lowers the cost most within the slack, if one does."""
    move = int(np.argmin(np.where(weight <= slack, cost, 0.0)))
    return [move] if weight[move] <= slack and cost[move] < 0.0 else []


def _best_pair(weight: Floats, cost: Floats, group: Ints, slack: float) -> list[int]:
    """The one or two moves, in different groups, that lower the cost most within the slack.

    Sorted by weight, the best partner of a move is a running minimum of the cost up to the slack
    it leaves. A partner of another group differs from this one in some bit of its number, so one
    running minimum per bit and value finds it.
    """
    order = np.argsort(weight, kind="stable")
    sorted_weight, sorted_cost, sorted_group = weight[order], cost[order], group[order]
    bits = np.arange(max(int(group.max(initial=0)).bit_length(), 1))[:, None]
    ones = (sorted_group >> bits & 1).astype(bool)
    running = np.minimum.accumulate(
        np.where(np.stack([ones, ~ones]), np.inf, sorted_cost), axis=2
    )  # [0]: over partners whose bit is 0; [1]: whose bit is 1

    last = np.searchsorted(sorted_weight, slack - weight, side="right") - 1
    partner = running[1 - (group >> bits & 1), bits, last].min(axis=0)
    partner[last < 0] = np.inf
    single = np.where(weight <= slack, cost, np.inf)
    together = np.minimum(cost + partner, single)
    if not len(together):
        return []
    move = int(np.argmin(together))
    if single[move] <= together[move]:
        return [move]
    others = order[: last[move] + 1]
    others = others[group[others] != group[move]]
    return [move, int(others[np.argmin(cost[others])])]
