"""What a survey found, block by block, brought back from where it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rankine.anatomy import Weight
from rankine.statistics.fisher import Fisher
from rankine.statistics.moments import Moment, OutputGradient
from rankine.statistics.units import (
    fisher_key,
    gradient_key,
    input_key,
    lookups_key,
    magnitude_key,
)

Store = Callable[[str], Mapping[str, Tensor] | None]
Basis = Callable[[Weight], Tensor]


class Statistics:
    """Keyed by need and tensor. `load` brings a unit's tensors back from the spool; only those of
    the block last asked for are held. `basis`: that of the smaller side of a weight."""

    def __init__(self, load: Store, basis: Basis):
        self._load, self._basis = load, basis
        self._held: dict[str, tuple[str, Mapping[str, Tensor]]] = {}
        self._inputs: dict[str, Moment] = {}

    def hold(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        """What was just measured, as it was kept: the next questions are about it."""
        kind = unit.partition("-")[0]
        self._held[kind] = (unit, tensors)
        if kind == "in":
            self._inputs = {}

    def let_go(self) -> None:
        """Hold nothing: the next question is a while off."""
        self._held, self._inputs = {}, {}

    def inputs(self, weight: Weight) -> Moment:
        """Moment of what the weight reads: (i, i) and (i,)."""
        key = input_key(weight)
        if key not in self._inputs:  # one for all who read it: they share its root
            self._inputs = {key: self._moment("in", weight, key)}
        return self._inputs[key]

    def magnitude(self, weight: Weight) -> Tensor:
        """(i,) mean absolute value of what the weight reads."""
        return self._found("in", weight.block, magnitude_key(weight))["mean"]

    def lookups(self, weight: Weight) -> Tensor:
        """(vocabulary,) share of the lookups that each row of an embedding had."""
        share_v = self._found("in", weight.block, lookups_key(weight))["share"]
        return torch.nn.functional.pad(share_v, (0, weight.shape[1] - len(share_v)))

    def gradient(self, weight: Weight, need: OutputGradient) -> Moment:
        """Moment of the gradient at what the weight writes: (o, o)."""
        return self._moment("grad", weight, gradient_key(weight, need))

    def fisher(self, weight: Weight) -> Fisher:
        """Fisher information of the weight, per example."""
        return Fisher.from_tensors(self._found("grad", weight.block, fisher_key(weight)))

    def _moment(self, kind: str, weight: Weight, key: str) -> Moment:
        found = self._found(kind, weight.block, key)
        return Moment.from_tensors(found, self._basis(weight) if "rest" in found else None)

    def _found(self, kind: str, block: int, key: str) -> dict[str, Tensor]:
        unit = f"{kind}-{block}"
        if self._held.get(kind, ("", {}))[0] != unit:
            self.hold(unit, self._load(unit) or {})
        tensors, prefix = self._held[kind][1], f"{key}/"
        found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if not found:
            raise KeyError(f"statistic {key} was not declared by `needs`")
        return found
