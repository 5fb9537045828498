"""What a command says on stderr: sentences for people or, with `--log-json`, one JSON object per
line for programs. All of it goes through `logging`; nothing here outlives the command."""

from __future__ import annotations

import datetime
import io
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

from rankine.limits import printable

OPTION = "--log-json"
#: Version of the objects.
SCHEMA = 1
#: Our records, and what other libraries write to stderr by themselves.
OURS, OTHERS = logging.getLogger("rankine"), logging.getLogger("stderr")


def without_option(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without `--log-json`, which may stand anywhere, and whether it was there."""
    rest = [argument for argument in arguments if argument != OPTION]
    return rest, len(rest) < len(arguments)


@contextmanager
def told(as_json: bool) -> Iterator[None]:
    """Inside, records reach stderr: in JSON those of every library (ours from INFO on), else our
    warnings and errors."""
    if not as_json:
        with _handled_by(Sentences(), OURS):
            yield
        return
    levels = {logger: logger.level for logger in (OURS, OTHERS)}
    for logger in levels:
        logger.setLevel(logging.INFO)
    try:
        with _handled_by(JsonLines(sys.stderr), logging.getLogger()):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def overheard(as_json: bool) -> Iterator[None]:
    """In JSON, what libraries write to stderr inside becomes records too."""
    if not as_json:
        yield
        return
    others = Lines()
    try:
        with redirect_stderr(others):
            yield
    finally:
        others.write("\n")


def is_json() -> bool:
    """Are we inside `told(as_json=True)`?"""
    return any(isinstance(handler, JsonLines) for handler in logging.getLogger().handlers)


def say(
    level: int, message: str, exc_info: BaseException | None = None, **fields: str | int
) -> None:
    """A record of the command itself; `fields` join the JSON object."""
    OURS.log(level, message, exc_info=exc_info, extra={"fields": fields})


class Sentences(logging.Handler):
    """For people: "rankine: ..." on whatever stderr is at the moment."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        kind = "warning: " if record.levelno < logging.ERROR else ""
        sentence = printable(" ".join(record.getMessage().split()))
        print(f"rankine: {kind}{sentence}", file=sys.stderr)


class JsonLines(logging.Handler):
    """For programs."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(logging.INFO)
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """One object on one line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "schema": SCHEMA,
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = logging.Formatter().formatException(record.exc_info)
        self.stream.write(json.dumps(line, default=str) + "\n")
        self.stream.flush()


class Lines(io.TextIOBase):
    """Stands for stderr: what is written to it becomes records, line by line."""

    def __init__(self) -> None:
        self.rest = ""

    def write(self, text: str) -> int:
        """A line is a record once it ends; a bar that is drawn again ends a line."""
        *whole, self.rest = re.split(r"[\r\n]", self.rest + text)
        for line in filter(str.strip, whole):
            OTHERS.info(line)
        return len(text)


@contextmanager
def _handled_by(handler: logging.Handler, logger: logging.Logger) -> Iterator[None]:
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
