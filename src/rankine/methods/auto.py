"""auto: our own. Every structure bids for every target in one knapsack of bits, in units of the
loss; each choice is solved against what the compressed prefix really feeds it.

    curve   ½ ‖G^{1/2} (W − Ŵ) H^{1/2}‖²          predicted nats per token (two-sided, KFAC)
    choice  min Σ loss  s.t.  Σ bits ≤ budget       knapsack over all targets, dense included
    solve   goal T = W + W (C − H')(H' + λI)⁻¹      anchored to the dense outputs (AA-SVD)
    refine  each block against the dense block      optional; gradients stay in the block

No published system composes the four. Defaults come from the ablation in docs/claims.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankine.anatomy import Target
from rankine.budget import Allocator, Bid, Knapsack, Option, Uniform
from rankine.fitting import PIVOT_HARM, TwoSided, anchored, dense_bid, expect
from rankine.method import Card, Compressor, Evidence, Refine, Source, Stream, method
from rankine.metric import Metric
from rankine.patch import Patch
from rankine.structures import LowRank, Structure

#: Storing a pivoted form adds at most this many mean squares of one rounding to its relative loss
#: (0 to 6 were measured over spectra, ranks and dtypes).
ROUNDINGS = 6.0


def pivot_rounding(goal: Tensor, metric: Metric, dtype: torch.dtype) -> float:
    """The loss that storing coefficients in `dtype` may add to a pivoted form: sizes so close to
    lossless that it would be felt are not offered. (Entries rounded to half an eps of their
    binade err by eps²/24 of their square in the mean.)"""
    everything = float(metric.loss(goal, torch.zeros_like(goal)))
    return ROUNDINGS * everything * torch.finfo(dtype).eps ** 2 / 24


@method
@dataclass(frozen=True)
class Auto(TwoSided, Compressor):
    """Two-sided metric, anchored solve, loss-aware knapsack, optional block refinement.

    - `structures`: what may bid: "low_rank" (two factors), "pivoted" (the same, fewer bytes).
    - `anchored`, `ridge`: solve against the compressed stream; ridge relative to mean(diag H').
    - `solve`: "two_sided", or "inputs" to fit by input whitening alone (the curves stay).
    - `allocation`: "knapsack", or "uniform" to see what the allocator is worth.
    - `refine`, `epochs`, `lr`: train each block against the dense block's output.
    """

    card = Card(
        name="auto",
        title="One knapsack of bits over every structure",
        reference="Rankine",
        family="low-rank",
        summary="two-sided metric, anchored solve, knapsack on predicted loss; --set refine=true",
        takes=("linear", "bank"),
        needs=("calibration", "gradients"),
        ours=True,
    )

    structures: tuple[str, ...] = ("low_rank",)
    middle: float = 1.0  # every position; the paper of kfac_svd leaves a quarter out
    anchored: bool = True
    ridge: float = 1e-4
    solve: str = "two_sided"
    allocation: str = "knapsack"
    refine: bool = False
    epochs: int = 25
    lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        forms = ("low_rank", "pivoted")
        bidding = bool(self.structures) and set(self.structures) <= set(forms)
        expect(bidding, f"structures among {forms}", self.structures)
        solves, rules = ("two_sided", "inputs"), ("knapsack", "uniform")
        expect(self.solve in solves, 'solve "two_sided" or "inputs"', self.solve)
        expect(self.allocation in rules, 'allocation "knapsack" or "uniform"', self.allocation)
        expect(self.ridge > 0, "ridge above 0", self.ridge)
        expect(self.epochs >= 1, "at least one of epochs", self.epochs)
        expect(self.lr > 0, "lr above 0", self.lr)

    @property
    def stream(self) -> Stream:
        """Both streams, unless told otherwise."""
        return "anchored" if self.anchored else "dense"

    @property
    def refinement(self) -> Refine | None:
        """Block training, when asked for."""
        return Refine(epochs=self.epochs, lr=self.lr) if self.refine else None

    @property
    def template(self) -> Structure:
        """Two factors, or their pivoted form where that bids."""
        return LowRank(1, pivoted="pivoted" in self.structures)

    def structure(self, target: Target) -> Structure:
        """The template; a bank of experts is always stored as two factors."""
        return LowRank(1) if target.weights[0].operator == "bank" else self.template

    def goal(self, target: Target, source: Source, evidence: Evidence) -> Tensor:
        """The weight; once the stream is live, shifted to give the dense outputs."""
        return anchored(target.weights[0], source, evidence, self.ridge)

    def bid(self, target: Target, goal: Tensor, metric: Metric, dtype: torch.dtype) -> Bid:
        """Curves of all structures; one spectrum serves both forms of low rank."""
        curve = self.template.curve(goal, metric, dtype)
        options: list[Option] = []
        if "low_rank" in self.structures:
            options += self._stored(curve, False, goal, dtype)
        if "pivoted" in self.structures and goal.dim() == 2:  # no bank
            felt = pivot_rounding(goal, metric, dtype) / PIVOT_HARM
            options += self._stored([o for o in curve if o.loss >= felt], True, goal, dtype)
        return dense_bid(target, goal, dtype, options)

    def _stored(
        self, curve: Sequence[Option], pivoted: bool, goal: Tensor, dtype: torch.dtype
    ) -> list[Option]:
        """The ranks of a curve in one form: the same losses at other bits."""
        forms = [dataclasses.replace(o.structure, pivoted=pivoted) for o in curve]
        return [
            Option(form, form.bits(goal.shape, dtype), o.loss, self.name)
            for form, o in zip(forms, curve, strict=True)
        ]

    def fit(
        self, target: Target, choice: Structure, goal: Tensor, metric: Metric, dtype: torch.dtype
    ) -> Patch:
        """In the metric of the bids, or in its input side alone."""
        if self.solve == "inputs":
            metric = Metric(inputs=metric.inputs)
        return super().fit(target, choice, goal, metric, dtype)

    @property
    def allocator(self) -> Allocator:
        """Least total predicted loss under the budget."""
        return Knapsack() if self.allocation == "knapsack" else Uniform()
