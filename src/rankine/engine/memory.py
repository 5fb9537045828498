"""How much memory a run may use, and whether its model fits."""

from __future__ import annotations

from pathlib import Path

from rankine.budget import parse_size
from rankine.checkpoint import directory_bytes

#: Share of the free memory that a run plans with.
SHARE = 0.8

#: Peak of a run that keeps everything in memory, in sizes of a 16-bit checkpoint: four models at
#: a time, two of them in float32, and room to compute (8.1 measured).
COPIES = 8.5

#: Where Linux says what a container may use: limit and use, in both versions of cgroups.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available() -> int:
    """Bytes this process may still take: what the machine has free, what its container leaves."""
    found = [free for free in (_machine(), *(_left(*files) for files in CGROUPS)) if free]
    return min(found, default=1 << 62)


def fits(directory: Path, limit: str | None, ranks: int = 1) -> bool:
    """Can a run keep everything in memory: the model of a directory as stored and in float32, and
    beside them, when it measures, the dense model and the result once more? `limit`: what the user
    allows ("4GB"), else a share of what is free; so many `ranks` on this machine do it at once."""
    return bytes_fit(ranks * directory_bytes(directory)[0], limit)


def bytes_fit(stored: int, limit: str | None) -> bool:
    """The same of a checkpoint of so many bytes."""
    allowed = parse_size(limit, "memory") if limit is not None else int(SHARE * available())
    return footprint(stored) <= allowed


def footprint(stored: int) -> int:
    """Bytes that such a run takes, about."""
    return int(COPIES * stored)


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")), None)


def _left(limit: str, use: str) -> int | None:
    try:
        return max(int(Path(limit).read_text()) - int(Path(use).read_text()), 1)
    except (OSError, ValueError):  # not in a container, or without a limit ("max")
        return None
