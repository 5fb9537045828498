"""Acceptance: what the user said the result must hold, on the figures measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankine import report
from rankine.errors import AcceptanceError, UserError, suggest
from rankine.recipe import Condition, Recipe
from rankine.report import figure, figures


def check_conditions(recipe: Recipe, dense: Mapping[str, Any] | None) -> None:
    """Raises UserError for a condition on a figure that the dense model has not: before any work.
    `dense` is its row; None: nothing is measured."""
    for condition in recipe.conditions():
        if dense is None:
            raise UserError(
                f"expected figures for --accept {condition.name}, found none measured: leave "
                "evaluate on"
            )
        if figure(dense, condition.name) is None:
            raise UserError(
                f'expected a figure "{condition.name}" for --accept, found none of that name; '
                f"{suggest(condition.name, list(figures(dense)))}"
            )


def unmet(conditions: Sequence[Condition], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the last row fails to hold, beside the dense model's figure; "" if it holds all."""
    dense = next((row for row in rows if row.get("kind") == "dense"), {})
    failed = []
    for condition in conditions:
        value = figure(rows[-1], condition.name)
        if value is None or not condition.holds(value):
            found = "none" if value is None else f"{value:.6g}"
            before = figure(dense, condition.name)
            beside = f" (dense {before:.6g})" if before is not None else ""
            bound = f"{condition.name} {condition.sign} {condition.bound:g}"
            failed.append(f"expected {bound}, found {found}{beside}")
    return "; ".join(failed)


def accept(recipe: Recipe, data: dict[str, Any], output: Path | None) -> None:
    """Raises AcceptanceError unless the measured result holds what was asked. Nothing is written
    to `output` then, but the report, beside it: how far off it was is worth knowing."""
    failed = unmet(recipe.conditions(), data["rows"])
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
