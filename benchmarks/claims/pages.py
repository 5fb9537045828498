"""What docs say about claims: docs/claims.md, and the measured part of each method's page, both
from benchmarks/results/claims.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.claims.harness import RESULTS, ROOT

#: On a method's page what is measured stands between these.
BEGIN, END = "<!-- claims -->", "<!-- /claims -->"
DOCS = ROOT / "docs"

Found = dict[str, Any]


def pages() -> Iterator[tuple[Path, str]]:
    """(file, content) of every page that shows results."""
    rows = fullest()
    systems = sorted({row["system"] for row in rows})
    yield DOCS / "claims.md", "\n".join(_all_claims(rows, systems))
    for system in systems:
        page = DOCS / "methods" / f"{system}.md"
        text = page.read_text("utf-8") if page.exists() else ""
        if BEGIN not in text:
            raise SystemExit(f"expected the markers {BEGIN} and {END} in {page}")
        block = "\n".join(_of_method([row for row in rows if row["system"] == system]))
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        yield page, f"{before}{BEGIN}\n{block}\n{END}{after}"


def write(check: bool = False) -> int:
    """Write what is stale; with `check` only say so. 1 where something was and is."""
    stale = [(file, text) for file, text in pages() if _current(file) != text]
    if check and stale:
        names = ", ".join(str(file.relative_to(ROOT)) for file, _ in stale)
        print(f"stale: {names}; run python -m benchmarks.claims --docs")
        return 1
    for file, text in stale:
        file.write_text(text, "utf-8")
    return 0


def fullest() -> list[Found]:
    """The fullest row of each claim."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    found = {}
    for row in sorted(rows, key=lambda r: r["profile"] == "full"):
        found[(row["system"], row["claim"], row["budget"])] = row
    return list(found.values())


def _current(file: Path) -> str:
    return file.read_text("utf-8") if file.exists() else ""


def _all_claims(rows: list[Found], systems: list[str]) -> Iterator[str]:
    yield from (
        "# Claims, re-measured",
        "",
        "Generated from `benchmarks/results/claims.json` by `make claims`; the fullest measurement",
        "of each claim is shown. *assert* rows gate, *report* rows inform. A claim that fails is",
        "published as failed, with what was found. Most are measured on what comes with Python;",
        "`RANKINE_DATA` names the folder of data sets that the others need (SST-2, Wikipedia).",
        "",
    )
    for system in systems:
        yield f"## {system}"
        yield ""
        yield from _tables([row for row in rows if row["system"] == system])


def _of_method(rows: list[Found]) -> Iterator[str]:
    """The verdicts first, then how they were measured."""
    asserted = [row for row in rows if row["rule"] == "assert"]
    held = sum(row["holds"] for row in asserted)
    yield "## Measured"
    yield ""
    yield (
        f"{held} of {len(asserted)} asserted statements hold. Written by `make claims`; what the "
        "columns mean: [claims](../claims.md)."
    )
    yield ""
    yield from list(_tables(rows))[:-1]


def _tables(rows: list[Found]) -> Iterator[str]:
    """A table for each model and data, and what was found where a claim fails."""
    for place in dict.fromkeys((row["model"], row["data"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["data"]) == place]
        first = mine[0]
        yield (
            f"Model `{first['model']}`; {first['data']}; `{first['command']}`; "
            f"{first['hardware']['processor']}, {first['hardware']['threads']} threads; "
            f"{first['date']}."
        )
        yield ""
        yield "| claim | budget | baseline | value | 95 % interval | seeds | profile | verdict |"
        yield "|---|---|---|---|---|---|---|---|"
        yield from (_line(row) for row in mine)
        yield ""
        for row in mine:
            if row.get("why"):
                yield f"- *{row['claim']}* ({row['budget']}): {row['why']}"
        if any(row.get("why") for row in mine):
            yield ""


def _line(row: Found) -> str:
    interval = row["interval"]
    shown = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
    verdict = ("holds" if row["holds"] else "**fails**") + f" ({row['rule']})"
    note = f" ({row['note']})" if row["note"] else ""
    return (
        f"| {row['claim']}{note} | {row['budget']} | {row['baseline']} "
        f"{row['baseline_value']:.4g} | {row['value']:.4g} {row['unit']} | {shown} | "
        f"{len(row['seeds'])} | {row['profile']} | {verdict} |"
    )
