"""Eckart and Young."""

import pytest
import torch
from fitting import Layer, normal, truncated
from hypothesis import given, settings
from hypothesis import strategies as st

from rankine.method import get

LAYER = Layer(normal(9, 7), normal(50, 7, seed=1))


@settings(max_examples=30, deadline=None)
@given(o=st.integers(1, 12), i=st.integers(1, 12), data=st.data())
def test_it_is_the_truncated_svd(o, i, data):
    rank = data.draw(st.integers(1, min(o, i)))
    layer = Layer(normal(o, i, seed=o * 13 + i), normal(4, i))
    approx, patch = layer.fitted(get("svd"), rank)
    assert torch.allclose(approx, truncated(layer.w_oi, rank), atol=1e-9)
    assert patch.tensors["w.down.weight"].shape == (rank, i)
    assert patch.tensors["w.up.weight"].shape == (o, rank)


def test_predicted_losses_are_the_tails_and_the_errors():
    losses = LAYER.losses(get("svd"))
    s = torch.linalg.svdvals(LAYER.w_oi)
    assert max(losses) == 3  # rank 4 of a 9 x 7 weight would store more than the weight
    for rank, loss in losses.items():
        approx, _ = LAYER.fitted(get("svd"), rank)
        assert loss == pytest.approx(float(s[rank:].square().sum()), rel=1e-9)
        assert loss == pytest.approx(float((approx - LAYER.w_oi).square().sum()), rel=1e-9)


def test_no_other_matrix_of_that_rank_is_closer():
    approx, _ = LAYER.fitted(get("svd"), 3)
    best = float((approx - LAYER.w_oi).norm())
    for seed in range(50):
        b, a = normal(9, 3, seed=seed), normal(3, 7, seed=seed + 99)
        other = approx + 0.1 * (b @ a)
        other = truncated(other, 3)
        assert float((other - LAYER.w_oi).norm()) >= best
