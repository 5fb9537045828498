"""SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression
(ICLR 2025, arXiv 2403.07378), the training-free whitening variant.

    min_{rank k} ‖(W − Ŵ) X‖_F      with  S Sᵀ = E[x xᵀ]:   W S = U Σ Vᵀ,   Ŵ = U_k U_kᵀ W

The paper writes Ŵ = U_k Σ_k V_kᵀ S⁻¹ with S a Cholesky factor: the same matrix. The output-side
form needs no inverse and no repair of a failed Cholesky. Same k in every weight; statistics are
the dense model's. The paper's LoRA update is `heal`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankine.anatomy import Target
from rankine.method import Card, Compressor, Evidence, method
from rankine.metric import Metric
from rankine.statistics import InputMoment, Need


@method
@dataclass(frozen=True)
class SVDLLM(Compressor):
    """Whitened SVD."""

    card = Card(
        name="svd_llm",
        title="SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model "
        "Compression",
        reference="arXiv:2403.07378",
        authors="Wang, Xin and Zheng, Yu and Wan, Zhongwei and Zhang, Mi",
        family="low-rank",
        summary="SVD whitened by the inputs' second moment, uniform ranks",
        takes=("linear", "bank"),
        needs=("calibration",),
    )

    def needs(self, target: Target) -> frozenset[Need]:
        """The second moment of what the weight reads."""
        return frozenset({InputMoment(compact=True)})

    def metric(self, target: Target, evidence: Evidence) -> Metric:
        """‖(W − Ŵ) S‖_F."""
        return Metric(inputs=evidence.inputs(target.weights[0]).gram)
