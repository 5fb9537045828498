"""The honest table for terminals and model cards: what was kept, what it cost, how fast it runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rankine.acceptance import metrics
from rankine.limits import printable
from rankine.report import numbers as n
from rankine.report.verdict import dense_row

if TYPE_CHECKING:
    from rich.table import Table

GAP = 2  # spaces between columns


class Column(NamedTuple):
    """A column: its heading, how a row (and the dense row) fill it, and how dispensable it is."""

    title: str
    cell: Callable[[Mapping[str, Any], Mapping[str, Any]], str]
    drop: int  # columns with a larger number leave a narrow terminal first; 0 stays


def _speed(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    ratio = n.real(row.get("ratio_to_dense"))
    mine, other = n.real(row.get("tokens_per_second")), n.real(dense.get("tokens_per_second"))
    if ratio is None and mine is not None and other:
        ratio = mine / other
    return n.times(ratio)


def _interval(row: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    bounds = row.get("perplexity_interval")
    if not isinstance(bounds, Sequence) or len(bounds) != 2 or None in map(n.real, bounds):
        return n.UNKNOWN
    return f"{n.perplexity(bounds[0])}–{n.perplexity(bounds[1])}"


def _cost(row: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    if row.get("kind") == "dense":
        return n.UNKNOWN
    return n.change(row.get("perplexity"), dense.get("perplexity")) or n.UNKNOWN


def name_of(row: Mapping[str, Any]) -> str:
    """What a row is called."""
    return str(row.get("name") or row.get("method") or n.UNKNOWN)


def metric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The user's own figures, in the order in which rows bring them."""
    return list(dict.fromkeys(name for row in rows for name in metrics(row)))


def metric_column(name: str) -> Column:
    """A column for a figure of the user's."""
    return Column(name, lambda row, _: n.decimal(metrics(row).get(name), 4), 1)


QUALITY = (
    Column("model", lambda row, _: name_of(row), 0),
    Column("kept bits", lambda row, _: n.percent(row.get("keep")), 2),
    Column("on disk", lambda row, _: n.size(row.get("bytes")), 0),
    Column("perplexity", lambda row, _: n.perplexity(row.get("perplexity")), 0),
    Column("change", _cost, 4),
    Column("95 %", _interval, 7),
    Column("loss", lambda row, _: n.decimal(row.get("loss"), 4), 1),
    Column("accuracy", lambda row, _: n.percent(row.get("accuracy")), 3),
)
WORDS = {"True": "yes", "False": "no"}
ACCEPTED = Column("accepted", lambda row, _: WORDS.get(str(row.get("accepted")), n.UNKNOWN), 1)
SPEED = (
    Column("tokens/s", lambda row, _: n.rate(row.get("tokens_per_second")), 6),
    Column("vs dense", _speed, 5),
)


class Cells(NamedTuple):
    """Headings and text of the columns that are worth showing."""

    columns: list[Column]
    rows: list[list[str]]


def cells(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> Cells:
    """The table as text: without columns that are empty, and without the least important ones
    where `width` characters do not hold them all."""
    dense = dense_row(rows)  # type: ignore[arg-type]
    own = [metric_column(name) for name in metric_names(rows)]
    columns = (*QUALITY, *own, ACCEPTED, *SPEED)
    filled = {column: [column.cell(row, dense) for row in rows] for column in columns}
    known = {column for column, texts in filled.items() if any(t != n.UNKNOWN for t in texts)}
    # An unmeasured perplexity keeps its place, unless another figure of quality takes it.
    instead = own or any(row.get("loss") is not None for row in rows)
    shown = [
        column
        for column in columns
        if column in known or (column.drop == 0 and not (instead and column.title == "perplexity"))
    ]
    while width is not None and _width(shown, filled) > width:
        least = max(shown, key=lambda column: column.drop)
        if least.drop == 0:
            break
        shown.remove(least)
    texts = [[filled[column][i] for column in shown] for i in range(len(rows))]
    return Cells(shown, texts)


def _width(shown: Sequence[Column], filled: Mapping[Column, list[str]]) -> int:
    widths = [max([len(c.title), *map(len, filled[c])]) for c in shown]
    return sum(widths) + GAP * (len(shown) - 1)


def plain_table(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> str:
    """The table in plain text, at most `width` characters wide where that is possible.

    Everything is text: control characters in names (a terminal would obey them) are shown as ?.
    """
    shown, body = cells(rows, width)
    lines = [[c.title for c in shown], *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    texts = []
    for line in lines:
        parts = [
            text.ljust(wide) if i == 0 else text.rjust(wide)
            for i, (text, wide) in enumerate(zip(line, widths))
        ]
        texts.append(printable((" " * GAP).join(parts).rstrip(), stays=""))
    return "\n".join(texts)


def table(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> Table:
    """The same table for rich consoles; the dense row is set apart, baselines are dimmed."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown, body = cells(rows, width)
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, GAP - 1, 0, 0), show_edge=False)
    for i, column in enumerate(shown):
        out.add_column(column.title, justify="left" if i == 0 else "right", no_wrap=True)
    for row, line in zip(rows, body):
        style = {"baseline": "dim", "dense": "bold"}.get(str(row.get("kind")), "")
        out.add_row(*(Text(printable(text, stays="")) for text in line), style=style)
    return out


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same table in Markdown, for a model card."""
    shown, body = cells(rows)
    head = [markdown_text(c.title) for c in shown]
    rule = [":--", *["--:"] * (len(shown) - 1)]
    lines = [head, *[[markdown_text(text) for text in line] for line in body]]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no links, no cells, no lines of its own."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", text)
