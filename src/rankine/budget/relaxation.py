"""The Lagrangian relaxation of the knapsack on a forest.

Minimise the sum of `cost` over the cover under `sum of weight <= cap`. For a price `lam >= 0`

    g(lam) = min over covers of  sum(cost + lam * weight)  -  lam * cap

is solved exactly in one pass (best option per node, then parent against children, bottom up) and
bounds the optimum from below. Only the lower convex hulls of the curves are ever visited, so the
hulls need not be built. `g` is concave and piecewise linear; its maximum is found by intersecting
the supporting lines of a cover that fits and one that does not (Everett 1963; Handler and Zang
1980), with bisection steps between.

Allocating bits under a budget and finding the fewest bits under a loss are the same problem with
cost and weight exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rankine.budget.forest import Bools, Floats, Forest, Ints, Tree

# Two priced options closer than this, relative to their size, count as a tie.
TIE = 1e-12


@dataclass(frozen=True, eq=False)
class Curves:
    """What is minimised and what is limited, for the options worth looking at."""

    tree: Tree
    start: Ints  # options of node n: start[n]:start[n + 1], by rising weight
    node: Ints
    cost: Floats
    weight: Floats
    index: Ints  # of the same option in the forest


@dataclass(frozen=True, eq=False)
class State:
    """A cover, with a standing choice for every node that is not in it."""

    pick: Ints  # the option of each node, should it be taken whole
    split: Bools  # whether its children are taken instead


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The best price, the bound it proves and a cover that fits."""

    price: float
    bound: float
    state: State
    excess: Floats  # how much an option, once forced, moves g above the bound; at least 0


def undominated(forest: Forest) -> Curves:
    """The options that store more only to lose less, by rising bits."""
    node = forest.node
    # A running minimum that starts afresh at every node: ranks of the losses, lowered by more
    # than their range from node to node.
    rank = np.unique(forest.loss, return_inverse=True)[1].reshape(-1)
    rank = rank - node * (len(node) + 1)
    below = np.minimum.accumulate(rank)
    kept = np.ones(len(node), dtype=bool)
    kept[1:] = rank[1:] < below[:-1]
    return select(forest, np.flatnonzero(kept))


def select(forest: Forest, index: Ints) -> Curves:
    """Curves over some options of a forest: least loss under limited bits."""
    node = forest.node[index]
    start = np.searchsorted(node, np.arange(len(forest.rivals) + 1))
    bits = forest.bits[index].astype(np.float64)
    return Curves(forest.tree, start, node, forest.loss[index], bits, index)


def exchanged(curves: Curves) -> Curves:
    """The reverse problem: cost and weight trade places."""
    order = np.lexsort((curves.weight, curves.cost, curves.node))
    return Curves(
        curves.tree,
        curves.start,
        curves.node,
        cost=curves.weight[order],
        weight=curves.cost[order],
        index=curves.index[order],
    )


def total(curves: Curves, state: State, values: Floats) -> float:
    """The sum of an option value over the cover."""
    return float(values[state.pick[curves.tree.taken(state.split)]].sum())


@dataclass(frozen=True, eq=False)
class _Priced:
    value: float  # least priced sum
    state: State  # the lightest of the (nearly) best covers
    cost: float
    weight: float
    heaviest: Ints  # per node: the heaviest of the (nearly) best options
    best: Floats  # per node: its own least priced option
    least: Floats  # per node: the lesser of that and its children's


def _price(curves: Curves, on_cost: float, on_weight: float) -> _Priced:
    """Minimise `on_cost * cost + on_weight * weight` over covers."""
    tree, start = curves.tree, curves.start
    priced = on_cost * curves.cost + on_weight * curves.weight
    best = np.minimum.reduceat(priced, start[:-1])
    tied = np.flatnonzero(priced <= (best + TIE * np.abs(best))[curves.node])
    pick = tied[np.searchsorted(tied, start[:-1])]
    heaviest = tied[np.searchsorted(tied, start[1:]) - 1]

    least, weight = best.copy(), curves.weight[pick]
    split = np.zeros(len(best), dtype=bool)
    for depth in range(len(tree.levels) - 1, 0, -1):
        inner, inner_weight = tree.children_sum(least, depth), tree.children_sum(weight, depth)
        near = TIE * np.abs(best)
        lighter = (inner <= best + near) & (inner_weight < weight)
        above = np.zeros(len(best), dtype=bool)
        above[tree.levels[depth - 1]] = True
        above &= tree.branching & ((inner < best - near) | lighter)
        split |= above
        least = np.where(above, inner, least)
        weight = np.where(above, inner_weight, weight)
    state = State(pick, split)
    roots = tree.roots
    cost = total(curves, state, curves.cost)
    return _Priced(
        float(least[roots].sum()), state, cost, float(weight[roots].sum()), heaviest, best, least
    )


def lightest(curves: Curves) -> float:
    """The least weight of any cover."""
    return _price(curves, 0.0, 1.0).weight


def relax(curves: Curves, cap: float) -> Relaxation | None:
    """Solve the relaxation; None when even the lightest cover weighs more than `cap`."""
    free = _price(curves, 1.0, 0.0)
    if free.weight <= cap:
        return Relaxation(0.0, free.value, free.state, _excess(curves, free, 0.0))
    fits, heavy = _price(curves, 0.0, 1.0), free
    if fits.weight > cap:
        return None

    low, high = 0.0, np.inf  # prices known to be too low, and high enough
    price, at, bound = 0.0, free, free.value
    for step in range(200):
        bisect = step % 3 == 2 and low > 0.0 and high < np.inf
        cross = max((fits.cost - heavy.cost) / (heavy.weight - fits.weight), 0.0)
        crossing = fits.cost + cross * fits.weight
        # Bisection now and then keeps one of the two lines from standing still for long.
        trial = float(np.sqrt(low * high)) if bisect else cross
        here = _price(curves, 1.0, trial)
        if here.value - trial * cap >= bound:
            price, at, bound = trial, here, here.value - trial * cap
        if here.weight <= cap:
            fits, high = here, trial
        else:
            heavy, low = here, trial
        if not bisect and here.value >= crossing - TIE * abs(crossing):
            break
    state = _fill(curves, at, cap) if at.weight <= cap else fits.state
    return Relaxation(price, bound, state, _excess(curves, at, price))


def _fill(curves: Curves, at: _Priced, cap: float) -> State:
    """Use the slack on ties, in order: at the best price both ends of a tie cost the same."""
    slack, pick = cap - at.weight, at.state.pick.copy()
    taken = curves.tree.taken(at.state.split)
    extra = np.where(taken, curves.weight[at.heaviest] - curves.weight[pick], 0.0)
    for node in np.flatnonzero(extra > 0):
        if extra[node] <= slack:
            pick[node] = at.heaviest[node]
            slack -= extra[node]
    return State(pick, at.state.split)


def _excess(curves: Curves, at: _Priced, price: float) -> Floats:
    """Reduced costs: what forcing an option adds to g, with all else at its priced best."""
    tree = curves.tree
    detour = np.zeros(len(at.best))  # of going down to a node at all
    for depth in range(1, len(tree.levels)):
        inner = tree.children_sum(at.least, depth)
        below = tree.levels[depth]
        above = tree.parent[below]
        detour[below] = detour[above] + np.maximum(inner[above] - at.least[above], 0.0)
    priced = curves.cost + price * curves.weight
    return np.maximum(priced - at.least[curves.node], 0.0) + detour[curves.node]
