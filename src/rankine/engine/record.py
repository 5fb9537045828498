"""The report's data: what was measured before, after, and beside."""

from __future__ import annotations

import copy
import datetime
import hashlib
import itertools
import math
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankine import report
from rankine.budget import Option
from rankine.checkpoint import directory_bytes
from rankine.engine import on_disk
from rankine.engine.check import measured_size
from rankine.engine.plan import Plan, tensor_bytes
from rankine.engine.run import Run, cast, computing_copy, threads_available
from rankine.engine.stage import Stage
from rankine.evaluation.generation import degenerate, sample
from rankine.evaluation.latency import decode_speed, measure_latency
from rankine.metric import Metric
from rankine.modules import module_at
from rankine.patch import Patch
from rankine.structures import Quantized, matrix
from rankine.structures.base import Structure

PLAIN_NOTE = "round to nearest, groups of 64; decoded at each call here, so no faster"
#: Points of a spectrum that the report keeps.
POINTS = 64
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
    plain = {f"int{bits} (plain)": plain_quantized(run, targets, bits) for bits in (8, 4)}
    models = {"dense": run.work, **{name: model for name, (model, _, _) in plain.items()}}
    figures = {name: dict(run.task.score(model)) for name, model in models.items()}
    if generates(run, run.work):
        for name, latency in measure_latency(models, fused=run.recipe.fused).items():
            figures[name]["tokens_per_second"] = latency.tokens_per_second
            figures[name]["ratio_to_dense"] = latency.speedup
    return figures, {name: sizes for name, (_, *sizes) in plain.items()}  # type: ignore[misc]


def before(report: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a report that `measure_before` gave: other methods on the same model share it."""
    rows = [row for row in report["rows"] if row["kind"] != "result"]
    samples = [{k: s[k] for k in ("prompt", "before")} for s in report["samples"]]
    sample_before = samples[0] if samples else None
    return {"rows": rows, "sample": sample_before, "bytes": report["bytes_before"]}


def plain_quantized(run: Run, paths: list[str], bits: int) -> tuple[nn.Module, int, float]:
    """(model, bytes on disk, keep) with round-to-nearest codes in place of every block weight."""
    structure = Quantized(bits, group=64)
    copied, patch = copy.deepcopy(run.work), Patch()
    weights = 0
    for path in paths:
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


def row(
    name: str,
    kind: str,
    found: Mapping[str, Any],
    *,
    bytes_: int,
    keep: float,
    method: str,
) -> dict[str, Any]:
    """One line of the honest table; figures that are not Rankine's own are the user's metrics."""
    own = {k: v for k, v in found.items() if k in report.FIGURES}
    metrics = {k: v for k, v in found.items() if k not in {*own, "tokens"}}
    return {
        "name": name,
        "kind": kind,
        "method": method,
        "keep": keep,
        "bytes": bytes_,
        **own,
        **({"metrics": metrics} if metrics else {}),
    }


def begin(run: Run, plan: Plan, stages: list[Stage], before: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the result's own figures."""
    from rankine import __version__

    last = stages[-1]
    size = measured_size(run.model, stages[0].targets)
    chain = run.recipe.chain()
    asked = run.recipe.budget(chain[last.number])
    return {
        "schema": report.SCHEMA,
        "rankine": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": None,
        "model": {
            "name": run.info.spec,
            "family": run.anatomy.family,
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "bytes": plan.bytes_before,
            "dtype": str(run.store_dtype).removeprefix("torch."),
        },
        "recipe": run.recipe.model_dump(mode="json", exclude_defaults=True),
        "fingerprints": fingerprints(run),
        "plan": plan.to_json(),
        "budget": {
            "asked": {
                k: v for k in ("keep", "size", "bits") if (v := getattr(asked, k, None)) is not None
            },
            "keep": size.keep,
            "bits": size.per_weight,
            "size": None,
            "note": getattr(asked, "note", "") or None,
        },
        "rows": list(before.get("rows", [])),
        "targets": [entry for stage in stages for entry in target_entries(stage)],
        "bytes": bytes_by_role(run),
        "bytes_before": dict(before.get("bytes", {})),
        "samples": [dict(before["sample"])] if before.get("sample") else [],
        "hardware": hardware(),
        "versions": versions(),
        "times": {k: round(v, 2) for k, v in run.times.items()},
        "warnings": [*run.warnings, *getattr(run.task, "notes", [])],
        "result": {
            "method": " → ".join(stage.method for stage in chain),
            "knobs": last.method.knobs(),
        },
    }


def fingerprints(run: Run) -> dict[str, str]:
    """sha256 of the model, the calibration data and the recipe."""
    found = run.journal.fingerprint
    recipe = hashlib.sha256(found["recipe"].encode()).hexdigest()
    return {"model": found["model"], "data": found["data"], "recipe": recipe}


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
    found: dict[str, Any] = dict(run.task.score(computing))
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


def target_entries(stage: Stage) -> list[dict[str, Any]]:
    """One entry per target: what was chosen, what it is predicted to cost, its spectrum."""
    entries = []
    by_id = {bid.target: bid for bid in stage.bids}
    for target in stage.targets:
        option: Option = stage.choices[target.id]
        weight = target.weights[0]
        structure: Structure = option.structure
        bid = by_id[target.id]
        worst = max(o.loss for o in bid.options)
        entries.append(
            {
                "id": target.id,
                "path": weight.path,
                "role": weight.role,
                "block": weight.block,
                "shape": list(weight.shape),
                "structure": structure.to_json(),
                "rank": getattr(structure, "rank", None),
                "keep": option.bits / bid.dense_bits,
                "bits": option.bits,
                "loss": option.loss,
                "error": option.loss / worst if worst > 0 else 0.0,
                **_tail_points(bid.options),
            }
        )
    return entries


def _tail_points(options: tuple[Option, ...]) -> dict[str, list[float]]:
    """Singular values in the method's metric, from the differences of the curve's tails."""
    ranked = sorted(
        (o.structure.rank, o.loss)
        for o in options
        if getattr(o.structure, "rank", None) and not getattr(o.structure, "pivoted", False)
    )
    if len(ranked) < 3:
        return {"spectrum": [], "spectrum_ranks": []}
    steps = itertools.pairwise(ranked)
    values = [(r2, (max(l1 - l2, 0.0) / (r2 - r1)) ** 0.5) for (r1, l1), (r2, l2) in steps]
    kept = values[:: math.ceil(len(values) / POINTS)]
    top = max(v for _, v in values) or 1.0
    return {"spectrum": [v / top for _, v in kept], "spectrum_ranks": [float(r) for r, _ in kept]}


def bytes_by_role(run: Run) -> dict[str, int]:
    """Where the bytes of the compressed model are."""
    roles = {w.path: w.role for w in run.anatomy.weights}
    out: dict[str, int] = {}
    seen: set[int] = set()
    for name, tensor in run.model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        owner = next((p for p in roles if name.startswith(p + ".")), None)
        role = roles[owner] if owner else ("norms" if "norm" in name or "ln_" in name else "other")
        out[role] = out.get(role, 0) + tensor.numel() * tensor.element_size()
    return out


def hardware() -> dict[str, Any]:
    """The machine the figures were measured on."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": threads_available(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(data: dict[str, Any], directory: Path) -> None:
    """report.html and report.json."""
    report.write(data, directory)
