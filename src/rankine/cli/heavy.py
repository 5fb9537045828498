"""What a command does before it imports torch and transformers."""

from __future__ import annotations

from rankine.manners import bars_shown, show_bars
from rankine.threads import settle


def prepare(threads: int | None = None) -> None:
    """Decide the threads, and leave stderr to our own progress and sentences."""
    settle(threads)
    _, downloads = bars_shown()
    show_bars((False, downloads))  # "Loading weights" lasts a moment and says nothing
