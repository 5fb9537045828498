"""FWSVD: Language model compression with weighted low-rank factorization (ICLR 2022, arXiv
2207.00112).

    min_{rank k} Σ_oi I_i (W_oi − Ŵ_oi)²,   I_i = Σ_o E_d[(∂L(d)/∂W_oi)²]:   the SVD of W diag(√I)

I is the empirical Fisher information of examples d: a sequence of a language model, as the task
says. Weighing each entry by itself has no closed form, so all weights of one input feature share
theirs. Re-implementations square the mean gradient of a mini-batch, which measures the batch size;
here each example's own gradient is squared. Features whose gradient is zero meet the one floor of
all moments. The paper's fine-tuning is `heal`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankine.anatomy import Target
from rankine.budget import Allocator, Knapsack, Uniform
from rankine.fitting import expect
from rankine.method import Card, Compressor, Evidence, method
from rankine.metric import Gram, Metric
from rankine.statistics import Need, WeightFisher


@method
@dataclass(frozen=True)
class FWSVD(Compressor):
    """SVD weighted by the Fisher information.

    - `sides`: "inputs" (the paper), or "both": output features have weights, too.
    - `allocation`: "uniform" (the paper), or "knapsack" (least predicted loss).
    """

    card = Card(
        name="fwsvd",
        title="Language model compression with weighted low-rank factorization",
        reference="arXiv:2207.00112",
        authors="Hsu, Yen-Chang and Hua, Ting and Chang, Sungen and Lou, Qian and Shen, Yilin and "
        "Jin, Hongxia",
        family="low-rank",
        summary="SVD with each input feature weighted by its Fisher information, uniform ranks",
        needs=("calibration", "gradients"),
    )

    sides: str = "inputs"
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        expect(self.sides in ("inputs", "both"), 'sides "inputs" or "both"', self.sides)
        known = self.allocation in ("knapsack", "uniform")
        expect(known, 'allocation "knapsack" or "uniform"', self.allocation)

    def needs(self, target: Target) -> frozenset[Need]:
        """Squared gradients of each example."""
        return frozenset({WeightFisher()})

    def metric(self, target: Target, evidence: Evidence) -> Metric:
        """½ Σ I Δ² per term of the loss, with the mean over outputs in the place of I_oi, or with
        the product of its sums over either side."""
        fisher = evidence.fisher(target.weights[0])
        inputs, scale = Gram(diagonal_n=fisher.inputs_i), 0.5 * fisher.terms
        if self.sides == "inputs":
            return Metric(inputs, scale=scale / len(fisher.outputs_o))
        total = float(fisher.outputs_o.sum()) or 1.0
        return Metric(inputs, Gram(diagonal_n=fisher.outputs_o), scale=scale / total)

    @property
    def allocator(self) -> Allocator:
        """The same share for every weight, or least total predicted loss."""
        return Knapsack() if self.allocation == "knapsack" else Uniform()
