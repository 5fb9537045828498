"""Statistics of a bank of experts: a moment per expert, of the rows that were routed to it.

An expert's second moment of inputs counts its share of all routed rows, that of its gradients is a
mean over its own rows, so that half the two-sided norm of a whole bank is still in units of the
loss. An expert that saw no row counts as if one average, directionless row had reached it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankine.ranks import Group
from rankine.statistics.moments import Moment, OutputGradient, middle_positions
from rankine.structures.bank import Routing


class BankSum:
    """Running Σ x xᵀ, Σ x and counts per expert; `add` takes the rows of each."""

    #: Does a moment count the expert's share of all rows?
    shares = True

    def __init__(self) -> None:
        self.h_enn: Tensor | None = None
        self.sum_en: Tensor | None = None
        self.count_e: Tensor | None = None
        self.count = 0

    def add(self, groups: Sequence[Tensor]) -> None:
        """(rows, n) of every expert."""
        if self.h_enn is None or self.sum_en is None or self.count_e is None:
            experts, n = len(groups), groups[0].shape[-1]
            zeros = groups[0].new_zeros(experts, n, n, dtype=torch.float64)
            self.h_enn, self.sum_en, self.count_e = zeros, zeros[..., 0].clone(), zeros[:, 0, 0] * 0
        for e, rows in enumerate(groups):
            x = rows.double()
            self.h_enn[e].addmm_(x.mT, x)
            self.sum_en[e] += x.sum(0)
            self.count_e[e] += len(x)
        self.count += sum(map(len, groups))

    def over(self, group: Group) -> None:
        """Add what the other ranks summed."""
        sums = group.sum(self.h_enn, self.sum_en, self.count_e)
        self.h_enn, self.sum_en, self.count_e = sums
        self.count = group.total(self.count)

    def mean(self) -> Moment:
        """(experts, n, n) and (experts, n); raises ValueError when nothing was added."""
        if self.h_enn is None or self.sum_en is None or self.count_e is None or self.count == 0:
            raise ValueError("no positions were measured")
        power = self.h_enn.diagonal(dim1=-2, dim2=-1).sum() / (self.count * self.h_enn.shape[-1])
        empty = self.count_e == 0
        self.h_enn[empty] = power * torch.eye(self.h_enn.shape[-1]).to(self.h_enn)
        rows_e = self.count_e.clamp_min(1)
        over_e = torch.full_like(rows_e, self.count) if self.shares else rows_e
        h_enn, mean_en = self.h_enn / over_e[:, None, None], self.sum_en / over_e[:, None]
        return Moment(h_enn, mean_en, self.count)


class BankGradientSum(BankSum):
    """The same of gradients: means over each expert's own rows."""

    shares = False


def routed(x_sn: Tensor, routing: Routing, mask: Tensor | None) -> list[Tensor]:
    """The rows of every expert, without those of tokens that `mask` (any shape, one entry per
    token) takes out."""
    groups = list(torch.split(x_sn, list(routing.counts)))
    if mask is None or mask.numel() != routing.total:
        return groups
    kept = torch.split(mask.reshape(-1)[routing.tokens_s], list(routing.counts))
    return [rows[keep] for rows, keep in zip(groups, kept, strict=True)]


def routed_gradients(
    g_so: Tensor, routing: Routing, mask_bt: Tensor | None, need: OutputGradient
) -> list[Tensor]:
    """As `routed`, after the need's clipping and choice of positions, example by example."""
    if mask_bt is None or mask_bt.dim() != 2 or mask_bt.numel() != routing.total:
        return routed(g_so, routing, mask_bt)
    if need.clip is not None:
        g_so = _clipped(g_so, routing, mask_bt, need.clip)
    return routed(g_so, routing, middle_positions(mask_bt, need.middle))


def _clipped(g_so: Tensor, routing: Routing, mask_bt: Tensor, clip: float) -> Tensor:
    """`moments.clip_rows` where an example's rows lie apart."""
    example_s = routing.tokens_s // mask_bt.shape[1]
    counted_s = mask_bt.reshape(-1)[routing.tokens_s].to(g_so)
    norm_s = torch.linalg.vector_norm(g_so, dim=-1)
    zeros_b = g_so.new_zeros(mask_bt.shape[0])
    total_b = zeros_b.index_add(0, example_s, norm_s * counted_s)
    number_b = zeros_b.index_add(0, example_s, counted_s).clamp_min(1)
    mean_s = (total_b / number_b)[example_s]
    wanted_s = torch.minimum(torch.maximum(norm_s, mean_s / clip), mean_s * clip)
    scale_s = torch.where(norm_s > 0, wanted_s / norm_s.clamp_min(1e-38), 1.0)
    return g_so * scale_s[:, None]
