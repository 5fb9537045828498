"""Rules that share a budget by a level that all targets have in common.

They read the same bids as `Knapsack` and serve as baselines and as the rules of published
systems. `Uniform` and `Entropic` give every target a size and take the best that fits it;
`Energy`, `Threshold` and `Ceiling` give every target a quality and take the smallest that reaches
it. Each has one level, set as high as the budget allows; what is then left of the budget stays
unused.

Where targets contain targets, a node competes with its children at the same level: by loss where
the level is a size, by bits where it is a quality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np

from rankine.budget.bids import Bid, Option
from rankine.budget.forest import Floats, Forest, Ints
from rankine.budget.planting import plant
from rankine.budget.relaxation import Curves, select, undominated


class Allocator(Protocol):
    """A rule that gives every target one option, within a budget."""

    def allocate(self, bids: Sequence[Bid], bits: int) -> dict[str, Option]:
        """Choose among `bids` so that the chosen options store at most `bits` together.

        Returns:
            The option of every chosen target. Every member of the bids is covered exactly once.

        Raises:
            BudgetError: when the smallest options together take more, stating how much.
            UserError: for bids that make no sense (see `Bid`).
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """Every target gets the same fraction of its dense bits, and takes the largest that fits.

    The fraction is the budget's. Only when a target offers nothing that small (its smallest
    option is then taken) does it fall, until the total fits.
    """

    def allocate(self, bids: Sequence[Bid], bits: int) -> dict[str, Option]:
        """See `Allocator.allocate`."""
        forest = plant(bids)
        if not bids:
            return {}
        roots = len(forest.tree.roots)
        return _by_size(forest, bits, lambda keep: np.full(roots, keep), forest.loss)


@dataclass(frozen=True)
class Energy:
    """One retained energy for all: the smallest option that keeps it.

    The energy an option retains is `1 - loss / reference`, the reference being the loss of the
    target's worst option (offer the zero option to normalise by everything there is to lose).
    Where losses are tails of squared singular values this is the rule of TRP and of PCA.
    """

    def allocate(self, bids: Sequence[Bid], bits: int) -> dict[str, Option]:
        """See `Allocator.allocate`."""
        forest = plant(bids)
        if not bids:
            return {}
        curves = undominated(forest)
        # Undominated options come by rising bits and falling loss, so the first is the worst.
        worst = np.maximum(curves.cost[curves.start[:-1]], 1e-300)
        energy = 1.0 - curves.cost / worst[curves.node]
        # An option is too small as soon as the level exceeds its energy; then the next is due.
        due = np.append(-np.inf, energy[:-1])
        due[curves.start[:-1]] = -np.inf
        return _by_quality(forest, curves, due, bits)


@dataclass(frozen=True)
class Threshold:
    """One threshold on the normalised marginal loss per bit: what falls below it is cut.

    On the lower convex hull of a target's curve every further step saves less loss per bit. The
    slopes are divided by the target's largest and compared across targets, as WeLore (2024, arXiv
    2407.11239) does with singular values.

    Attributes:
        power: exponent of the slopes. Where losses are tails of squared singular values, 0.5 makes
            them singular values.
    """

    power: float = 1.0

    def allocate(self, bids: Sequence[Bid], bits: int) -> dict[str, Option]:
        """See `Allocator.allocate`."""
        forest = plant(bids)
        if not bids:
            return {}
        curves = undominated(forest)
        corners, due = [], []
        for first, last in pairwise(curves.start):
            hull = first + _hull(curves.weight[first:last], curves.cost[first:last])
            slope = -np.diff(curves.cost[hull]) / np.diff(curves.weight[hull])
            corners.append(curves.index[hull])
            # A step is due once the threshold has come down to its slope; the first option always.
            normal = (slope / slope.max(initial=1e-300)) ** self.power
            due.append(np.append(-np.inf, -normal))
        hulls = select(forest, np.concatenate(corners))
        return _by_quality(forest, hulls, np.concatenate(due), bits)


@dataclass(frozen=True)
class Ceiling:
    """One ceiling for all: the smallest option whose loss stays below it.

    With probed losses this is the rank search of ASVD (2312.05821); with the largest normalised
    singular value that an option cuts, the threshold of WeLore (2407.11239). `Bid.scale` counts.
    """

    def allocate(self, bids: Sequence[Bid], bits: int) -> dict[str, Option]:
        """See `Allocator.allocate`."""
        forest = plant(bids)
        if not bids:
            return {}
        curves = undominated(forest)
        # An option is too small as soon as the ceiling comes down to its loss.
        due = np.append(-np.inf, -curves.cost[:-1])
        due[curves.start[:-1]] = -np.inf
        return _by_quality(forest, curves, due, bits)


@dataclass(frozen=True)
class Entropic:
    """Removed fractions by a softmax of scores, as MoDeGPT (ICLR 2025, arXiv 2408.09632).

    Maximising `sum_i w_i (s_i (1 - phi_i) + epsilon H(phi_i))` over removed fractions `phi_i` with
    a given mean gives `phi_i` proportional to `exp(-s_i / epsilon)`. The score `s_i` is
    `Bid.scale` (for example block influence: high is important) and the weight `w_i` is
    `dense_bits`. Fractions above `cap` are cut, and the excess goes to the others. The bids inside
    a target share its fraction.

    Attributes:
        epsilon: temperature, in units of the score; large values approach `Uniform`. "auto" is the
            smallest value that needs no cut.
        cap: largest fraction to remove from a target, unless the budget asks more of all.
    """

    epsilon: float | Literal["auto"] = 0.1
    cap: float = 0.8

    def allocate(self, bids: Sequence[Bid], bits: int) -> dict[str, Option]:
        """See `Allocator.allocate`."""
        forest = plant(bids)
        if not bids:
            return {}
        roots = forest.tree.roots
        score = np.array([forest.bids[forest.rivals[root][0]].scale for root in roots])
        weight = forest.dense[roots] / max(forest.dense_bits, 1)
        # `scale` is the score here, so rivals compare by their own losses.
        loss = np.array([max(forest.option(i).loss, 0.0) for i in range(len(forest.bits))])

        def kept(keep: float) -> Floats:
            return max(keep, 1.0) - self.removed(score, weight, max(1.0 - keep, 0.0))

        return _by_size(forest, bits, kept, loss)

    def removed(self, score: Floats, weight: Floats, mean: float) -> Floats:
        """Fractions to remove, with the weighted mean `mean`, at most `cap` where possible."""
        cap = max(self.cap, mean)
        if self.epsilon != "auto":
            return _capped(score / self.epsilon, weight, mean, cap)
        low, high = 1e-6, 1e6
        spread = float(np.ptp(score)) or 1.0
        for _ in range(100):
            middle = float(np.sqrt(low * high))
            free = _softmin(score / (middle * spread), weight, mean)
            low, high = (low, middle) if free.max() <= cap else (middle, high)
        return _capped(score / (high * spread), weight, mean, cap)


def _softmin(score: Floats, weight: Floats, mean: float) -> Floats:
    """Numbers proportional to exp(-score) with the given weighted mean."""
    raw = np.exp(score.min() - score)
    return raw * (mean / max(float(weight @ raw), 1e-300) * float(weight.sum()))


def _capped(score: Floats, weight: Floats, mean: float, cap: float) -> Floats:
    """The same, with what exceeds `cap` spread over the rest until nothing does."""
    removed = _softmin(score, weight, mean)
    full = np.zeros(len(score), dtype=bool)
    while np.any(new := (removed > cap) & ~full) and not np.all(full | new):
        full |= new
        removed[full] = cap
        rest = mean * weight.sum() - cap * weight[full].sum()
        share = max(rest, 0.0) / max(float(weight[~full].sum()), 1e-300)
        removed[~full] = _softmin(score[~full], weight[~full], share)
    return np.minimum(removed, cap)


def _by_size(
    forest: Forest, bits: int, fractions: Callable[[float], Floats], loss: Floats
) -> dict[str, Option]:
    """The largest options within a fraction of dense per root; rivals compare by loss."""
    by_bid = np.argsort(forest.bid, kind="stable")  # within a bid still by rising bits
    first = np.searchsorted(forest.bid[by_bid], np.arange(len(forest.bids) + 1))
    root = np.arange(len(forest.rivals))
    for level in forest.tree.levels[1:]:
        root[level] = root[forest.tree.parent[level]]
    place = np.searchsorted(forest.tree.roots, root)

    def choose(keep: float) -> list[int]:
        most = fractions(keep)[place] * forest.dense * (1 + 1e-12)  # 0.7 x 1600 is 1120
        picks = []
        for node, rivals in enumerate(forest.rivals):
            fits = [
                _largest(forest.bits, by_bid[first[i] : first[i + 1]], most[node]) for i in rivals
            ]
            picks.append(min(fits, key=lambda i: loss[i]))
        return forest.cover(picks, lambda i: (loss[i],))

    keep = bits / max(forest.dense_bits, 1)
    chosen = choose(keep)
    if forest.bits[chosen].sum() > bits:  # some targets offer nothing that small
        chosen = forest.cover(forest.start[:-1], lambda i: (forest.bits[i], loss[i]))
        if forest.bits[chosen].sum() > bits:
            forest.refuse(bits)
        low, high = 0.0, keep
        for _ in range(40):
            middle = (low + high) / 2
            trial = choose(middle)
            if forest.bits[trial].sum() <= bits:
                low, chosen = middle, trial
            else:
                high = middle
    return forest.allocation(chosen)


def _largest(bits: Ints, options: Ints, most: float) -> int:
    """The largest of a bid's options that fits, at equal bits the first; else the smallest."""
    sizes = bits[options]
    last = int(np.searchsorted(sizes, most, side="right")) - 1
    return int(options[np.searchsorted(sizes, sizes[max(last, 0)])])


def _by_quality(forest: Forest, curves: Curves, due: Floats, bits: int) -> dict[str, Option]:
    """Take on every curve the last option that is due, at the highest level that fits."""
    levels = np.unique(due)
    first = curves.start[:-1]

    def choose(level: float) -> list[int]:
        last = first + np.add.reduceat((due <= level).astype(np.int64), first) - 1
        return forest.cover(curves.index[last], lambda i: (forest.bits[i], forest.loss[i]))

    low, high = 0, len(levels)  # the first level means the smallest options
    chosen = choose(levels[0])
    if forest.bits[chosen].sum() > bits:
        forest.refuse(bits)
    while high - low > 1:
        middle = (low + high) // 2
        trial = choose(levels[middle])
        if forest.bits[trial].sum() <= bits:
            low, chosen = middle, trial
        else:
            high = middle
    return forest.allocation(chosen)


def _hull(x: Floats, y: Floats) -> Ints:
    """Corners of the lower convex hull of points with rising x and falling y."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return np.array(corners, dtype=np.int64)
