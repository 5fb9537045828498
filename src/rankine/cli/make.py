"""Verbs that make a model: plan, compress, compare, heal."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rankine.cli import known, show
from rankine.cli.heavy import prepare
from rankine.cli.launched import together
from rankine.cli.options import Json, Output, Timeout, takes_recipe
from rankine.cli.progress import bars
from rankine.errors import UserError
from rankine.ranks import TIMEOUT
from rankine.recipe import Recipe


@takes_recipe()
def plan(recipe: Recipe, json: Json = False) -> None:
    """Say what compress would do: size, memory, time, where the result runs. No work is done."""
    prepare(recipe.threads)
    from rankine.pipeline import plan

    made = plan(recipe=recipe)
    show.lines("plan", made.lines(), made.to_json(), json)


@takes_recipe()
def compress(
    recipe: Recipe, output: Output = None, timeout: Timeout = TIMEOUT, json: Json = False
) -> None:
    """Make a model smaller and write a directory that transformers loads, with a report."""
    if output is None:
        raise UserError("expected an output directory, found none: add -o DIR")
    prepare(recipe.threads)
    from rankine.pipeline import compress

    with bars() as progress, together(timeout) as group, show.unaccepted("compress", json):
        result = compress(output=output, recipe=recipe, progress=progress, group=group)
    written = f"wrote {output} (report: {output / 'report.html'})"
    text = [result.table(), *show.warnings(result.report), written]
    show.lines("compress", text, {"output": str(output), "report": result.report}, json)


@takes_recipe(without=("method", "keep", "size", "bits", "paper_ratio", "max_loss"), file=False)
def compare(
    recipe: Recipe,
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="methods to compare, by commas")
    ] = "svd,svd_llm,auto",
    keep: Annotated[str, typer.Option(metavar="X,Y", help="shares to keep, by commas")] = "0.8,0.6",
    output: Output = None,
    timeout: Timeout = TIMEOUT,
    json: Json = False,
) -> None:
    """Print the equal-budget table of several methods, with dense and int8/int4 beside them."""
    names, shares = _names(methods), _numbers(keep)
    for name in names:
        for share in shares:
            known.check(recipe.model_copy(update={"method": name, "keep": share}))
    prepare(recipe.threads)
    from rankine.pipeline import compare

    fields = {**recipe.given("model"), "methods": names, "keep": shares}
    with bars() as progress, together(timeout) as group, show.unaccepted("compare", json):
        rows = compare(recipe.model, output=output, progress=progress, group=group, **fields)
    show.rows("compare", rows, json)


@takes_recipe(
    "model", "into", "tokens", "evaluation", "eval_tokens", "text_column", "forward", "loss",
    "evaluate", "accept", "device", "dtype", "threads", "seed", "work", "fresh", "force",
    "allow_pickle", "set", file=False,
)  # fmt: skip
def heal(
    recipe: Recipe,
    teacher: Annotated[
        str | None, typer.Option(metavar="DENSE", help="the model before compression, as MODEL")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="training text or batches  [default: embedded]"),
    ] = None,
    mode: Annotated[
        Literal["factors", "lora", "all"],
        typer.Option(help="train the factors, LoRA merged into them, or every weight"),
    ] = "factors",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="with --mode lora: write a PEFT folder")
    ] = False,
    output: Output = None,
    json: Json = False,
) -> None:
    """Train a compressed model to win back what it lost; knobs (--set): `rankine methods heal`."""
    known.check_knobs("heal", recipe.set)
    if output is None:
        raise UserError("expected an output directory, found none: add -o DIR")
    prepare(recipe.threads)
    from rankine.engine.heal import heal

    fields = {**recipe.given("model", "set"), **recipe.set}
    with bars() as progress, show.unaccepted("heal", json):
        healed = heal(
            recipe.model,
            teacher=teacher,
            data=data,
            output=output,
            adapter=adapter,
            progress=progress,
            **{"mode": mode, **fields},
        )
    page = "" if adapter else f" (report: {output / 'report.html'})"
    text = [healed.table(), *show.warnings(healed.report), f"wrote {output}{page}"]
    show.lines("heal", text, {"output": str(output), "report": healed.report}, json)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("expected --methods with names by commas, such as svd,auto, found none")
    return names


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f'expected --keep with numbers by commas, such as 0.8,0.6, found "{text}"'
        ) from None
