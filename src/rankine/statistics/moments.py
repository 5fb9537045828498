"""What is measured at one tensor, summed in float64, so that the result does not depend on how
the calibration data was batched or ordered (up to float64 rounding)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rankine.metric import Gram
from rankine.ranks import Group
from rankine.statistics.fisher import WeightFisher


@dataclass(frozen=True)
class InputMoment:
    """Need: E[x xᵀ] and E[x] of what a weight reads."""


@dataclass(frozen=True)
class InputMagnitude:
    """Need: E|x_j| of what a weight reads."""


@dataclass(frozen=True)
class Lookups:
    """Need: how often each row of an embedding is looked up, its padding row apart. An embedding
    reads one-hot ids: this is their mean, and the diagonal of their second moment."""


@dataclass(frozen=True)
class OutputGradient:
    """Need: E[g gᵀ] of the loss's gradient with respect to what a weight writes, per position.

    g is the gradient of the sum of the loss terms; the moment is the mean over positions, times
    positions per term (about 1 for a language model, the length for a classifier). So half of it
    is in units of one term: nats per token, or the mean loss of an example.

    `middle`: share of each example's positions used, around its centre; `clip`: each position's
    norm is brought into [1/clip, clip] × its example's mean (KFAC-SVD 2026: this keeps outliers
    from collapsing the rank).
    """

    middle: float = 1.0
    clip: float | None = None


Need = InputMoment | InputMagnitude | Lookups | OutputGradient | WeightFisher


@dataclass(frozen=True)
class Moment:
    """Second moment `h_nn` (float64, mean over positions), mean `mean_n`, number of positions."""

    h_nn: Tensor
    mean_n: Tensor
    count: int

    @cached_property
    def gram(self) -> Gram:
        """H as one side of a metric; weights that read the same tensor share its root."""
        return Gram(self.h_nn)

    @property
    def covariance(self) -> Tensor:
        """H − μ μᵀ."""
        return self.h_nn - torch.outer(self.mean_n, self.mean_n)

    def tensors(self) -> dict[str, Tensor]:
        """For the journal."""
        return {"h": self.h_nn, "mean": self.mean_n, "count": torch.tensor(self.count)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moment:
        """Inverse of `tensors`."""
        return cls(tensors["h"], tensors["mean"], int(tensors["count"]))


class MomentSum:
    """Running Σ x xᵀ, Σ x and count; `add` takes (positions, n) rows."""

    def __init__(self) -> None:
        self.h_nn: Tensor | None = None
        self.sum_n: Tensor | None = None
        self.count = 0

    def add(self, x_tn: Tensor, other_tn: Tensor | None = None) -> None:
        """Add rows; with `other_tn` the cross moment Σ other xᵀ instead of Σ x xᵀ."""
        if x_tn.shape[0] == 0:
            return
        x = x_tn.double()
        left = x if other_tn is None else other_tn.double()
        if self.h_nn is None or self.sum_n is None:
            self.h_nn = x.new_zeros(left.shape[1], x.shape[1])
            self.sum_n = x.new_zeros(x.shape[1])
        self.h_nn.addmm_(left.mT, x)
        self.sum_n += x.sum(0)
        self.count += x.shape[0]

    def over(self, group: Group) -> None:
        """Add what the other ranks summed."""
        self.h_nn, self.sum_n = group.sum(self.h_nn, self.sum_n)
        self.count = group.total(self.count)

    def mean(self) -> Moment:
        """The moment, which takes the sum's memory; raises ValueError when nothing was added."""
        if self.h_nn is None or self.sum_n is None:
            raise ValueError("no positions were measured")
        moment = Moment(self.h_nn.div_(self.count), self.sum_n.div_(self.count), self.count)
        self.h_nn = self.sum_n = None
        self.count = 0
        return moment


@dataclass(frozen=True)
class Magnitude:
    """Mean absolute values `mean_n` (float64), number of positions."""

    mean_n: Tensor
    count: int

    def tensors(self) -> dict[str, Tensor]:
        """For the journal."""
        return {"mean": self.mean_n, "count": torch.tensor(self.count)}


class MagnitudeSum:
    """Running Σ |x| and count; `add` takes (positions, n) rows."""

    def __init__(self) -> None:
        self.sum_n: Tensor | None = None
        self.count = 0

    def add(self, x_tn: Tensor) -> None:
        """Add rows."""
        total_n = x_tn.double().abs().sum(0)
        self.sum_n = total_n if self.sum_n is None else self.sum_n + total_n
        self.count += x_tn.shape[0]

    def over(self, group: Group) -> None:
        """Add what the other ranks summed."""
        (self.sum_n,) = group.sum(self.sum_n)
        self.count = group.total(self.count)

    def mean(self) -> Magnitude:
        """The mean; raises ValueError when nothing was added."""
        if self.sum_n is None or self.count == 0:
            raise ValueError("no positions were measured")
        return Magnitude(self.sum_n / self.count, self.count)


@dataclass(frozen=True)
class Frequencies:
    """Share of all lookups that each row had, `share_v` (float64, up to the largest id seen)."""

    share_v: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """For the journal."""
        return {"share": self.share_v}


class LookupSum:
    """Running number of lookups by id; `add` takes (positions, 1) ids."""

    def __init__(self) -> None:
        self.count_v = torch.zeros(0, dtype=torch.float64)
        self.count = 0

    def add(self, ids_t1: Tensor) -> None:
        """Add ids."""
        seen = torch.bincount(ids_t1.flatten().cpu(), minlength=len(self.count_v)).double()
        seen[: len(self.count_v)] += self.count_v
        self.count_v = seen
        self.count += ids_t1.numel()

    def over(self, group: Group) -> None:
        """Add what the other ranks counted."""
        (self.count_v,) = group.sum(self.count_v)
        self.count = group.total(self.count)

    def mean(self) -> Frequencies:
        """The shares; raises ValueError when nothing was added."""
        if self.count == 0:
            raise ValueError("no ids were looked up")
        return Frequencies(self.count_v / self.count)


def clip_rows(g_btn: Tensor, mask_bt: Tensor, clip: float | None) -> Tensor:
    """Scale each position's gradient so that its norm lies in [1/clip, clip] × the mean norm of
    its example's own positions. A zero gradient stays zero."""
    if clip is None:
        return g_btn
    norm_bt = torch.linalg.vector_norm(g_btn, dim=-1)
    total = norm_bt.where(mask_bt, 0.0).sum(-1, keepdim=True)
    mean = total / mask_bt.sum(-1, keepdim=True).clamp_min(1)
    wanted = torch.minimum(torch.maximum(norm_bt, mean / clip), mean * clip)
    scale_bt = torch.where(norm_bt > 0, wanted / norm_bt.clamp_min(1e-38), 1.0)
    return g_btn * scale_bt.unsqueeze(-1)


def middle_positions(mask_bt: Tensor, share: float) -> Tensor:
    """The mask restricted to the middle share of each example's own positions."""
    if share >= 1:
        return mask_bt
    order = mask_bt.cumsum(-1) - 1
    length = mask_bt.sum(-1, keepdim=True)
    cut = ((1 - share) / 2 * length).floor()
    return mask_bt & (order >= cut) & (order < length - cut)
