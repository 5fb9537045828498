"""Factored decoding in one compiled call: a runtime, not a compression.

    y = B (A x) + b     both products in one call, the row between them in float32

Decoding one token reads every weight once, so dense bytes ÷ factored bytes is the limit of a
speed-up. torch's products start too slowly, and read short rows too slowly, to come near it (keep
0.3: 0.7 of the limit, in one call 0.9; docs/speed.md). A small C file is compiled once with the
machine's own compiler; where it does not apply (several rows, gradients, no CPU, no compiler)
torch's products run as before.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

from rankine.method import Card, Runtime, method
from rankine.structures import fused


@method
@dataclass(frozen=True)
class Fused(Runtime):
    """`rankine.load(directory, fused=True)`, or `with rankine.fused(model):`. No knobs."""

    card = Card(
        name="fused",
        title="Factored decoding in one compiled call",
        reference="Rankine",
        family="runtime",
        summary="decodes linear and factored layers at the speed of memory (CPU, one row)",
        takes=("linear", "low_rank"),
        gives=(),
        after=("dense", "low-rank", "quantization"),
        before=(),
        ours=True,
    )

    def swap(self, model: nn.Module) -> ExitStack:
        """Linear layers, and factored ones without a function between the factors."""
        return fused(model)
