"""Verbs that take results elsewhere: export, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rankine import own
from rankine.cli import show
from rankine.cli.heavy import prepare
from rankine.cli.options import AllowPickle, Force, Json, Output, Threads
from rankine.cli.progress import bars
from rankine.errors import UserError

NAME = "PACKAGE.MODULE:NAME"
Model = Annotated[str, typer.Argument(metavar="DIR", help="a compressed checkpoint")]


def export(
    model: Model,
    to: Annotated[
        Literal["dense", "onnx"] | None,
        typer.Option(
            help="dense: an ordinary checkpoint; onnx: a file for ONNX Runtime  [default: onnx for "
            "an output *.onnx, else dense]"
        ),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(metavar=NAME, help="what builds the architecture that a plain DIR needs"),
    ] = None,
    example_inputs: Annotated[
        str | None, typer.Option(metavar=NAME, help="inputs of a plain module, for its ONNX")
    ] = None,
    output: Output = None,
    force: Force = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
) -> None:
    """Write a checkpoint for programs that do not know Rankine."""
    if output is None:
        raise UserError("expected an output, found none: add -o PATH")
    prepare()
    from rankine.checkpoint.formats import export

    with own.current_directory_importable(bool(into or example_inputs)):
        written = export(
            model,
            output,
            to=to,
            into=into,
            example_inputs=example_inputs,
            force=force,
            allow_pickle=allow_pickle,
        )
    show.lines("export", [f"wrote {written}"], {"output": str(written)}, json)


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="where to write")
    ] = Path("rankine-demo"),
    model: Annotated[str, typer.Option(metavar="MODEL", help="another model")] = "embedded",
    quick: Annotated[
        bool, typer.Option("--quick", help="one method, one size, little text")
    ] = False,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compress the embedded model with three methods at two sizes and show what it cost."""
    prepare(threads)
    from rankine.demo import demo

    with bars() as progress:
        report = demo(output, model=model, quick=quick, force=force, progress=progress)
    show.lines("demo", _shown(report, output), {"output": str(output), "report": report}, json)


def _shown(report: dict[str, Any], output: Path) -> list[str]:
    from rankine.report import plain_table

    lines = [plain_table(report["rows"]), *show.warnings(report)]
    for sample in report["samples"]:
        for when in ("before", "after"):
            lines += ["", f"{when}:", sample["prompt"] + sample.get(when, "")]
    return [*lines, "", f"wrote {output / 'report.html'}"]
