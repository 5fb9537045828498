"""One stage of a recipe: a method, its targets, its budget; and the verbs the driver calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankine.anatomy import Target, Weight
from rankine.budget import Bid, Budget, Option
from rankine.checkpoint.journal import digest
from rankine.engine.run import Run
from rankine.engine.spool import Spool
from rankine.errors import BudgetError, UserError
from rankine.evaluation.latency import pays
from rankine.linalg.anchor import Cross
from rankine.method import Compressor, Evidence
from rankine.patch import Patch
from rankine.ranks import Group
from rankine.statistics import Fisher, Moment, Need, OutputGradient
from rankine.structures import Dense, from_json, matrix

#: The one entry of the stage "choices-0".
CHOICES = "options"


@dataclass
class Stage:
    """`number` tells the stages of a chain apart in the journal."""

    run: Run
    method: Compressor
    number: int
    targets: list[Target]
    evidence: Evidence = field(default_factory=lambda: Nothing())
    bids: list[Bid] = field(default_factory=list)
    choices: dict[str, Option] = field(default_factory=dict)
    #: Where its statistics wait, if it measured any.
    spool: Spool | None = None

    @property
    def weights(self) -> int:
        """Number of targeted weights."""
        return sum(target.size for target in self.targets)

    def target(self, target_id: str) -> Target:
        """By id."""
        return next(t for t in self.targets if t.id == target_id)


class Nothing:
    """Evidence of a method that needs none."""

    def inputs(self, weight: Weight) -> Moment:
        raise KeyError(f"{weight.path}: the method declared no need for inputs")

    def magnitude(self, weight: Weight) -> Tensor:
        raise KeyError(f"{weight.path}: the method declared no need for magnitudes")

    def gradient(self, weight: Weight, need: OutputGradient) -> Moment:
        raise KeyError(f"{weight.path}: the method declared no need for gradients")

    def fisher(self, weight: Weight) -> Fisher:
        raise KeyError(f"{weight.path}: the method declared no need for the Fisher information")

    def lookups(self, weight: Weight) -> Tensor:
        raise KeyError(f"{weight.path}: the method declared no need for lookups")


@dataclass
class WorkSource:
    """Weights of the stage's input, and the cross moments of an anchored stream."""

    run: Run
    crosses: Mapping[str, Cross] = field(default_factory=dict)

    def weight(self, weight: Weight) -> Tensor:
        """(o, i), in the dtype of computation. Raises UserError where it holds NaN or infinity."""
        with self.run.weights.standing(weight.path):
            found = matrix(self.run.work.get_submodule(weight.path)).detach()
        if not bool(torch.isfinite(found).all()):
            raise UserError(
                f"expected finite weights, found NaN or infinity in {weight.path}: exclude it, or "
                "get the model from its source again"
            )
        return found

    def bias(self, weight: Weight) -> Tensor | None:
        """(o,) of the layer, if it adds one."""
        bias: Tensor | None = getattr(self.run.work.get_submodule(weight.path), "bias", None)
        return None if bias is None else bias.detach()

    def cross(self, weight: Weight) -> Cross | None:
        """E[x x'ᵀ] where the stream is anchored."""
        return self.crosses.get(weight.reads)


def needed(stage: Stage, targets: Sequence[Target]) -> dict[str, frozenset[Need]]:
    """Weight path → what must be measured for it."""
    return {w.path: need for t in targets if (need := stage.method.needs(t)) for w in t.weights}


def by_block(run: Run, targets: Sequence[Target]) -> Iterator[Target]:
    """The targets in their order, the block of each one's first weight in memory."""
    for _, group in groupby(targets, key=lambda target: target.block):
        together = list(group)
        with run.weights.standing(together[0].members[0]):
            yield from together


def slow(stage: Stage, target: Target) -> bool:
    """With `--fast`: a weight so narrow that two small products cost more than one, in the dtype
    that the result is stored and loaded in."""
    run = stage.run
    if not run.recipe.fast or stage.method.card.family != "low-rank":
        return False
    return not any(pays(*w.shape, run.store_dtype, fused=run.recipe.fused) for w in target.weights)


def only_dense(bid: Bid) -> Bid:
    """The bid with nothing but its dense option."""
    dense = tuple(o for o in bid.options if isinstance(o.structure, Dense))
    return replace(bid, options=dense)


def choose(stage: Stage, budget: Budget | None, fixed_bytes: int = 0) -> dict[str, Option]:
    """What `allocate` chose, once for all: a rule that probes reads statistics which are gone when
    a run is resumed."""
    journal, name = stage.run.journal, f"choices-{stage.number}"
    known = journal.get(name, CHOICES)
    if known is not None:
        return {target: option_from(data) for target, data in known[1]["options"].items()}
    choices = allocate(stage, budget, fixed_bytes)
    data = {target: option_to_json(option) for target, option in choices.items()}
    journal.put(name, CHOICES, {}, {"options": data})
    return choices


def agreed(group: Group, choose: Callable[[], dict[str, Option]]) -> dict[str, Option]:
    """What the first rank chooses, on every rank."""
    told = group.first(lambda: {t: option_to_json(option) for t, option in choose().items()})
    return {target: option_from(data) for target, data in told.items()}


def option_to_json(option: Option) -> list[Any]:
    """For the journal; exact."""
    structure = option.structure.to_json()
    return [structure, option.bits, option.loss, option.by, option.seconds]


def option_from(data: list[Any]) -> Option:
    """Inverse of `option_to_json`."""
    structure, *rest = data
    return Option(from_json(structure), *rest)


def allocate(stage: Stage, budget: Budget | None, fixed_bytes: int = 0) -> dict[str, Option]:
    """One option per target. Raises BudgetError when the smallest options do not fit."""
    if not stage.method.sized:
        return {bid.target: min(bid.options, key=lambda o: o.bits) for bid in stage.bids}
    if budget is None:
        raise UserError(
            f"expected a budget for {stage.method.name}, found none: give one of --keep 0.7, "
            "--size 4GB, --bits 8, or --max-loss 1.02x"
        )
    # In a chain `keep` refers to the original model, `bits` to what the stage targets.
    weights = stage.weights if budget.keep is None else stage.run.targeted
    bits = budget.total_bits(weights, fixed_bytes)
    least = sum(min(o.bits for o in bid.options) for bid in stage.bids)
    if bits < least:
        raise BudgetError(
            f"expected a budget that {stage.method.name} can reach, found {describe(budget)}: its "
            f"smallest sizes take {smallest(budget, least, weights, fixed_bytes)}; ask for that or "
            "more, exclude fewer weights or choose another method"
        )
    return stage.method.allocate(stage.bids, bits, WorkBench(stage))


def smallest(budget: Budget, bits: int, weights: int, fixed_bytes: int) -> str:
    """What to ask for, in the budget's own words; rounded up, so that it works."""
    if budget.size is not None:
        return f"size {fixed_bytes + math.ceil(bits / 8)} (bytes)"
    if budget.bits is not None:
        return f"bits {math.ceil(1000 * bits / weights) / 1000:g}"
    return f"keep {math.ceil(1000 * bits / (16 * weights)) / 1000:g}"


def describe(budget: Budget) -> str:
    """`keep 0.7`."""
    names = ("keep", "size", "bits")
    return ", ".join(f"{n} {getattr(budget, n)}" for n in names if getattr(budget, n) is not None)


def fit(
    stage: Stage, target: Target, option: Option, evidence: Evidence, source: WorkSource
) -> Patch:
    """The stored patch of one choice."""
    with stage.run.weights.standing(*target.members):
        goal = stage.method.goal(target, source, evidence)
        metric = stage.method.metric(target, evidence)
        patch = stage.method.fit(target, option.structure, goal, metric, stage.run.store_dtype)
        return with_biases(stage.run, patch)


def with_biases(run: Run, patch: Patch) -> Patch:
    """Complete a centred fit's bias change with the layer's own bias; store biases as the layer
    stores its weights. A module without a new bias keeps its old one when the patch is applied."""
    tensors = dict(patch.tensors)
    for path, structure in patch.modules.items():
        name = f"{path}.{structure.bias_name}"
        old = getattr(run.work.get_submodule(path), "bias", None)
        if name in tensors:
            total = tensors[name] + (old.double() if old is not None else 0)
            tensors[name] = total.to(run.store_dtype)
    return replace(patch, tensors=tensors)


def put(run: Run, patch: Patch, file: Path | None = None) -> Patch:
    """Put a stored patch in place for good; `file` is the journal's entry that holds its tensors.
    Returns what to remember of it: all, or where weights stay on the disk, all but its tensors."""
    with run.weights.standing(*patch.modules):
        apply(run, patch)
        return run.weights.taken(patch, file)


def apply(run: Run, patch: Patch) -> None:
    """Apply a stored patch to the working copy, upcast to its dtype (values as stored)."""
    dtype = run.dtype
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in patch.tensors.items()}
    replace(patch, tensors=tensors).apply(run.work)
    run.work.requires_grad_(False)


@dataclass
class WorkBench:
    """Probes for allocation rules: the calibration loss with one patch alone in place."""

    stage: Stage
    sequences: int = 32

    def fit(self, target: str, option: Option) -> Patch:
        """From the survey's statistics."""
        found = self.stage.target(target)
        source = WorkSource(self.stage.run)
        if isinstance(option.structure, Dense):
            return Patch()
        return fit(self.stage, found, option, self.stage.evidence, source)

    def probe(self, patch: Patch) -> float:
        """Mean loss per term with the patch minus without; kept in the journal, as a search may
        take hours."""
        run, name = self.stage.run, f"probe-{self.stage.number}"
        unit = digest(patch.to_json())
        kept = run.journal.get(name, unit)
        if kept is not None:
            return float(kept[1]["loss"])
        before = self._before
        with tried(run, patch):
            loss = self._loss() - before
        run.journal.put(name, unit, {}, {"loss": loss})
        return loss

    @cached_property
    def _before(self) -> float:
        return self._loss()

    @torch.no_grad()
    def _loss(self) -> float:
        run, total, terms, seen = self.stage.run, 0.0, 0.0, 0
        for batch in run.calibration:
            loss = run.task.loss(run.task.run(run.work, batch), batch)
            count = run.task.terms(batch).to(loss)
            total += float((loss * count).sum())
            terms += float(count.expand_as(loss).sum())
            seen += loss.shape[0]
            if seen >= self.sequences:
                break
        return total / terms


@contextmanager
def tried(run: Run, patch: Patch) -> Iterator[None]:
    """The patch in place inside the context, the old modules back after it."""
    with run.weights.standing(*patch.modules):
        old = {path: run.work.get_submodule(path) for path in patch.modules}
        apply(run, patch)
        try:
            yield
        finally:
            for path, module in old.items():
                parent, _, leaf = path.rpartition(".")
                setattr(run.work.get_submodule(parent), leaf, module)


__all__ = ["Stage", "WorkSource", "allocate", "fit", "put"]
