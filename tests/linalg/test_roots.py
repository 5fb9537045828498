"""Square roots of moments, and the one treatment of singular ones."""

import pytest
import torch

from rankine.linalg.roots import FLOOR, Root, symmetric
from rankine.metric import Gram


def psd(n, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, n, generator=g, dtype=torch.float64)
    return x.T @ x


@pytest.mark.parametrize("rank", [6, 2])
def test_root_times_its_transpose_is_the_moment_up_to_the_floor(rank):
    h = psd(6, rank)
    root, eye = Root.of(h), torch.eye(6).double()
    s = root.right(eye)
    assert torch.allclose(s @ s.T, h, atol=10 * FLOOR * float(h.diagonal().mean()))


@pytest.mark.parametrize(
    "h",
    [
        psd(5, 5),
        psd(5, 2),
        torch.zeros(5, 5),
        torch.ones(5, 5),
        1e-30 * psd(5, 3),
        1e30 * psd(5, 3),
    ],
    ids=["full", "deficient", "zero", "constant", "tiny", "huge"],
)
def test_every_root_is_invertible_on_both_sides(h):
    root = Root.of(h.double())
    t = torch.randn(4, 5, dtype=torch.float64)
    assert torch.allclose(root.right_inverse(root.right(t)), t, rtol=1e-6, atol=1e-9)
    assert torch.allclose(root.left_inverse(root.left(t.T)), t.T, rtol=1e-6, atol=1e-9)
    assert bool((root.s_n > 0).all())


def test_eigenvalues_are_raised_to_the_floor_and_no_higher():
    h = torch.diag(torch.tensor([4.0, 1.0, 0.0, -1e-20])).double()
    squared = Root.of(h).s_n.square().sort().values
    mean = 5 / 4
    assert torch.allclose(squared, torch.tensor([FLOOR * mean, FLOOR * mean, 1, 4]).double())


def test_a_zero_moment_is_the_identity_metric():
    assert torch.equal(Root.of(torch.zeros(3, 3)).s_n, torch.ones(3).double())


def test_batches():
    h = torch.stack([psd(4, 4, 1), psd(4, 2, 2)])
    t = torch.randn(2, 3, 4, dtype=torch.float64)
    both = Root.of(h).right(t)
    one = Root.of(h[1]).right(t[1])
    assert torch.allclose(both[1] @ both[1].T, one @ one.T, atol=1e-9)


def test_rounding_of_the_accumulation_is_symmetrised():
    h = torch.tensor([[1.0, 0.5], [0.4, 1.0]])
    assert torch.equal(symmetric(h), symmetric(h).T)


@pytest.mark.parametrize("plain", [True, False])
def test_the_pseudo_inverse_projects_onto_the_data(plain):
    d = torch.tensor([2.0, 0.0, 0.5]).double()
    gram = Gram(diagonal_n=d) if plain else Gram(torch.diag(d))
    t = torch.ones(1, 3).double()
    back = gram.right_pseudo_inverse(gram.right_on_data(t))
    assert torch.allclose(back, torch.tensor([[1.0, 0.0, 1.0]]).double(), atol=1e-12)
    assert float(gram.right_on_data(t).square().sum()) == pytest.approx(2.5)


# -- the kinds of Gram are one form
def test_a_diagonal_gram_is_the_dense_one_with_that_diagonal():
    d = torch.tensor([4.0, 1.0, 0.25]).double()
    plain, dense = Gram(diagonal_n=d), Gram(torch.diag(d))
    t = torch.randn(2, 3, dtype=torch.float64)
    assert torch.allclose(plain.right(t).square().sum(), dense.right(t).square().sum())
    assert torch.allclose(plain.left(t.T).square().sum(), dense.left(t.T).square().sum())
    assert torch.allclose(plain.right_inverse(plain.right(t)), t)
    assert torch.allclose(plain.left_inverse(plain.left(t.T)), t.T)
    assert torch.equal(plain.diagonal(), dense.diagonal())


def test_diagonal_plus_rank_one():
    d, u = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, -1.0]).double()
    gram = Gram(diagonal_n=d, rank_one_n=u)
    assert torch.equal(gram.dense(), torch.tensor([[2.0, -1.0], [-1.0, 3.0]]).double())
    assert torch.equal(gram.diagonal(), torch.tensor([2.0, 3.0]).double())
    eye = torch.eye(2).double()
    assert torch.allclose(gram.right(eye) @ gram.right(eye).T, gram.dense())


def test_zero_entries_of_a_diagonal_meet_the_same_floor():
    gram = Gram(diagonal_n=torch.tensor([1.0, 0.0]))
    t = torch.ones(1, 2).double()
    assert torch.allclose(gram.right_inverse(gram.right(t)), t)
    assert float(gram.right(t)[0, 1]) ** 2 == pytest.approx(FLOOR * 0.5)


def test_shrinking_keeps_the_trace_and_lifts_the_null_space():
    h = psd(5, 2)
    shrunk = Gram(h).shrink(0.1).dense()
    assert torch.allclose(shrunk.trace(), h.trace())
    assert float(torch.linalg.eigvalsh(shrunk)[0]) == pytest.approx(0.1 * float(h.trace()) / 5)
