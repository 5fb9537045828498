"""The one weighted solver: Eckart and Young in every norm, and nothing lost off the data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankine.linalg.lowrank import balance, weighted
from rankine.metric import Gram, Metric
from rankine.structures import LowRank

SHAPES = [(6, 6), (5, 12), (12, 5), (1, 7), (7, 1)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n, samples, seed=0):
    x = random(samples, n, seed=seed) @ random(n, n, seed=seed + 1)
    return x.T @ x / samples


def solved(w, metric, rank):
    structure = LowRank(rank)
    return structure.decode(structure.encode(w, metric))


@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_is_that_of_the_svd(shape):
    m = random(*shape)
    u, s, _ = torch.linalg.svd(m, full_matrices=False)
    found = weighted(m)
    assert torch.allclose(found.squared_n, s.square(), rtol=1e-10)
    b, a = found.factors(len(s))
    directions = b / torch.linalg.vector_norm(b, dim=0)
    overlap = (directions.T @ u).diagonal().abs()
    assert torch.allclose(overlap, torch.ones_like(overlap), atol=1e-8)
    assert torch.allclose(b @ a, m, atol=1e-9)
    wanted = [float(s[r:].square().sum()) for r in range(len(s) + 1)]
    assert torch.allclose(found.tails, torch.tensor(wanted).double(), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    o=st.integers(1, 9),
    i=st.integers(1, 9),
    rank_of_data=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)
def test_error_of_every_rank_is_the_tail_whatever_the_moment(o, i, rank_of_data, seed):
    """Also with fewer samples than inputs, with none at all, and with zero moments."""
    w, x = random(o, i, seed=seed), random(rank_of_data, i, seed=seed + 1)
    metric = Metric(Gram(x.T @ x), Gram(moment(o, 3, seed + 2)))
    m = metric.whiten(w)
    tails = weighted(w, metric.inputs, metric.outputs).tails
    total = float(m.square().sum())
    assert bool((tails[:-1] >= tails[1:]).all())
    assert float(tails[0]) == pytest.approx(total, rel=1e-8)
    for rank in range(1, min(o, i) + 1):
        error = float(metric.loss(w, solved(w, metric, rank)))
        assert error == pytest.approx(float(tails[rank]), rel=1e-6, abs=1e-9 * total + 1e-300)


@settings(max_examples=40, deadline=None)
@given(o=st.integers(1, 9), i=st.integers(1, 9), samples=st.integers(0, 4), seed=st.integers(0, 99))
def test_full_rank_recovers_the_weight_on_any_moment(o, i, samples, seed):
    w, x = random(o, i, seed=seed), random(samples, i, seed=seed + 1)
    outputs = Gram(moment(o, 2, seed))
    for metric in (Metric(Gram(x.T @ x)), Metric(Gram(x.T @ x), outputs), Metric(None, outputs)):
        back = solved(w, metric, min(o, i))
        assert torch.allclose(back, w, atol=1e-5 * float(w.abs().max()))


def test_directions_without_data_are_taken_by_their_size_once_the_data_is_served():
    """Two inputs carry data; a third component must be the largest of what T has left."""
    w = torch.diag(torch.tensor([1.0, 1.0, 5.0, 3.0])).double()
    h = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])).double()
    back = solved(w, Metric(Gram(h)), 3)
    assert torch.allclose(back, torch.diag(torch.tensor([1.0, 1.0, 5.0, 0.0])).double(), atol=1e-4)


def test_zero_data_weighs_the_weight_itself():
    w, zero = random(5, 4), torch.zeros(4, 4).double()
    assert torch.allclose(solved(w, Metric(Gram(zero)), 2), solved(w, Metric(), 2), atol=1e-9)


@pytest.mark.parametrize("o", [4, 7])  # wide and tall
def test_completion_keeps_the_datas_own_directions(o):
    t, h = random(o, 5), torch.diag(torch.tensor([4.0, 1.0, 0, 0, 0])).double()
    found = weighted(t, Gram(h))
    for rank in (3, 4):
        b, a = found.factors(rank)
        assert torch.allclose((b @ a)[:, :2], t[:, :2], atol=1e-9)  # the data is served
        kept = t - t[:, :2] @ torch.linalg.pinv(t[:, :2]) @ t
        best = torch.linalg.svdvals(kept)[rank - 2 :].square().sum()
        assert float((t - b @ a).square().sum()) == pytest.approx(float(best), rel=1e-9)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_only_the_smaller_side_needs_a_root(shape):
    """The larger side enters as products: no decomposition of its moment."""
    o, i = shape
    inputs, outputs = Gram(moment(i, 20)), Gram(moment(o, 20, 5))
    weighted(random(o, i), inputs, outputs).factors(2)
    assert ("_root" in vars(inputs)) == (i < o)
    assert ("_root" in vars(outputs)) == (o <= i)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_the_two_sided_solution_is_the_svd_between_the_roots(shape):
    o, i = shape
    w, metric = random(o, i), Metric(Gram(moment(i, 20)), Gram(moment(o, 20, 5)).shrink(0.3))
    u, s, v = torch.linalg.svd(metric.whiten(w), full_matrices=False)
    for rank in range(1, 5):
        best = metric.unwhiten(u[:, :rank] * s[:rank] @ v[:rank])
        assert torch.allclose(solved(w, metric, rank), best, atol=1e-7)


def test_curve_and_fit_share_one_decomposition():
    w, metric = random(6, 9), Metric(Gram(moment(9, 20)))
    structure = LowRank(3)
    structure.curve(w, metric)
    kept = metric._kept["svd"]
    structure.encode(w, metric)
    assert metric._kept["svd"] is kept
    structure.encode(w.clone(), metric)
    assert metric._kept["svd"] is not kept


def test_batches_are_solved_one_by_one():
    w, h = random(3, 6, 4), torch.stack([moment(4, 9, s) for s in range(3)])
    together = solved(w, Metric(Gram(h)), 2)
    for one in range(3):
        assert torch.allclose(together[one], solved(w[one], Metric(Gram(h[one])), 2), atol=1e-9)
    deficient = torch.stack([moment(4, s + 1, s) for s in range(3)])
    full = solved(w, Metric(Gram(deficient)), 4)
    assert torch.allclose(full, w, atol=1e-5)


def test_factors_are_balanced_and_their_product_is_unchanged():
    b, a = random(6, 3), random(3, 4)
    b[:, 0] *= 1e6
    a[2] = 0
    b_new, a_new = balance(b, a)
    assert torch.allclose(b_new @ a_new, b @ a, rtol=1e-12)
    norms = torch.linalg.vector_norm(b_new, dim=0), torch.linalg.vector_norm(a_new, dim=1)
    assert torch.allclose(norms[0][:2], norms[1][:2])
    assert bool(torch.isfinite(b_new).all() and torch.isfinite(a_new).all())


def test_zero_weight_has_finite_factors():
    b, a = weighted(torch.zeros(4, 5)).factors(2)
    assert torch.equal(b @ a, torch.zeros(4, 5).double())
    assert bool(torch.isfinite(b).all() and torch.isfinite(a).all())


def test_tails_end_with_zero_and_start_with_everything():
    solution = weighted(torch.diag(torch.tensor([2.0, 2.0**0.5, 1.0])))
    assert solution.tails.tolist() == pytest.approx([7.0, 3.0, 1.0, 0.0])


def test_a_residual_has_no_component_off_the_data():
    w, x = random(6, 5), random(2, 5)
    metric = Metric(Gram(x.T @ x), off_data="zero")
    null = torch.eye(5).double() - torch.linalg.pinv(x) @ x
    approx = solved(w, metric, 4)
    assert float((approx @ null).abs().max()) < 1e-4 * float(w.abs().max())
    assert torch.allclose(approx @ x.T, w @ x.T, atol=1e-4)
