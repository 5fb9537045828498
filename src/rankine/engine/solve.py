"""The solve: each target's choice is fitted, journalled and put in place.

A dense stream solves targets in any order. A compressed or anchored stream walks the blocks once
more: the inputs of each step (q·k·v → o → gate·up → down) are measured behind the finished ones,
beside the dense block's where the method wants both. Sizes are fixed before, so a global budget
and sequential statistics coexist.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankine.anatomy import Anatomy, Block, Target, Weight
from rankine.budget import Option
from rankine.engine.run import generator
from rankine.engine.shared import in_chunks, lacking, made_ahead
from rankine.engine.stage import CHOICES, Stage, WorkSource, by_block, fit, put
from rankine.errors import UserError
from rankine.linalg.anchor import Cross
from rankine.method import Evidence, Refine
from rankine.patch import Patch
from rankine.statistics import CrossSum, Fisher, Moment, MomentSum, OutputGradient, Walk
from rankine.statistics.sums import finite
from rankine.statistics.units import reads_alone
from rankine.statistics.walk import listening
from rankine.structures import Dense
from rankine.training.refine import refine_block

#: (stage, unit) of the journal.
Entry = tuple[str, str]
#: Step of the weights that no block holds: after all others.
OUTSIDE = (1 << 30, 0)


def solve(stage: Stage, choices: Mapping[str, Option]) -> Patch:
    """The stage's patch; the run's working copy has it in place afterwards."""
    due = [t for t in stage.targets if not isinstance(choices[t.id].structure, Dense)]
    if stage.method.stream == "dense" and stage.method.refinement is None:
        return _solve_independent(stage, choices, due)
    return _solve_in_order(stage, choices, due)


def _solve_independent(stage: Stage, choices: Mapping[str, Option], due: Sequence[Target]) -> Patch:
    run, patch = stage.run, Patch()
    source = WorkSource(run)
    solved: dict[str, Entry] = {}

    def solve_one(target: Target) -> tuple[Patch, Path]:
        make = partial(fit, stage, target, choices[target.id], stage.evidence, source)
        return _journalled(stage, target.id, make)

    def told() -> None:
        run.progress("solve", len(solved), len(due))

    for some in in_chunks(run, due):
        made_ahead(run, f"solve-{stage.number}", some, solve_one, told)
        for target in by_block(run, some):
            patch |= put(run, *solve_one(target))
            solved[target.id] = (f"solve-{stage.number}", target.id)
            _free_behind(stage, solved, due)
            told()
    return patch


def _free_behind(stage: Stage, solved: Mapping[str, Entry], due: Sequence[Target]) -> None:
    """Drop the statistics that only solved targets, and those that stay dense, had read. `solved`:
    target → the entry that holds it."""
    if stage.spool is None:
        return
    to_solve = {target.id for target in due}
    for unit, users in stage.spool.users.items():
        fits = [target.id for target in users if target.id in to_solve]
        if solved.keys() >= set(fits):
            went_into = dict.fromkeys(solved[fit] for fit in fits)
            stage.spool.free(unit, [(f"choices-{stage.number}", CHOICES), *went_into])


def _journalled(stage: Stage, unit: str, make: Callable[[], Patch]) -> tuple[Patch, Path]:
    """The unit's patch from the journal, or made and kept there; and the file it is kept in."""
    name, journal = f"solve-{stage.number}", stage.run.journal
    kept = journal.get_patch(name, unit)
    if kept is None:
        kept = make()
        journal.put_patch(name, unit, kept)
    return kept, journal.file(name, unit)


def _places(anatomy: Anatomy) -> dict[str, tuple[int, int]]:
    """Weight path → (block, step)."""
    return {
        w.path: (b.index, s) for b in anatomy.blocks for s, step in enumerate(b.steps) for w in step
    }


def _solve_in_order(stage: Stage, choices: Mapping[str, Option], due: Sequence[Target]) -> Patch:
    run, patch = stage.run, Patch()
    walk = run.walk(whole=stage.method.refinement is not None)
    dense_hidden = list(walk.hidden)
    order = Order.of(run.anatomy, due)
    seen = Live(stage.evidence)
    solved: dict[str, Entry] = {}
    for stretch in order.stretches:
        before = list(walk.hidden)
        for block in stretch:
            with walk.standing(block.path):
                stream = Stream.of_block(walk, block, dense_hidden)
                alone = len(stretch) == 1

                def told(more: int, before: int = len(solved)) -> None:
                    run.progress("solve", before + more, len(due))

                block_patch, entries = _solve_block(
                    stage, choices, order, block, stream, seen, alone, told
                )
                patch |= block_patch
                solved |= entries
                dense_hidden = stream.dense_outputs()
                walk.advance(block)
                _free_behind(stage, solved, due)
        if len(stretch) > 1:  # once more, with what later blocks' steps put into earlier ones
            walk.hidden = before
            for block in stretch:
                walk.advance(block)
    if OUTSIDE in order.due:  # behind the last block: the head
        behind = stream if walk.whole else Stream.behind(walk, dense_hidden)
        patch |= _solve_step(stage, choices, order, OUTSIDE, behind, seen)
        solved |= {t.id: (f"solve-{stage.number}", t.id) for t in order.due[OUTSIDE]}
        _free_behind(stage, solved, due)
        run.progress("solve", len(due), len(due))
    return patch


def _solve_block(
    stage: Stage,
    choices: Mapping[str, Option],
    order: Order,
    block: Block,
    stream: Stream,
    seen: Live,
    alone: bool,
    told: Callable[[int], None],
) -> tuple[Patch, dict[str, Entry]]:
    """A block's patch, and which entry of the journal holds each target. Of a block that no target
    reaches out of (`alone`), the refined patch takes the place of what was solved. `told` is called
    with the number of its targets that are solved."""
    run, patch = stage.run, Patch()
    steps = [(block.index, s) for s in range(len(block.steps))]
    due = [target.id for step in steps for target in order.due.get(step, ())]
    refined = (f"refine-{stage.number}", f"block-{block.index}")
    journal, settings = run.journal, stage.method.refinement
    stands = settings is not None and alone and journal.get(*refined) is not None
    if run.group.first(lambda: stands):
        kept = journal.get_patch(*refined)
        assert kept is not None
        told(len(due))
        return put(run, kept, journal.file(*refined)), dict.fromkeys(due, refined)
    done = 0
    for step in steps:
        patch |= _solve_step(stage, choices, order, step, stream, seen)
        done += len(order.due.get(step, ()))
        told(done)
    if settings is None or not patch:
        return patch, {target: (f"solve-{stage.number}", target) for target in due}
    patch = _refined(stage, stream, block, patch, settings, refined)
    if alone and run.group.leads:
        for target in due:
            journal.forget(f"solve-{stage.number}", target)
    return patch, dict.fromkeys(due, refined)


#: (block, step inside it).
Step = tuple[int, int]


@dataclass(frozen=True)
class Order:
    """When targets are solved. `due`: at the last step of their weights. `waiting`: those with a
    weight at a step, by step. `stretches`: runs of blocks that no target reaches out of."""

    due: Mapping[Step, Sequence[Target]]
    waiting: Mapping[Step, Sequence[tuple[Target, Weight]]]
    stretches: Sequence[Sequence[Block]]

    @classmethod
    def of(cls, anatomy: Anatomy, targets: Sequence[Target]) -> Order:
        """The order of an anatomy's targets."""
        place = _places(anatomy)
        due: dict[Step, list[Target]] = {}
        waiting: dict[Step, list[tuple[Target, Weight]]] = {}
        reach: dict[int, int] = {}  # block → last block of the targets that begin there
        for target in targets:
            steps = [place.get(w.path, OUTSIDE) for w in target.weights]
            due.setdefault(max(steps), []).append(target)
            for step, weight in zip(steps, target.weights, strict=True):
                waiting.setdefault(step, []).append((target, weight))
            first = min(steps)[0]
            reach[first] = max(reach.get(first, first), max(steps)[0])
        stretches: list[list[Block]] = []
        end = -1
        for block in anatomy.blocks:
            if block.index > end:
                stretches.append([])
            stretches[-1].append(block)
            end = max(end, reach.get(block.index, block.index))
        return cls(due, waiting, stretches)

    def reads_after(self, step: Step) -> set[str]:
        """What the targets that are solved later read."""
        later = (target for at, targets in self.due.items() if at > step for target in targets)
        return {weight.reads for target in later for weight in target.weights}


@dataclass
class Stream:
    """A part of the model, twice: as it was on the dense stream, as it becomes on the compressed
    one. `run(batch, hidden, module)` runs either; `path` is where the part stands."""

    walk: Walk
    path: str
    work: nn.Module
    dense: nn.Module
    dense_hidden: list[Tensor]
    run: Callable[[int, Tensor, nn.Module], Any]

    @classmethod
    def of_block(cls, walk: Walk, block: Block, dense_hidden: list[Tensor]) -> Stream:
        """One block, before any of its weights is replaced."""
        work = walk.module(block)

        def run(n: int, hidden: Tensor, module: nn.Module) -> Any:
            return walk.forward(block, n, hidden, module)

        return cls(walk, block.path, work, copy.deepcopy(work), dense_hidden, run)

    @classmethod
    def behind(cls, walk: Walk, dense_hidden: list[Tensor]) -> Stream:
        """What follows the last block: the same modules on both streams."""

        def run(n: int, hidden: Tensor, module: nn.Module) -> Any:
            return walk.tail(n, hidden)

        return cls(walk, "", walk.model, walk.model, dense_hidden, run)

    @torch.no_grad()
    def moments(
        self, reads: Mapping[str, Tensor | None], anchored: bool
    ) -> tuple[dict[str, Moment], dict[str, Cross]]:
        """(E[x' x'ᵀ], E[x x'ᵀ]) of the named tensors; the second only for anchored streams, on the
        named basis where there is one."""
        group = self.walk.group
        own = {key: MomentSum() for key in reads}
        cross = {key: CrossSum(basis) for key, basis in reads.items()}
        for n, hidden in enumerate(self.walk.hidden):
            seen = self._inputs(self.work, list(reads), n, hidden)
            for key, x in seen.items():
                own[key].add(x)
            if anchored:
                before = self._inputs(self.dense, list(reads), n, self.dense_hidden[n])
                for key, x in seen.items():
                    cross[key].add(before[key], x)
        return (
            {k: finite(m, k, "activations of the compressed model", group) for k, m in own.items()},
            {k: finite(m, k, "activations", group) for k, m in cross.items()} if anchored else {},
        )

    def _inputs(
        self, module: nn.Module, reads: Sequence[str], n: int, hidden: Tensor
    ) -> dict[str, Tensor]:
        """(positions, i) inputs of the modules at `reads` when `module` runs on batch n."""
        found: dict[str, Tensor] = {}

        def listen(key: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                found[key] = self.walk.rows(n, args[0])
                if len(found) == len(reads):
                    raise _SeenError

            return hook

        prefix = self.path + "." if self.path else ""
        places = {key: module.get_submodule(key.removeprefix(prefix)) for key in reads}
        hooks = [(place, listen(key), True) for key, place in places.items()]
        with listening(hooks), suppress(_SeenError):
            self.run(n, hidden, module)
        return found

    @torch.no_grad()
    def dense_outputs(self) -> list[Tensor]:
        """The boundary behind the dense part."""
        return [self.run(n, h, self.dense) for n, h in enumerate(self.dense_hidden)]


class _SeenError(Exception):
    """Raised by the last hook: the rest need not run."""


@dataclass
class Live:
    """Evidence of the compressed stream over that of the survey. `crosses`: E[x x'ᵀ] beside it."""

    survey: Evidence
    moments: dict[str, Moment] = field(default_factory=dict)
    crosses: dict[str, Cross] = field(default_factory=dict)

    def inputs(self, weight: Weight) -> Moment:
        """What the weight reads behind the compressed prefix."""
        return self.moments.get(weight.reads) or self.survey.inputs(weight)

    def magnitude(self, weight: Weight) -> Tensor:
        """As surveyed."""
        return self.survey.magnitude(weight)

    def gradient(self, weight: Weight, need: OutputGradient) -> Moment:
        """As surveyed: gradients are the dense model's."""
        return self.survey.gradient(weight, need)

    def fisher(self, weight: Weight) -> Fisher:
        """As surveyed: gradients are the dense model's."""
        return self.survey.fisher(weight)

    def lookups(self, weight: Weight) -> Tensor:
        """As surveyed: ids are data."""
        return self.survey.lookups(weight)

    def keep(self, reads: Collection[str]) -> None:
        """Forget the other tensors."""
        self.moments = {key: m for key, m in self.moments.items() if key in reads}
        self.crosses = {key: c for key, c in self.crosses.items() if key in reads}


def _solve_step(
    stage: Stage,
    choices: Mapping[str, Option],
    order: Order,
    step: Step,
    stream: Stream,
    seen: Live,
) -> Patch:
    run, patch = stage.run, Patch()
    unit = f"solve-{stage.number}"
    targets = order.due.get(step, ())
    measured = [
        (target, weight)
        for target, weight in order.waiting.get(step, ())
        if stage.method.stream != "dense"
        # Both streams route on their own: what an expert reads in one has no like in the other.
        and weight.operator != "bank"
    ]
    open_ = {target.id for target in lacking(run, unit, [target for target, _ in measured])}
    if open_:
        reads = _with_bases(stream.walk, [w for target, w in measured if target.id in open_])
        own, cross = stream.moments(reads, stage.method.stream == "anchored")
        seen.moments.update(own)
        seen.crosses.update(cross)
    source = WorkSource(run, seen.crosses)

    def solve_one(target: Target) -> tuple[Patch, Path]:
        make = partial(fit, stage, target, choices[target.id], seen, source)
        return _journalled(stage, target.id, make)

    made_ahead(run, unit, targets, solve_one)
    fitted = [solve_one(target) for target in targets]
    for one, file in fitted:  # in place only when the whole step is solved: they read one input
        remembered = put(run, one, file)
        patch |= remembered if stage.method.refinement is None else one
    seen.keep(order.reads_after(step))
    return patch


def _with_bases(walk: Walk, weights: Sequence[Weight]) -> dict[str, Tensor | None]:
    """What the weights read → the basis of a wide weight that reads it by itself."""
    return {
        weight.reads: walk.bases(weight) if reads_alone(weight, walk.anatomy.weights) else None
        for weight in sorted(weights, key=lambda weight: weight.reads)
    }


def _refined(
    stage: Stage, stream: Stream, block: Block, patch: Patch, settings: Refine, entry: Entry
) -> Patch:
    """The block trained against the dense block's output, as a patch in the stored dtype, kept as
    an entry of the journal."""
    run, (name, unit) = stage.run, entry
    kept = run.journal.get_patch(name, unit) if run.group.leads else None
    if kept is None and run.group.leads:
        wanted = stream.dense_outputs()
        if not all(isinstance(output, Tensor) for output in wanted):
            raise UserError(
                f"expected blocks in a chain to refine, found a {type(run.work).__name__} that "
                "only runs as a whole: leave refine off"
            )
        tensors = refine_block(
            stream.walk,
            block,
            wanted,
            settings,
            generator(run.recipe.seed, name, unit),
        )
        stored = {n: t.to(run.store_dtype) for n, t in tensors.items()}
        kept = replace(patch, tensors={**patch.tensors, **stored})
        run.journal.put_patch(name, unit, kept)
    run.group.barrier()  # the others take over what the first rank trained
    kept = kept or run.journal.get_patch(name, unit)
    assert kept is not None
    return put(run, kept, run.journal.file(name, unit))
