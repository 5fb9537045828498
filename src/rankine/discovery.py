"""Which methods there are, and how a name and knobs as users type them become one."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from rankine.errors import UserError, suggest
from rankine.method import Method, registered

ENTRY_POINTS = "rankine.methods"


def catalogue() -> dict[str, type[Method]]:
    """Every method: ours, those other packages offer (entry-point group `rankine.methods`), and
    what the process has registered since."""
    _import_methods()
    return registered()


@cache
def _import_methods() -> None:
    """Importing registers; packages are walked once per process."""
    package = importlib.import_module("rankine.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"rankine.methods.{module.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            owner = entry.dist.name if entry.dist else entry.value
            raise UserError(
                f"expected methods in {entry.value} of the package {owner}, found "
                f"{type(error).__name__}: {error}; repair or uninstall it"
            ) from error


def get(name: str | Method, knobs: Mapping[str, Any] | None = None) -> Method:
    """The method of that name with the given knobs; raises UserError on unknown ones."""
    if isinstance(name, Method):
        return dataclasses.replace(name, **_values(type(name), knobs or {}))
    known = catalogue()
    if name not in known:
        raise UserError(f'unknown method "{name}"; {suggest(name, list(known))}')
    return known[name](**_values(known[name], knobs or {}))


def _values(cls: type[Method], knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs as the method's own types."""
    name, fields = cls.card.name, {f.name: f for f in dataclasses.fields(cls)}
    for knob in knobs:
        if knob not in fields:
            raise UserError(f'{name} has no knob "{knob}"; {suggest(knob, list(fields))}')
    return {knob: convert(value, fields[knob], name) for knob, value in knobs.items()}


def convert(value: Any, field: dataclasses.Field[Any], owner: str) -> Any:
    """A knob's value as its type (command lines give strings); raises UserError."""
    kind = str(field.type)
    base = kind.replace(" | None", "")
    if "None" in kind and (value is None or str(value).lower() == "none"):
        return None
    listed = re.fullmatch(r"tuple\[(\w+), \.\.\.\]", base)
    try:
        if listed is not None:
            return tuple(PARSERS[listed[1]](item) for item in _parse_list(value))
        return PARSERS[base](value) if base in PARSERS else value
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"expected {owner}.{field.name} to be {base}, found {value!r:.80}"
        ) from None


def _parse_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        return value.split(",")
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    return list(value)


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise ValueError(value)


def _parse_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError(value)
    return int(value)


def _parse_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError(value)
    return number


def _parse_str(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str):
        raise ValueError(value)
    return str(value)


PARSERS: dict[str, Callable[[Any], Any]] = {
    "bool": _parse_bool,
    "int": _parse_int,
    "float": _parse_float,
    "str": _parse_str,
}
