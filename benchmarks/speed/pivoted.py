"""Which run-time form of a pivoted weight is faster here: rows gathered, or two plain factors.

    python -m benchmarks.speed.pivoted

Prints medians of interleaved runs per width, batch 1, keep 0.5.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from rankine.patch import Patch
from rankine.structures import LowRank
from rankine.structures import lowrank as forms


def seconds(module: nn.Module, x: torch.Tensor, below: int, repeats: int = 200) -> float:
    """Median time of one call with the given threshold."""
    forms.UNFOLD_BELOW = below
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        module(x)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


@torch.no_grad()
def main() -> None:
    """One line per width."""
    print("width   gathered   two factors   two factors / gathered")
    for width in (128, 256, 512, 1024, 2048, 4096):
        rank = int(0.5 * width / 2)
        model = nn.Sequential(nn.Linear(width, width, bias=False))
        structure = LowRank(rank, pivoted=True)
        b_or, a_ri = torch.randn(width, rank), torch.randn(rank, width)
        parts = structure.parts(b_or.double(), a_ri.double(), torch.float32)
        Patch.of("0", structure, parts).apply(model)
        x = torch.randn(1, width)
        both = [(seconds(model, x, 0, 50), seconds(model, x, 10**9, 50)) for _ in range(5)]
        gathered = statistics.median(a for a, _ in both)
        factors = statistics.median(b for _, b in both)
        times = f"{gathered * 1e6:8.1f} µs {factors * 1e6:10.1f} µs"
        print(f"{width:5d} {times} {factors / gathered:12.2f}")


if __name__ == "__main__":
    main()
