"""Bids as a forest: which targets contain which, and all curves in flat arrays.

Bids that cover the same members are rivals and share a node. A node whose members contain those
of another is its ancestor. A *cover* takes, for every tree, the root whole or its children
(recursively), so that every member is covered exactly once. Nodes are numbered in the order in
which their first bid was given, which is also the order in which ties are broken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from rankine.budget.bids import Bid, Option
from rankine.errors import BudgetError, UserError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Tree:
    """The shape of a forest: who stands under whom."""

    parent: Ints  # of each node; -1 for a root
    levels: tuple[Ints, ...]  # nodes by depth, roots first
    branching: Bools  # has children

    @property
    def roots(self) -> Ints:
        return self.levels[0]

    def children_sum(self, values: Floats, depth: int) -> Floats:
        """For every node, the sum of `values` over its children, where those stand at `depth`."""
        below = self.levels[depth]
        sums = np.bincount(self.parent[below], weights=values[below], minlength=len(values))
        return sums.astype(np.float64, copy=False)

    def totals(self, own: Floats, split: Bools) -> Floats:
        """For every node, `own` where it is taken whole, and the sum of its children if split."""
        total = own.copy()
        for depth in range(len(self.levels) - 1, 0, -1):
            above = self.levels[depth - 1]
            above = above[split[above]]
            total[above] = self.children_sum(total, depth)[above]
        return total

    def taken(self, split: Bools) -> Bools:
        """The cover: nodes taken whole while all their ancestors are split."""
        active = self.parent < 0
        for level in self.levels[1:]:
            above = self.parent[level]
            active[level] = active[above] & split[above]
        return active & ~split


@dataclass(frozen=True, eq=False)
class Forest:
    """Bids, their tree, and their options sorted by node, then bits, then loss."""

    bids: tuple[Bid, ...]
    tree: Tree
    rivals: tuple[tuple[int, ...], ...]  # the bids of each node
    dense: Ints  # bits of each node at 16 per weight
    start: Ints  # the options of node n are start[n]:start[n + 1]
    bits: Ints
    loss: Floats  # scaled, negatives clamped to 0
    bid: Ints  # where an option came from: the bid ...
    place: Ints  # ... and its place in bid.options

    @property
    def dense_bits(self) -> int:
        return int(self.dense[self.tree.roots].sum())

    @property
    def node(self) -> Ints:
        return np.repeat(np.arange(len(self.rivals)), np.diff(self.start))

    def option(self, index: int) -> Option:
        return self.bids[self.bid[index]].options[self.place[index]]

    def seconds(self) -> Floats:
        """The second resource of every option.

        Raises:
            UserError: naming a target, when one of its options states none.
        """
        found = [self.option(i).seconds for i in range(len(self.bits))]
        for i, seconds in enumerate(found):
            if seconds is None or not np.isfinite(seconds) or seconds < 0:
                raise UserError(
                    f"With a limit in seconds every option must state its seconds, but one of "
                    f"'{self.bids[self.bid[i]].target}' has seconds={seconds}. Give seconds to "
                    f"all options or drop the limit."
                )
        return np.array(found, dtype=np.float64)

    def allocation(self, chosen: Sequence[int] | Ints) -> dict[str, Option]:
        """The choice as {target: option}, in the order of the bids."""
        order = sorted((int(self.bid[i]), int(i)) for i in chosen)
        return {self.bids[bid].target: self.option(i) for bid, i in order}

    def cover(
        self, picks: Sequence[int] | Ints, cost: Callable[[int], tuple[float, ...]]
    ) -> list[int]:
        """Resolve one pick per node into a cover: the cheaper of a node and its children.

        Args:
            picks: an option index for every node.
            cost: additive costs of an option, compared in order; a tie goes to the parent.

        Returns:
            The option indices of the nodes taken.
        """
        best = [(cost(int(i)), [int(i)]) for i in picks]
        for depth in range(len(self.tree.levels) - 1, 0, -1):
            below: dict[int, list[int]] = {}
            for child in self.tree.levels[depth]:
                below.setdefault(int(self.tree.parent[child]), []).append(int(child))
            for parent, children in below.items():
                costs = (best[c][0] for c in children)
                total = tuple(sum(column) for column in zip(*costs))
                if total < best[parent][0]:
                    best[parent] = (total, [i for c in children for i in best[c][1]])
        return [i for root in self.tree.roots for i in best[root][1]]

    def smallest_bits(self) -> int:
        """The fewest bits that any cover takes."""
        first = self.start[:-1]
        return int(sum(self.bits[i] for i in self.cover(first, lambda i: (self.bits[i],))))

    def refuse(self, bits: float) -> NoReturn:
        """Say that a budget is too small, and what would do.

        Raises:
            BudgetError: always.
        """
        least, dense = self.smallest_bits(), max(self.dense_bits, 1)
        enough = ceil(least / dense * 10_000) / 10_000
        raise BudgetError(
            f"The budget is {int(bits)} bits (keep {bits / dense:.4f}), but the smallest options "
            f"of all targets together take {least} bits (keep {least / dense:.4f}). "
            f"Raise the budget to keep {enough:.4f} or more, or let the targets offer smaller "
            f"options."
        )
