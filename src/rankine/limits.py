"""Text from strangers, measured before it is believed: how long a file is, how deeply it nests,
how far its aliases unfold, and whether it holds characters that a terminal would obey."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import yaml

from rankine.errors import UserError

#: Bytes of the largest JSON read whole: the index of 100,000 tensors has 12 MB.
JSON_BYTES = 1 << 26
#: Bytes of the largest YAML, and the number of values in it once all aliases are written out.
YAML_BYTES = 1 << 20
YAML_VALUES = 10_000
#: Lists in objects in lists: configs of nested models have about ten.
DEPTH = 50


def read_text(path: Path, most: int) -> str:
    """A UTF-8 file of at most `most` bytes. Raises UserError for a longer one, for what is no
    regular file (a pipe would never end), and for one that cannot be read."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"expected a file at {path}, found something else")
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise UserError(f"expected to read {path}, found: {error.strerror or error}") from None
    if len(raw) > most:
        raise UserError(f"expected at most {most:,} bytes in {path}, found more")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"expected UTF-8 text in {path}, found the byte 0x{raw[error.start]:02x}, which is none"
        ) from None


def parse_json(text: str, where: object, *, any_text: bool = False) -> Any:
    """The value of a JSON text. Raises UserError for a damaged one, for nesting deeper than
    `DEPTH`, and (unless `any_text`) for control characters in names or values."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise UserError(f"expected JSON in {where}, found a damaged file: {error}") from None
    for leaf, depth in _leaves(value):
        if depth > DEPTH:
            raise _too_deep(where)
        if isinstance(leaf, str) and not any_text and printable(leaf) != leaf:
            raise UserError(
                f"expected names and values of printable characters in {where}, found {leaf!r:.60}"
            )
    return value


def _leaves(value: Any) -> Iterator[tuple[Any, int]]:
    """(value, depth) of everything inside, keys included; without recursion."""
    waiting = [(value, 0)]
    while waiting:
        found, depth = waiting.pop()
        yield found, depth
        if isinstance(found, dict):
            waiting += [(item, depth + 1) for pair in found.items() for item in pair]
        elif isinstance(found, list):
            waiting += [(item, depth + 1) for item in found]


def parse_yaml(text: str, where: object) -> Any:
    """The value of a YAML text, by the safe loader: no objects, only data. Raises UserError for a
    damaged one, for tags, for nesting deeper than `DEPTH`, and for more than `YAML_VALUES` values,
    each alias counted as all that it stands for."""
    try:
        _measure_yaml(text, where)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date of month 13
        line = str(error).splitlines()[0]
        raise UserError(f"expected YAML in {where}, found: {line}") from None


def _measure_yaml(text: str, where: object) -> None:
    if len(text) > YAML_BYTES:
        raise UserError(f"expected at most {YAML_BYTES:,} characters in {where}, found more")
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # anchor and values so far of each open collection
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes |= {anchor: total - before} if anchor else {}
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise UserError(f"expected aliases of values that are complete in {where}, found "
                                f"one of {event.anchor!r:.40}")  # fmt: skip
            total += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
        if (tag := getattr(event, "tag", None)) is not None:
            raise UserError(f"expected plain values in {where}, found the tag {tag!r:.60}")
        if len(opened) > DEPTH:
            raise _too_deep(where)
        if total > YAML_VALUES:
            raise UserError(
                f"expected at most {YAML_VALUES:,} values in {where}, aliases written out, found "
                "more"
            )


_pickles: ContextVar[bool] = ContextVar("pickles", default=False)


@contextmanager
def allowing_pickles(allowed: bool) -> Iterator[None]:
    """Inside, directories whose weights are pickles may be opened (if `allowed`)."""
    token = _pickles.set(allowed or _pickles.get())
    try:
        yield
    finally:
        _pickles.reset(token)


def pickles_allowed() -> bool:
    """Did the user say so?"""
    return _pickles.get()


def _too_deep(where: object) -> UserError:
    return UserError(f"expected at most {DEPTH} levels of nesting in {where}, found more")


def printable(text: str, stays: str = "\n\t") -> str:
    """The text with ? for characters that a terminal would act upon, but for those that `stays`
    names."""
    return "".join(c if c.isprintable() or c in stays else "?" for c in text)
