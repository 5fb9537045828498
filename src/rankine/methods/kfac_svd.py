"""KFAC-SVD with loss-aware allocation (ICML 2026, lems-svd).

    min ‖ G^{1/2} (W − BA) H^{1/2} ‖_F,   H = E[x xᵀ],   G = E[g gᵀ],   g = ∂L/∂y per token

Both sides are shrunk, (1−a)H + a·mean(diag H)·I with a = 0.1 for inputs and 0.3 for gradients;
g comes from the middle 75 % of each sequence, each token's norm clipped into [0.1, 10] × the
mean (of its sequence here, of the batch in the reference: so the result does not depend on the
batch size). The paper's LEMS curves need one KL probe per layer and a MILP solver; the squared
tail of the two-sided spectrum is already in units of the loss (½ Σ_{i>k} σ_i²), so `knapsack`
uses it directly: see docs. `allocation="uniform"` is the paper's KFAC-SVD row.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankine.budget import Allocator, Knapsack, Uniform
from rankine.fitting import TwoSided, expect
from rankine.method import Card, Compressor, method


@method
@dataclass(frozen=True)
class KFACSVD(TwoSided, Compressor):
    """Two-sided whitening.

    - `allocation`: "knapsack" (least predicted loss) or "uniform".
    """

    card = Card(
        name="kfac_svd",
        title="Advancing SVD-based LLM Compression via Layer-Wise Error Model Search",
        reference="ICML 2026, lems-svd",
        authors="Thoma, Moritz and Groezinger, Maximilian and Forstenhäusler, Maximilian and "
        "Aghajanzadeh, Emad and Vemparala, Manoj-Rohit and Anagnostopoulos, Christos and "
        "Mori, Pierpaolo and Fasfous, Nael and Frickenstein, Alexander and "
        "Mueller-Gritschneder, Daniel and Schlichtmann, Ulf",
        family="low-rank",
        summary="SVD in the input and output-gradient metric, ranks by a knapsack on the loss",
        takes=("linear", "bank"),
        needs=("calibration", "gradients"),
    )

    allocation: str = "knapsack"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.allocation in ("knapsack", "uniform")
        expect(known, 'allocation "knapsack" or "uniform"', self.allocation)

    @property
    def allocator(self) -> Allocator:
        """Least total predicted loss under the budget."""
        return Knapsack() if self.allocation == "knapsack" else Uniform()
