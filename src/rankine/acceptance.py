"""The figures of a row of the honest table, and what they must hold to be accepted.

A row holds Rankine's own figures under their names, and the user's own under `metrics`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any, NamedTuple

from rankine.errors import UserError, suggest

#: What Rankine measures itself, beside size.
FIGURES = (
    *("perplexity", "perplexity_interval", "bits_per_byte", "accuracy", "loss"),
    *("tokens_per_second", "ratio_to_dense", "note"),
)
SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """The user's own figures of a row."""
    found = row.get("metrics")
    return {str(k): v for k, v in found.items()} if isinstance(found, Mapping) else {}


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a row by name; where two share one it is the user's."""
    found = {name: row.get(name) for name in (*FIGURES, "bytes", "keep")}
    found |= metrics(row)
    return {name: float(value) for name, value in found.items() if isinstance(value, Real)}


def figure(row: Mapping[str, Any], name: str) -> float | None:
    """One of them; None where it was not measured."""
    return figures(row).get(name)


class Condition(NamedTuple):
    """`name` `sign` `bound`, such as auc >= 0.8: what a measured figure must hold."""

    name: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises UserError on anything else."""
        found = re.fullmatch(r"\s*(\w[\w.@/ -]*?)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        bound = math.nan
        if found is not None:
            with suppress(ValueError):
                bound = float(found[3])
        if found is None or math.isnan(bound):  # which nothing holds
            raise UserError(
                f'expected accept as a figure and its bound, such as auc>=0.80, found "{text}"'
            )
        return cls(found[1], found[2], bound)

    def holds(self, value: float) -> bool:
        """NaN holds nothing."""
        return bool(SIGNS[self.sign](value, self.bound))


def check_measured(conditions: Sequence[Condition], row: Mapping[str, Any]) -> None:
    """Raises UserError for a condition on a figure that a measured row has not."""
    for name in (condition.name for condition in conditions):
        if figure(row, name) is None:
            raise UserError(
                f'expected a figure "{name}" for --accept, found none of that name; '
                f"{suggest(name, list(figures(row)))}"
            )


def unmet(conditions: Sequence[Condition], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the last row fails to hold, beside the dense model's figure; "" if it holds all."""
    dense = next((row for row in rows[:-1] if row.get("kind") == "dense"), {})
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
