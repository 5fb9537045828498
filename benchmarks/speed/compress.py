"""How far `svd_llm` is from its floor: what no implementation of it can leave out.

    python -m benchmarks.speed.compress [--shape 1.1b] [--blocks 4] [--tokens 64x512] [--threads 2]

The floor of a run is the sum of forward passes without hooks, X Xᵀ of each distinct input in the
dtype it is summed in, one eigendecomposition of each weight's smaller Gram, one Cholesky root of
each distinct input, and the bytes read and written. Parts are printed for both; the result goes to
benchmarks/results/compress.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.scale.memory import SHAPES, Shape, build
from rankine import compress
from rankine.anatomy import describe
from rankine.checkpoint import directory_bytes, open_model
from rankine.engine.given import task_of
from rankine.engine.record import hardware, versions
from rankine.engine.run import computing_copy
from rankine.recipe import Recipe
from rankine.statistics import Walk
from rankine.threads import settle

RESULTS = Path(__file__).resolve().parents[1] / "results" / "compress.json"
KEEP = 0.7


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def floor(directory: Path, recipe: Recipe, scratch: Path) -> dict[str, float]:
    """Seconds of each part of the floor."""
    parts = {"read and write": seconds(lambda: _through_disk(directory, scratch))}
    model, tokenizer, _ = open_model(str(directory))
    work, task = computing_copy(model), task_of(recipe, model, tokenizer)
    walk = Walk(work, describe(work), task, list(task.batches("calibration")))
    rows = sum(h.shape[0] * h.shape[1] for h in walk.hidden)
    parts["forward"] = sum(seconds(lambda b=b: walk.advance(b)) for b in walk.anatomy.blocks)
    at_once = walk.hidden[0].shape[0] * walk.hidden[0].shape[1]
    timed: dict[int, tuple[float, float]] = {}
    parts |= {"moments": 0.0, "roots": 0.0, "eigenvectors": 0.0}
    for block in walk.anatomy.blocks:
        widths = {w.reads: w.shape[1] for w in block.weights}
        for width in widths.values():
            if width not in timed:
                timed[width] = _moment(width, at_once)
            parts["moments"] += timed[width][0] * rows / at_once
            parts["roots"] += timed[width][1]
        parts["eigenvectors"] += sum(_eigenvectors(min(w.shape)) for w in block.weights)
    return parts


def _through_disk(directory: Path, scratch: Path) -> None:
    for file in directory.glob("*.safetensors"):
        data = file.read_bytes()
        (scratch / file.name).write_bytes(data[: int(KEEP * len(data))])


def _moment(width: int, rows: int) -> tuple[float, float]:
    """(seconds of X Xᵀ over `rows` positions in float64, seconds of a Cholesky root)."""
    x_tn = torch.randn(rows, width)
    h_nn = torch.eye(width, dtype=torch.float64)

    def add() -> None:
        x = x_tn.double()
        h_nn.addmm_(x.mT, x)

    add()
    return seconds(add), seconds(lambda: torch.linalg.cholesky(h_nn))


_KNOWN: dict[int, float] = {}


def _eigenvectors(n: int) -> float:
    if n not in _KNOWN:
        a = torch.randn(n, n, dtype=torch.float64)
        gram = a @ a.mT
        _KNOWN[n] = seconds(lambda: torch.linalg.eigh(gram))
    return _KNOWN[n]


def main() -> None:
    """Measure both, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1.1b", choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", default="64x512")
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(settle(asked.threads))
    shape: Shape = replace(SHAPES[asked.shape], blocks=asked.blocks)
    with tempfile.TemporaryDirectory(prefix="rankine-speed-") as place:
        model, output = Path(place) / "model", Path(place) / "out"
        build(shape, model)
        recipe = Recipe.of(model=str(model), tokens=asked.tokens, keep=KEEP, method="svd_llm")
        parts = floor(model, recipe, Path(place))
        start = time.perf_counter()
        result = compress(recipe=recipe, output=output, evaluate=False)
        taken = time.perf_counter() - start
        written = directory_bytes(output)[0]
    times = result.report["times"]
    ratio = taken / sum(parts.values())
    print(
        "floor   ", {k: round(v, 1) for k, v in parts.items()}, f"sum {sum(parts.values()):.1f} s"
    )
    print("measured", times, f"wall {taken:.1f} s, {written / 1e6:.0f} MB written")
    print(f"ratio    {ratio:.2f}")
    row = {
        "shape": asked.shape,
        "blocks": asked.blocks,
        "tokens": asked.tokens,
        "threads": torch.get_num_threads(),
        "floor": {k: round(v, 2) for k, v in parts.items()},
        "times": times,
        "seconds": round(taken, 2),
        "ratio": round(ratio, 3),
        "hardware": hardware(),
        "versions": versions(),
    }
    RESULTS.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
