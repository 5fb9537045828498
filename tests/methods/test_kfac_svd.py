"""KFAC-SVD: best in the two-sided norm; half of its square predicts the loss."""

import pytest
import torch
from fitting import Layer, correlated, normal

from rankine.budget import Knapsack, Uniform, total_loss
from rankine.errors import UserError
from rankine.method import get
from rankine.statistics import InputMoment, OutputGradient

BARE = get("kfac_svd", {"shrink_in": 0.0, "shrink_out": 0.0})
LAYER = Layer(normal(8, 6), correlated(300, 6), correlated(300, 8, seed=3))


def two_sided(layer, difference):
    """½ E_x E_g (gᵀ Δ x)², the second-order loss of a change Δ, from the samples themselves."""
    h, g = (m.T @ m / len(m) for m in (layer.x_ni, layer.g_no))
    return 0.5 * float((difference.T @ g @ difference @ h).trace())


@pytest.mark.parametrize("rank", range(1, 7))
def test_predicted_losses_are_those_of_the_fit(rank):
    approx, _ = LAYER.fitted(BARE, rank)
    loss = two_sided(LAYER, LAYER.w_oi - approx)
    if rank in (losses := LAYER.losses(BARE)):
        assert losses[rank] == pytest.approx(loss, rel=1e-6)
    tail = torch.linalg.svdvals(
        torch.linalg.cholesky(LAYER.g_no.T @ LAYER.g_no / 300).T
        @ LAYER.w_oi
        @ torch.linalg.cholesky(LAYER.x_ni.T @ LAYER.x_ni / 300)
    )[rank:]
    assert loss == pytest.approx(0.5 * float(tail.square().sum()), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_no_perturbation_of_that_rank_is_better(seed):
    approx, patch = LAYER.fitted(BARE, 3)
    b, a = patch.tensors["w.up.weight"], patch.tensors["w.down.weight"]
    best = two_sided(LAYER, LAYER.w_oi - approx)
    for size in (1e-3, 1e-1, 1.0):
        other = (b + size * normal(8, 3, seed=seed)) @ (a + size * normal(3, 6, seed=seed + 50))
        assert two_sided(LAYER, LAYER.w_oi - other) >= best
    one_sided, _ = LAYER.fitted(get("svd_llm"), 3)
    assert two_sided(LAYER, LAYER.w_oi - one_sided) > best
    assert LAYER.error(one_sided) < LAYER.error(approx)


def test_shrinkage_tends_to_plain_svd():
    whole = get("kfac_svd", {"shrink_in": 1.0, "shrink_out": 1.0})
    approx, _ = LAYER.fitted(whole, 3)
    assert torch.allclose(approx, LAYER.fitted(get("svd"), 3)[0], atol=1e-9)
    scale = 0.5 * float(LAYER.x_ni.square().mean() * LAYER.g_no.square().mean())
    plain = LAYER.losses(get("svd"))
    assert LAYER.losses(whole)[2] == pytest.approx(scale * plain[2], rel=1e-9)


def test_gradients_scale_the_prediction_and_not_the_fit():
    louder = Layer(LAYER.w_oi, LAYER.x_ni, 3 * LAYER.g_no)
    assert louder.losses(BARE)[2] == pytest.approx(9 * LAYER.losses(BARE)[2], rel=1e-9)
    assert torch.allclose(louder.fitted(BARE, 2)[0], LAYER.fitted(BARE, 2)[0], atol=1e-8)


def test_what_it_asks_to_be_measured():
    needs = get("kfac_svd").needs(LAYER.target)
    assert needs == {InputMoment(compact=True), OutputGradient(0.75, 10.0, compact=True)}


def test_the_knapsack_predicts_less_loss_than_uniform_ranks():
    """Two layers, one of them a hundred times as sensitive."""
    method = get("kfac_svd")
    assert isinstance(method.allocator, Knapsack)
    assert isinstance(get("kfac_svd", {"allocation": "uniform"}).allocator, Uniform)
    layers = [LAYER, Layer(normal(8, 6, seed=9), LAYER.x_ni, 10 * LAYER.g_no)]
    bids = []
    for n, layer in enumerate(layers):
        metric = method.metric(layer.target, layer)
        bid = method.bid(layer.target, layer.w_oi, metric, torch.float64)
        bids.append(type(bid)(str(n), (str(n),), bid.options, bid.dense_bits))
    bits = 2 * 2 * (8 + 6) * 64
    ours, plain = Knapsack().allocate(bids, bits), Uniform().allocate(bids, bits)
    assert total_loss(bids, ours) < 0.9 * total_loss(bids, plain)
    assert ours["1"].structure.rank > ours["0"].structure.rank


def test_unknown_allocation():
    with pytest.raises(UserError, match="knapsack"):
        get("kfac_svd", {"allocation": "lems"})
