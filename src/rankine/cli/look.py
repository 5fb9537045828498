"""Verbs that look: eval, inspect, generate, report, methods."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from rankine.cards import bibtex
from rankine.cli import known, show
from rankine.cli.heavy import prepare
from rankine.cli.options import AllowPickle, Json, Output, takes_recipe
from rankine.cli.progress import shown
from rankine.errors import UserError
from rankine.recipe import Recipe

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="a checkpoint directory")]


@takes_recipe(
    "model", "into", "evaluation", "eval_tokens", "text_column", "evaluate", "accept", "device",
    "dtype", "threads", "fused", "allow_pickle", file=False,
)  # fmt: skip
def evaluate(
    recipe: Recipe,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="a second model, on the same text")
    ] = None,
    json: Json = False,
) -> None:
    """Measure perplexity, accuracy, size and speed, and your own figures (--evaluate), alone or
    against another model."""
    prepare(recipe.threads)
    from rankine.engine.run import choose_device
    from rankine.evaluation.evaluate import evaluate

    with shown(), show.unaccepted("eval", json):
        found = evaluate(
            recipe.model,
            against=against,
            into=recipe.into,
            evaluate=recipe.evaluate,
            accept=recipe.accept,
            evaluation=recipe.evaluation,
            eval_tokens=recipe.eval_tokens,
            text_column=recipe.text_column,
            device=choose_device(recipe.device),
            dtype=recipe.dtype,
            fused=recipe.fused,
            allow_pickle=recipe.allow_pickle,
        )
    if json:
        show.as_json("eval", found)
        return
    show.rows("eval", found["rows"], json)
    if found["difference"] is not None:
        estimate, low, high = found["difference"]
        interval = "" if math.isnan(low) else f" (95 % {low:+.4f} to {high:+.4f})"
        print(f"\nlog-perplexity {estimate:+.4f}{interval} nats per token")


def inspect(directory: Directory, allow_pickle: AllowPickle = False, json: Json = False) -> None:
    """Say what a checkpoint is made of, without loading its weights."""
    from rankine.checkpoint.contents import inspect, lines

    found = inspect(directory, allow_pickle=allow_pickle)
    show.lines("inspect", lines(found), found, json)


@takes_recipe("model", "device", "dtype", "threads", "seed", "fused", "allow_pickle", file=False)
def generate(
    recipe: Recipe,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="what to continue")],
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="new tokens at most")] = 64,
    temperature: Annotated[
        float, typer.Option(metavar="NUMBER", min=0, help="0 takes the likeliest token")
    ] = 0.0,
    json: Json = False,
) -> None:
    """Continue a prompt."""
    prepare(recipe.threads)
    from rankine.checkpoint import open_model
    from rankine.engine.run import choose_device
    from rankine.evaluation.generation import draw
    from rankine.structures import fused

    model, tokenizer, _ = open_model(recipe.model, choose_device(recipe.device), recipe.dtype)
    if tokenizer is None:
        raise UserError(f"expected a tokenizer beside the model {recipe.model}, found none")
    if recipe.fused:
        fused(model)
    drawn = draw(
        model,
        tokenizer,
        prompt,
        new_tokens=max_tokens,
        temperature=temperature,
        seed=recipe.seed,
    )
    found = {"prompt": prompt, "text": drawn.text, "tokens": len(drawn.tokens)}
    show.lines("generate", [prompt + drawn.text], {**found, "problem": drawn.problem()}, json)


def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="what compress or demo wrote")
    ],
    output: Output = None,
    json: Json = False,
) -> None:
    """Write report.html again, or one page of several runs (-o DIR)."""
    from rankine.report import combine, read, write

    found = [read(directory) for directory in directories]
    if len(found) > 1 and output is None:
        raise UserError("expected an output for the page of several runs, found none: add -o DIR")
    first = directories[0]
    place = output or (first if first.is_dir() else first.parent)  # a report.json by itself
    place.mkdir(parents=True, exist_ok=True)
    write(combine(found) if len(found) > 1 else found[0], place)
    page = str(place / "report.html")
    show.lines("report", [f"wrote {page}"], {"output": page}, json)


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="one method's card")] = None,
    cite: Annotated[bool, typer.Option("--cite", help="BibTeX for NAME instead")] = False,
    json: Json = False,
) -> None:
    """List the methods, or show one with its knobs."""
    if name is None:
        if cite:
            raise UserError("expected the method to cite, found none: rankine methods NAME --cite")
        entries = [*known.catalogue().values(), *known.foreign().values()]
        cells = [[e["name"], e["family"], e["summary"]] for e in entries]
        text = show.table(("method", "family", "what it does"), cells)
        show.lines("methods", [text], {"methods": entries}, json)
        return
    entry = known.entry(name)
    if cite:
        found = bibtex(entry)
        show.lines("methods", [found], {"name": name, "bibtex": found}, json)
        return
    show.lines("methods", _card(entry), {"method": entry}, json)


def _card(entry: dict[str, Any]) -> list[str]:
    knobs = [(k["name"], k["type"], str(k["default"]), k["doc"]) for k in entry["knobs"]]
    facts = ("family", "takes", "needs", "gives", "after", "before")
    card = [entry["title"], f"{entry['reference']}: {entry['summary']}", ""]
    for fact in facts:
        value = entry[fact] if isinstance(entry[fact], str) else ", ".join(entry[fact] or ())
        card.append(f"{fact:8}{value or 'nothing'}")
    if knobs:
        card += ["", show.table(("knob (--set name=value)", "type", "default", ""), knobs)]
    return card
