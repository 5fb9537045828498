"""The options of `pytest --pyargs rankine.testing`. pytest loads this in every run on a machine
that has Rankine, so it imports nothing."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The method, its budgets and its knobs."""
    group = parser.getgroup("rankine", "rankine.testing: what every compression method must do")
    group.addoption(
        "--rankine-method",
        action="append",
        default=[],
        metavar="NAME",
        help="hold this method to it; may be repeated",
    )
    group.addoption(
        "--rankine-keep",
        action="append",
        type=float,
        default=[],
        metavar="SHARE",
        help="at this budget (default: 0.6 and 0.2); may be repeated",
    )
    group.addoption(
        "--rankine-set",
        action="append",
        default=[],
        metavar="KNOB=VALUE",
        help="with this knob; may be repeated",
    )
