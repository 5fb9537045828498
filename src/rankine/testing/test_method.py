"""`pytest --pyargs rankine.testing --rankine-method NAME`: all checks on the methods named."""

from __future__ import annotations

from typing import Any

import pytest

from rankine.discovery import get
from rankine.errors import UserError
from rankine.method import Compressor
from rankine.testing.rows import Row
from rankine.testing.suite import MethodChecks

#: A usual size and a small one.
KEEP = (0.6, 0.2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One row per method and budget."""
    try:
        found = rows(metafunc.config)
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize("row", found, ids=lambda row: row.id)


def rows(config: pytest.Config) -> list[Row]:
    """What the options ask for; raises UserError for an unknown method or knob."""
    names: list[str] = config.getoption("--rankine-method")
    if not names:
        raise UserError("expected a method to test, found none: add --rankine-method NAME")
    knobs = assignments(config.getoption("--rankine-set"))
    budgets: list[float] = config.getoption("--rankine-keep") or list(KEEP)
    return [row for name in names for row in rows_of(name, knobs, budgets)]


def rows_of(name: str, knobs: dict[str, Any], budgets: list[float]) -> list[Row]:
    """Of one method; one row where the knobs fix the size."""
    method = get(name, knobs)
    if not isinstance(method, Compressor):
        raise UserError(f"expected a Compressor, found {name}, a method of {method.card.family}")
    if not method.sized:
        return [Row(name, None, knobs)]
    probes = type(method).allocate is not Compressor.allocate
    return [Row(name, keep, knobs, probes) for keep in budgets]


def assignments(texts: list[str]) -> dict[str, str]:
    """{"rank": "8"} of ["rank=8"]; the method's own types make the values."""
    pairs = (text.partition("=") for text in texts)
    return {name.strip(): value for name, _, value in pairs}


class TestMethod(MethodChecks):
    """All checks on all rows."""
