"""What a run measures: the model before, the result after, plain quantization beside them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankine.checkpoint import directory_bytes
from rankine.engine import on_disk
from rankine.engine.plan import tensor_bytes
from rankine.engine.record import bytes_by_role, row
from rankine.engine.run import Run, cast, computing_copy
from rankine.evaluation.generation import degenerate, sample
from rankine.evaluation.latency import decode_speed, measure_latency
from rankine.metric import Metric
from rankine.modules import module_at
from rankine.patch import Patch
from rankine.progress import concerning, counted
from rankine.structures import Quantized, matrix
from rankine.structures.base import Structure

PLAIN_NOTE = "round to nearest, groups of 64; decoded at each call here, so no faster"
PROMPTS = ("def read_lines(path):\n    ", "class Stack:\n    def __init__(self", "import os\n")


def measure_before(run: Run) -> dict[str, Any]:
    """The dense model's row and those of plain int8 and int4, before anything is replaced. The
    three are timed interleaved: on a busy machine only ratios mean something."""
    figures, plain = (on_disk.measured if run.streamed else _measured)(run)
    size, keep = tensor_bytes(run.model), run.store_dtype.itemsize * 8 / 16
    rows = [row("dense", "dense", figures["dense"], bytes_=size, keep=keep, method="")]
    for name, (bytes_, kept) in plain.items():
        found = figures[name] | {"note": PLAIN_NOTE}
        rows.append(row(name, "baseline", found, bytes_=bytes_, keep=kept, method="rtn"))
    before = None if run.streamed else sample_before(run, run.work)
    return {"rows": rows, "sample": before, "bytes": bytes_by_role(run)}


def _measured(run: Run) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[int, float]]]:
    """Figures of the dense model and the baselines by name; (bytes, keep) of the baselines."""
    targets = [w.path for w in run.anatomy.linears if w.operator != "embedding"]
    made = {f"int{bits} (plain)": plain_quantized(run, targets, bits) for bits in (8, 4)}
    plain = {name: found for name, found in made.items() if found[2] > 0}  # an input all factors
    models = {"dense": run.work, **{name: model for name, (model, _, _) in plain.items()}}
    figures = {name: scored(run, model, name) for name, model in models.items()}
    if generates(run, run.work):
        for name, latency in measure_latency(models, fused=run.recipe.fused).items():
            figures[name]["tokens_per_second"] = latency.tokens_per_second
            figures[name]["ratio_to_dense"] = latency.speedup
    return figures, {name: sizes for name, (_, *sizes) in plain.items()}  # type: ignore[misc]


def scored(run: Run, model: nn.Module, name: str) -> dict[str, Any]:
    """The task's figures; `name` is what progress calls the model."""
    with concerning(name):
        return dict(run.task.score(model))


def plain_quantized(run: Run, paths: list[str], bits: int) -> tuple[nn.Module, int, float]:
    """(model, bytes on disk, keep) with round-to-nearest codes in place of every block weight."""
    structure = Quantized(bits, group=64)
    copied, patch = copy.deepcopy(run.work), Patch()
    weights = 0
    for path in counted(paths, f"int{bits}"):
        module = module_at(copied, path)
        w_oi = matrix(module).to(run.store_dtype)
        if isinstance(getattr(module, "structure", None), Structure) or w_oi.shape[-1] * bits % 8:
            continue
        patch |= Patch.of(path, structure, structure.encode(w_oi, Metric()))
        weights += w_oi.numel()
    upcast = {n: t.float() if t.is_floating_point() else t for n, t in patch.tensors.items()}
    replace(patch, tensors=upcast).apply(copied)
    other = tensor_bytes(run.model) - weights * run.store_dtype.itemsize
    return copied, other + patch.bits() // 8, patch.bits() / (16 * max(weights, 1))


def generates(run: Run, model: nn.Module) -> bool:
    """Is this a language model with its tokenizer?"""
    return run.tokenizer is not None and hasattr(model, "generate")


def measure_after(
    run: Run, saved: nn.Module, data: dict[str, Any], directory: Path | None = None
) -> None:
    """Add the result's row and sample, measured on what was written."""
    kept, method = data["budget"]["keep"], data["result"]["method"]
    weights = directory_bytes(directory)[0] if directory is not None else tensor_bytes(run.model)
    data["budget"]["size"] = weights
    computing = saved
    if (
        not run.streamed and next(saved.parameters()).device.type == "cpu"
    ):  # what the caller gets keeps its dtype
        computing = computing_copy(saved) if saved is run.model else cast(saved, torch.float32)
    found = scored(run, computing, "result")
    if generates(run, computing) and not run.streamed:
        dense = run.reopen_dense()
        found.update(speed_beside(dense, computing, data["rows"], run.recipe.fused))
        judge_output(run, computing, dense, data)
    data["rows"].append(
        row(f"{method} {kept:.2f}", "result", found, bytes_=weights, keep=kept, method=method)
    )
    data["times"] = {k: round(v, 2) for k, v in run.times.items()}


def speed_beside(
    dense: nn.Module | None, model: nn.Module, rows: list[dict[str, Any]], fused: bool = False
) -> dict[str, float]:
    """Decoding speed, interleaved with the dense model's where that can be opened again: the ratio
    is measured, tokens per second are the ratio times the dense row's."""
    if dense is None:
        return {"tokens_per_second": decode_speed(model, fused=fused)}
    both = measure_latency({"dense": dense, "result": model}, fused=fused)
    ratio = both["result"].speedup
    known = (r["tokens_per_second"] for r in rows if r["kind"] == "dense")
    base = next(known, both["dense"].tokens_per_second)
    return {"tokens_per_second": ratio * base, "ratio_to_dense": ratio}


def judge_output(run: Run, model: nn.Module, dense: nn.Module | None, data: dict[str, Any]) -> None:
    """A sample after, and a warning when the output has become degenerate."""
    if data["samples"]:
        data["samples"][0]["after"] = sample(model, run.tokenizer, PROMPTS[0])
    problem = degenerate(model, run.tokenizer, PROMPTS, dense=dense)
    if problem is not None:
        data["warnings"].append(problem)


def sample_before(run: Run, model: nn.Module) -> dict[str, str] | None:
    if not generates(run, model):
        return None
    return {"prompt": PROMPTS[0], "before": sample(model, run.tokenizer, PROMPTS[0])}
