"""Several runs on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankine.acceptance import metrics
from rankine.errors import UserError
from rankine.report.schema import SCHEMA, Report, parse
from rankine.report.verdict import subject_row

#: Rows are comparable only where these agree.
SHARED = ("model", "data")


def combine(reports: Sequence[Mapping[str, Any]]) -> Report:
    """One report with the rows of all: the dense model and baselines once, then every result.

    The headline speaks of the result of the first run. Runs on another model or other held-out
    text than the first are kept, and a warning says that their figures do not compare. Raises
    UserError for no reports.
    """
    if not reports:
        raise UserError("expected at least one report to compare, found none")
    runs = [parse(data) for data in reports]
    first, rows, seen = runs[0], [], set()
    for row in (
        row
        for kind in ("dense", "baseline", "result")
        for r in runs
        for row in r["rows"]
        if (row.get("kind") or "result") == kind
    ):
        mark = repr((row.get("name"), row.get("method"), row.get("bytes"), *_quality(row)))
        if mark not in seen:
            seen.add(mark)
            rows.append(row)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "model": first["model"],
        "rows": rows,
        "subject": subject_row(first).get("name"),
        "warnings": [*dict.fromkeys(w for run in runs for w in run["warnings"]), *_strangers(runs)],
        "fingerprints": first["fingerprints"],
        **{key: first[key] for key in ("rankine", "created", "hardware") if first.get(key)},  # type: ignore[literal-required]
    }
    return parse(report)


def _quality(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row.get("perplexity"), row.get("loss"), *metrics(row).items()


def _strangers(runs: Sequence[Report]) -> list[str]:
    found = []
    for i, run in enumerate(runs[1:], start=2):
        for field in SHARED:
            mine, other = run["fingerprints"].get(field), runs[0]["fingerprints"].get(field)
            if mine and other and mine != other:
                found.append(
                    f"Run {i} has another {field} fingerprint than run 1: "
                    "their perplexities do not compare."
                )
    return found
