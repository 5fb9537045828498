"""Verbs that look: eval, inspect, generate, report, methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankine.cli import known, show
from rankine.cli.options import Json, Output, takes_recipe
from rankine.errors import UserError
from rankine.recipe import Recipe

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="a checkpoint directory")]


@takes_recipe(
    "model", "evaluation", "eval_tokens", "text_column", "device", "dtype", "threads", "seed",
    file=False,
)  # fmt: skip
def evaluate(
    recipe: Recipe,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="a second model, on the same text")
    ] = None,
    json: Json = False,
) -> None:
    """Measure perplexity, accuracy, speed and memory, alone or against another model."""
    raise UserError("eval is not wired yet")


def inspect(directory: Directory, json: Json = False) -> None:
    """Say what a checkpoint is made of, without loading its weights."""
    from rankine.checkpoint.contents import inspect, lines

    found = inspect(directory)
    show.lines("inspect", lines(found), found, json)


def generate() -> None:
    """Continue a prompt."""
    raise UserError("generate is not wired yet")


def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="what compress or demo wrote")
    ],
    output: Output = None,
) -> None:
    """Write report.html again, or one page of several runs (-o DIR)."""
    from rankine.report import combine, read, write

    found = [read(directory) for directory in directories]
    if len(found) > 1 and output is None:
        raise UserError("expected an output for the page of several runs, found none: add -o DIR")
    place = output or directories[0]
    place.mkdir(parents=True, exist_ok=True)
    write(combine(found) if len(found) > 1 else found[0], place)
    print(f"wrote {place / 'report.html'}")


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="one method's card")] = None,
    json: Json = False,
) -> None:
    """List the methods, or show one with its knobs."""
    if name is None:
        entries = list(known.catalogue().values())
        cells = [[e["name"], e["family"], e["summary"]] for e in entries]
        text = show.table(("method", "family", "what it does"), cells)
        show.lines("methods", [text], {"methods": entries}, json)
        return
    entry = known.entry(name)
    show.lines("methods", _card(entry), {"method": entry}, json)


def _card(entry: dict[str, Any]) -> list[str]:
    knobs = [(k["name"], k["type"], str(k["default"]), k["doc"]) for k in entry["knobs"]]
    facts = ("family", "takes", "needs", "gives", "after", "before")
    card = [entry["title"], f"{entry['reference']}: {entry['summary']}", ""]
    for fact in facts:
        value = entry[fact] if isinstance(entry[fact], str) else ", ".join(entry[fact])
        card.append(f"{fact:8}{value or 'nothing'}")
    if knobs:
        card += ["", show.table(("knob (--set name=value)", "type", "default", ""), knobs)]
    return card
