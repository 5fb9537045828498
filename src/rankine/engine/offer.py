"""The survey and the bids. A target bids as soon as all that it needs was measured: on the way
forward, or, where it needs gradients, on the way back. Its bid is journalled, and statistics that
no fit will ask for leave the spool at once."""

from __future__ import annotations

from collections.abc import Mapping

from rankine.anatomy import Target
from rankine.budget import Bid
from rankine.engine.shared import lacking, make_shares
from rankine.engine.spool import Spool, open_spool, unit_of, units_for
from rankine.engine.stage import (
    Stage,
    WorkSource,
    by_block,
    needed,
    only_dense,
    option_from,
    option_to_json,
    slow,
)
from rankine.method import Evidence
from rankine.statistics import InputMoment, Need, Statistics, survey


def measure(stage: Stage) -> None:
    """Survey: one walk gathers the union of what the method declares for its targets, each of
    which bids behind it."""
    needs = needed(stage, stage.targets)
    if not needs:
        return
    run = stage.run

    def step(done: int, total: int) -> None:
        run.progress("survey", done, total)

    with open_spool(run, stage.number, stage.targets, needs) as spool:
        stage.spool = spool
        after, scratch = _Offers(stage, spool, needs).seen, run.journal.scratch
        walk = run.walk()
        stage.evidence = survey(walk, needs, spool.load, spool.keep, step, after, scratch)


def offer(stage: Stage) -> None:
    """Each target's bid: its sizes, their bits and losses."""
    stage.bids = []
    for target in by_block(stage.run, stage.targets):
        bid = _kept_bid(stage, target) or _new_bid(stage, target, stage.evidence)
        stage.bids.append(only_dense(bid) if slow(stage, target) else bid)
        stage.run.progress("bids", len(stage.bids), len(stage.targets))


def offer_sizes(stage: Stage) -> None:
    """The same for a rule that looks at sizes alone."""
    bids = [(t, stage.method.sizes(t, stage.run.store_dtype)) for t in stage.targets]
    stage.bids = [only_dense(bid) if slow(stage, t) else bid for t, bid in bids]


class _Offers:
    """Which targets wait for which units, and which units are waited for."""

    def __init__(self, stage: Stage, spool: Spool, needs: Mapping[str, frozenset[Need]]):
        self.stage, self.spool, self.needs = stage, spool, needs
        self.done: set[str] = set()
        self.waiting = {t.id: t for t in lacking(stage.run, _bids(stage), stage.targets)}

    def seen(self, found: Statistics, unit: str) -> None:
        """A unit stands in the spool: who waited for nothing else bids."""
        self.done.add(unit)
        ready = [t for t in self.waiting.values() if units_for(t, self.needs) <= self.done]
        make_shares(self.stage.run, ready, lambda target: _new_bid(self.stage, target, found))
        for target in ready:
            del self.waiting[target.id]
        for known in sorted(self.done):
            users = [target.id for target in self.spool.users.get(known, ())]
            if not self.waiting.keys() & set(users) and not self._asked_again(known):
                self.spool.free(known, [(_bids(self.stage), user) for user in users])

    def _asked_again(self, unit: str) -> bool:
        """Will fits or probes read a unit? A stream that is measured anew needs no input moments
        of the survey, but those of banks."""
        method = self.stage.method
        if (
            not unit.startswith("in-")
            or method.stream == "dense"
            or method.probes(self.stage.targets) > 0
        ):
            return True
        weights = [w for target in self.spool.users.get(unit, ()) for w in target.weights]
        return any(
            weight.operator == "bank" or not isinstance(need, InputMoment)
            for weight in weights
            for need in self.needs.get(weight.path, ())
            if unit_of(weight, need) == unit
        )


def _bids(stage: Stage) -> str:
    return f"bids-{stage.number}"


def _new_bid(stage: Stage, target: Target, evidence: Evidence) -> Bid:
    """Made and journalled."""
    method, run = stage.method, stage.run
    with run.weights.standing(*target.members):
        goal = method.goal(target, WorkSource(run), evidence)
        bid = method.bid(target, goal, method.metric(target, evidence), run.store_dtype)
    meta = {
        "options": [option_to_json(option) for option in bid.options],
        "dense_bits": bid.dense_bits,
        "scale": bid.scale,
        "group": bid.group,
    }
    run.journal.put(_bids(stage), target.id, {}, meta)
    return bid


def _kept_bid(stage: Stage, target: Target) -> Bid | None:
    entry = stage.run.journal.get(_bids(stage), target.id)
    if entry is None:
        return None
    meta = entry[1]
    options = tuple(map(option_from, meta["options"]))
    return Bid(target.id, target.members, options, meta["dense_bits"], meta["scale"], meta["group"])
