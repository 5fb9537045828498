"""AFM: Atomic Feature Mimicking (AAAI 2023), as the low-rank framework for click-through-rate
prediction uses it (KDD 2024, arXiv 2405.18146): PCA of what a layer puts out, not of its weight.

    C = Cov(W x + b) = U Λ Uᵀ,   A = U_kᵀ W,   B = U_k,   c = (I − U_kU_kᵀ) E[y]
    ŷ = B σ(A x + U_kᵀ b) + c,   E‖y − ŷ‖² = Σ_{i>k} λ_i without σ: least of all affine maps

An embedding is a layer that reads one-hot ids: Cov is weighted by how often each id is looked up,
the thin table holds U_kᵀ e, and `up` decodes it and adds c (not to the padding row, which may have
to stay zero). A table whose storage an output layer shares is fitted without a mean, so that both
go on sharing it. `act` puts σ between the factors of linear layers; the signs of U_k are then such
that E[U_kᵀ y] ≥ 0. That does not keep the function: train afterwards (`heal`), or give `headroom`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rankine.anatomy import Target
from rankine.budget import Bid, Knapsack, Option, Uniform
from rankine.errors import UserError
from rankine.method import Bench, Card, Compressor, Evidence, Source, dense_bid, method
from rankine.metric import Gram, Metric
from rankine.patch import Patch
from rankine.progress import counted
from rankine.statistics import InputMoment, Lookups, Need
from rankine.structures import Dense, LowRank, Structure


@method
@dataclass(frozen=True)
class AFM(Compressor):
    """Output PCA of linear layers and of embedding tables.

    - `act`: a function between the factors of linear layers: "relu" and the like.
    - `headroom`: with `act`, standard deviations by which each component is lifted above the
      function's zero on average (a "relu" then hardly acts before training); 0 is the paper's.
    - `allocation`: "uniform", or "greedy": by the loss that each size of each target alone costs.
    - `sweep`: shares of the dense bits that "greedy" probes.
    """

    card = Card(
        name="afm",
        title="Unified Low-rank Compression Framework for Click-through Rate Prediction",
        reference="arXiv:2405.18146",
        authors="Yu, Hao and Fu, Minghao and Ding, Jiandong and Zhou, Yusheng and Wu, Jianxin",
        family="low-rank",
        summary="PCA of each layer's outputs; of embeddings, weighted by lookups",
        takes=("linear", "embedding"),
        needs=("calibration",),
    )

    #: The fit changes the layer's bias.
    centred: ClassVar[bool] = True

    act: str | None = None
    headroom: float = 0.0
    allocation: str = "uniform"
    sweep: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2)

    def __post_init__(self) -> None:
        if self.allocation not in ("uniform", "greedy"):
            raise UserError(f'expected allocation "uniform" or "greedy", found {self.allocation}')
        LowRank(1, act=self.act)  # says which functions there are
        object.__setattr__(self, "sweep", tuple(float(s) for s in self.sweep))

    @property
    def by_size(self) -> bool:
        """A uniform budget asks for no losses."""
        return self.act is None and self.allocation == "uniform"

    def needs(self, target: Target) -> frozenset[Need]:
        """Moment and mean of what a layer reads, or how often a table's rows are."""
        return frozenset({Lookups() if _is_table(target) else InputMoment()})

    def metric(self, target: Target, evidence: Evidence) -> Metric:
        """‖(W − Ŵ)(x − E[x])‖: the outputs' covariance, seen from the input side."""
        weight = target.weights[0]
        if _is_table(target):
            share_v = evidence.lookups(weight)
            if target.kind == "table":
                return Metric(Gram(diagonal_n=share_v))
            return Metric(Gram(diagonal_n=share_v, rank_one_n=share_v, sign=-1.0), mean_i=share_v)
        moment = evidence.inputs(weight)
        if not self._affine(target):
            return Metric(Gram(moment.covariance), mean_i=moment.mean_n)
        one = moment.mean_n.new_ones(1)
        covariance = torch.nn.functional.pad(moment.covariance, (0, 1, 0, 1))
        return Metric(Gram(covariance), mean_i=torch.cat([moment.mean_n, one]))

    def goal(self, target: Target, source: Source, evidence: Evidence) -> Tensor:
        """The weight; with a function behind the first factor [W b], a map of [x 1]."""
        weight = target.weights[0]
        w_oi, b_o = source.weight(weight), source.bias(weight)
        if not self._affine(target):
            return w_oi
        assert b_o is not None
        return torch.cat([w_oi, b_o.to(w_oi).unsqueeze(1)], 1)

    def _affine(self, target: Target) -> bool:
        return self.act is not None and not _is_table(target) and target.weights[0].bias

    def structure(self, target: Target) -> Structure:
        """A centred fit adds a bias where there is none."""
        if _is_table(target):
            return LowRank(1, view="table", bias=target.kind != "table")
        bias = target.weights[0].bias
        shift = self.act is not None and (bias or self.headroom > 0)
        return LowRank(1, act=self.act, bias=not bias, shift=shift)

    def bid(self, target: Target, goal: Tensor, metric: Metric, dtype: torch.dtype) -> Bid:
        """Losses without the function; bits of the layer, whose bias is dense either way."""
        if not self._affine(target):
            return super().bid(target, goal, metric, dtype)
        options = [
            replace(o, bits=o.structure.bits(target.shape, dtype), by=self.name)
            for o in self.structure(target).curve(goal, metric, dtype)
        ]
        return dense_bid(target, goal[:, :-1], dtype, options)

    def fit(
        self, target: Target, choice: Structure, goal: Tensor, metric: Metric, dtype: torch.dtype
    ) -> Patch:
        """Output PCA; with a function, U_k itself and its projections with a positive mean."""
        if self.act is None or _is_table(target) or isinstance(choice, Dense):
            return super().fit(target, choice, goal, metric, dtype)
        assert isinstance(choice, LowRank)
        assert metric.mean_i is not None
        fitted = LowRank(choice.rank).encode(goal.double(), metric)
        scale_r = torch.linalg.vector_norm(fitted["up.weight"], dim=0)
        mean_r = scale_r * (fitted["down.weight"] @ metric.mean_i)
        sign_r = torch.where(mean_r < 0, -1.0, 1.0)
        u_or = fitted["up.weight"] * (sign_r / scale_r)
        a_ri = fitted["down.weight"] * (sign_r * scale_r).unsqueeze(1)
        a_ri, a_r = (a_ri[:, :-1], a_ri[:, -1]) if self._affine(target) else (a_ri, 0.0 * mean_r)
        bias_o = metric.implied_bias(goal, u_or @ (u_or.mT @ goal.double()))
        assert bias_o is not None
        if self._affine(target):
            bias_o = bias_o - goal[:, -1]  # the layer's own comes on top
        if self.headroom > 0:
            lifted_r = self.headroom * _deviation(u_or, goal, metric) - sign_r * mean_r
            a_r, bias_o = a_r + lifted_r, bias_o - u_or @ lifted_r
        parts = {"down.weight": a_ri.contiguous(), "up.weight": u_or}
        if choice.shift:
            parts["down.bias"] = a_r
        stored = {name: tensor.to(dtype) for name, tensor in parts.items()}
        return Patch.over(target, choice, stored, bias_o)

    def allocate(self, bids: Sequence[Bid], bits: int, bench: Bench) -> dict[str, Option]:
        """The same share for all, or the least probed loss per bit."""
        if self.allocation == "uniform":
            return Uniform().allocate(bids, bits)
        probed = [self._probed(bid, bench) for bid in counted(bids, "probes")]
        return Knapsack().allocate(probed, bits)

    def _probed(self, bid: Bid, bench: Bench) -> Bid:
        """The curve at a few sizes, each priced by what it alone costs on the calibration data."""
        smallest = min(bid.options, key=lambda o: o.bits)
        picked = {smallest}
        for share in self.sweep:
            fitting = [o for o in bid.options if o.bits <= share * bid.dense_bits]
            picked.add(max(fitting, key=lambda o: o.bits, default=smallest))
        probed = [
            replace(o, loss=max(0.0, bench.probe(bench.fit(bid.target, o))))
            for o in sorted(picked, key=lambda o: o.bits)
            if not isinstance(o.structure, Dense)
        ]
        dense = [o for o in bid.options if isinstance(o.structure, Dense)]
        return replace(bid, options=(*probed, *dense))


def _is_table(target: Target) -> bool:
    return target.weights[0].operator == "embedding"


def _deviation(u_or: Tensor, goal: Tensor, metric: Metric) -> Tensor:
    """(r,) standard deviations of U_kᵀ y."""
    assert metric.inputs is not None
    spread_rr = metric.inputs.congruence(u_or.mT @ goal.double())
    return spread_rr.diagonal().clamp_min(0).sqrt()
