"""The solve: each target's choice is fitted, journalled and put in place.

A dense stream solves targets in any order. A compressed or anchored stream walks the blocks once
more: the inputs of each step (q·k·v → o → gate·up → down) are measured behind the finished ones,
beside the dense block's where the method wants both. Sizes are fixed before, so a global budget
and sequential statistics coexist.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankine.anatomy import Block, Target, Weight
from rankine.budget import Option
from rankine.engine.run import generator
from rankine.engine.stage import Stage, WorkSource, fit, put
from rankine.errors import UserError
from rankine.method import Evidence, Refine
from rankine.patch import Patch
from rankine.statistics import Moment, MomentSum, OutputGradient, Walk
from rankine.statistics.survey import finite
from rankine.statistics.walk import listening
from rankine.structures import Dense
from rankine.training.refine import refine_block

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
    for n, target in enumerate(due):
        make = partial(fit, stage, target, choices[target.id], stage.evidence, source)
        fitted = _journalled(stage, target.id, make)
        put(run, fitted)
        patch |= fitted
        run.progress("solve", n + 1, len(due))
    return patch


def _journalled(stage: Stage, unit: str, make: Callable[[], Patch]) -> Patch:
    """The unit's patch from the journal, or made and kept there."""
    name = f"solve-{stage.number}"
    kept = stage.run.journal.get_patch(name, unit)
    if kept is None:
        kept = make()
        stage.run.journal.put_patch(name, unit, kept)
    return kept


def _solve_in_order(stage: Stage, choices: Mapping[str, Option], due: Sequence[Target]) -> Patch:
    run, patch = stage.run, Patch()
    walk = Walk(run.work, run.anatomy, run.task, run.calibration)
    dense_hidden = list(walk.hidden)
    at: dict[tuple[int, int], list[Target]] = {}
    place = {
        w.path: (b.index, s)
        for b in run.anatomy.blocks
        for s, step in enumerate(b.steps)
        for w in step
    }
    for target in due:
        last = max(place.get(w.path, OUTSIDE) for w in target.weights)
        at.setdefault(last, []).append(target)
    done = 0
    for block in run.anatomy.blocks:
        stream = Stream.of_block(walk, block, dense_hidden)
        block_patch = Patch()
        for s in range(len(block.steps)):
            targets = at.pop((block.index, s), [])
            block_patch |= _solve_step(stage, choices, targets, stream)
            done += len(targets)
            run.progress("solve", done, len(due))
        if stage.method.refinement is not None and block_patch:
            block_patch = _refined(stage, stream, block, block_patch, stage.method.refinement)
        patch |= block_patch
        dense_hidden = stream.dense_outputs()
        walk.advance(block)
    for targets in at.values():  # behind the last block: the head
        behind = stream if walk.whole else Stream.behind(walk, dense_hidden)
        patch |= _solve_step(stage, choices, targets, behind)
        run.progress("solve", len(due), len(due))
    return patch


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
        self, reads: Sequence[str], anchored: bool
    ) -> tuple[dict[str, Moment], dict[str, Moment]]:
        """(E[x' x'ᵀ], E[x x'ᵀ]) of the named tensors; the second only for anchored streams."""
        own = {key: MomentSum() for key in reads}
        cross = {key: MomentSum() for key in reads}
        for n, hidden in enumerate(self.walk.hidden):
            seen = self._inputs(self.work, reads, n, hidden)
            for key, x in seen.items():
                own[key].add(x)
            if anchored:
                before = self._inputs(self.dense, reads, n, self.dense_hidden[n])
                for key, x in seen.items():
                    cross[key].add(x, before[key])
        return (
            {k: finite(m, k, "activations of the compressed model") for k, m in own.items()},
            {k: finite(m, k, "activations") for k, m in cross.items()} if anchored else {},
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
    """Evidence of the compressed stream over that of the survey."""

    survey: Evidence
    moments: Mapping[str, Moment] = field(default_factory=dict)

    def inputs(self, weight: Weight) -> Moment:
        """What the weight reads behind the compressed prefix."""
        return self.moments.get(weight.reads) or self.survey.inputs(weight)

    def gradient(self, weight: Weight, need: OutputGradient) -> Moment:
        """As surveyed: gradients are the dense model's."""
        return self.survey.gradient(weight, need)


def _solve_step(
    stage: Stage, choices: Mapping[str, Option], targets: Sequence[Target], stream: Stream
) -> Patch:
    run, patch = stage.run, Patch()
    kept = {t.id: run.journal.get_patch(f"solve-{stage.number}", t.id) for t in targets}
    if targets and stage.method.stream != "dense" and None in kept.values():
        reads = sorted({w.reads for t in targets for w in t.weights})
        own, cross = stream.moments(reads, stage.method.stream == "anchored")
        evidence: Evidence = Live(stage.evidence, own)
        source = WorkSource(run, {k: m.h_nn for k, m in cross.items()})
    else:
        evidence, source = stage.evidence, WorkSource(run)
    fitted = []
    for target in targets:
        make = partial(fit, stage, target, choices[target.id], evidence, source)
        fitted.append(_journalled(stage, target.id, make))
    for one in fitted:  # in place only when the whole step is solved: they read the same input
        put(run, one)
        patch |= one
    return patch


def _refined(stage: Stage, stream: Stream, block: Block, patch: Patch, settings: Refine) -> Patch:
    """The block trained against the dense block's output, as a patch in the stored dtype."""
    run = stage.run
    unit = f"block-{block.index}"
    name = f"refine-{stage.number}"
    kept = run.journal.get_patch(name, unit)
    if kept is None:
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
    put(run, kept)
    return kept
