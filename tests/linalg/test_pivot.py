"""PIFA's storage form: the same matrix in r² fewer numbers, with bounded coefficients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankine.linalg import pivot
from rankine.linalg.lowrank import balance
from rankine.structures import LowRank


def pair(o, i, r, seed=0, scale=None):
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(o, r, generator=g, dtype=torch.float64)
    a = torch.randn(r, i, generator=g, dtype=torch.float64)
    return (b if scale is None else b * scale), a


@settings(max_examples=60, deadline=None)
@given(
    o=st.integers(1, 24),
    i=st.integers(1, 24),
    r=st.integers(1, 24),
    decay=st.floats(0, 12),
    seed=st.integers(0, 2**16),
)
def test_decodes_to_the_same_matrix_with_bounded_coefficients(o, i, r, decay, seed):
    r = min(o, i, r)
    b, a = pair(o, i, r, seed, 10.0 ** -torch.linspace(0, decay, r).double())
    rows, coefficients, pivots = pivot.encode(b, a)
    assert rows.shape == (r, i)
    assert coefficients.shape == (o - r, r)
    assert pivots.tolist() == sorted(set(pivots.tolist()))
    dense = b @ a
    back = pivot.decode(rows, coefficients, pivots)
    assert float((back - dense).abs().max()) <= 1e-9 * float(dense.abs().max())
    assert float(coefficients.abs().max() if coefficients.numel() else 0) <= 2 + 1e-9


def test_pivot_rows_are_rows_of_the_matrix():
    b, a = pair(9, 5, 3)
    rows, _, pivots = pivot.encode(b, a)
    assert torch.allclose(rows, (b @ a)[pivots.long()])


def test_bounded_on_the_matrix_that_defeats_plain_pivoting():
    """Kahan's matrix: QR with pivoting leaves coefficients that grow like 2^r."""
    n, c = 24, 0.285
    s = (1 - c * c) ** 0.5
    kahan = torch.diag(s ** torch.arange(n).double()) @ (
        torch.eye(n).double() - c * torch.triu(torch.ones(n, n).double(), 1)
    )
    b = kahan.T[:, : n - 1].contiguous()
    _, coefficients, _ = pivot.encode(b, torch.eye(n - 1).double())
    assert float(coefficients.abs().max()) <= 2 + 1e-9


def test_full_row_rank_has_no_coefficients():
    b, a = pair(4, 6, 4)
    rows, coefficients, pivots = pivot.encode(b, a)
    assert coefficients.shape == (0, 4)
    assert torch.allclose(pivot.decode(rows, coefficients, pivots), b @ a)


@pytest.mark.parametrize("seed", range(5))
def test_bf16_rounding_is_about_three_times_that_of_balanced_factors(seed):
    b, a = balance(*pair(96, 64, 24, seed))
    dense = b @ a

    def error(structure):
        stored = structure.parts(b, a, torch.bfloat16)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in stored.items()}
        return float((structure.decode(wide) - dense).norm() / dense.norm())

    assert error(LowRank(24, pivoted=True)) <= 3 * error(LowRank(24))


@settings(max_examples=30, deadline=None)
@given(o=st.integers(1, 40), i=st.integers(1, 40), r=st.integers(1, 40))
def test_it_stores_r_squared_numbers_fewer(o, i, r):
    r = min(o, i, r)
    plain, pivoted = LowRank(r), LowRank(r, pivoted=True)
    parts = pivoted.parts(*pair(o, i, r), torch.float64)
    stored = sum(t.numel() * t.element_size() * 8 for t in parts.values())
    assert pivoted.bits((o, i), torch.float64) == stored
    saved = plain.bits((o, i), torch.float64) - stored
    assert saved == 64 * r * r - 32 * r  # r indices of 32 bits
