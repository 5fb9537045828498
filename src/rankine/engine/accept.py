"""Acceptance of a run: what the user said its result must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankine import report
from rankine.acceptance import check_measured, unmet
from rankine.errors import AcceptanceError, UserError
from rankine.recipe import Recipe


def check_conditions(recipe: Recipe, dense: Mapping[str, Any] | None) -> None:
    """Raises UserError for a condition on a figure that the dense model has not: before any work.
    `dense` is its row; None: nothing is measured."""
    if dense is not None:
        check_measured(recipe.conditions(), dense)
    elif recipe.accept:
        raise UserError(
            f"expected figures for --accept {recipe.accept[0]}, found none measured: leave "
            "evaluate on"
        )


def accept(recipe: Recipe, data: dict[str, Any], output: Path | None) -> None:
    """Raises AcceptanceError unless the measured result holds what was asked. Nothing is written
    to `output` then, but the report, beside it: how far off it was is worth knowing."""
    failed = unmet(recipe.conditions(), data["rows"])
    if recipe.accept:
        data["rows"][-1]["accepted"] = not failed
    if not failed:
        return
    if output is None:
        raise AcceptanceError(f"{failed}: keep more, or choose another method", data)
    place = output.with_name(f"{output.name}.report")
    place.mkdir(parents=True, exist_ok=True)
    report.write(data, place)
    raise AcceptanceError(
        f"{failed}: {output} was not written, the report is in {place}; keep more, or choose "
        "another method",
        data,
    )


def check_any(rows: Sequence[Mapping[str, Any]], accepts: Sequence[str] | str) -> None:
    """Raises AcceptanceError where none of a comparison's results holds what was asked."""
    results = [row for row in rows if row["kind"] == "result"]
    if not accepts or any(row["accepted"] for row in results):
        return
    asked = accepts if isinstance(accepts, str) else " and ".join(accepts)
    raise AcceptanceError(
        f"expected a result that holds {asked}, found none among {len(results)}: keep more, or "
        "compare other methods",
        {"rows": list(rows)},
    )
