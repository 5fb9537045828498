"""One verb over the ways out of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rankine.checkpoint.export import export_dense
from rankine.checkpoint.onnx import export_onnx
from rankine.errors import UserError, suggest

FORMATS: dict[str, Callable[..., Path]] = {"dense": export_dense, "onnx": export_onnx}


def export(
    where: str | Path, output: str | Path, *, to: str = "dense", force: bool = False
) -> Path:
    """Write a checkpoint for programs that do not know Rankine; returns what was written.

    `to`: "dense", an ordinary checkpoint directory; "onnx", a file for ONNX Runtime. Raises
    UserError.
    """
    if to not in FORMATS:
        raise UserError(f'unknown format "{to}"; {suggest(to, list(FORMATS))}')
    return FORMATS[to](where, output, force=force)
