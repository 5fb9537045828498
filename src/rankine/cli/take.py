"""Verbs that take results elsewhere: export, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rankine.cli.options import Json, Output
from rankine.errors import UserError

Threads = Annotated[int | None, typer.Option(metavar="N", help="CPU threads")]


def export(
    model: Annotated[str, typer.Argument(metavar="DIR", help="a compressed checkpoint")],
    to: Annotated[
        Literal["dense", "onnx"],
        typer.Option(help="dense: an ordinary checkpoint; onnx: a file for ONNX Runtime"),
    ] = "dense",
    output: Output = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing output")] = False,
    json: Json = False,
) -> None:
    """Write a checkpoint for programs that do not know Rankine."""
    raise UserError("export is not wired yet")


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="where to write")
    ] = Path("rankine-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="fewer held-out tokens")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an existing output")] = False,
    json: Json = False,
) -> None:
    """Compress the embedded model with three methods at two sizes and show what it cost."""
    raise UserError("demo is not wired yet")
