"""The user's own code: objects given in Python, or named as `package.module:name`.

Only what a user typed or handed over is ever imported or called; nothing here reads a checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any

from rankine.errors import UserError, suggest

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
#: How a recipe that is written down marks what was an object: such a mark cannot be read back.
MARK = re.compile(r"<.*>", re.DOTALL)


def is_name(value: Any) -> bool:
    """Is this "package.module:name"? (A hub data set "owner/name:config" has a slash.)"""
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def readable(text: str, what: str) -> str:
    """The text, unless it is the mark that `shown` left: then a UserError."""
    if MARK.fullmatch(text):
        raise UserError(
            f"expected {what} as package.module:name, found {text}, the mark of an object that was "
            "given in Python: give it again"
        )
    return text


def find(value: Any, what: str) -> Any:
    """The object itself, or the one that a name stands for. `what` says in errors what was wanted.

    Raises UserError where there is no such module or attribute; an error inside the user's module
    is the user's to see, with its traceback.
    """
    if not isinstance(value, str):
        return value
    if not is_name(value):
        raise UserError(f'expected {what} as package.module:name, found "{readable(value, what)}"')
    name, _, path = value.partition(":")
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f'expected {what} at {value}, found no module "{error.name}": run in the directory '
            "that holds it, or install it"
        ) from None
    for part in path.split("."):
        if not hasattr(found, part):
            known = [attribute for attribute in dir(found) if not attribute.startswith("_")]
            raise UserError(
                f'expected {what} at {value}, found no "{part}" there; {suggest(part, known)}'
            )
        found = getattr(found, part)
    return found


def function(value: Any, what: str) -> Any:
    """A function by itself or by name; None stays None. Raises UserError on anything else."""
    found = find(value, what)
    if found is not None and not callable(found):
        raise UserError(f"expected {what} to be a function, found {type(found).__name__}")
    return found


def iterable(value: Any, what: str) -> Iterable[Any]:
    """An iterable by itself, by name, or from a function (called without arguments). Raises
    UserError on anything else."""
    found = find(value, what)
    if callable(found) and not hasattr(found, "__iter__"):
        found = found()
    one = isinstance(found, str | Mapping) or hasattr(found, "shape")
    if one or not isinstance(found, Iterable):
        raise UserError(
            f"expected {what} to be an iterable of batches, found {type(found).__name__}: put it "
            "in a list if it is one batch"
        )
    return found


def shown(value: Any) -> Any:
    """What a recipe that is written down says of an object: "<function auc>", "<list>"."""
    if value is None or isinstance(value, str | bool):
        return value
    kind = "function" if hasattr(value, "__code__") else type(value).__name__
    return f"<{' '.join(filter(None, [kind, getattr(value, '__name__', '')]))}>"


def code(*functions: Any) -> str:
    """sha256 (hex) over what functions do, as far as their own bytecode, constants and defaults
    say it (not what they call): a resumed run knows by it that its loss was edited."""
    digest = hashlib.sha256()
    for value in functions:
        for part in _parts(value):
            digest.update(part.encode())
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, functools.partial):
        yield from _parts(value.func)
        yield _plain((value.args, sorted(value.keywords.items())))
    elif (found := getattr(value, "__code__", None)) is not None:
        yield from _bytecode(found)
        yield _plain(value.__defaults__)
    elif value is not None:
        yield f"{type(value).__module__}.{type(value).__qualname__} {_plain(value)}"


def _bytecode(found: CodeType) -> Iterator[str]:
    yield f"{found.co_code.hex()} {found.co_names}"
    for constant in found.co_consts:
        if isinstance(constant, CodeType):
            yield from _bytecode(constant)
        else:
            yield _plain(constant)


def _plain(value: Any) -> str:
    """Without addresses and the order of sets, which differ from process to process."""
    if isinstance(value, frozenset):
        return str(sorted(map(repr, value)))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


@contextmanager
def current_directory_importable(wanted: bool = True) -> Iterator[None]:
    """As with `python -m`, for the duration of the context."""
    here = os.getcwd()
    if not wanted or here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
