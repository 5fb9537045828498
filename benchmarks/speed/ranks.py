"""What a second rank is worth: 2 ranks × 1 thread against 1 rank × 1 thread on one machine.

    python -m benchmarks.speed.ranks [--shape "1k x 16"] [--blocks 2] [--tokens 64x512]
        [--repeats 5] [--ranks 2]

Two things are timed: the survey (both walks of `auto` and its statistics in the journal), and the
survey with the bids that follow it, which are shared out. Each repetition measures one rank and
then two on the same model, so that a busy machine disturbs both; the ratio is the median over the
repetitions. Half of the time is the best there is: what is above it are the sums over the ranks,
the first pass of each, and cores that are not quite free. Rows go to benchmarks/results/ranks.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.scale.memory import SHAPES, build
from rankine.engine.offer import measure
from rankine.engine.parts import seen_by, stage_targets
from rankine.engine.plan import driven
from rankine.engine.record import hardware, versions
from rankine.engine.run import open_run
from rankine.engine.stage import Stage, needed
from rankine.manners import show_bars
from rankine.ranks import Group, joined, launched
from rankine.recipe import Recipe
from rankine.statistics import survey

RESULTS = Path(__file__).resolve().parents[1] / "results" / "ranks.json"
#: The issue's bound on the survey.
BOUND = 0.65


def surveyed(stage: Stage) -> None:
    """Both walks; what they find goes to the journal, as in a run."""
    run = stage.run

    def keep(unit: str, tensors: dict[str, torch.Tensor]) -> None:
        run.journal.put("survey", unit, tensors)

    survey(run.walk(), needed(stage, stage.targets), lambda unit: None, keep)


PARTS: dict[str, Callable[[Stage], None]] = {"survey": surveyed, "survey and bids": measure}


def seconds(recipe: Recipe, group: Group, place: Path, part: Callable[[Stage], None]) -> float:
    """Wall time of a part of a run, from when all ranks are ready to when all are done."""
    method = driven(recipe.method, recipe.set)
    with open_run(recipe, output=place, group=group) as run:
        run.anatomy = seen_by(method, run)
        stage = Stage(run, method, 0, stage_targets(method, run.anatomy, recipe))
        group.barrier()
        start = time.perf_counter()
        part(stage)
        group.barrier()
        taken = time.perf_counter() - start
        run.forget()
    return taken


def measured(recipe: Recipe, place: Path, repeats: int, group: Group) -> dict[str, list[float]]:
    """Part → [seconds of one rank, of all] by turns, on every rank."""
    torch.set_num_threads(1)
    show_bars((False, False))
    found: dict[str, list[float]] = {name: [] for name in PARTS}
    for n in range(repeats):
        for name, part in PARTS.items():
            alone = group.first(lambda part=part: seconds(recipe, Group(), place / "one", part))
            both = seconds(recipe, group, place / "all", part)
            found[name] += [alone, both]
            if group.leads:
                print(f"{n + 1}: {name}: {alone:.2f} s, {both:.2f} s, {both / alone:.3f}")
    return found


def summary(times: list[float]) -> dict[str, object]:
    """Medians, and the ratio of each repetition."""
    one, both = times[::2], times[1::2]
    ratios = [b / a for a, b in zip(one, both, strict=True)]
    return {
        "one": round(statistics.median(one), 2),
        "all": round(statistics.median(both), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def start_ranks(arguments: list[str], ranks: int) -> None:
    """This file again, under torchrun, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "benchmarks.speed.ranks", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run(command, check=True, env=environment)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1k x 16", choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tokens", default="64x512")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not launched():
        with tempfile.TemporaryDirectory(prefix="rankine-ranks-") as scratch:
            build(replace(SHAPES[asked.shape], blocks=asked.blocks), Path(scratch) / "model")
            start_ranks([*sys.argv[1:], "--place", scratch], asked.ranks)
        return
    model = asked.place / "model"
    recipe = Recipe.of(model=str(model), tokens=asked.tokens, method=asked.method, keep=0.7)
    with joined() as group:
        found = measured(recipe, asked.place, asked.repeats, group)
    if not group.leads:
        return
    rows = {name: summary(times) for name, times in found.items()}
    for name, row in rows.items():
        print(f"{name}: {row['one']} s on one rank, {row['all']} s on {group.size}: {row['ratio']}")
    print(f"bound for the survey: {BOUND}")
    told = {k: getattr(asked, k) for k in ("shape", "blocks", "tokens", "method", "ranks")}
    row = {**told, **rows, "bound": BOUND, "hardware": hardware(), "versions": versions()}
    RESULTS.write_text(json.dumps(row, indent=1) + "\n")
    shutil.rmtree(model, ignore_errors=True)


if __name__ == "__main__":
    main()
