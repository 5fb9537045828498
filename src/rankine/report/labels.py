"""Puts names beside points so that none covers another: greedy, the first free side wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

CHARACTER = 6.6  # mean width in pixels at the charts' text size
HEIGHT = 15.0
REACH = 9.0  # from a point's centre to its label


class Box(NamedTuple):
    """Pixels, y growing upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Do the two overlap?"""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top


class Label(NamedTuple):
    """A name, its point's index, its offset from it in pixels, and how it is aligned."""

    text: str
    point: int
    dx: float
    dy: float
    align: str


def place(
    points: Sequence[tuple[float, float]], names: Sequence[str], width: float, height: float
) -> list[Label]:
    """Labels for points given in pixels, in order of importance; those without room are left out
    (the chart's tooltip and the table name them)."""
    taken = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    frame = Box(0, 0, width, height)
    labels = []
    for i, ((x, y), name) in enumerate(zip(points, names)):
        long = CHARACTER * len(name)
        for dx, dy, align in _SIDES:
            left = x + dx - {"left": 0.0, "center": long / 2, "right": long}[align]
            box = Box(left, y + dy - HEIGHT / 2, left + long, y + dy + HEIGHT / 2)
            inside = box.left >= frame.left and box.right <= frame.right
            inside = inside and box.bottom >= frame.bottom and box.top <= frame.top
            if inside and not any(box.meets(other) for other in taken):
                taken.append(box)
                labels.append(Label(name, i, dx, dy, align))
                break
    return labels


_SIDES = (
    (REACH, 0.0, "left"),
    (-REACH, 0.0, "right"),
    (0.0, 1.6 * REACH, "center"),
    (0.0, -1.6 * REACH, "center"),
    (REACH, REACH, "left"),
    (-REACH, -REACH, "right"),
    (REACH, -REACH, "left"),
    (-REACH, REACH, "right"),
)
