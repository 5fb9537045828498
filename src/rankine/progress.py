"""How far long work is: who does it counts its units, who wants to know listens. In between may
stand code of the user's, such as a task's `score`, so the listener comes with the context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """What a progress bar implements: a stage's name, its units done, its units in all."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def quiet(stage: str, done: int, total: int) -> None:
    """No bar."""


_listener: ContextVar[Progress] = ContextVar("progress", default=quiet)


@contextmanager
def heard(progress: Progress) -> Iterator[None]:
    """Inside, `progress` hears of what is counted."""
    token = _listener.set(progress)
    try:
        yield
    finally:
        _listener.reset(token)


def named(run: str, progress: Progress) -> Progress:
    """Progress whose stages say which of several runs they belong to: "svd 0.8, survey"."""

    def called(stage: str, done: int, total: int) -> None:
        progress(f"{run}, {stage}", done, total)

    return called


@contextmanager
def concerning(name: str) -> Iterator[None]:
    """Inside, stages say what they are about: "score" becomes "score dense"."""
    outer = _listener.get()

    def named(stage: str, done: int, total: int) -> None:
        outer(f"{stage} {name}", done, total)

    with heard(named):
        yield


def counted(items: Sequence[T], stage: str) -> Iterator[T]:
    """The items; each is a unit of `stage`, done when the next one is asked for."""
    tell, total = _listener.get(), len(items)
    if total:
        tell(stage, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        tell(stage, done, total)
