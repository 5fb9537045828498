"""How fast the knapsack is, and how close to the optimum.

    python benchmarks/speed/allocator.py            # writes results/allocator.json
    python benchmarks/speed/allocator.py --solver   # the same, with the bound of HiGHS

Bids like those of a 32-layer model with grouped queries: 7 matrices per layer, 63 ranks and dense
each, losses that are tails of decaying spectra times a sensitivity per layer. Prints, per budget,
the median time of `Knapsack().allocate` on bids that exist already, and the gap of its loss to the
bound of the relaxation; with --solver also to the bound HiGHS proves by branch and bound on the
whole instance (up to --seconds per budget).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from rankine.budget import Bid, Knapsack, Option, total_bits, total_loss

RESULTS = Path(__file__).resolve().parents[1] / "results" / "allocator.json"
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
    """Median time of one allocation: this process's own (it runs in one thread), so that another
    job's turns do not count."""
    times = []
    for _ in range(repeat):
        begin = time.process_time()
        Knapsack().allocate(bids, bits)
        times.append(1000 * (time.process_time() - begin))
    return statistics.median(times)


def proven(bids: list[Bid], bits: int, seconds: float) -> float | None:
    """The bound that HiGHS proves on the plain integer program, without any of our code; None
    where it proves none in that time."""
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
    return None if result.mip_dual_bound is None else float(result.mip_dual_bound)


def measure(bids: list[Bid], keep: float, repeat: int, seconds: float | None) -> dict[str, Any]:
    """One budget: median time, how far above each bound the loss is, how much was spent."""
    bits = int(keep * sum(bid.dense_bits for bid in bids))
    chosen = Knapsack().allocate(bids, bits)
    loss = total_loss(bids, chosen)
    bound = proven(bids, bits, seconds) if seconds is not None else None
    return {
        "keep": keep,
        "milliseconds": milliseconds(bids, bits, repeat),
        "gap": loss / Knapsack().dual_bound(bids, bits) - 1,
        "used": total_bits(chosen) / bits,
        "gap_to_solver": None if bound is None else loss / bound - 1,
    }


def conditions() -> dict[str, Any]:
    """When, on what, and how busy it was."""
    from rankine.engine.record import hardware, versions

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    busy = {"clock": "process_time", "load": os.getloadavg()[0]}
    return {"date": now, **hardware(), **busy, **versions()}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sizes", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=25)
    parser.add_argument("--solver", action="store_true", help="also ask HiGHS for its bound")
    parser.add_argument("--seconds", type=float, default=20.0, help="that HiGHS may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    bids = model(options.layers, options.sizes)
    Knapsack().allocate(bids, sum(bid.dense_bits for bid in bids))  # imports and caches
    print(f"{len(bids)} targets x {options.sizes} sizes")
    print("keep   median ms   gap to bound   budget used" + "   gap to HiGHS" * options.solver)
    rows = []
    for keep in KEEPS:
        row = measure(bids, keep, options.repeat, options.seconds if options.solver else None)
        line = f"{keep:.2f} {row['milliseconds']:11.2f} {row['gap']:13.4%} {row['used']:13.5%}"
        solver = "none in time" if row["gap_to_solver"] is None else f"{row['gap_to_solver']:.4%}"
        print(line + (f" {solver:>14}" if options.solver else ""), flush=True)
        rows.append(row)
    found = {**conditions(), "targets": len(bids), "sizes": options.sizes, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
