"""The anchored goal: what a layer must do on the compressed inputs to give the dense outputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankine.linalg.anchor import Cross, anchored_goal


def streams(n=200, i=6, o=4, noise=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(o, i, generator=g, dtype=torch.float64)
    x = torch.randn(n, i, generator=g, dtype=torch.float64)
    shift = torch.eye(i).double() + noise * torch.randn(i, i, generator=g, dtype=torch.float64)
    return w, x, x @ shift + noise * torch.randn(n, i, generator=g, dtype=torch.float64)


def moments(x, seen):
    """(E[x x'ᵀ], E[x' x'ᵀ])."""
    return Cross(x.T @ seen / len(x)), seen.T @ seen / len(x)


def test_without_a_ridge_it_is_least_squares():
    w, x, seen = streams()
    goal = anchored_goal(w, *moments(x, seen), ridge=0.0)
    wanted = torch.linalg.lstsq(seen, x @ w.T).solution.T
    assert torch.allclose(goal, wanted, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(ridge=st.floats(1e-6, 10), seed=st.integers(0, 999), samples=st.integers(1, 30))
def test_it_minimises_the_ridge_objective(ridge, seed, samples):
    """E‖Wx − Tx'‖² + λ‖T − W‖² has zero gradient there, also with less data than inputs."""
    w, x, seen = streams(samples, seed=seed)
    c, h = moments(x, seen)
    goal = anchored_goal(w, c, h, ridge)
    strength = ridge * h.diagonal().mean()
    gradient = goal @ h - c.behind(w) + strength * (goal - w)
    assert float(gradient.abs().max()) < 1e-8 * float(c.behind(w).abs().max() + 1)


@pytest.mark.parametrize("ridge", [0.1, 1e-8])
def test_streams_that_agree_leave_the_weight(ridge):
    w, x, _ = streams()
    h = x.T @ x / len(x)
    assert torch.equal(anchored_goal(w, Cross(h), h, ridge), w)


def test_off_the_data_it_is_the_weight():
    w, x, seen = streams()
    seen = seen.clone()
    seen[:, 4:] = 0  # the compressed stream never takes the last two directions
    goal = anchored_goal(w, *moments(x, seen), ridge=1e-6)
    assert torch.allclose(goal[:, 4:], w[:, 4:], atol=1e-6)


def test_a_silent_stream_leaves_the_weight():
    w, x, seen = streams()
    zero = torch.zeros_like(seen)
    assert torch.equal(anchored_goal(w, *moments(x, zero), ridge=1e-4), w)


def test_it_helps_on_the_data():
    w, x, seen = streams()
    goal = anchored_goal(w, *moments(x, seen), ridge=1e-6)
    wanted = x @ w.T
    assert (seen @ goal.T - wanted).norm() < 0.8 * (seen @ w.T - wanted).norm()
