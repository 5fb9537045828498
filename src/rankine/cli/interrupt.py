"""SIGINT and SIGTERM stop a command behind the unit of work it is in; a second one stops it now."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
    """What was asked for by a signal; `exit_code` is 128 + its number, as shells count."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def between_units() -> Iterator[Callable[[], None]]:
    """Yields what is called between units of work: it raises StoppedError after a signal. In other
    threads than the main one, where signals do not arrive, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    arrived: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if arrived:
            raise StoppedError(number)
        arrived.append(number)

    def check() -> None:
        if arrived:
            raise StoppedError(arrived[0])

    old = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield check
        check()  # it came while the last unit ran
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
