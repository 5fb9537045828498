"""Round to nearest: plain weight-only quantization, the baseline every low-rank result is shown
beside at its bytes.

Asymmetric min-max codes, `group` consecutive inputs of one output share a scale and a minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankine.anatomy import Target
from rankine.budget import Bid, Option
from rankine.method import Card, Compressor, dense_bid, method
from rankine.metric import Metric
from rankine.structures import Quantized


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
        gives=("quantized",),
    )

    sized: ClassVar[bool] = False

    code_bits: int = 4
    group: int = 64

    def bid(self, target: Target, goal: Tensor, metric: Metric, dtype: torch.dtype) -> Bid:
        """One size."""
        structure = Quantized(self.code_bits, self.group)
        loss = float(metric.loss(goal, structure.decode(structure.encode(goal, metric))))
        option = Option(structure, structure.bits(goal.shape, dtype), loss, self.name)
        return dense_bid(target, goal, dtype, [option])
