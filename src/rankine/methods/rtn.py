"""Round to nearest: plain weight-only quantization, the baseline every low-rank result is shown
beside at its bytes.

Asymmetric min-max codes, `group` consecutive inputs of one output share a scale and a minimum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rankine.anatomy import Target
from rankine.budget import Bid
from rankine.fitting import dense_bid
from rankine.method import Card, Compressor, method
from rankine.metric import Metric
from rankine.structures import Dense, Quantized, Structure


@method
@dataclass(frozen=True)
class RTN(Compressor):
    """`code_bits` per weight in groups of `group`."""

    card = Card(
        name="rtn",
        title="Round-to-nearest weight quantization",
        reference="baseline",
        family="quantization",
        summary="plain weight-only quantization, no data: the baseline at equal bytes",
        takes=("linear", "bank"),
        gives=("quantized",),
        after=("dense", "low-rank"),
    )

    sized: ClassVar[bool] = False
    inside: ClassVar[bool] = True

    code_bits: int = 4
    group: int = 64

    def __post_init__(self) -> None:
        _ = self.template  # which knows what it can hold

    @property
    def template(self) -> Structure:
        """Codes along the inputs."""
        return Quantized(self.code_bits, self.group)

    def structure(self, target: Target) -> Structure:
        """Along the outputs where codes of the inputs' width would end in half a byte; dense where
        neither fits."""
        o, i = target.shape
        for axis, width in ((-1, i), (-2, o)):
            if width * self.code_bits % 8 == 0:
                return Quantized(self.code_bits, self.group, axis)
        return Dense()

    def bid(self, target: Target, goal: Tensor, metric: Metric, dtype: torch.dtype) -> Bid:
        """One size."""
        curve = self.structure(target).curve(goal, metric, dtype)
        return dense_bid(target, goal, dtype, [replace(o, by=self.name) for o in curve])
