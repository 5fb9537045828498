"""Sums of moments, clipped gradients, the middle of a sequence, boundaries that wait in files."""

from pathlib import Path

import pytest
import surveys
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surveys import GRADIENTS, INPUTS, close, surveyed

import tiny_models as tiny
from rankine.anatomy import describe
from rankine.errors import UserError
from rankine.statistics import CrossSum, Moment, MomentSum, OutputGradient, Walk, survey
from rankine.statistics.boundaries import Boundaries
from rankine.statistics.moments import clip_rows, middle_positions


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 99))
def test_a_moment_is_the_same_however_the_rows_were_cut(cuts, seed):
    x = normal(40, 5, seed=seed) * 1e3
    whole, parts = MomentSum(), MomentSum()
    whole.add(x)
    for part in torch.tensor_split(x, sorted(cuts)):
        parts.add(part)
    a, b = whole.mean(), parts.mean()
    assert a.count == b.count == 40
    assert close(b.h_nn, a.h_nn, 1e-13)
    assert close(b.mean_n, a.mean_n, 1e-12)


def test_float32_rows_are_summed_in_float64():
    """A million-fold offset would eat a float32 sum's small entries."""
    x = torch.cat([torch.full((1, 1), 1e4), torch.full((5000, 1), 1e-2)])
    total = MomentSum()
    for row in x:
        total.add(row[None])
    assert float(total.mean().h_nn) * 5001 == pytest.approx(1e8 + 5000 * 1e-4, rel=1e-9)


def test_moment_covariance_cross_moment_and_journal_form():
    x, other, total, cross = normal(50, 4), normal(50, 3, seed=1), MomentSum(), CrossSum()
    total.add(x)
    cross.add(other, x)
    found = total.mean()
    assert close(found.covariance, torch.cov(x.double().T, correction=0), 1e-12)
    assert close(cross.mean().c_ii, other.double().T @ x.double() / 50, 1e-12)
    back = Moment.from_tensors(found.tensors())
    assert back.count == 50
    assert torch.equal(back.h_nn, found.h_nn)


def test_float32_squares_that_do_not_fit_into_float32_wait_in_float32():
    total = MomentSum()
    total.add(1e30 * normal(50, 4))
    found = total.mean()
    back = Moment.from_tensors(found.tensors(torch.float32))
    assert close(back.h_nn, found.h_nn, 1e-7)


def test_a_moment_on_a_subspace_keeps_the_trace_and_its_covariance():
    x = normal(60, 9) + 2.0
    basis, _ = torch.linalg.qr(normal(9, 3, seed=1))
    whole, total = MomentSum(), MomentSum(basis)
    whole.add(x)
    total.add(x)
    w, found = whole.mean(), total.mean()
    t = normal(4, 3, seed=2).double() @ basis.double().T
    assert torch.allclose(found.gram.mean_diagonal(), w.gram.mean_diagonal(), rtol=1e-6)
    assert close(found.gram.congruence(t), w.gram.congruence(t), 1e-5)
    assert close(found.centred.congruence(t), w.centred.congruence(t), 1e-5)
    assert torch.allclose(found.centred.mean_diagonal(), w.centred.mean_diagonal(), rtol=1e-5)
    back = Moment.from_tensors(found.tensors(), basis)
    assert torch.equal(back.gram.congruence(t), found.gram.congruence(t))


def test_a_cross_moment_on_a_subspace_is_all_that_its_weight_asks_for():
    x, other, w = normal(60, 9), normal(60, 9, seed=1), normal(3, 9, seed=2)
    whole, total = CrossSum(), CrossSum(torch.linalg.qr(w.T)[0])
    whole.add(x, other)
    total.add(x, other)
    assert close(total.mean().behind(w), whole.mean().behind(w), 1e-6)


def test_no_rows_is_an_error_of_the_caller():
    total = MomentSum()
    total.add(torch.empty(0, 3))
    with pytest.raises(ValueError, match="no positions"):
        total.mean()


# -- clipping and choosing positions -----
def masks(*lengths, width=8):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def test_clipped_norms_lie_within_the_factor_of_their_examples_mean():
    g = normal(3, 8, 5) * torch.logspace(-3, 3, 8)[None, :, None]
    mask = masks(8, 8, 5)
    clipped = clip_rows(g, mask, 2.0)
    for n, length in enumerate((8, 8, 5)):
        norms = g[n, :length].norm(dim=-1)
        after = clipped[n, :length].norm(dim=-1)
        assert bool((after <= 2.0 * norms.mean() * (1 + 1e-5)).all())
        assert bool((after >= norms.mean() / 2.0 * (1 - 1e-5)).all())
        inside = (norms > norms.mean() / 2) & (norms < norms.mean() * 2)
        assert torch.allclose(clipped[n, :length][inside], g[n, :length][inside])
    cosine = torch.nn.functional.cosine_similarity(g, clipped, dim=-1)
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-5)


def test_clipping_ignores_padding_and_other_examples():
    g = normal(2, 8, 5)
    g[0, 5:] = 0  # the gradient of padding
    alone = clip_rows(g[:1, :5], masks(5, width=5), 1.5)
    together = clip_rows(g, masks(5, 8), 1.5)
    assert torch.allclose(together[:1, :5], alone)


def test_zero_gradients_stay_zero_and_no_clip_is_no_change():
    g = normal(1, 4, 3)
    g[0, 2] = 0
    assert torch.equal(clip_rows(g, masks(4, width=4), 10.0)[0, 2], torch.zeros(3))
    assert torch.equal(clip_rows(g, masks(4, width=4), None), g)
    nothing = clip_rows(torch.zeros(1, 4, 3), masks(4, width=4), 10.0)
    assert torch.equal(nothing, torch.zeros(1, 4, 3))


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 8), start=st.integers(0, 8), share=st.floats(0.05, 1))
def test_the_middle_is_centred_and_never_empty(length, start, share):
    """Also under left padding: the sequence's own positions count."""
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, start : start + length] = True
    chosen = middle_positions(mask, share)[0].nonzero().flatten() - start
    assert len(chosen) >= 1
    assert int(chosen[0]) == length - 1 - int(chosen[-1])  # as many are cut on either side
    assert len(chosen) == int(chosen[-1] - chosen[0]) + 1
    assert len(chosen) >= share * length - 1e-6
    assert len(chosen) < share * length + 2


@pytest.mark.parametrize("need", [OutputGradient(0.75, 10.0), OutputGradient(0.5, 1.2)])
def test_middle_and_clip_in_the_survey(need):
    model, task = tiny.llama().double(), tiny.tokens(padded=True)
    found, anatomy = surveyed(model, task, need)
    weight = anatomy.linears[4]
    rows = surveys.plain_gradients(model, task, [weight.path])[weight.path]
    lengths = [int(n) for b in task.batches("calibration") for n in b["attention_mask"].sum(1)]
    chosen = []
    for g in rows.split(lengths):
        norm = g.norm(dim=-1, keepdim=True)
        low, high = norm.mean() / need.clip, norm.mean() * need.clip
        g = torch.where(norm > 0, g / norm.clamp_min(1e-30) * norm.clamp(low, high), g)
        cut = int((1 - need.middle) / 2 * len(g))
        chosen.append(g[cut : len(g) - cut])
    terms = sum(int(task.terms(b).sum()) for b in task.batches("calibration"))
    wanted = surveys.moment(torch.cat(chosen)).h_nn * sum(lengths) / terms
    assert close(found.gradient(weight, need).h_nn, wanted, 1e-9)


# -- outside the blocks, and one example at a time -----
def test_the_head_is_measured_behind_the_last_block():
    model, task = tiny.llama(tie_word_embeddings=False).double(), tiny.tokens(padded=True)
    anatomy = describe(model)
    model.requires_grad_(False)
    head = anatomy.weight("lm_head")
    q = anatomy.linears[0]
    spool = surveys.Spool()
    walk = Walk(model, anatomy, task, list(task.batches("calibration")))
    needs = {w.path: frozenset({INPUTS, GRADIENTS}) for w in (head, q)}
    found = survey(walk, needs, spool.get, spool.keep)
    inputs = surveys.plain_inputs(model, task, [head.path])
    assert close(found.inputs(head).h_nn, inputs[head.path].h_nn)
    rows = surveys.plain_gradients(model, task, [head.path, q.path])
    terms = sum(int(task.terms(b).sum()) for b in task.batches("calibration"))
    for weight in (head, q):
        g = rows[weight.path]
        wanted = surveys.moment(g).h_nn * len(g) / terms
        assert close(found.gradient(weight, GRADIENTS).h_nn, wanted, 1e-9)


def test_a_pooled_head_has_one_position_per_example():
    model, task = tiny.bert().double(), tiny.classified()
    anatomy = describe(model)
    model.requires_grad_(False)
    head = anatomy.weight("classifier")
    spool = surveys.Spool()
    walk = Walk(model, anatomy, task, list(task.batches("calibration")))
    found = survey(walk, {head.path: frozenset({INPUTS, GRADIENTS})}, spool.get, spool.keep)
    assert found.inputs(head).count == 6
    logits = torch.cat([task.run(model, b).logits for b in task.batches("calibration")])
    labels = torch.cat([b["labels"] for b in task.batches("calibration")])
    g = logits.softmax(-1) - torch.nn.functional.one_hot(labels, 2)
    assert close(found.gradient(head, GRADIENTS).h_nn, g.T @ g / 6, 1e-9)


def test_an_embedding_has_no_input_moment():
    model, task = tiny.llama(), tiny.tokens()
    anatomy = describe(model)
    walk = Walk(model, anatomy, task, list(task.batches("calibration")))
    spool = surveys.Spool()
    with pytest.raises(UserError, match=r"embedding model\.embed_tokens"):
        survey(walk, {anatomy.embedding: frozenset({INPUTS})}, spool.get, spool.keep)


@pytest.mark.parametrize("batch", [1, 16])
def test_vectors_one_by_one(batch):
    """No sequence dimension: nothing to clip among, nothing to cut, whatever the batch."""
    model, need = tiny.mlp(), OutputGradient(0.75, 10.0)
    found, anatomy = surveyed(model, tiny.regression(16, batch), need)
    plain, _ = surveyed(model, tiny.regression(16, 16), GRADIENTS)
    for weight in anatomy.linears:
        mine = found.gradient(weight, need)
        assert mine.count == 16
        assert close(mine.h_nn, plain.gradient(weight, GRADIENTS).h_nn, 1e-5)


# -- boundaries -----
@pytest.mark.parametrize("limit", [0, 300, 1 << 20])
def test_boundaries_come_back_last_in_first_out(limit):
    stack = [[normal(2, 5, seed=10 * n + m) for m in range(3)] for n in range(4)]
    with Boundaries(limit) as boundaries:
        for hidden in stack:
            boundaries.append(hidden)
        files = boundaries._directory is not None
        for hidden in reversed(stack):
            back = boundaries.pop()
            assert all(torch.equal(a, b) for a, b in zip(back, hidden, strict=True))
    assert files == (limit < 480)


def test_boundary_files_may_come_from_slices_of_one_tensor_and_go_away():
    x = normal(4, 3)
    with Boundaries(0) as boundaries:
        boundaries.append(list(x.split(2)))
        place = boundaries._directory.name
        assert torch.equal(torch.cat(boundaries.pop()), x)
        boundaries.append([x])
    assert not Path(place).exists()


def test_a_survey_whose_boundaries_wait_in_files_is_the_same(monkeypatch):
    model, task = tiny.gpt2(), tiny.tokens()
    wanted, anatomy = surveyed(model, task, GRADIENTS)
    monkeypatch.setattr(Boundaries.__init__, "__defaults__", (0,))
    found, _ = surveyed(model, task, GRADIENTS)
    for weight in anatomy.linears:
        assert torch.equal(
            found.gradient(weight, GRADIENTS).h_nn, wanted.gradient(weight, GRADIENTS).h_nn
        )
