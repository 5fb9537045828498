"""Symmetric matrices at half their bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankine.linalg.packed import pack, unpack


@given(n=st.integers(1, 20), lead=st.sampled_from([(), (3,), (2, 2)]), seed=st.integers(0, 99))
def test_there_and_back(n, lead, seed):
    half = torch.randn(*lead, n, n, generator=torch.Generator().manual_seed(seed)).double()
    h = half + half.mT
    packed = pack(h)
    assert packed.numel() * n * n == h.numel() * n * (n + 1) // 2
    assert torch.equal(unpack(packed), h)


def test_only_the_lower_triangle_is_read():
    h = torch.arange(16.0).reshape(4, 4)
    assert torch.equal(unpack(pack(h)), h.tril() + h.tril(-1).mT)


@pytest.mark.parametrize("n", [5, 6])
def test_what_is_packed_is_a_copy(n):
    h = torch.eye(n)
    pack(h).zero_()
    assert torch.equal(h, torch.eye(n))
