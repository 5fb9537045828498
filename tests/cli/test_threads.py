"""Threads: who decides their number, and a solver that stays quick beside a busy machine."""

import subprocess
import sys

import pytest

from rankine import threads

NAMES = (
    "OMP_WAIT_POLICY",
    "OMP_NUM_THREADS",
    "LOCAL_WORLD_SIZE",
    "PYTEST_XDIST_WORKER_COUNT",
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 8)


def test_default_is_all_cores_and_sleeping_threads():
    assert threads.settle() == 8
    assert threads.os.environ["OMP_NUM_THREADS"] == "8"
    assert threads.os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "PYTEST_XDIST_WORKER_COUNT"])
def test_workers_share_the_cores(monkeypatch, name):
    monkeypatch.setenv(name, "4")
    assert threads.settle() == 2
    monkeypatch.setenv(name, "64")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads.settle() == 1


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads.settle() == 5
    assert threads.os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert threads.settle(threads=3) == 3
    assert threads.os.environ["OMP_NUM_THREADS"] == "3"


#: Seconds of one weighted solve, the best of several: other jobs only ever add.
SOLVE = """
import time
import rankine
from rankine import threads
threads.settle()
import torch
from rankine.metric import Gram, Metric
from rankine.structures import LowRank
x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
w = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
def solve():
    start = time.perf_counter()
    LowRank(64).encode(w, Metric(inputs=Gram(x.T @ x / 1024)))
    return time.perf_counter() - start
solve()
print(min(solve() for _ in range(15)))
"""
BUSY = "while True: pass"


def seconds_of_a_solve():
    done = subprocess.run(
        [sys.executable, "-c", SOLVE], capture_output=True, text=True, check=True, timeout=100
    )
    return float(done.stdout)


@pytest.mark.process
@pytest.mark.slow
def test_the_solver_beside_a_busy_loop(monkeypatch):
    monkeypatch.undo()
    idle = seconds_of_a_solve()
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(threads.cores())]
    try:
        busy = seconds_of_a_solve()
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert busy <= 5 * idle
