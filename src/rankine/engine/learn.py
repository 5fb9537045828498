"""A stage that trains: the learner's loop instead of survey, allocation and solve."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from torch import nn

from rankine.checkpoint import directory_bytes, is_plain, open_given
from rankine.engine.plan import tensor_bytes
from rankine.engine.run import Run, computing_copy, model_fingerprint
from rankine.engine.stage import put
from rankine.method import Learner, Learning
from rankine.modules import conceal
from rankine.patch import Patch
from rankine.tasks import LanguageModelling, Task
from rankine.tasks.distillation import check_vocabulary
from rankine.training.heal import standing
from rankine.training.loop import train


@dataclass(frozen=True)
class Learned:
    """`patch`: the trained tensors as they will be stored; `losses`: of each step."""

    patch: Patch
    losses: list[float]
    learner: Learner


def learn(run: Run, method: Learning, number: int, teacher: nn.Module | None) -> Learned:
    """Train the run's working copy, which then holds the stored (rounded) values."""
    conceal(run.work)  # what is trained is named as in the model that is saved
    task, per_step = feeding(run.task, method.sequences)
    learner = method.learner(standing(run.work, run.patch))
    unit = f"{method.name}-{number}"
    if teacher is not None:
        unit += "-" + model_fingerprint(teacher)[:16]
    patch, losses = train(
        run.work,
        method.objective(task, teacher),
        learner,
        method.schedule,
        batches_per_step=per_step,
        seed=run.recipe.seed,
        journal=run.journal,
        unit=unit,
        progress=lambda _, done, total: run.progress(method.name, done, total),
    )
    stored = {n: t.to(run.store_dtype) for n, t in patch.tensors.items()}
    patch = replace(patch, tensors=stored)
    put(run, patch)
    return Learned(patch, losses, learner)


def learned(run: Run, method: Learning, number: int) -> Patch:
    """A stage of a chain: the first rank trains, the others take over what it learned."""
    if run.group.size == 1:
        return learn(run, method, number, chain_teacher(run, method)).patch
    name = f"learned-{number}"
    if run.group.leads:
        patch = learn(run, method, number, chain_teacher(run, method)).patch
        run.journal.put_patch(name, method.name, patch)
    run.group.barrier()
    found = run.journal.get_patch(name, method.name)
    assert found is not None
    if not run.group.leads:
        conceal(run.work)
        put(run, found)
    return found


def feeding(task: Task, sequences: int | None) -> tuple[Task, int]:
    """A language task whose training batches fit into memory and add up to `sequences`, and how
    many of them a step takes. Other tasks' batches are taken as they come, one per step."""
    if sequences is None or not isinstance(task, LanguageModelling):
        return task, 1
    at_once = max(1, task.tokens_at_once // task.length)
    size = max(n for n in range(1, sequences + 1) if sequences % n == 0 and n <= at_once)
    fed = copy.copy(task)
    fed.batch_size = size
    return fed, sequences // size


@dataclass(frozen=True)
class Teacher:
    """A model to follow, in the dtype of computation; `keep` and `bytes` are those it is stored
    with."""

    model: nn.Module
    name: str
    keep: float
    bytes: int


def open_teacher(run: Run, teacher: str | nn.Module) -> Teacher:
    """By directory, hub id or as a module. Raises UserError where its vocabulary is not the
    model's."""
    device = next(run.work.parameters()).device
    if isinstance(teacher, nn.Module):
        model, tokenizer, name, directory = teacher, None, type(teacher).__name__, None
    else:
        into = run.recipe.into if is_plain(teacher) else None
        model, tokenizer, info = open_given(teacher, into, device)
        name, directory = info.name, info.directory
    check_vocabulary(run.model, model, run.tokenizer, tokenizer)
    keep = next(p for p in model.parameters() if p.is_floating_point()).element_size() / 2
    size = directory_bytes(directory)[0] if directory else tensor_bytes(model)
    return Teacher(computing_copy(model.to(device)), name, keep, size)


def chain_teacher(run: Run, method: Learning) -> nn.Module | None:
    """What a stage of a chain follows: the teacher it names, else what the chain began with."""
    if not method.distils:
        return None
    name = method.knobs().get("teacher")
    return open_teacher(run, name).model if name else computing_copy(run.model)
