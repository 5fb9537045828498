"""Small instances, and the search through all covers that the allocators are compared with."""

import numpy as np
from hypothesis import strategies as st

from rankine.budget import Bid, Option


def bid(target, points, dense, members=None, scale=1.0, zero=True, **fields):
    """A bid from (bits, loss) points, with the dense option at the end."""
    options = [Option(f"{target}/{i}", *point) for i, point in enumerate(points)]
    options += [Option(f"{target}/dense", dense, 0.0)] if zero else []
    return Bid(target, members or (target,), tuple(options), dense, scale, **fields)


def covers(bids):
    """(bits, loss) of every cover of the forest, by exhaustive search.

    Written without the forest of the package: members are partitioned by trying every bid that
    covers the first one left.
    """

    def extend(left):
        if not left:
            return np.zeros(1), np.zeros(1)
        bits, loss = [], []
        for b in bids:
            if left[0] in b.members and set(b.members) <= set(left):
                rest_bits, rest_loss = extend(tuple(m for m in left if m not in b.members))
                for option in b.options:
                    bits.append(rest_bits + option.bits)
                    loss.append(rest_loss + b.scale * max(option.loss, 0.0))
        if not bits:
            return np.zeros(0), np.zeros(0)
        return np.concatenate(bits), np.concatenate(loss)

    # Trees share no members, so each is searched alone.
    total = (np.zeros(1), np.zeros(1))
    for members in _trees(bids):
        bits, loss = extend(members)
        total = tuple(np.add.outer(a, b).ravel() for a, b in zip(total, (bits, loss), strict=True))
    return total


def _trees(bids):
    trees = []
    for b in sorted(bids, key=lambda b: -len(b.members)):
        if not any(set(b.members) <= set(tree) for tree in trees):
            trees.append(b.members)
    return trees


def random_forest(rng):
    """Up to three trees of depth up to two, with rivals, ties and curves that are not monotone."""
    bids = []

    def points(dense):
        count = int(rng.integers(1, 4))
        return [
            (int(rng.integers(1, dense + 1)), float(np.round(rng.random() * 10, 1)))
            for _ in range(count)
        ]

    for t in range(int(rng.integers(1, 4))):
        leaves = tuple(f"t{t}.w{i}" for i in range(int(rng.integers(1, 4))))
        dense = 16 * len(leaves)
        if rng.random() < 0.6 or len(leaves) == 1:
            bids.append(bid(f"t{t}", points(dense), dense, leaves, float(rng.choice([0.5, 1, 2]))))
        if len(leaves) == 3 and rng.random() < 0.5:
            bids.append(bid(f"t{t}.pair", points(32), 32, leaves[:2]))
        for leaf in leaves if len(leaves) > 1 else ():
            bids.append(bid(leaf, points(16), 16))
            if rng.random() < 0.2:
                bids.append(bid(f"{leaf}.rival", points(16), 16, (leaf,)))
    return [bids[i] for i in rng.permutation(len(bids))]


@st.composite
def forests(draw):
    """The same, drawn by hypothesis."""
    return random_forest(np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
