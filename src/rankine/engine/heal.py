"""The verb `heal`: recovery training of a compressed model, measured before and after."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankine import checkpoint, report
from rankine.checkpoint import directory_bytes
from rankine.checkpoint.export import export_peft
from rankine.checkpoint.load import EMBEDDED
from rankine.discovery import get
from rankine.engine import check, record
from rankine.engine.accept import accept, check_conditions
from rankine.engine.healed import add_after, begin, command, measure_before
from rankine.engine.in_place import in_place
from rankine.engine.learn import Learned, Teacher, learn, open_teacher
from rankine.engine.run import Run, cast, open_run
from rankine.errors import UserError, suggest
from rankine.limits import allowing_pickles
from rankine.methods.heal import Heal
from rankine.patch import Patch
from rankine.progress import Progress, heard, quiet
from rankine.recipe import Recipe
from rankine.tasks import Task, parse_tokens
from rankine.training.heal import LoraHealing, standing


@dataclass
class Healed:
    """The healed model, what stands where in it, and what healing won: `report["rows"]` holds the
    teacher, the model before and after, all scored on the same text."""

    model: nn.Module
    patch: Patch
    report: dict[str, Any]
    output: Path | None = None

    def table(self) -> str:
        """The honest table, as text."""
        return report.plain_table(self.report["rows"])


def heal(
    model: str | Path | nn.Module | None = None,
    *,
    teacher: str | Path | nn.Module | None = None,
    data: Any = None,
    output: str | Path | None = None,
    adapter: bool = False,
    patch: Patch | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    task: Task | None = None,
    tokenizer: Any = None,
    **fields: Any,
) -> Healed:
    """Train a compressed model to win back what it lost.

    - `model`: as for `compress`; a module is healed in place, and `patch` says what stands in it
      where it was never saved.
    - `teacher`: the model before compression (directory, hub id, module); None trains on the
      cross-entropy alone.
    - `data`: training text or batches, as `calibration` of a recipe; default "embedded". With
      `task`, its "train" split is used instead.
    - `output`: where the healed checkpoint is written; with `adapter` (and mode "lora") a PEFT
      folder that belongs to `model`.
    - `fields`: knobs of the method `heal` (mode, steps, lr, ...) and fields of a recipe (`into`,
      `forward`, `loss` and `evaluate` for a module of your own). `tokens` says how many sequences
      of what length are trained on, unless `steps` does.

    Interrupted, the same call goes on. Raises UserError with one sentence; a module that was handed
    over is then as it was.
    """
    model, teacher = _plain(model), _plain(teacher)
    asked, knobs = _asked(recipe, model, teacher, data, fields)
    recipe, method = _settled(asked, knobs, adapter)
    progress = progress or quiet
    place = Path(output) if output is not None else None
    if place is not None:
        checkpoint.check_output(place, recipe.force)
    with (
        in_place(model) as hold,
        allowing_pickles(recipe.allow_pickle),
        heard(progress),
        open_run(recipe, model, task, tokenizer, progress, place) as run,
    ):
        run.patch = patch or run.patch
        method.check(run.work, standing(run.work, run.patch))
        followed = None if teacher is None else open_teacher(run, teacher)
        evaluate = recipe.evaluate is not False
        before = measure_before(run, followed) if evaluate else {}
        check_conditions(recipe, before["rows"][-1] if evaluate else None)
        start = time.perf_counter()
        learned = learn(run, method, 0, followed.model if followed else None)
        run.times["heal"] = time.perf_counter() - start
        hold(learned.patch)
        learned.patch.apply(run.model)
        checkpoint.remember(run.model, run.patch)
        objects = any(isinstance(given, nn.Module) for given in (model, teacher))
        typed = not objects and task is None and tokenizer is None
        said = command(asked, knobs, adapter, place) if typed else None
        found = begin(run, method, learned, before, said)
        if place is None or adapter:
            add_after(run, run.work, found, followed)
            accept(recipe, found, place)
        if place is not None:
            if adapter:
                _write_adapter(run, learned, place)
            else:
                _write(run, place, found, followed)
            run.forget()
        return Healed(run.model, run.patch, found, place)


def _asked(
    recipe: Recipe | None,
    model: str | nn.Module | None,
    teacher: str | nn.Module | None,
    data: Any,
    fields: Mapping[str, Any],
) -> tuple[Recipe, dict[str, Any]]:
    """What was asked for, as a recipe without knobs, and the knobs."""
    knobs = {f.name for f in dataclasses.fields(Heal)} - {"teacher"}
    known = knobs | set(Recipe.model_fields)
    for name in fields:
        if name not in known:
            raise UserError(f'heal has no option "{name}"; {suggest(name, sorted(known))}')
    base = recipe.given() if recipe is not None else {}
    if model is None and "model" not in base:
        raise UserError("expected a compressed model to heal, found none: name its directory")
    given = {**base, **{n: v for n, v in fields.items() if n not in knobs}}
    chosen = {**given.pop("set", {}), **{n: v for n, v in fields.items() if n in knobs}}
    if isinstance(teacher, str):
        chosen["teacher"] = teacher
    given["method"] = "heal"
    if isinstance(model, str):
        given["model"] = model
    if data is not None:
        given["calibration"] = data
    return Recipe.of(**given), chosen


def _settled(asked: Recipe, knobs: dict[str, Any], adapter: bool) -> tuple[Recipe, Heal]:
    """The recipe and the method; the recipe's `tokens` are what is set aside of the text."""
    method = get("heal", knobs)
    assert isinstance(method, Heal)
    sequences, length = parse_tokens(asked.tokens)
    if "tokens" in asked.model_fields_set and "steps" not in knobs:
        method = dataclasses.replace(method, steps=math.ceil(sequences / method.batch))
    if adapter and method.mode != "lora":
        raise UserError(
            f'expected mode lora for an adapter, found "{method.mode}": add --mode lora'
        )
    aside = 1  # nothing is calibrated; held-out windows of the same text come on top of it
    text = isinstance(asked.calibration, str)
    if text and asked.evaluation == asked.calibration != "embedded":
        aside = max(1, asked.eval_tokens // length)
    return asked.model_copy(
        update={"set": {**method.knobs()}, "tokens": f"{aside}x{length}"}
    ), method


def _plain(model: str | Path | nn.Module | None) -> str | nn.Module | None:
    return str(model) if isinstance(model, Path) else model


def _write(run: Run, place: Path, data: dict[str, Any], teacher: Teacher | None) -> None:
    """Written beside, reopened as a user will, checked and measured there, then renamed."""
    with checkpoint.written_beside(place, run.recipe.force) as beside:
        checkpoint.write(run.model, beside, run.patch, run.tokenizer, run.info.directory)
        saved = check.reopened(beside, run)
        check.check_outputs(saved, run)
        on_cpu = next(saved.parameters()).device.type == "cpu"
        saved = cast(saved, torch.float32) if on_cpu else saved
        add_after(run, saved, data, teacher, directory_bytes(beside)[0])
        accept(run.recipe, data, place)
        record.write(data, beside)
        cost = report.cost(data) if run.recipe.evaluate is not False else ""
        checkpoint.write_card(run.model, beside, run.info.directory, cost, bool(run.patch))


def _write_adapter(run: Run, learned: Learned, place: Path) -> None:
    """What LoRA learned, for the model it was trained on."""
    learner = learned.learner
    assert isinstance(learner, LoraHealing)
    base = str(run.info.directory) if run.info.spec == EMBEDDED else run.info.spec
    export_peft(learner.factors, place, base=base, task_type="CAUSAL_LM", force=run.recipe.force)
