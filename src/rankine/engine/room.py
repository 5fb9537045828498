"""What a run takes beside its result: memory at its peak, and disk for what waits between its
stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rankine.anatomy import Anatomy, Target
from rankine.engine.at_once import can_solve_at_once
from rankine.engine.memory import footprint
from rankine.method import Compressor
from rankine.statistics import Need
from rankine.statistics.boundaries import IN_MEMORY
from rankine.statistics.units import bytes_of

#: Python, torch and transformers themselves.
IMPORTS = 450_000_000
#: Bytes of one point of a journalled curve.
POINT = 90


def memory(anatomy: Anatomy, stored: int, streamed: bool, positions: int) -> int:
    """Bytes at the peak, imports included. Of a streamed model: the largest block as stored and
    twice in float32 or the largest weight outside, the moments of a block, the hidden states."""
    if not streamed:
        return footprint(stored) + IMPORTS
    blocks = [sum(w.size for w in block.weights) for block in anatomy.blocks]
    outside = [w.size for w in anatomy.outside]
    widest = max((w.shape[1] for w in anatomy.linears), default=0)
    hidden = 3 * 4 * positions * _hidden_size(anatomy)
    return IMPORTS + 10 * max([*blocks, *outside], default=0) + 2 * 8 * widest**2 + hidden


def scratch(
    methods: Sequence[Compressor],
    targets: Sequence[Target],
    anatomy: Anatomy,
    bits: int,
    streamed: bool,
    positions: int,
) -> int:
    """Bytes of the work directory at its fullest. `bits`: of the targets when all is done; what
    one stage of a chain solved waits while the next one works."""
    stages = [_stage(m, targets, anatomy, bits // 8, streamed, positions) for m in methods]
    return max(n * (bits // 8) + stage for n, stage in enumerate(stages))


def _stage(
    method: Compressor,
    targets: Sequence[Target],
    anatomy: Anatomy,
    solved: int,
    streamed: bool,
    positions: int,
) -> int:
    """On the way forward input moments and hidden states pile up, on the way back gradient moments
    take the place of both; then solved targets take the place of moments."""
    needs = {w.path: need for t in targets if (need := method.needs(t)) for w in t.weights}
    if not needs or can_solve_at_once(
        method, targets
    ):  # each target is solved behind its own block
        return solved
    inputs, gradients = map(sum, zip(*_by_block(anatomy, needs), strict=True))
    points = sum(o * i // (o + i) for t in targets for o, i in [t.shape])
    waiting = 0
    if gradients:
        waiting = 4 * positions * _hidden_size(anatomy) * (len(anatomy.blocks) + 1)
        waiting = waiting if streamed else max(0, waiting - IN_MEMORY)
    measured_anew = method.stream != "dense"
    survey = max(inputs, gradients) if measured_anew else inputs + gradients
    return POINT * points + max(inputs + waiting, survey, solved)


def _by_block(anatomy: Anatomy, needs: Mapping[str, frozenset[Need]]) -> list[tuple[int, int]]:
    parts = [*(block.weights for block in anatomy.blocks), anatomy.outside]
    return [bytes_of(weights, needs) for weights in parts]


def _hidden_size(anatomy: Anatomy) -> int:
    return anatomy.linears[0].shape[1] if anatomy.linears else 0
