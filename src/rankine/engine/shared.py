"""Units of work shared out over the ranks of a group: each is made by one of them and journalled,
and the others read it behind a barrier. So whoever goes on finds everything in the journal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from rankine.anatomy import Target
from rankine.engine.run import Run
from rankine.engine.stage import by_block


def lacking(run: Run, stage: str, targets: Sequence[Target]) -> list[Target]:
    """Those that have no entry in the journal, by the first rank's word."""
    lacks = run.group.first(lambda: [run.journal.get(stage, t.id) is None for t in targets])
    return [target for target, lacks_it in zip(targets, lacks, strict=True) if lacks_it]


def make_shares(
    run: Run,
    targets: Sequence[Target],
    make: Callable[[Target], object],
    told: Callable[[], None] = lambda: None,
) -> None:
    """`make` (which journals) each target on one of the ranks, and wait until all are made. `told`
    is called between two of them."""
    for target in by_block(run, run.group.mine(targets, cost)):
        make(target)
        told()
    run.group.barrier()


def made_ahead(
    run: Run,
    stage: str,
    targets: Sequence[Target],
    make: Callable[[Target], object],
    told: Callable[[], None] = lambda: None,
) -> None:
    """In a group, make what `stage` lacks, share by share; a process by itself makes each target
    when it comes to it."""
    if run.group.size > 1:
        make_shares(run, lacking(run, stage, targets), make, told)


def in_chunks(run: Run, targets: Sequence[Target]) -> Iterator[list[Target]]:
    """The targets of as many blocks as there are ranks at a time: enough to share out, and few
    enough that their statistics can go before the next are solved."""
    blocks = [list(group) for _, group in groupby(targets, key=lambda target: target.block)]
    for first in range(0, len(blocks), run.group.size):
        yield [target for block in blocks[first : first + run.group.size] for target in block]


def cost(target: Target) -> float:
    """What decomposing it takes, up to a factor."""
    return sum(
        math.prod(weight.shape) * min(weight.shape) * weight.copies for weight in target.weights
    )
