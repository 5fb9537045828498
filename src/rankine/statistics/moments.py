"""What is measured at one tensor, summed in float64, so that the result does not depend on how
the calibration data was batched or ordered (up to float64 rounding)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from rankine.linalg.anchor import Cross
from rankine.linalg.packed import pack, unpack
from rankine.metric import Gram
from rankine.ranks import Group
from rankine.statistics.fisher import WeightFisher


@dataclass(frozen=True)
class InputMoment:
    """Need: E[x xᵀ] and E[x] of what a weight reads.

    `compact`: who only compares matrices T whose rows lie in the weight's row space asks for T H Tᵀ
    alone. Of a wide weight that reads its input by itself, H is then measured on that space: fewer
    products, and half to a tenth of the memory (`Moment.basis_nk`).
    """

    compact: bool = False


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
    from collapsing the rank). `compact`: as of `InputMoment`, on the column space of a tall weight.
    """

    middle: float = 1.0
    clip: float | None = None
    compact: bool = False


Need = InputMoment | InputMagnitude | Lookups | OutputGradient | WeightFisher


#: A weight's smaller side is worth a basis of its own up to this share of the larger one.
COMPACT = 0.5


@dataclass(frozen=True)
class Moment:
    """Second moment `h_nn` (float64, mean over positions), mean `mean_n`, number of positions.

    Measured on a subspace, `h_nn` is QᵀHQ (k, k) with Q = `basis_nk` (orthonormal columns), and
    `rest_1` the mean of the trace outside of it.
    """

    h_nn: Tensor
    mean_n: Tensor
    count: int
    basis_nk: Tensor | None = None
    rest_1: Tensor | None = None
    _shrunk: dict[float, Gram] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def gram(self) -> Gram:
        """H as one side of a metric; weights that read the same tensor share its root."""
        return Gram(self.h_nn, basis_nk=self.basis_nk, rest_1=self.rest_1)

    @cached_property
    def centred(self) -> Gram:
        """H − μ μᵀ as one side of a metric."""
        if self.basis_nk is None:
            return Gram(self.covariance)
        assert self.rest_1 is not None
        n, k = self.basis_nk.shape
        inside_k = self.basis_nk.double().mT @ self.mean_n
        beside = (self.mean_n.square().sum() - inside_k.square().sum()) / (n - k)
        covariance_kk = self.h_nn - torch.outer(inside_k, inside_k)
        rest_1 = (self.rest_1 - beside).clamp_min(0)
        return Gram(covariance_kk, basis_nk=self.basis_nk, rest_1=rest_1)

    def shrunk(self, amount: float) -> Gram:
        """`gram.shrink(amount)`, one for all who ask."""
        if amount not in self._shrunk:
            self._shrunk[amount] = self.gram.shrink(amount)
        return self._shrunk[amount]

    @property
    def covariance(self) -> Tensor:
        """H − μ μᵀ, of a moment on the whole space."""
        return self.h_nn - torch.outer(self.mean_n, self.mean_n)

    def scale(self, factor: float) -> None:
        """Multiply H in place."""
        self.h_nn.mul_(factor)
        if self.rest_1 is not None:
            self.rest_1.mul_(factor)

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """For the journal: H by its triangle, in `dtype`, in units of a power of two near its
        largest entry (squares of float32 numbers need not fit into float32)."""
        unit = torch.exp2(self.h_nn.abs().max().log2().floor().nan_to_num(0.0, 0.0, 0.0))
        found = {"h": pack(self.h_nn).div_(unit).to(dtype), "unit": unit, "mean": self.mean_n}
        if self.rest_1 is not None:
            found["rest"] = self.rest_1
        return {**found, "count": torch.tensor(self.count)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], basis_nk: Tensor | None = None) -> Moment:
        """Inverse of `tensors`; the basis is not among them (it follows from the weight)."""
        h_nn, count = unpack(tensors["h"]).double().mul_(tensors["unit"]), int(tensors["count"])
        return cls(h_nn, tensors["mean"], count, basis_nk, tensors.get("rest"))


class MomentSum:
    """Running Σ x xᵀ, Σ x and count; `add` takes (positions, n) rows. With `basis_nk` the first is
    measured on its span: float32 products of float32 rows, summed in float64."""

    def __init__(self, basis_nk: Tensor | None = None) -> None:
        self.basis_nk = basis_nk
        self.h_nn: Tensor | None = None
        self.sum_n: Tensor | None = None
        self.power = 0.0
        self.count = 0

    def add(self, x_tn: Tensor) -> None:
        """Add rows."""
        if x_tn.shape[0] == 0:
            return
        wide = x_tn.double()
        x = wide
        if self.basis_nk is not None:
            x = (x_tn.to(self.basis_nk) @ self.basis_nk).double()
            self.power += float(torch.linalg.vector_norm(wide)) ** 2
        if self.h_nn is None or self.sum_n is None:
            self.h_nn = x.new_zeros(x.shape[1], x.shape[1])
            self.sum_n = x.new_zeros(wide.shape[1])
        self.h_nn.addmm_(x.mT, x)
        self.sum_n += wide.sum(0)
        self.count += x.shape[0]

    def over(self, group: Group) -> None:
        """Add what the other ranks summed."""
        self.h_nn, self.sum_n = group.sum(self.h_nn, self.sum_n)
        self.power = group.total(self.power)
        self.count = group.total(self.count)

    def mean(self) -> Moment:
        """The moment, which takes the sum's memory; raises ValueError when nothing was added."""
        if self.h_nn is None or self.sum_n is None:
            raise ValueError("no positions were measured")
        rest_1 = None
        if self.basis_nk is not None:
            n, k = self.basis_nk.shape
            rest = (self.power - float(self.h_nn.trace())) / (self.count * (n - k))
            rest_1 = self.h_nn.new_tensor([max(rest, 0.0)])
        h_nn, mean_n = self.h_nn.div_(self.count), self.sum_n.div_(self.count)
        moment = Moment(h_nn, mean_n, self.count, self.basis_nk, rest_1)
        self.h_nn = self.sum_n = None
        self.count = 0
        return moment


class CrossSum:
    """Running Σ x x'ᵀ of what a layer reads in two models, and count. With `basis_nk` of the rows
    of the weight W that reads it, Σ (Qᵀx) x'ᵀ: all that W C asks for."""

    def __init__(self, basis_nk: Tensor | None = None) -> None:
        self.basis_nk = basis_nk
        self.c_nn: Tensor | None = None
        self.count = 0

    def add(self, x_tn: Tensor, other_tn: Tensor) -> None:
        """Add rows of both, position by position."""
        if x_tn.shape[0] == 0:
            return
        if self.basis_nk is not None:
            x_tn = x_tn.to(self.basis_nk) @ self.basis_nk
        x, other = x_tn.double(), other_tn.double()
        if self.c_nn is None:
            self.c_nn = x.new_zeros(x.shape[1], other.shape[1])
        self.c_nn.addmm_(x.mT, other)
        self.count += x.shape[0]

    def over(self, group: Group) -> None:
        """Add what the other ranks summed."""
        (self.c_nn,) = group.sum(self.c_nn)
        self.count = group.total(self.count)

    def mean(self) -> Cross:
        """The mean, which takes the sum's memory; raises ValueError when nothing was added."""
        if self.c_nn is None:
            raise ValueError("no positions were measured")
        return Cross(self.c_nn.div_(self.count), self.basis_nk)


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
