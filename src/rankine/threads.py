"""How many threads this process may use, and how they wait. Standard library only: it has to run
before torch is imported, as OpenMP reads the environment once, when it is loaded.

Idle OpenMP threads spin by default. Where another job wants the same cores, every small parallel
region then waits for a spinning thread to be scheduled away: a 256 x 256 eigendecomposition beside
a busy job took 2.9 s instead of 0.006 s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

#: Who tells a process that it shares the machine with its like: torchrun, pytest-xdist.
_WORKER_COUNTS = ("LOCAL_WORLD_SIZE", "PYTEST_XDIST_WORKER_COUNT")


def be_passive() -> None:
    """Let idle OpenMP threads sleep, unless the user chose (`OMP_WAIT_POLICY`)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def passive() -> Iterator[None]:
    """`be_passive` for an OpenMP that is loaded inside, and the environment as it was after it."""
    chosen = "OMP_WAIT_POLICY" in os.environ
    be_passive()
    try:
        yield
    finally:
        if not chosen:
            os.environ.pop("OMP_WAIT_POLICY", None)


def settle(threads: int | None = None) -> int:
    """Decide the number of threads and tell OpenMP; returns it. Call before torch is imported.

    `threads` wins over `OMP_NUM_THREADS`, which wins over cores / worker processes.
    """
    be_passive()
    if threads is None and os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"])
    count = threads or max(1, cores() // workers())
    os.environ["OMP_NUM_THREADS"] = str(count)
    return count


def cores() -> int:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def workers() -> int:
    """Processes of our kind on this machine, this one included."""
    counts = (os.environ.get(name, "") for name in _WORKER_COUNTS)
    return max([1, *(int(count) for count in counts if count.isdigit())])
