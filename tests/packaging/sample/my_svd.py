"""A method of another package: SVD in the norm of the inputs' second moment, shrunk."""

from __future__ import annotations

from dataclasses import dataclass

from rankine.anatomy import Target
from rankine.method import Card, Compressor, Evidence, method
from rankine.metric import Gram, Metric
from rankine.statistics import InputMoment, Need


@method
@dataclass(frozen=True)
class MySvd(Compressor):
    """Whitened SVD.

    - `shrink`: share of the identity in the moment.
    """

    card = Card(
        name="my_svd",
        title="An example",
        reference="arXiv:2601.00001",
        family="low-rank",
        summary="what a package of yours may hold",
        needs=("calibration",),
    )

    shrink: float = 0.1

    def needs(self, target: Target) -> frozenset[Need]:
        """The second moment of what the weight reads."""
        return frozenset({InputMoment()})

    def metric(self, target: Target, evidence: Evidence) -> Metric:
        """‖(W − Ŵ) S‖_F."""
        return Metric(inputs=Gram(evidence.inputs(target.weights[0]).h_nn).shrink(self.shrink))
