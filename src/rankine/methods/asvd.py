"""ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models (2023,
arXiv 2312.05821).

    W S = U Σ Vᵀ,   Ŵ = U_k Σ_k V_kᵀ S⁻¹,   S = diag(E|x_j|^α),   α = 0.5

Ranks by STRS, its sensitivity-based truncation rank search: each layer alone is cut to nine sizes
and the model's loss on 32 calibration sequences read; every layer then takes its smallest size
whose loss stays below one threshold, as low as the budget allows. The probes go with the number of
layers: hours on a model of billions. Below the smallest probed size all layers get the same share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from rankine.anatomy import Target
from rankine.budget import Bid, Ceiling, Option, Uniform
from rankine.fitting import expect
from rankine.method import Bench, Card, Compressor, Evidence, method
from rankine.metric import Gram, Metric
from rankine.progress import counted
from rankine.statistics import InputMagnitude, Need


@method
@dataclass(frozen=True)
class ASVD(Compressor):
    """SVD scaled by the size of the inputs.

    - `alpha`: exponent of the mean absolute inputs; 0 is plain SVD.
    - `ratios`: shares of a layer's dense bits that the search probes.
    - `allocation`: "search" (the paper's), or "uniform", which probes nothing.
    """

    card = Card(
        name="asvd",
        title="ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language "
        "Models",
        reference="arXiv:2312.05821",
        authors="Yuan, Zhihang and Shang, Yuzhang and Song, Yue and Wu, Qiang and Yan, Yan and "
        "Sun, Guangyu",
        family="low-rank",
        summary="SVD scaled by the inputs' mean size, ranks by probing each layer alone",
        needs=("calibration",),
    )

    alpha: float = 0.5
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    allocation: str = "search"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(float(r) for r in self.ratios))
        between = bool(self.ratios) and all(0 < r < 1 for r in self.ratios)
        expect(between, "ratios between 0 and 1", self.ratios)
        expect(self.alpha >= 0, "alpha of at least 0", self.alpha)
        known = self.allocation in ("search", "uniform")
        expect(known, 'allocation "search" or "uniform"', self.allocation)

    @property
    def needs_loss(self) -> bool:
        """For the search."""
        return self.allocation == "search"

    def needs(self, target: Target) -> frozenset[Need]:
        """Mean absolute inputs."""
        return frozenset({InputMagnitude()})

    def metric(self, target: Target, evidence: Evidence) -> Metric:
        """‖(W − Ŵ) S‖_F."""
        scale_i = evidence.magnitude(target.weights[0]) ** self.alpha
        return Metric(inputs=Gram(diagonal_n=scale_i.square()))

    def allocate(self, bids: Sequence[Bid], bits: int, bench: Bench) -> dict[str, Option]:
        """STRS."""
        sizes = {bid.target: self._probed_sizes(bid) for bid in bids}
        least = sum(min(o.bits for o in options) for options in sizes.values())
        if self.allocation == "uniform" or bits < least:
            return Uniform().allocate(bids, bits)
        probed = [
            dataclasses.replace(
                bid, options=tuple(_probed(bid, option, bench) for option in sizes[bid.target])
            )
            for bid in counted(bids, "probes")
        ]
        return Ceiling().allocate(probed, bits)

    def probes(self, targets: Sequence[Target]) -> int:
        """Each size of each layer."""
        return len(targets) * len(self.ratios) if self.allocation == "search" else 0

    def _probed_sizes(self, bid: Bid) -> list[Option]:
        """For each ratio the largest option within it, and the dense one."""
        by_bits = sorted(bid.options, key=lambda option: option.bits)
        dense = by_bits[-1]
        found = []
        for ratio in sorted(self.ratios):
            fitting = [option for option in by_bits if option.bits <= ratio * dense.bits]
            found.append(fitting[-1] if fitting else by_bits[0])
        return list(dict.fromkeys([*found, dense]))


def _probed(bid: Bid, option: Option, bench: Bench) -> Option:
    """The option with the rise of the loss that it causes alone."""
    if option.structure == max(bid.options, key=lambda o: o.bits).structure:
        return option
    loss = max(0.0, bench.probe(bench.fit(bid.target, option)))
    return dataclasses.replace(option, loss=loss)
