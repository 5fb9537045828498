"""How fast the knapsack is, and how close to the optimum.

    python benchmarks/speed/allocator.py [--layers 32] [--sizes 64] [--repeat 25] [--solver]

Bids like those of a 32-layer model with grouped queries: 7 matrices per layer, 63 ranks and dense
each, losses that are tails of decaying spectra times a sensitivity per layer. Prints, per budget,
the median time of `Knapsack().allocate` on bids that exist already, and the gap of its loss to the
bound of the relaxation; with --solver also to the bound HiGHS proves by branch and bound on the
whole instance (up to 20 s per budget).
"""

import argparse
import statistics
import sys
import time

import numpy as np

from rankine.budget import Bid, Knapsack, Option, total_bits, total_loss

SHAPES = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
KEEPS = (0.2, 0.4, 0.6, 0.8, 0.9)


def model(layers: int = 32, sizes: int = 64, seed: int = 0) -> list[Bid]:
    """One bid per matrix: `sizes - 1` ranks up to the break-even, and dense."""
    rng = np.random.default_rng(seed)
    bids = []
    for layer in range(layers):
        for role, (o, i) in SHAPES.items():
            j = np.arange(1, min(o, i) + 1)
            squares = j ** -rng.uniform(0.5, 1.5) * np.exp(-j / len(j) * rng.uniform(0, 4))
            sensitivity = rng.lognormal(0, 1) * (4 if layer in (0, layers - 1) else 1)
            squares *= sensitivity / squares.sum()
            tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
            even = o * i / (o + i)
            ranks = np.linspace(0.05 * even, 0.97 * even, sizes - 1).astype(int)
            options = [Option(int(r), 16 * int(r) * (o + i), float(tails[r])) for r in ranks]
            options.append(Option("dense", 16 * o * i, 0.0))
            name = f"{layer}.{role}"
            bids.append(Bid(name, (name,), tuple(options), 16 * o * i, group=role))
    return bids


def milliseconds(bids: list[Bid], bits: int, repeat: int) -> float:
    """Median time of one allocation."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        Knapsack().allocate(bids, bits)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def proven(bids: list[Bid], bits: int, seconds: float = 20.0) -> float:
    """The bound that HiGHS proves on the plain integer program, without any of our code."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    loss = np.array([bid.scale * o.loss for bid in bids for o in bid.options])
    share = np.array([o.bits / bits for bid in bids for o in bid.options])
    row = np.repeat(np.arange(len(bids)), [len(bid.options) for bid in bids])
    one = coo_array((np.ones(len(row)), (row, np.arange(len(row))))).tocsr()
    result = milp(
        loss,
        integrality=np.ones(len(loss)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(share[None, :], -np.inf, 1)],
        options={"time_limit": seconds, "mip_rel_gap": 1e-5},
    )
    return float(result.mip_dual_bound)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sizes", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=25)
    parser.add_argument("--solver", action="store_true", help="also ask HiGHS for its bound")
    options = parser.parse_args(arguments)

    bids = model(options.layers, options.sizes)
    dense = sum(bid.dense_bits for bid in bids)
    Knapsack().allocate(bids, dense)  # imports and caches are not what is measured
    print(f"{len(bids)} targets x {options.sizes} sizes")
    print("keep   median ms   gap to bound   budget used" + "   gap to HiGHS" * options.solver)
    for keep in KEEPS:
        bits = int(keep * dense)
        chosen = Knapsack().allocate(bids, bits)
        loss, bound = total_loss(bids, chosen), Knapsack().dual_bound(bids, bits)
        line = (
            f"{keep:.2f} {milliseconds(bids, bits, options.repeat):11.2f} "
            f"{loss / bound - 1:13.4%} {total_bits(chosen) / bits:13.5%}"
        )
        if options.solver:
            line += f" {loss / proven(bids, bits) - 1:14.4%}"
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
