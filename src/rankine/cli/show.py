"""Text for people, or one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rankine.errors import AcceptanceError
from rankine.limits import printable

#: Version of the JSON that every verb prints with --json.
SCHEMA = 1


def as_json(verb: str, data: Mapping[str, Any]) -> None:
    """One object on stdout; what is no number (a NaN) is null, as JSON has none."""
    from rankine.report.schema import clean

    print(json.dumps(clean({"schema": SCHEMA, "verb": verb, **data}), indent=2, allow_nan=False))


def lines(verb: str, text: Sequence[str], data: Mapping[str, Any], wants_json: bool) -> None:
    """Lines, or the data."""
    if wants_json:
        as_json(verb, data)
        return
    for line in text:
        print(printable(line))  # names of a stranger's model, and what it says


def table(headers: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns padded to the widest cell; those numbered in `right` flush right."""
    widths = [max(len(row[n]) for row in [headers, *cells]) for n in range(len(headers))]
    made = []
    for row in [headers, *cells]:
        padded = [
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        made.append("  ".join(padded).rstrip())
    return "\n".join(made)


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What a report warns of, a line each."""
    return [f"warning: {warning}" for warning in report.get("warnings", [])]


@contextmanager
def unaccepted(verb: str, wants_json: bool) -> Iterator[None]:
    """A result that was refused is shown all the same: how far off it was is worth knowing."""
    try:
        yield
    except AcceptanceError as error:
        if error.report is not None:
            rows(verb, error.report["rows"], wants_json)
        raise


def rows(verb: str, found: Sequence[Mapping[str, Any]], wants_json: bool) -> None:
    """The report's rows."""
    if wants_json:
        as_json(verb, {"rows": list(found)})
        return
    from rankine.report import plain_table

    print(plain_table(list(found)))
