"""Sizes first, then one walk: each target is solved as soon as its own block was measured.

For budget rules that look at sizes alone. Nothing is spooled, each goal is decomposed once for
its curve and its fit, and a block's moments are gone when the next block is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from rankine.anatomy import Target
from rankine.budget import Bid
from rankine.engine.shared import lacking, made_ahead
from rankine.engine.solve import Live
from rankine.engine.stage import Stage, WorkSource, by_block, needed, put, with_biases
from rankine.method import Compressor, Evidence
from rankine.patch import Patch
from rankine.statistics import InputMoment
from rankine.statistics.survey import measured
from rankine.structures import Structure

#: What a walk measures for a block without the others.
AT_ONCE = frozenset({InputMoment(), InputMoment(compact=True)})
#: Points of a curve that are kept: a deep model has thousands of curves.
POINTS = 128


def solves_at_once(stage: Stage) -> bool:
    """May each target be solved behind its own block's measurement? Its size must not depend on
    what is measured, nor its fit on another block or on gradients."""
    return can_solve_at_once(stage.method, stage.targets)


def can_solve_at_once(method: Compressor, targets: Sequence[Target]) -> bool:
    """The same of a method and its targets alone: for a plan."""
    return (
        method.by_size
        and method.stream == "dense"
        and method.refinement is None
        and all(method.needs(target) <= AT_ONCE for target in targets)
        and all(
            target.kind == "weight"
            and len(target.weights) == 1
            and target.weights[0].operator in ("linear", "conv1d", "bank")
            for target in targets
        )
    )


def solve_at_once(stage: Stage) -> Patch:
    """The stage's patch, the curves of its targets (`stage.bids`) and what was chosen on them."""
    run, patch = stage.run, Patch()
    bids: dict[str, Bid] = {}
    name = f"solve-{stage.number}"

    def told() -> None:
        run.progress("solve", len(bids), len(stage.targets))

    for evidence, targets in _behind_their_blocks(stage, name):
        made_ahead(run, name, targets, partial(_solved, stage, name, evidence), told)
        for target in by_block(run, targets):
            choice = stage.choices[target.id].structure
            fitted, bids[target.id] = _solved(stage, name, evidence, target)
            if fitted:
                patch |= put(run, fitted, run.journal.file(name, target.id))
            stage.choices[target.id] = next(
                option for option in bids[target.id].options if option.structure == choice
            )
            told()
    stage.bids = [bids[target.id] for target in stage.targets]
    return patch


def _solved(stage: Stage, name: str, evidence: Evidence, target: Target) -> tuple[Patch, Bid]:
    """From the journal, or made and kept there."""
    kept = _kept_with_curve(stage, name, target)
    if kept is None:
        kept = _fitted_with_curve(stage, target, stage.choices[target.id].structure, evidence)
        _keep_with_curve(stage, name, target, *kept)
    return kept


def _behind_their_blocks(stage: Stage, name: str) -> Iterator[tuple[Evidence, Sequence[Target]]]:
    """Targets with what was measured for them; blocks whose targets are all in the journal are
    only walked through."""
    run = stage.run
    needs = needed(stage, lacking(run, name, stage.targets))
    if not needs:
        yield stage.evidence, stage.targets
        return
    at: dict[int, list[Target]] = {}
    for target in stage.targets:
        at.setdefault(target.block, []).append(target)
    for block, moments in measured(run.walk(), needs):
        yield Live(stage.evidence, moments), at.pop(block, [])
    for targets in at.values():
        yield stage.evidence, targets


def _fitted_with_curve(
    stage: Stage, target: Target, choice: Structure, evidence: Evidence
) -> tuple[Patch, Bid]:
    method, dtype = stage.method, stage.run.store_dtype
    goal = method.goal(target, WorkSource(stage.run), evidence)
    metric = method.metric(target, evidence)
    bid = thinned(method.bid(target, goal, metric, dtype), choice)
    fitted = with_biases(stage.run, method.fit(target, choice, goal, metric, dtype))
    return fitted, bid


def _kept_with_curve(stage: Stage, name: str, target: Target) -> tuple[Patch, Bid] | None:
    found = stage.run.journal.get(name, target.id)
    if found is None:
        return None
    tensors, meta = found
    bid = stage.method.sizes(target, stage.run.store_dtype)
    sizes = {option.bits: option for option in bid.options}
    options = tuple(replace(sizes[bits], loss=loss) for bits, loss in meta["curve"])
    return Patch.from_json(meta["patch"], tensors), replace(bid, options=options)


def _keep_with_curve(stage: Stage, name: str, target: Target, fitted: Patch, bid: Bid) -> None:
    curve = [[option.bits, option.loss] for option in bid.options]
    meta = {"patch": fitted.to_json(), "curve": curve}
    stage.run.journal.put(name, target.id, fitted.tensors, meta)


def thinned(bid: Bid, choice: Structure) -> Bid:
    """A curve that was decided before: as many points as a report draws, ends and choice too."""
    step = math.ceil(len(bid.options) / POINTS)
    last = len(bid.options) - 1
    kept = (
        option
        for n, option in enumerate(bid.options)
        if n % step == 0 or n == last or option.structure == choice
    )
    return replace(bid, options=tuple(kept))
