"""The main job: plan → survey → allocate → solve → check → save."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from rankine import checkpoint, report
from rankine.anatomy import describe
from rankine.engine import check, record
from rankine.engine.learn import chain_teacher, learn
from rankine.engine.parts import seen_by, stage_targets
from rankine.engine.plan import Plan, driven, fixed_bytes, make_plan
from rankine.engine.run import Progress, Run, language_task, open_run, quiet
from rankine.engine.search import smallest_that_holds
from rankine.engine.solve import solve
from rankine.engine.stage import Stage, allocate, measure, offer
from rankine.method import Learning
from rankine.patch import Patch
from rankine.recipe import Recipe
from rankine.tasks import Task


@dataclass
class Result:
    """The compressed model, what stands where in it, and what it cost."""

    model: nn.Module
    patch: Patch
    report: dict[str, Any]
    output: Path | None = None
    stages: list[Stage] = field(default_factory=list)

    def table(self) -> str:
        """The honest table, as text."""
        return report.plain_table(self.report["rows"])


def compress(
    model: str | nn.Module | None = None,
    *,
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    task: Task | None = None,
    tokenizer: Any = None,
    evaluate: bool = True,
    before: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Result:
    """Make a model smaller.

    `model` is a hub id, a directory, "embedded", or any `nn.Module` (compressed in place; `task`
    says how to run it, or `tokenizer` makes it a language model). `fields` are the recipe's.
    `evaluate=False` measures nothing but sizes; `before` is the dense model's and the baselines'
    part of an earlier report, so that they are not measured twice. Raises UserError with one
    sentence.
    """
    recipe = complete(recipe, model, fields)
    if recipe.max_loss is not None:
        return smallest_that_holds(compress, recipe, model, output, progress, task, tokenizer)
    place = Path(output) if output is not None else None
    if place is not None:
        checkpoint.check_output(place, recipe.force)
    with open_run(recipe, model, task, tokenizer, progress or quiet, place) as run:
        plan = make_plan(recipe, run.model, run.anatomy, run.info.spec)
        known = before or (record.measure_before(run) if evaluate else {})
        numbers = range(len(recipe.chain()))
        stages = [stage for number in numbers if (stage := run_stage(run, number)) is not None]
        run.patch.apply(run.model)
        data = record.begin(run, plan, stages, known)
        if place is not None:
            save(run, place, data, stages, evaluate)
        elif evaluate:
            record.measure_after(run, run.model, data)
        return Result(run.model, run.patch, data, place, stages)


def run_stage(run: Run, number: int) -> Stage | None:
    """One method of the chain: survey, allocate, solve; or (None) training."""
    asked = run.recipe.chain()[number]
    method = driven(asked.method, asked.set)
    if isinstance(method, Learning):
        with timed(run, method.name):
            run.patch |= learn(run, method, number, chain_teacher(run, method)).patch
        return None
    run.anatomy = seen_by(method, run)
    targets = stage_targets(method, run.anatomy, run.recipe)
    stage = Stage(run, method, number, targets)
    run.targeted = run.targeted or stage.weights
    with timed(run, "survey"):
        measure(stage)
    with timed(run, "allocate"):
        offer(stage)
        fixed = fixed_bytes(run.work, targets, method, run.store_dtype)
        stage.choices = allocate(stage, run.recipe.budget(asked), fixed)
    with timed(run, "solve"):
        run.patch = run.patch | solve(stage, stage.choices)
    return stage


def save(
    run: Run, place: Path, data: dict[str, Any], stages: Sequence[Stage], evaluate: bool
) -> None:
    """Written beside, reopened as a user will, checked and measured there, then renamed."""
    with checkpoint.written_beside(place, run.recipe.force) as beside, timed(run, "check"):
        checkpoint.write(run.model, beside, run.patch, run.tokenizer, run.info.directory)
        saved = check.reopened(beside, run)
        check.check_bits(saved, run.patch, stages[-1].choices if len(stages) == 1 else {})
        check.check_outputs(saved, run)
        if evaluate:
            record.measure_after(run, saved, data, beside)
        record.write(data, beside)
        if hasattr(run.model, "config"):
            cost = report.cost(data) if evaluate else ""
            checkpoint.write_card(run.model, beside, run.info.directory, cost, bool(run.patch))
    run.forget()


def plan(
    model: str | nn.Module | None = None, *, recipe: Recipe | None = None, **fields: Any
) -> Plan:
    """The dry run: what would come out, before any work. A model given by name is read without
    its weights; the calibration text is checked."""
    recipe = complete(recipe, model, fields)
    if isinstance(model, nn.Module):
        return make_plan(recipe, model, describe(model), type(model).__name__)
    planned, tokenizer, info = checkpoint.open_meta(recipe.model, recipe.dtype)
    if any(driven(s.method, s.set).card.needs for s in recipe.chain()):
        language_task(recipe, planned, tokenizer).windows("calibration")
    return make_plan(recipe, planned, describe(planned), info.spec)


def compare(
    model: str | nn.Module,
    *,
    methods: Sequence[str],
    keep: Sequence[float],
    output: str | Path | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> list[dict[str, Any]]:
    """The equal-budget table: every method at every size, the dense model and plain int8 and
    int4 beside them. Rows as in the report."""
    rows: dict[str, dict[str, Any]] = {}
    before = None
    for share in keep:
        for name in methods:
            place = Path(output) / f"{name}-{share:g}" if output is not None else None
            asked = {**fields, "method": name, "keep": share}
            if fields.get("work") is not None:  # a journal serves one recipe
                asked["work"] = str(Path(fields["work"]) / f"{name}-{share:g}")
            # A module is compressed in place: each method gets its own.
            given = copy.deepcopy(model) if isinstance(model, nn.Module) else model
            result = compress(given, output=place, progress=progress, before=before, **asked)
            before = before or record.before(result.report)
            for row in result.report["rows"]:
                rows.setdefault(row["name"], row)
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def complete(
    recipe: Recipe | None, model: str | nn.Module | None, fields: Mapping[str, Any]
) -> Recipe:
    """The recipe with keywords on top; a model given by name is part of it."""
    named = {"model": model} if isinstance(model, str) else {}
    base = recipe.model_dump(exclude_unset=True) if recipe is not None else {}
    return Recipe.of(**{**base, **named, **fields})


@contextmanager
def timed(run: Run, what: str) -> Iterator[None]:
    """Add the seconds inside to the run's times."""
    start = time.perf_counter()
    try:
        yield
    finally:
        run.times[what] = run.times.get(what, 0.0) + time.perf_counter() - start
