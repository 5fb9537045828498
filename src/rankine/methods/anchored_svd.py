"""AA-SVD: anchored SVD (2026, arXiv 2604.02119), the closed form.

    min_{rank k} E‖ W x − Ŵ x' ‖²,   x inputs of the dense, x' of the compressed model
    goal T = W C H'⁻¹ (C = E[x x'ᵀ], H' = E[x' x'ᵀ]),   then the SVD of T whitened by H'

Layers are solved in execution order, so x' is what the finished prefix really feeds the next
layer. T is computed as W + W (C − H')(H' + λI)⁻¹: off the data it stays W. The paper's block
refinement is the engine's `refine`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rankine.anatomy import Target
from rankine.fitting import anchored, expect
from rankine.method import Card, Compressor, Evidence, Source, Stream, method
from rankine.metric import Metric
from rankine.statistics import InputMoment, Need


@method
@dataclass(frozen=True)
class AnchoredSVD(Compressor):
    """Whitened SVD of the anchored goal, block after block. `ridge`: relative to mean(diag H')."""

    card = Card(
        name="anchored_svd",
        title="AA-SVD: Anchored and Adaptive SVD for Large Language Model Compression",
        reference="arXiv:2604.02119",
        authors="Sinha, Atul Kumar and Fleuret, François",
        family="low-rank",
        summary="whitened SVD of the goal that undoes the compressed prefix's shift",
        needs=("calibration",),
    )

    ridge: float = 1e-4

    def __post_init__(self) -> None:
        expect(self.ridge > 0, "ridge above 0", self.ridge)

    @property
    def stream(self) -> Stream:
        """Both."""
        return "anchored"

    def needs(self, target: Target) -> frozenset[Need]:
        """The second moment of what the weight reads (for the bids; the solve measures its own)."""
        return frozenset({InputMoment(compact=True)})

    def metric(self, target: Target, evidence: Evidence) -> Metric:
        """‖(T − Ŵ) S'‖_F."""
        return Metric(inputs=evidence.inputs(target.weights[0]).gram)

    def goal(self, target: Target, source: Source, evidence: Evidence) -> Tensor:
        """The weight, shifted to the compressed stream once there is one."""
        return anchored(target.weights[0], source, evidence, self.ridge)
