"""Progress with an estimate of the time left, on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rankine.cli import logs
from rankine.cli.interrupt import between_units
from rankine.progress import Progress, heard


@contextmanager
def bars() -> Iterator[Progress]:
    """One bar per stage on a terminal; elsewhere one line when a stage ends; with --log-json an
    object for each unit of work. Between units a signal ends the command (`cli.interrupt`)."""
    with between_units() as check, shown() as show:

        def progress(stage: str, done: int, total: int) -> None:
            show(stage, done, total)
            check()

        yield progress


@contextmanager
def shown() -> Iterator[Progress]:
    """The same without signals, for a verb that has nothing to resume; what is counted inside is
    shown (see `rankine.progress`)."""
    with _drawn() as progress, heard(progress):
        yield progress


@contextmanager
def _drawn() -> Iterator[Progress]:
    if logs.is_json():
        yield _recorded
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, disable=not console.is_terminal) as shown:
        running: dict[str, TaskID] = {}
        last = ("", 0, 0)

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal last
            if (stage, done, total) == last:  # a block without targets
                return
            last = (stage, done, total)
            if stage not in running:
                running[stage] = shown.add_task(stage, total=total)
            shown.update(running[stage], completed=done, total=total)
            if done >= total:  # called again, it is another run's stage and gets a new bar
                del running[stage]
                if not console.is_terminal:
                    console.print(f"{stage}: {done} of {total}", highlight=False)

        yield progress


def _recorded(stage: str, done: int, total: int) -> None:
    logs.say(logging.INFO, f"{stage}: {done} of {total}", stage=stage, done=done, total=total)
