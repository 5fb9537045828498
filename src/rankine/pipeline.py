"""The main job: plan → survey → allocate → solve → check → save."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rankine import checkpoint, report
from rankine.anatomy import describe
from rankine.engine import check, figures, record
from rankine.engine.accept import accept, check_any, check_conditions
from rankine.engine.at_once import solve_at_once, solves_at_once
from rankine.engine.given import check_data, is_text, task_of
from rankine.engine.in_place import in_place
from rankine.engine.learn import learned
from rankine.engine.offer import measure, offer, offer_sizes
from rankine.engine.parts import seen_by, stage_targets
from rankine.engine.plan import Plan, driven, fixed_bytes, make_plan, methods_of
from rankine.engine.run import Run, open_run
from rankine.engine.search import smallest_that_holds
from rankine.engine.solve import solve
from rankine.engine.stage import Stage, agreed, allocate, choose
from rankine.engine.surveys import shared_surveys
from rankine.errors import AcceptanceError, UserError
from rankine.limits import allowing_pickles
from rankine.method import Learning
from rankine.patch import Patch
from rankine.progress import Progress, heard, named, quiet
from rankine.ranks import Group
from rankine.recipe import Recipe
from rankine.tasks import Task

_log = logging.getLogger(__name__)


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
    before: Mapping[str, Any] | None = None,
    group: Group | None = None,
    **fields: Any,
) -> Result:
    """Make a model smaller.

    `model` is a hub id, a directory, "embedded", "package.module:factory", or any `nn.Module`,
    compressed in place. `fields` are the recipe's; of a module of your own say how to run it:
    `calibration` (an iterable of batches), `forward(model, batch)`, `loss(outputs, batch)` with
    one value per example where a method needs gradients, `evaluate(model)` with your figures. A
    whole `task` takes their place, and `tokenizer` makes a module a language model.
    Where it fails, a module that was handed over is as it was.

    `evaluate=False` measures nothing but sizes; `before` is the dense model's and the baselines'
    part of an earlier report, so that they are not measured twice. In a `group` every rank calls
    this alike (see `rankine.ranks`); the first measures and writes, the others wait for its report.

    Raises UserError with one sentence; its kind BudgetError where no sizes fit, AcceptanceError
    where the result does not hold what `accept` asks.
    """
    recipe = complete(recipe, model, fields)
    if recipe.max_loss is not None:
        together = partial(compress, group=group)
        with shared_surveys(recipe.work, output):
            return smallest_that_holds(together, recipe, model, output, progress, task, tokenizer)
    methods = methods_of(recipe)
    progress = progress or quiet
    place = Path(output) if output is not None else None
    if place is not None:
        checkpoint.check_output(place, recipe.force)
    with (
        in_place(model) as hold,
        allowing_pickles(recipe.allow_pickle),
        heard(progress),
        open_run(recipe, model, task, tokenizer, progress, place, group) as run,
    ):
        if run.streamed and place is None:
            raise UserError(
                f"expected an output directory, as {run.info.spec} does not fit into memory: give "
                "one, or more --memory"
            )
        check_data(run.task, methods)
        plan = make_plan(recipe, run.model, run.anatomy, run.info.spec, run.task)
        known = before or run.group.first(lambda: measured_before(run))
        check_conditions(recipe, next(iter(known.get("rows", ())), None))
        numbers = range(len(recipe.chain()))
        stages = [stage for number in numbers if (stage := run_stage(run, number)) is not None]
        if not run.streamed:
            hold(run.patch)
            run.patch.apply(run.model)
        checkpoint.remember(run.model, run.patch)
        data, refusal = run.group.first(lambda: finish(run, plan, stages, known, place))
        if refusal:
            raise AcceptanceError(refusal, data)
        result = run.model if place is None or not run.streamed else check.reopened(place, run)
        return Result(result, run.patch, data, place, stages)


def measured_before(run: Run) -> dict[str, Any]:
    """Of the dense model and the baselines, where anything is measured."""
    return figures.measure_before(run) if run.recipe.evaluate is not False else {}


def finish(
    run: Run, plan: Plan, stages: list[Stage], known: Mapping[str, Any], place: Path | None
) -> tuple[dict[str, Any], str]:
    """The report of what came out, which is written if there is a place for it; and why it is not
    accepted, if it is not."""
    data = record.begin(run, plan, stages, known, place)
    try:
        if place is not None:
            save(run, place, data, stages)
        elif run.recipe.evaluate is not False:
            figures.measure_after(run, run.model, data)
            accept(run.recipe, data, None)
    except AcceptanceError as refused:
        return data, str(refused)
    return data, ""


def run_stage(run: Run, number: int) -> Stage | None:
    """One method of the chain: survey, allocate, solve; or (None) training."""
    asked = run.recipe.chain()[number]
    method = driven(asked.method, asked.set)
    if isinstance(method, Learning):
        with timed(run, method.name):
            run.patch |= learned(run, method, number)
        return None
    run.anatomy = seen_by(method, run)
    targets = stage_targets(method, run.anatomy, run.recipe)
    stage = Stage(run, method, number, targets)
    run.targeted = run.targeted or stage.weights
    fixed = fixed_bytes(run.work, targets, method, run.store_dtype)
    at_once = solves_at_once(stage)
    with timed(run, "survey"):
        if not at_once:
            measure(stage)
    with timed(run, "allocate"):
        if run.group.leads:  # whose choice it is
            (offer_sizes if at_once else offer)(stage)
        rule = partial(allocate if at_once else choose, stage, run.recipe.budget(asked), fixed)
        stage.choices = agreed(run.group, rule)
    with timed(run, "solve"):
        run.patch |= solve_at_once(stage) if at_once else solve(stage, stage.choices)
    run.group.barrier()  # who is first to finish drops the journal
    return stage


def save(run: Run, place: Path, data: dict[str, Any], stages: Sequence[Stage]) -> None:
    """Written beside, reopened as a user will, checked and measured there, then renamed."""
    evaluate = run.recipe.evaluate is not False
    with checkpoint.written_beside(place, run.recipe.force) as beside, timed(run, "check"):
        checkpoint.write(
            run.model,
            beside,
            run.patch,
            run.tokenizer,
            run.info.directory,
            weights=run.weights,
        )
        saved = check.reopened(beside, run)
        check.check_bits(saved, run.patch, stages[-1].choices if len(stages) == 1 else {})
        check.check_outputs(saved, run)
        if evaluate:
            figures.measure_after(run, saved, data, beside)
            accept(run.recipe, data, place)
        record.write(data, beside)
        cost = report.cost(data) if evaluate else ""
        checkpoint.write_card(run.model, beside, run.info.directory, cost, bool(run.patch))
    run.forget()


def plan(
    model: str | nn.Module | None = None, *, recipe: Recipe | None = None, **fields: Any
) -> Plan:
    """The dry run: what would come out, before any work. A model given by name is read without
    its weights (one of your own is built); the calibration data is checked."""
    recipe = complete(recipe, model, fields)
    methods = methods_of(recipe)
    if isinstance(model, nn.Module):
        task = None if is_text(recipe.calibration) else task_of(recipe, model, None)
        return make_plan(recipe, model, describe(model), type(model).__name__, task)
    if recipe.into is not None or checkpoint.is_own(recipe.model):  # no meta twin of such a one
        planned, tokenizer, info = checkpoint.open_given(recipe.model, recipe.into)
    else:
        with allowing_pickles(recipe.allow_pickle):
            planned, tokenizer, info = checkpoint.open_meta(recipe.model, recipe.dtype)
    task = task_of(recipe, planned, tokenizer)
    if any(method.card.needs for method in methods):
        check_data(task, methods)
        task.fingerprint("calibration")  # reads the data: a mistake in it shows now
    return make_plan(recipe, planned, describe(planned), info.spec, task)


def compare(
    model: str | nn.Module,
    *,
    methods: Sequence[str],
    keep: Sequence[float],
    output: str | Path | None = None,
    progress: Progress | None = None,
    group: Group | None = None,
    **fields: Any,
) -> list[dict[str, Any]]:
    """The equal-budget table: every method at every size, the dense model and plain int8 and
    int4 beside them. Rows as in the report; with `accept` each result's `accepted` says whether it
    holds that. Raises AcceptanceError, with the rows as its report, where none does. `group` as for
    `compress`."""
    rows: dict[str, dict[str, Any]] = {}
    before = None
    with shared_surveys(fields.get("work"), output):
        for share in keep:
            for name in methods:
                place = Path(output) / f"{name}-{share:g}" if output is not None else None
                asked = {**fields, "method": name, "keep": share}
                if fields.get("work") is not None:  # a journal serves one recipe
                    asked["work"] = str(Path(fields["work"]) / f"{name}-{share:g}")
                # A module is compressed in place: each method gets its own.
                given = copy.deepcopy(model) if isinstance(model, nn.Module) else model
                told = named(f"{name} {share:g}", progress or quiet)
                asked |= {"before": before, "group": group}
                try:
                    made = compress(given, output=place, progress=told, **asked)
                    found = made.report
                except AcceptanceError as refused:
                    if refused.report is None:
                        raise
                    found = refused.report
                before = before or record.before(found)
                for row in found["rows"]:
                    rows.setdefault(row["name"], row)
    table = sorted(rows.values(), key=lambda row: -row["bytes"])
    check_any(table, fields.get("accept", ()))
    return table


def complete(
    recipe: Recipe | None, model: str | nn.Module | None, fields: Mapping[str, Any]
) -> Recipe:
    """The recipe with keywords on top; a model given by name is part of it."""
    named = {"model": model} if isinstance(model, str) else {}
    base = recipe.given() if recipe is not None else {}
    return Recipe.of(**{**base, **named, **fields})


@contextmanager
def timed(run: Run, what: str) -> Iterator[None]:
    """Add the seconds inside to the run's times."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        run.times[what] = run.times.get(what, 0.0) + seconds
        _log.info("%s of %s: %.1f s", what, run.info.spec, seconds)
