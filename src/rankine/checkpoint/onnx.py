"""ONNX: two matrix products per factored layer, for ONNX Runtime and the edge."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankine.checkpoint.beside import new_file
from rankine.checkpoint.load import load
from rankine.errors import UserError
from rankine.tasks.task import evaluating

#: Bytes of weights above which they go to a file beside (a protobuf ends at 2 GB).
EXTERNAL = 1 << 30


class _Logits(nn.Module):
    """A transformers model as a function of token ids that returns one tensor."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        takes_cache = getattr(model.config, "use_cache", None) is not None
        self.options = {"use_cache": False} if takes_cache else {}

    def forward(self, input_ids: Tensor) -> Tensor:
        out = self.model(input_ids=input_ids, **self.options)
        logits: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
        return logits


def export_onnx(
    model: str | Path | nn.Module,
    path: str | Path,
    example: Any = None,
    *,
    force: bool = False,
) -> Path:
    """Write a model (or the checkpoint in a directory) as an ONNX file; returns its path.

    transformers models take `input_ids` (batch, sequence; both dynamic) and return logits; any
    other module takes `example` (a tensor, a tuple of arguments, or a mapping of keywords), whose
    first dimensions are dynamic where they are those of the first tensor. Quantized codes are
    stored as they are and decoded in the graph. Weights beyond 1 GiB go to a file beside.

    Raises UserError when the onnx extra is missing or the file exists (unless `force`).
    """
    missing = [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]
    if missing:
        raise UserError(
            f"expected the package {missing[0]} for an ONNX export, found none: "
            'pip install "rankine[onnx]"'
        )
    with new_file(Path(path), force) as beside:
        module: nn.Module = load(model) if isinstance(model, str | Path) else model
        with evaluating(module):
            program = _without_shifts(_program(module, example))
        size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
        torch.onnx.export(program, (), beside, verbose=False, external_data=size > EXTERNAL)
    return Path(path)


def _program(model: nn.Module, example: Any) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    if not hasattr(getattr(model, "config", None), "to_dict"):
        if example is None:
            raise UserError(
                "expected an example input to export a plain torch module, found none: pass "
                "example_inputs= (--example-inputs package.module:name)"
            )
        return _plain(model, example, batch)
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    sequence = torch.export.Dim("sequence", min=2, max=positions)
    if example is None:
        example = torch.zeros(2, 8, dtype=torch.long)
    shapes = {"input_ids": {0: batch, 1: sequence}}
    return _exported(_Logits(model), (example,), {}, shapes)


def _plain(model: nn.Module, example: Any, batch: Any) -> torch.export.ExportedProgram:
    """Any module: every input whose first dimension is the batch is dynamic there."""
    keywords = dict(example) if isinstance(example, Mapping) else {}
    single = () if keywords else (example,)
    arguments = tuple(example) if isinstance(example, tuple | list) else single
    inputs = [*arguments, *keywords.values()]
    size = next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.ndim), None)

    def batched(x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == size

    def doubled(x: Any) -> Any:  # a batch of one would be taken for a constant
        return torch.cat([x, x]) if size == 1 and batched(x) else x

    shapes = [{0: batch} if batched(x) else None for x in inputs]
    return _exported(
        model,
        tuple(doubled(x) for x in arguments),
        {name: doubled(x) for name, x in keywords.items()},
        dict(zip(keywords, shapes, strict=True)) if keywords else tuple(shapes),
    )


def _exported(
    model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], shapes: Any
) -> torch.export.ExportedProgram:
    with torch.no_grad():
        model(*arguments, **keywords)  # fills what modules compute once: constants of the graph
        return torch.export.export(model, arguments, keywords, dynamic_shapes=shapes)


def _without_shifts(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """x >> k becomes x // 2^k: onnxscript shifts unsigned bytes as signed ones, which no runtime
    accepts."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.__rshift__.Scalar:
            node.target = torch.ops.aten.floor_divide.Scalar
            node.args = (node.args[0], 2 ** node.args[1])
    program.graph_module.recompile()
    return program
