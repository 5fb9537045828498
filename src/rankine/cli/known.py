"""The catalogue of methods as data: names, cards and knobs without importing torch, unless other
packages offer methods too.

`assets/catalogue.json` is generated from the methods themselves (`make docs`).
"""

from __future__ import annotations

import functools
import json
from importlib import metadata, resources
from typing import Any

from rankine.errors import UserError, suggest
from rankine.recipe import Recipe

ENTRY_POINTS = "rankine.methods"


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Name → card and knobs of every method that comes with Rankine."""
    text = resources.files("rankine").joinpath("assets/catalogue.json").read_text("utf-8")
    return {entry["name"]: entry for entry in json.loads(text)["methods"]}


@functools.cache
def foreign() -> dict[str, dict[str, Any]]:
    """The same of methods that other packages offer; importing them is how to know."""
    if not metadata.entry_points(group=ENTRY_POINTS):
        return {}
    from rankine.cards import entry
    from rankine.discovery import catalogue as everything

    found = {name: cls for name, cls in everything().items() if name not in catalogue()}
    return {name: entry(cls) for name, cls in found.items()}


def entry(name: str) -> dict[str, Any]:
    """One method's card and knobs; raises UserError for an unknown name."""
    found = catalogue().get(name) or foreign().get(name)
    if found is None:
        known = [*catalogue(), *foreign()]
        raise UserError(f'unknown method "{name}"; {suggest(name, known)}')
    return found


def check(recipe: Recipe) -> None:
    """Raises UserError for what can be known to be wrong before anything heavy is imported."""
    for stage in recipe.chain():
        check_knobs(stage.method, stage.set)
        asked = recipe.budget(stage) is not None or recipe.max_loss is not None
        if entry(stage.method)["sized"] and not asked:
            raise UserError(
                f"expected a budget for {stage.method}, found none: give one of --keep 0.7, "
                "--size 4GB, --bits 8, or --max-loss 1.02x"
            )


def check_knobs(method: str, knobs: dict[str, Any]) -> None:
    """Raises UserError for a knob that the method does not have."""
    names = [knob["name"] for knob in entry(method)["knobs"]]
    for name in knobs:
        if name not in names:
            tail = suggest(name, names) if names else "it has none"
            raise UserError(f'{method} has no knob "{name}"; {tail}')
