"""Plain truncated SVD: the baseline every other method must beat.

W ≈ U_k Σ_k V_kᵀ minimises ‖W − BA‖_F (Eckart and Young, 1936), with the same share of every
weight kept: k = ⌊keep · o·i / (o + i)⌋. No data is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankine.method import Card, Compressor, method


@method
@dataclass(frozen=True)
class SVD(Compressor):
    """Every default of `Compressor`: weight, Frobenius norm, two factors, uniform budget."""

    card = Card(
        name="svd",
        title="The approximation of one matrix by another of lower rank",
        reference="doi:10.1007/BF02288367",
        authors="Eckart, Carl and Young, Gale",
        year=1936,
        family="low-rank",
        summary="truncated SVD of each weight, no data",
        takes=("linear", "bank", "embedding"),
    )
