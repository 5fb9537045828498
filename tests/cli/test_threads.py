"""Threads: who decides their number. (What it is worth: tests/engine/test_busy.py.)"""

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
