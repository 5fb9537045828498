"""The report's data: what was asked, planned, chosen and stored, and on what machine."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import math
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rankine import report
from rankine.acceptance import FIGURES
from rankine.budget import Option
from rankine.engine.check import measured_size
from rankine.engine.plan import Plan
from rankine.engine.run import Run, processor, threads_available
from rankine.engine.stage import Stage
from rankine.evaluation.latency import peak_resident
from rankine.recipe import Recipe
from rankine.structures.base import Structure

#: Points of a spectrum that the report keeps.
POINTS = 64


def before(report: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a report that `measure_before` gave: other methods on the same model share it."""
    rows = [row for row in report["rows"] if row["kind"] != "result"]
    samples = [{k: s[k] for k in ("prompt", "before")} for s in report["samples"]]
    sample_before = samples[0] if samples else None
    return {"rows": rows, "sample": sample_before, "bytes": report["bytes_before"]}


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
    own = {k: v for k, v in found.items() if k in FIGURES}
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


def begin(
    run: Run,
    plan: Plan,
    stages: list[Stage],
    before: Mapping[str, Any],
    output: Path | None = None,
) -> dict[str, Any]:
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
        "command": command(run.recipe, output) if run.named and output else None,
        "model": {
            "name": run.info.spec,
            "family": run.anatomy.family,
            "parameters": plan.parameters,  # of the input: the run's model is smaller by now
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
        "hardware": {**hardware(), "peak": peak_resident()},
        "versions": versions(),
        "times": {k: round(v, 2) for k, v in run.times.items()},
        "warnings": [*run.warnings, *getattr(run.task, "notes", [])],
        "result": {
            "method": " → ".join(stage.method for stage in chain),
            "knobs": last.method.knobs(),
        },
    }


#: Recipe fields that say where the work is done, not what.
PLACES = ("work", "fresh", "force")


def command(recipe: Recipe, output: Path) -> str | None:
    """`rankine compress` with the options that make this recipe; None where no options can: a chain
    is a file, and functions or batches of the user's are objects."""
    words = []
    for name, value in changed(recipe, "model", *PLACES).items():
        if name == "stages" or not isinstance(value, str | int | float | tuple | dict):
            return None
        words += typed("--" + name.replace("_", "-"), value)
    return shlex.join(["rankine", "compress", recipe.model, *words, "-o", str(output)])


def changed(recipe: Recipe, *without: str) -> dict[str, Any]:
    """The fields that are not at their default."""
    defaults = {n: f.get_default(call_default_factory=True) for n, f in Recipe.model_fields.items()}
    found = {name: getattr(recipe, name) for name in defaults if name not in without}
    return {name: value for name, value in found.items() if value != defaults[name]}


def typed(option: str, value: Any) -> list[str]:
    """The words of one option, as the command line reads them."""
    if isinstance(value, bool):
        return [option] if value else [option, "no"]
    if isinstance(value, tuple):
        return [word for one in value for word in (option, str(one))]
    if isinstance(value, dict):
        return [word for knob, v in value.items() for word in (option, f"{knob}={_knob(v)}")]
    return [option, str(value)]


def _knob(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def fingerprints(run: Run) -> dict[str, str]:
    """sha256 of the model, the calibration data and the recipe."""
    found = run.journal.fingerprint
    recipe = hashlib.sha256(found["recipe"].encode()).hexdigest()
    return {"model": found["model"], "data": found["data"], "recipe": recipe}


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
                "blocks": sorted({w.block for w in target.weights}),
                "shape": list(target.shape),
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
        "processor": processor(),
        "cores": threads_available(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


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
