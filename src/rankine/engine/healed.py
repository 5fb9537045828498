"""What healing won: the teacher, the model before and after, on the same text."""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rankine import report
from rankine.checkpoint import directory_bytes
from rankine.discovery import get
from rankine.engine import figures, record
from rankine.engine.learn import Learned, Teacher
from rankine.engine.plan import tensor_bytes
from rankine.engine.run import Run
from rankine.evaluation.latency import decode_speed, measure_latency, peak_resident
from rankine.method import Learning
from rankine.patch import stored_bits
from rankine.recipe import Recipe
from rankine.report.schema import parse
from rankine.structures.bank import full_shape
from rankine.training.heal import standing

#: What an earlier report says of the model before it was compressed, and of how.
KEPT = ("model", "targets", "bytes", "bytes_before", "budget")
#: Steps whose mean loss the report keeps as one point.
CURVE = 50


def measure_before(run: Run, teacher: Teacher | None) -> dict[str, Any]:
    """Rows: the teacher, what an earlier report measured on the same text, the model as it is.
    A sample: the earlier report's, or the teacher's, or the model's own."""
    old = _earlier(run)
    kept = old.get("rows", []) if _same_text(run, old) else []
    rows = [row for row in kept if row.get("kind") != "result"]
    if teacher is not None:
        found = figures.scored(run, teacher.model, "teacher")
        name = f"{teacher.name} (teacher)"
        own = record.row(name, "dense", found, bytes_=teacher.bytes, keep=teacher.keep, method="")
        rows = [own, *_beside(own, rows)]
    directory = run.info.directory
    size = directory_bytes(directory)[0] if directory else tensor_bytes(run.model)
    rows.append(_row(run, _name(run), run.work, size))
    drawn = figures.sample_before(run, teacher.model if teacher is not None else run.work)
    return {"rows": rows, "samples": old.get("samples") or [s for s in (drawn,) if s]}


def _beside(teacher: Mapping[str, Any], old: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The earlier baselines, if the dense model they were made from scored as the teacher does."""
    dense = next((r for r in old if r.get("kind") == "dense"), {})
    pairs = ((dense.get(f), teacher.get(f)) for f in ("perplexity", "loss"))
    same = any(a and b and math.isclose(a, b, rel_tol=1e-3) for a, b in pairs)
    return [r for r in old if r.get("kind") != "dense"] if same else []


def _earlier(run: Run) -> dict[str, Any]:
    """The report that lies beside the model, if there is one; it may be a stranger's. Raises
    UserError where it is none."""
    directory = run.info.directory
    if directory is None or not (directory / "report.json").is_file():
        return {}
    return dict(parse(report.read(directory)))


def _same_text(run: Run, old: Mapping[str, Any]) -> bool:
    """Did the earlier report score the text that this one does?"""
    asked = Recipe.model_fields
    names = ("evaluation", "eval_tokens", "text_column")
    recipe = old.get("recipe", {})
    return all(recipe.get(n, asked[n].default) == getattr(run.recipe, n) for n in names)


def _name(run: Run) -> str:
    results = [r for r in _earlier(run).get("rows", []) if r.get("kind") == "result"]
    return str(results[-1].get("name") or run.info.name) if results else run.info.name


def _row(run: Run, name: str, model: nn.Module, size: int, **more: Any) -> dict[str, Any]:
    found = {**figures.scored(run, model, name), **more}
    kept = _kept(run)
    return record.row(name, "result", found, bytes_=size, keep=kept, method="heal")


def _kept(run: Run) -> float:
    """Stored bits ÷ 16 per weight of what stands compressed in the model."""
    found = standing(run.model, run.patch).modules
    paths = [p for p in found if not any(p.startswith(other + ".") for other in found)]
    weights = sum(math.prod(full_shape(run.model.get_submodule(p))) for p in paths)
    if not weights:
        return run.store_dtype.itemsize / 2
    return stored_bits(run.model, *paths) / (16 * weights)


#: Recipe fields that `rankine heal` has as options, but for those that are named otherwise there.
OPTIONS = {
    *("into", "tokens", "evaluation", "eval_tokens", "text_column", "forward", "loss", "evaluate"),
    *("accept", "device", "dtype", "threads", "seed", "allow_pickle"),
}


def command(
    recipe: Recipe, knobs: Mapping[str, Any], adapter: bool, output: Path | None
) -> str | None:
    """`rankine heal` with the options that ask for the same; None where no options can."""
    asked = record.changed(recipe, "model", "method", "calibration", "set", *record.PLACES)
    plain = all(isinstance(value, str | int | float | tuple) for value in asked.values())
    text = isinstance(recipe.calibration, str)
    if output is None or not (plain and text and asked.keys() <= OPTIONS):
        return None
    rest = dict(knobs)
    named = {name: rest.pop(name) for name in ("teacher", "mode") if name in knobs}
    words = ["rankine", "heal", recipe.model]
    words += ["--data", recipe.calibration] if recipe.calibration != "embedded" else []
    for name, value in {**named, **asked, **({"set": rest} if rest else {})}.items():
        words += record.typed("--" + name.replace("_", "-"), value)
    return shlex.join([*words, *["--adapter"] * adapter, "-o", str(output)])


def begin(
    run: Run,
    method: Learning,
    learned: Learned,
    before: Mapping[str, Any],
    said: str | None,
) -> dict[str, Any]:
    """The earlier report with the new rows; without one, what is known of the model. `said` is the
    command that asks for the same."""
    from rankine import __version__

    old = _earlier(run)
    model = {
        "name": run.info.name,
        "family": run.anatomy.family,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "bytes": tensor_bytes(run.model),
        "dtype": str(run.store_dtype).removeprefix("torch."),
    }
    means = [sum(part) / len(part) for part in _chunks(learned.losses, CURVE)]
    return {
        "model": model,
        "targets": [],
        "bytes": record.bytes_by_role(run),
        "bytes_before": {},
        "budget": {"asked": {}, "keep": _kept(run), "size": None, "note": None},
        **{name: old[name] for name in KEPT if old.get(name)},
        "rows": [],
        "samples": [],
        **before,
        "schema": report.SCHEMA,
        "rankine": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": said,
        "recipe": _recipe(run, method, learned),
        "fingerprints": record.fingerprints(run),
        "hardware": {**record.hardware(), "peak": peak_resident()},
        "versions": record.versions(),
        "times": {k: round(v, 2) for k, v in run.times.items()},
        "warnings": [*run.warnings, *getattr(run.task, "notes", [])],
        "result": {"method": "heal", "knobs": method.knobs()},
        "healing": {
            "steps": len(learned.losses),
            "loss": means,
            "steps_per_point": CURVE,
            "recipe_before": old.get("recipe") or None,
        },
    }


def _recipe(run: Run, method: Learning, learned: Learned) -> dict[str, Any]:
    """As asked for: knobs that differ from their defaults; `tokens` says what was trained on."""
    recipe = run.recipe.model_dump(mode="json", exclude_defaults=True)
    usual = get(method.name).knobs()
    recipe["set"] = {name: v for name, v in method.knobs().items() if v != usual[name]}
    length = getattr(run.task, "length", None)
    if length is not None and method.sequences is not None:
        recipe["tokens"] = f"{len(learned.losses) * method.sequences}x{length}"
    return recipe


def _speed(
    model: nn.Module, teacher: Teacher | None, rows: Sequence[dict[str, Any]], fused: bool
) -> dict[str, float]:
    """Decoding speed, in turn with the teacher's, whose row gets its own: on a busy machine only
    the ratio means something, so the healed model's figure is the teacher's times it."""
    if teacher is None:
        return {"tokens_per_second": decode_speed(model, fused=fused)}
    found = measure_latency({"teacher": teacher.model, "healed": model}, fused=fused)
    base, ratio = found["teacher"].tokens_per_second, found["healed"].speedup
    rows[0]["tokens_per_second"] = base
    return {"tokens_per_second": ratio * base, "ratio_to_dense": ratio}


def _chunks(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[n : n + size] for n in range(0, len(values), size)]


def add_after(
    run: Run,
    model: nn.Module,
    data: dict[str, Any],
    teacher: Teacher | None,
    size: int | None = None,
) -> None:
    """The healed model's row, a sample, and a warning where healing did harm."""
    if run.recipe.evaluate is False:
        return
    before = data["rows"][-1]
    speed: dict[str, float] = {}
    if figures.generates(run, model):
        speed = _speed(model, teacher, data["rows"], run.recipe.fused)
        figures.judge_output(run, model, teacher.model if teacher else None, data)
    size = size or before["bytes"]
    row = _row(run, f"{before['name']} healed", model, size, **speed)
    data["rows"].append(row)
    data["subject"] = row["name"]
    if row.get("perplexity", 0.0) > before.get("perplexity", math.inf):
        data["warnings"].append(
            "healing raised the held-out perplexity: train on text nearer to it, on more of it, or "
            "with a lower learning rate"
        )
