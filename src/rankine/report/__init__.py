"""One self-contained page per run, its data as JSON, and the same table for terminals and cards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankine.report.card import cost
from rankine.report.compare import combine
from rankine.report.schema import FILE, SCHEMA, Report, dumps, read
from rankine.report.terminal import plain_table, table

__all__ = [
    "SCHEMA",
    "Report",
    "combine",
    "cost",
    "dumps",
    "html",
    "plain_table",
    "read",
    "table",
    "write",
]

PAGE = "report.html"


def html(data: Mapping[str, Any]) -> str:
    """The page; it opens offline and asks the network for nothing. Raises UserError."""
    from rankine.report.page import html as render  # Bokeh takes half a second to import

    return render(data)


def write(data: Mapping[str, Any], directory: str | Path) -> None:
    """Write report.html and report.json (NaN-free) into an existing directory."""
    directory = Path(directory)
    page = html(data)  # before anything is written
    (directory / FILE).write_text(dumps(data), encoding="utf-8")
    (directory / PAGE).write_text(page, encoding="utf-8")
