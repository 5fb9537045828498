"""Moments that are known on the subspace a weight sees: exact there, and a form everywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankine.linalg.lowrank import weighted
from rankine.metric import Gram, Metric


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def moment(n, samples, seed=0):
    x = random(samples, n, seed=seed)
    return x.T @ x / samples


def seen(h, q):
    """H as a moment that was measured on the span of Q alone."""
    n, k = q.shape
    inside = q.T @ h @ q
    rest = (h.trace() - inside.trace()) / (n - k)
    return Gram(inside, basis_nk=q, rest_1=rest.reshape(1))


def basis(w):
    """Of the smaller side's span."""
    return torch.linalg.qr(w.mT if w.shape[0] <= w.shape[1] else w)[0]


@pytest.mark.parametrize("amount", [0.0, 0.1])
def test_every_verb_is_that_of_the_matrix(amount):
    h, t = moment(9, 30), random(5, 9, seed=1)
    gram = seen(h, basis(random(3, 9, seed=2))).shrink(amount)
    dense = gram.dense()
    assert torch.allclose(gram.diagonal(), dense.diagonal())
    assert torch.allclose(gram.mean_diagonal(), dense.diagonal().mean())
    assert torch.allclose(gram.mean_diagonal(), h.diagonal().mean())  # no trace is lost
    assert torch.allclose(gram.times(t), t @ dense)
    assert torch.allclose(gram.congruence(t), t @ dense @ t.T)
    assert torch.allclose(gram.right(t) @ gram.right(t).T, t @ dense @ t.T)
    assert torch.allclose(gram.times_root(gram.left(t.T)), dense @ t.T)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), amount=st.sampled_from([0.0, 0.3]), tall=st.booleans())
def test_it_is_exact_for_what_the_weight_sees(seed, amount, tall):
    """T H Tᵀ for all T = K W, as the whole moment gives it."""
    w = random(12, 4, seed=seed) if tall else random(4, 12, seed=seed)
    q, h = basis(w), moment(12, 20, seed + 1)
    t = random(4, 4, seed=seed + 2) @ (w.mT if tall else w)
    known, whole = seen(h, q).shrink(amount), Gram(h).shrink(amount)
    assert torch.allclose(known.congruence(t), whole.congruence(t))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), tall=st.booleans(), rank=st.integers(1, 4))
def test_the_solver_finds_the_same_matrix(seed, tall, rank):
    o, i = (12, 4) if tall else (4, 12)
    w, h, g = random(o, i, seed=seed), moment(i, 20, seed + 1), moment(o, 20, seed + 2)
    whole = weighted(w, Gram(h), Gram(g))
    known = weighted(w, *((Gram(h), seen(g, basis(w))) if tall else (seen(h, basis(w)), Gram(g))))
    assert torch.allclose(known.tails, whole.tails)
    (b, a), (d, c) = known.factors(rank), whole.factors(rank)
    assert torch.allclose(b @ a, d @ c, atol=1e-8 * float(w.abs().max()))


def test_an_anchored_goal_stays_in_the_columns_of_the_weight():
    """T = W K is solved as well as W itself."""
    w, h, g = random(12, 4), moment(4, 20, 1), moment(12, 20, 2)
    t = w @ random(4, 4, seed=3)
    whole = weighted(t, Gram(h), Gram(g)).factors(2)
    known = weighted(t, Gram(h), seen(g, basis(w))).factors(2)
    assert torch.allclose(known[0] @ known[1], whole[0] @ whole[1], atol=1e-8)


def test_the_error_of_a_rounded_matrix_is_felt_outside_the_subspace_too():
    """Off the span an error weighs what a direction there weighs on average."""
    h, w = moment(12, 40), random(4, 12, seed=1)
    metric = Metric(seen(h, basis(w)))
    out = torch.linalg.svd(w)[2][4:].mean(0)  # orthogonal to the rows of W
    felt = float(metric.loss(w, w + torch.outer(torch.ones(4).double(), out)))
    rest = metric.inputs.rest_1
    assert felt == pytest.approx(4 * float(rest) * float(out @ out), rel=1e-6)
