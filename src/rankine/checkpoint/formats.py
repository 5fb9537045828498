"""One verb over the ways out of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from rankine import own
from rankine.checkpoint.export import export_dense
from rankine.checkpoint.given import built, is_plain
from rankine.checkpoint.load import load
from rankine.checkpoint.onnx import export_onnx
from rankine.errors import UserError, suggest
from rankine.limits import allowing_pickles

FORMATS = ("dense", "onnx")


def export(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    to: str | None = None,
    into: Any = None,
    example_inputs: Any = None,
    force: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """Write a model for programs that do not know Rankine; returns what was written.

    - `model`: a checkpoint directory, or a module in memory (which stays as it is).
    - `to`: "onnx", a file for ONNX Runtime (the default for an output called *.onnx); "dense", an
      ordinary checkpoint directory. A plain module's holds its state dict in `model.safetensors`.
    - `into`: the architecture (a module, a factory, or "package.module:factory") that a directory
      of a plain module goes into.
    - `example_inputs`: of a plain module's ONNX: a tensor, a tuple of them, or a mapping of
      keywords (or what gives them, or its name); first dimensions become dynamic.
    - `allow_pickle`: weights in pickles are read, their tensors and no code.

    Raises UserError.
    """
    to = to or ("onnx" if Path(output).suffix == ".onnx" else "dense")
    if to not in FORMATS:
        raise UserError(f'unknown format "{to}"; {suggest(to, list(FORMATS))}')
    with allowing_pickles(allow_pickle):
        return _written(model, output, to, into, example_inputs, force)


def _written(
    model: str | Path | nn.Module,
    output: str | Path,
    to: str,
    into: Any,
    example_inputs: Any,
    force: bool,
) -> Path:
    if not isinstance(model, nn.Module) and into is not None and is_plain(model):
        model = load(model, into=built(into, "into"))
    if to == "dense":
        return export_dense(model, output, force=force)
    example = own.find(example_inputs, "example_inputs")
    example = example() if callable(example) else example
    return export_onnx(model, output, example, force=force)
