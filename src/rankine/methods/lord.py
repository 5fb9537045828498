"""LORD: Low Rank Decomposition of Monolingual Code LLMs for One-Shot Compression (2023,
arXiv 2309.14021): PCA of each layer's outputs (AFM), ranks per layer type by a sensitivity sweep.

    C = Cov(W x) = U Λ Uᵀ,   A = U_kᵀ W,   B = U_k,   bias (I − U_kU_kᵀ) E[y] + U_kU_kᵀ b

The centred fit costs one bias per layer (counted) and is never worse on the calibration data:
E‖y − ŷ‖² = Σ_{i>k} λ_i. Un-centred it is SVD-LLM's matrix. The sweep compresses one type of layer
at a time at reductions of 10-50 % and reads the change of the loss; one share per type is then
chosen under the budget (the paper picks by hand; here the knapsack does, over types).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rankine.anatomy import Target
from rankine.budget import Bid, Knapsack, Option, Uniform
from rankine.errors import UserError
from rankine.method import Bench, Card, Compressor, Evidence, method
from rankine.metric import Metric
from rankine.patch import Patch
from rankine.progress import counted
from rankine.statistics import InputMoment, Need
from rankine.structures import LowRank, Structure


@method
@dataclass(frozen=True)
class LoRD(Compressor):
    """Output PCA.

    - `centred`: PCA of the covariance with an implied bias (the paper), or of the second moment.
    - `sweep`: shares of the dense bits probed per layer type.
    - `allocation`: "by_type" (the paper's sweep) or "uniform".
    """

    card = Card(
        name="lord",
        title="LORD: Low Rank Decomposition of Monolingual Code LLMs for One-Shot Compression",
        reference="arXiv:2309.14021",
        authors="Kaushal, Ayush and Vaidhya, Tejas and Rish, Irina",
        family="low-rank",
        summary="PCA of each layer's outputs, ranks per layer type by a sensitivity sweep",
        needs=("calibration",),
    )

    centred: bool = True
    sweep: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
    allocation: str = "by_type"

    def __post_init__(self) -> None:
        if self.allocation not in ("by_type", "uniform"):
            raise UserError(f'expected allocation "by_type" or "uniform", found {self.allocation}')
        object.__setattr__(self, "sweep", tuple(float(s) for s in self.sweep))
        if not self.sweep or not all(0 < share <= 1 for share in self.sweep):
            raise UserError(f"expected shares above 0 and at most 1 in sweep, found {self.sweep}")

    @property
    def needs_loss(self) -> bool:
        """The sweep probes it."""
        return self.allocation == "by_type"

    def needs(self, target: Target) -> frozenset[Need]:
        """Moment and mean of what the weight reads: Cov(y) = W Cov(x) Wᵀ."""
        return frozenset({InputMoment(compact=True)})

    def metric(self, target: Target, evidence: Evidence) -> Metric:
        """‖(W − Ŵ)(x − μ)‖: the output's covariance, seen from the input side."""
        moment = evidence.inputs(target.weights[0])
        if not self.centred:
            return Metric(inputs=moment.gram)
        return Metric(inputs=moment.centred, mean_i=moment.mean_n)

    def structure(self, target: Target) -> Structure:
        """A centred fit adds a bias where the layer has none."""
        return LowRank(1, bias=self.centred and not target.weights[0].bias)

    def allocate(self, bids: Sequence[Bid], bits: int, bench: Bench) -> dict[str, Option]:
        """One share per layer type by the sweep; nothing kept above the break-even size."""
        if self.allocation == "uniform":
            return Uniform().allocate(bids, bits)
        types: dict[str, list[Bid]] = {}
        for bid in bids:
            types.setdefault(bid.group, []).append(bid)
        pairs = counted(list(types.items()), "probes")
        joint = [self._type_bid(group, members, bench) for group, members in pairs]
        chosen = Knapsack().allocate(joint, bits)
        return {
            bid.target: option
            for group, members in types.items()
            for bid, option in zip(members, chosen[group].structure, strict=True)
        }

    def probes(self, targets: Sequence[Target]) -> int:
        """Each share of each type, and the smallest."""
        types = {target.weights[0].role for target in targets}
        return len(types) * (len(self.sweep) + 1) if self.allocation == "by_type" else 0

    def _type_bid(self, group: str, bids: Sequence[Bid], bench: Bench) -> Bid:
        """All layers of a type as one target; an option is one option per layer."""
        points = [Option(tuple(max(b.options, key=_bits) for b in bids), _total(bids, None), 0.0)]
        for share in (*self.sweep, None):
            picked = tuple(_largest(bid, share) for bid in bids)
            patch = Patch()
            for bid, option in zip(bids, picked, strict=True):
                patch |= bench.fit(bid.target, option)
            loss = max(0.0, bench.probe(patch))
            points.append(Option(picked, sum(o.bits for o in picked), loss, self.name))
        members = tuple(m for bid in bids for m in bid.members)
        return Bid(group, members, tuple(points), sum(b.dense_bits for b in bids), group=group)


def _bits(option: Option) -> int:
    return option.bits


def _total(bids: Sequence[Bid], share: float | None) -> int:
    return sum(max(o.bits for o in bid.options) for bid in bids)


def _largest(bid: Bid, share: float | None) -> Option:
    """The largest option within a share of the dense bits; the smallest for None."""
    if share is None:
        return min(bid.options, key=_bits)
    fitting = [o for o in bid.options if o.bits <= share * bid.dense_bits]
    return max(fitting or [min(bid.options, key=_bits)], key=_bits)
