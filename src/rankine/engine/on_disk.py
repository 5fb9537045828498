"""Figures of a model whose weights stay on the disk: scored block by block. Plain quantization is
applied to each weight as it comes into memory. Speed and samples want the whole model: none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rankine.anatomy import Weight
from rankine.checkpoint.streamed import Streamed
from rankine.engine.plan import tensor_bytes
from rankine.engine.run import Run
from rankine.metric import Metric
from rankine.modules import module_at
from rankine.progress import concerning
from rankine.structures import Quantized

NOTE = (
    "the model was measured from the disk, block by block: no speed and no sample here; "
    "`rankine eval` takes both on a machine that holds it"
)
#: Weights per scale of the plain baselines.
GROUP = 64
#: Rows that are rounded at a time.
ROWS = 256


def measured(run: Run) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[int, float]]]:
    """Figures of the dense model and the baselines by name; (bytes, keep) of the baselines."""
    run.warnings.append(NOTE)
    with concerning("dense"):
        figures = {"dense": dict(run.task.score(run.work))}
    sizes = {}
    for bits in (8, 4):
        name, structure = f"int{bits} (plain)", Quantized(bits, group=GROUP)
        if not (taken := _taken(run, structure)):  # an input all factors
            continue
        with concerning(name):
            figures[name] = _rounded(run, structure, taken)
        sizes[name] = _size(run, structure, taken)
    return figures, sizes


def _taken(run: Run, structure: Quantized) -> list[Weight]:
    """The plain weights of all blocks, as far as codes fill whole bytes."""
    return [
        w
        for w in run.anatomy.linears
        if w.block >= 0
        and w.shape[1] * structure.code_bits % 8 == 0
        and getattr(module_at(run.work, w.path), "structure", None) is None
    ]


def _rounded(run: Run, structure: Quantized, taken: Sequence[Weight]) -> dict[str, Any]:
    """The task's score with those weights rounded."""
    assert isinstance(run.weights, Streamed)
    turned = {f"{w.path}.weight": w.operator == "conv1d" for w in taken}

    def rounded(name: str, tensor: Tensor) -> Tensor:
        if name not in turned:
            return tensor
        for rows in (tensor.mT if turned[name] else tensor).split(ROWS):  # in place, by and by
            codes = structure.encode(rows.to(run.store_dtype), Metric())
            rows.copy_(structure.decode(codes))
        return tensor

    with run.weights.through(rounded):
        return dict(run.task.score(run.work))


def _size(run: Run, structure: Quantized, taken: Sequence[Weight]) -> tuple[int, float]:
    """(bytes on disk, keep) with those weights as codes."""
    bits = sum(structure.bits(w.shape, run.store_dtype) for w in taken)
    weights = sum(w.size for w in taken)
    other = tensor_bytes(run.model) - weights * run.store_dtype.itemsize
    return other + bits // 8, bits / (16 * max(weights, 1))
