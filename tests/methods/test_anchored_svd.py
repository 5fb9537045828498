"""AA-SVD: the closed form is least squares on the compressed stream, then Eckart-Young."""

import pytest
import torch
from fitting import Layer, correlated, normal

from rankine.method import get

X = correlated(400, 6)
SEEN = X @ (torch.eye(6).double() + 0.2 * normal(6, 6, seed=4)) + 0.1 * normal(400, 6, seed=5)
LAYER = Layer(normal(8, 6), X, seen_ni=SEEN)


def error(approx):
    """E‖W x − Ŵ x'‖²."""
    return float((X @ LAYER.w_oi.T - SEEN @ approx.T).square().sum(1).mean())


def by_brute_force(rank):
    """min over rank-k Ŵ of ‖Y − X' Ŵᵀ‖: project onto the range of X', truncate there, solve."""
    q, r = torch.linalg.qr(SEEN)
    projected = q.T @ (X @ LAYER.w_oi.T)
    u, s, v = torch.linalg.svd(projected, full_matrices=False)
    return torch.linalg.solve(r, (u[:, :rank] * s[:rank]) @ v[:rank]).T


@pytest.mark.parametrize("rank", range(1, 7))
def test_it_minimises_the_anchored_error(rank):
    approx, _ = LAYER.fitted(get("anchored_svd", {"ridge": 1e-12}), rank)
    wanted = by_brute_force(rank)
    assert error(approx) == pytest.approx(error(wanted), rel=1e-8)
    assert torch.allclose(approx, wanted, atol=1e-5)


def test_a_small_ridge_costs_little_and_a_large_one_gives_the_weight():
    best = error(by_brute_force(3))
    default, _ = LAYER.fitted(get("anchored_svd"), 3)
    assert best <= error(default) < 1.02 * best
    stiff, _ = LAYER.fitted(get("anchored_svd", {"ridge": 1e9}), 6)
    assert torch.allclose(stiff, LAYER.w_oi, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_it_beats_whitening_that_ignores_the_shift(rank):
    approx, _ = LAYER.fitted(get("anchored_svd"), rank)
    plain, _ = Layer(LAYER.w_oi, X).fitted(get("svd_llm"), rank)
    assert error(approx) < error(plain)


def test_streams_that_agree_give_svd_llm():
    same = Layer(LAYER.w_oi, X, seen_ni=X)
    goal = get("anchored_svd").goal(same.target, same, same)
    assert torch.equal(goal, LAYER.w_oi)
    for rank in (1, 4):
        ours, _ = same.fitted(get("anchored_svd"), rank)
        plain, _ = Layer(LAYER.w_oi, X).fitted(get("svd_llm"), rank)
        assert torch.allclose(ours, plain, atol=1e-9)


def test_without_a_stream_the_goal_is_the_weight():
    survey = Layer(LAYER.w_oi, X)
    assert get("anchored_svd").goal(survey.target, survey, survey) is LAYER.w_oi


def test_off_the_data_the_goal_is_the_weight():
    silent = SEEN.clone()
    silent[:, 3:] = 0
    layer = Layer(LAYER.w_oi, X, seen_ni=silent)
    goal = get("anchored_svd", {"ridge": 1e-8}).goal(layer.target, layer, layer)
    assert torch.allclose(goal[:, 3:], LAYER.w_oi[:, 3:], atol=1e-6)
    assert not torch.allclose(goal[:, :3], LAYER.w_oi[:, :3], atol=1e-2)
