"""From bids to a forest: read the curves, find the nesting, refuse what makes no sense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rankine.budget.bids import Bid
from rankine.budget.forest import Floats, Forest, Ints, Tree
from rankine.errors import UserError


def plant(bids: Sequence[Bid]) -> Forest:
    """Arrange bids in a forest and read their curves.

    Options that store more than dense are dropped: nothing grows.

    Raises:
        UserError: naming the target(s), when members overlap without being nested, the children
            of a target leave one of its members out, denominators disagree, a target bids twice,
            or bits, loss or scale is not a usable number.
    """
    bids = tuple(bids)
    twice = [target for target, n in Counter(bid.target for bid in bids).items() if n > 1]
    if twice:
        raise UserError(
            f"Every bid needs its own target id, but '{twice[0]}' bids twice. Put the options in "
            f"one bid, or give rivals for the same weights different ids."
        )
    node_of_bid, rivals, tree = _nest(bids)
    dense = np.array([bids[r[0]].dense_bits for r in rivals], dtype=np.int64)
    _agree(bids, rivals, dense, tree)
    return _read(bids, np.array(node_of_bid, dtype=np.int64), rivals, dense, tree)


def _nest(bids: tuple[Bid, ...]) -> tuple[list[int], tuple[tuple[int, ...], ...], Tree]:
    nodes: dict[frozenset[str], list[int]] = {}
    for i, bid in enumerate(bids):
        nodes.setdefault(frozenset(bid.members), []).append(i)
    sets, rivals = list(nodes), tuple(tuple(r) for r in nodes.values())
    node_of_bid = [0] * len(bids)
    for node, group in enumerate(rivals):
        for i in group:
            node_of_bid[i] = node

    # Largest sets first: then the innermost set seen so far around each member must be the same
    # for all members of a set, and is its parent. If it differs, two sets cross.
    parent = np.full(len(sets), -1, dtype=np.int64)
    depth = np.zeros(len(sets), dtype=np.int64)
    covered = np.zeros(len(sets), dtype=np.int64)
    innermost: dict[str, int] = {}
    for node in sorted(range(len(sets)), key=lambda n: -len(sets[n])):
        around = {innermost.get(member, -1) for member in sets[node]}
        if len(around) > 1:
            other = next(o for o in around if o >= 0 and not sets[node] <= sets[o])
            raise UserError(
                f"Targets must be nested or disjoint, but '{bids[rivals[node][0]].target}' and "
                f"'{bids[rivals[other][0]].target}' share only "
                f"{sorted(sets[node] & sets[other])}. Bid for one of the two."
            )
        parent[node] = around.pop()
        if parent[node] >= 0:
            depth[node] = depth[parent[node]] + 1
            covered[parent[node]] += len(sets[node])
        innermost.update(dict.fromkeys(sets[node], node))

    for node in range(len(sets)):
        if 0 < covered[node] < len(sets[node]):
            inside = (sets[n] for n in np.flatnonzero(parent == node))
            missing = sorted(sets[node].difference(*inside))
            raise UserError(
                f"Bids inside '{bids[rivals[node][0]].target}' can only win if they cover all its "
                f"members, but none covers {missing}. Add a bid for them; the dense option alone "
                f"will do."
            )
    levels = tuple(np.flatnonzero(depth == d) for d in range(int(depth.max(initial=0)) + 1))
    return node_of_bid, rivals, Tree(parent, levels, covered > 0)


def _agree(
    bids: tuple[Bid, ...], rivals: tuple[tuple[int, ...], ...], dense: Ints, tree: Tree
) -> None:
    """`keep` means something only if all bids count the same weights alike."""
    inner = np.zeros(len(dense), dtype=np.int64)
    np.add.at(inner, tree.parent[tree.parent >= 0], dense[tree.parent >= 0])
    for node, group in enumerate(rivals):
        first = bids[group[0]]
        for i in group[1:]:
            if bids[i].dense_bits != first.dense_bits:
                raise UserError(
                    f"'{first.target}' and '{bids[i].target}' cover the same weights, but their "
                    f"dense_bits are {first.dense_bits} and {bids[i].dense_bits}. Count 16 bits "
                    f"per weight in both."
                )
        if tree.branching[node] and inner[node] != dense[node]:
            raise UserError(
                f"'{first.target}' has dense_bits {dense[node]}, but the bids inside it add up to "
                f"{inner[node]}. Count 16 bits per weight in all of them."
            )


def _read(
    bids: tuple[Bid, ...],
    node_of_bid: Ints,
    rivals: tuple[tuple[int, ...], ...],
    dense: Ints,
    tree: Tree,
) -> Forest:
    counts = np.array([len(bid.options) for bid in bids], dtype=np.int64)
    first = np.concatenate(([0], np.cumsum(counts)[:-1])) if len(bids) else counts
    bits = np.array([o.bits for bid in bids for o in bid.options])
    raw = np.array([o.loss for bid in bids for o in bid.options], dtype=np.float64)
    scale = np.array([bid.scale for bid in bids], dtype=np.float64)
    bid = np.repeat(np.arange(len(bids)), counts)
    place = np.arange(len(bid)) - np.repeat(first, counts)
    _check(bids, bid, bits, raw, scale)
    loss = np.maximum(raw, 0.0) * scale[bid]
    bits = bits.astype(np.int64)

    kept = bits <= _ceiling(bids, bits, loss, first)[bid]
    bits, loss, bid, place = bits[kept], loss[kept], bid[kept], place[kept]
    node = node_of_bid[bid]
    step = np.diff(node) * 4 + np.sign(np.diff(bits)) * 2 + np.sign(np.diff(loss))
    if np.any(step < 0):  # most curves come sorted already
        order = np.lexsort((place, bid, loss, bits, node))
        bits, loss, bid, place = bits[order], loss[order], bid[order], place[order]
        node = node[order]
    start = np.searchsorted(node, np.arange(len(rivals) + 1))
    return Forest(bids, tree, rivals, dense, start, bits, loss, bid, place)


def _check(bids: tuple[Bid, ...], source: Ints, bits: NDArray, raw: Floats, scale: Floats) -> None:
    for i in np.flatnonzero(~np.isfinite(scale) | (scale < 0)):
        raise UserError(
            f"The scale of '{bids[i].target}' must be a finite number of at least 0, found "
            f"{scale[i]}. Check the probe or the statistics it came from."
        )
    for i in np.flatnonzero(~np.isfinite(raw)):
        raise UserError(
            f"The losses of '{bids[source[i]].target}' must be finite numbers, found {raw[i]}. "
            f"Check the statistics it was predicted from: a NaN or a constant activation does this."
        )
    if len(bits) and (bits.dtype.kind not in "iu" or bits.min() < 0):
        bid, found = next(
            (b, o.bits) for b in bids for o in b.options if o.bits < 0 or o.bits != int(o.bits)
        )
        raise UserError(
            f"The options of '{bid.target}' must store a whole number of bits of at least 0, "
            f"found {found}. "
            f"Count masks, indices and padding in full bits."
        )


def _ceiling(bids: tuple[Bid, ...], bits: Ints, loss: Floats, first: Ints) -> Ints:
    """Most bits a bid may take: those of its dense option, or 16 per weight if it has none.

    Which option is dense is read off the curve, as structures are opaque: the smallest lossless
    one that stores at least 16 bits per weight (a float32 model is dense at 32).
    """
    if not len(bids):
        return np.zeros(0, dtype=np.int64)
    none = np.iinfo(np.int64).max
    dense = np.array([bid.dense_bits for bid in bids], dtype=np.int64)
    per_option = np.repeat(dense, np.diff(np.append(first, len(bits))))
    lossless = np.where((loss == 0.0) & (bits >= per_option), bits, none)
    ceiling = np.minimum.reduceat(lossless, first)
    without = np.maximum(dense, np.minimum.reduceat(bits, first))
    return np.where(ceiling < none, ceiling, without)
