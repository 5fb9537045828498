"""The diagonal Fisher information of a weight from gradients per example, without ever holding
more than one example's (FWSVD, arXiv 2207.00112, equation 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rankine.ranks import Group


@dataclass(frozen=True)
class WeightFisher:
    """Need: the empirical Fisher I = E_d[(∂L(d)/∂W)²] of a weight, in sums of rows and columns.

    L(d) is the task's loss of example d (the mean over its terms): a sequence of a language model
    counts as one. The mean of squares, not the square of a batch's mean, so the batch size does
    not matter.
    """


@dataclass(frozen=True)
class Fisher:
    """`inputs_i` = Σ_o I_oi and `outputs_o` = Σ_i I_oi (float64), number of examples `count`.

    `terms`: mean number of terms of an example. ½ · terms · Σ I Δ² estimates by how much a change
    Δ of the weight raises the loss of one term (a token), where examples are of one length.
    """

    inputs_i: Tensor
    outputs_o: Tensor
    count: int
    terms: float

    def tensors(self) -> dict[str, Tensor]:
        """For the journal."""
        return {
            "inputs": self.inputs_i,
            "outputs": self.outputs_o,
            "count": torch.tensor(self.count),
            "terms": torch.tensor(self.terms, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Fisher:
        """Inverse of `tensors`."""
        count, terms = int(tensors["count"]), float(tensors["terms"])
        return cls(tensors["inputs"], tensors["outputs"], count, terms)


class FisherSum:
    """Running sums; `add` takes inputs (examples, positions, i), gradients of the summed terms at
    the outputs (examples, positions, o), and each example's number of terms."""

    def __init__(self) -> None:
        self.inputs_i: Tensor | None = None
        self.outputs_o: Tensor | None = None
        self.count = 0
        self.terms = 0.0

    def add(self, x_bti: Tensor, g_bto: Tensor, terms_b: Tensor) -> None:
        """Add the squared gradient Σ_t g_t x_tᵀ / terms of each example."""
        x, g = x_bti.double(), g_bto.double() / terms_b.double()[:, None, None]
        if self.inputs_i is None or self.outputs_o is None:
            self.inputs_i, self.outputs_o = x.new_zeros(x.shape[-1]), g.new_zeros(g.shape[-1])
        (_, t, i), o = x.shape, g.shape[-1]
        if t * (o + i) < o * i:  # fewer products than the gradient itself has entries
            self.inputs_i += _column_sums(x, g)
            self.outputs_o += _column_sums(g, x)
        else:
            for x_ti, g_to in zip(x, g, strict=True):
                squared_oi = (g_to.mT @ x_ti).square()
                self.inputs_i += squared_oi.sum(0)
                self.outputs_o += squared_oi.sum(1)
        self.count += len(x)
        self.terms += float(terms_b.sum())

    def over(self, group: Group) -> None:
        """Add what the other ranks summed."""
        self.inputs_i, self.outputs_o = group.sum(self.inputs_i, self.outputs_o)
        self.count, self.terms = group.total(self.count), group.total(self.terms)

    def mean(self) -> Fisher:
        """Over the examples; raises ValueError when nothing was added."""
        if self.inputs_i is None or self.outputs_o is None:
            raise ValueError("no examples were measured")
        n = self.count
        return Fisher(self.inputs_i / n, self.outputs_o / n, n, self.terms / n)


def _column_sums(x_btm: Tensor, g_btn: Tensor) -> Tensor:
    """(m,) Σ_b Σ_n (Σ_t g_tn x_tm)² as Σ_b Σ_st x_sm (g_s·g_t) x_tm: no (n, m) matrix."""
    inner_btt = g_btn @ g_btn.mT
    return ((inner_btt @ x_btm) * x_btm).sum((0, 1)).clamp_min(0)
