"""What is measured where: the declared needs, sorted into one unit of work per block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rankine.anatomy import Weight
from rankine.errors import UserError
from rankine.statistics.banks import BankGradientSum, BankSum
from rankine.statistics.fisher import WeightFisher
from rankine.statistics.moments import (
    COMPACT,
    InputMagnitude,
    InputMoment,
    Lookups,
    LookupSum,
    MagnitudeSum,
    MomentSum,
    Need,
    OutputGradient,
)
from rankine.statistics.walk import Walk

#: What sums an input's statistic, and a gradient's.
InputSum = MomentSum | MagnitudeSum | LookupSum | BankSum
GradientSum = MomentSum | BankGradientSum
#: Who asks for the moment of one input, and how.
Asked = list[tuple[Weight, InputMoment]]
#: Block index of the weights outside all blocks.
OUTSIDE = -1


@dataclass(frozen=True)
class Unit:
    """What is measured in one block (or, last, outside all of them), and how it is run.

    `reads`: key of the statistic → path of the module whose input it is, and what makes its sum;
    `writes`: key → path of the module whose output's gradient it is, the need and what makes its
    sum; `weights`: key → path of the module whose weight's gradient it is.
    """

    index: int
    run: Callable[[int, Tensor], Any]
    path: str = ""
    reads: Mapping[str, tuple[str, Callable[[], InputSum]]] = field(default_factory=dict)
    writes: Mapping[str, tuple[str, OutputGradient, Callable[[], GradientSum]]] = field(
        default_factory=dict
    )
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def backwards(self) -> bool:
        """Does it take gradients?"""
        return bool(self.writes or self.weights)


# -- keys of statistics ---------------------------------------------------------------------------
def input_key(weight: Weight) -> str:
    """Of the moment of what a weight reads."""
    return weight.reads


def magnitude_key(weight: Weight) -> str:
    """Of its mean absolute values."""
    return f"abs/{weight.reads}"


def lookups_key(weight: Weight) -> str:
    """Of an embedding's frequencies."""
    return f"lookups/{weight.path}"


def gradient_key(weight: Weight, need: OutputGradient) -> str:
    """Of the moment of the gradient at what a weight writes."""
    return f"{need.middle}/{need.clip}/{need.compact}/{weight.path}"


def fisher_key(weight: Weight) -> str:
    """Of a weight's Fisher information."""
    return f"fisher/{weight.path}"


# -- the smaller side -----------------------------------------------------------------------------
def is_wide(weight: Weight) -> bool:
    """Has it so few rows that what it reads is better measured on their span?"""
    return weight.operator in ("linear", "conv1d") and weight.shape[0] <= COMPACT * weight.shape[1]


def is_tall(weight: Weight) -> bool:
    """Has it so few columns that the gradient at what it writes is better measured on theirs?"""
    return weight.operator in ("linear", "conv1d") and weight.shape[1] <= COMPACT * weight.shape[0]


def reads_alone(weight: Weight, weights: Iterable[Weight]) -> bool:
    """Is it wide, and the only one of `weights` that reads its input? Whoever else reads it counts,
    measured or not: what is left to do in a resumed run must not change how it is done."""
    return is_wide(weight) and sum(other.reads == weight.reads for other in weights) == 1


def reads_compactly(asked: Asked, weights: Iterable[Weight]) -> bool:
    """Is the moment of an input measured on the row space of the weight that reads it?"""
    return all(need.compact for _, need in asked) and reads_alone(asked[0][0], weights)


def writes_compactly(weight: Weight, need: OutputGradient) -> bool:
    """Is the moment of the gradient at what `weight` writes measured on its column space?"""
    return need.compact and is_tall(weight)


# -- units ----------------------------------------------------------------------------------------
def units_of(walk: Walk, needs: Mapping[str, frozenset[Need]]) -> list[Unit]:
    """One per block, in order; one more where weights outside the blocks are measured."""
    blocks = [(b.index, b.path, b.weights, _runner(walk, b)) for b in walk.anatomy.blocks]
    outside = tuple(w for w in walk.anatomy.outside if w.path in needs)
    for weight in walk.anatomy.weights:
        if weight.operator == "embedding" and needs.get(weight.path, frozenset()) - {Lookups()}:
            raise UserError(
                f"expected linear weights to measure, found the embedding {weight.path}: exclude "
                "it, or choose a method that takes embeddings (svd, afm)"
            )
    if outside:
        blocks.append((OUTSIDE, "", outside, blocks[0][3] if walk.whole else walk.tail))
    return [
        Unit(
            index,
            run,
            path,
            _reads(walk, weights, needs),
            _writes(walk, weights, needs),
            {fisher_key(w): w.path for w in weights if WeightFisher() in needs.get(w.path, ())},
        )
        for index, path, weights, run in blocks
    ]


def _runner(walk: Walk, block: Any) -> Callable[[int, Tensor], Any]:
    return lambda index, hidden: walk.forward(block, index, hidden)


def input_moments(
    weights: Sequence[Weight], needs: Mapping[str, frozenset[Need]]
) -> dict[str, Asked]:
    """Key → the weights that ask for the moment of that input, each with how it asks."""
    found: dict[str, Asked] = {}
    for weight in weights:
        for need in needs.get(weight.path, ()):
            if isinstance(need, InputMoment):
                found.setdefault(input_key(weight), []).append((weight, need))
    return found


def _reads(
    walk: Walk, weights: Sequence[Weight], needs: Mapping[str, frozenset[Need]]
) -> dict[str, tuple[str, Callable[[], InputSum]]]:
    found: dict[str, tuple[str, Callable[[], InputSum]]] = {}
    for key, asked in input_moments(weights, needs).items():
        found[key] = (asked[0][0].reads, _moment_sum(walk, asked, weights))
    for weight in weights:
        wanted = needs.get(weight.path, ())
        if InputMagnitude() in wanted:
            found[magnitude_key(weight)] = (weight.reads, MagnitudeSum)
        if Lookups() in wanted and weight.operator == "embedding":
            found[lookups_key(weight)] = (weight.path, LookupSum)
    return found


def _moment_sum(
    walk: Walk, asked: Asked, weights: Sequence[Weight]
) -> Callable[[], MomentSum | BankSum]:
    weight = asked[0][0]
    if weight.operator == "bank":
        return BankSum
    if reads_compactly(asked, weights):
        return lambda: MomentSum(walk.bases(weight))
    return MomentSum


def _writes(
    walk: Walk, weights: Sequence[Weight], needs: Mapping[str, frozenset[Need]]
) -> dict[str, tuple[str, OutputGradient, Callable[[], GradientSum]]]:
    return {
        gradient_key(weight, need): (weight.path, need, _gradient_sum(walk, weight, need))
        for weight in weights
        for need in needs.get(weight.path, ())
        if isinstance(need, OutputGradient)
    }


def _gradient_sum(
    walk: Walk, weight: Weight, need: OutputGradient
) -> Callable[[], MomentSum | BankGradientSum]:
    if weight.operator == "bank":
        return BankGradientSum
    if writes_compactly(weight, need):
        return lambda: MomentSum(walk.bases(weight))
    return MomentSum


def bytes_of(weights: Sequence[Weight], needs: Mapping[str, frozenset[Need]]) -> tuple[int, int]:
    """Bytes that the moments of some weights take in a spool: of inputs (float64 triangles), of
    gradients (float32 triangles)."""
    inputs = gradients = 0
    for asked in input_moments(weights, needs).values():
        weight = asked[0][0]
        o, i = weight.shape
        side = o if reads_compactly(asked, weights) else i
        inputs += 8 * (side * (side + 1) // 2 * weight.copies + i)
    for weight in weights:
        o, i = weight.shape
        for need in needs.get(weight.path, ()):
            if isinstance(need, OutputGradient):
                side = i if writes_compactly(weight, need) else o
                gradients += weight.copies * 4 * side * (side + 1) // 2 + 8 * o
    return inputs, gradients


__all__ = ["OUTSIDE", "Unit", "bytes_of", "units_of"]
