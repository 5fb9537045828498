"""Fisher information per example, and mean absolute inputs, against plain autograd and hooks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surveys import INPUTS, MODELS, Spool, built, close, surveyed
from torch import nn

import tiny_models as tiny
from rankine.errors import UserError
from rankine.patch import matrix
from rankine.statistics import InputMagnitude, OutputGradient, WeightFisher
from rankine.statistics.fisher import Fisher, FisherSum

FISHER, MAGNITUDE = WeightFisher(), InputMagnitude()


def one_by_one(model, task, paths):
    """Path → (examples, o, i) gradients of each example's loss, by autograd through all of it."""
    model.requires_grad_(True)
    weights = [model.get_submodule(path).weight for path in paths]
    found = {path: [] for path in paths}
    for batch in task.batches("calibration"):
        losses = task.loss(task.run(model, batch), batch)
        for loss in losses:
            grads = torch.autograd.grad(loss, weights, retain_graph=True)
            for path, weight, grad in zip(paths, weights, grads, strict=True):
                found[path].append(grad if matrix(model.get_submodule(path)) is weight else grad.mT)
    model.requires_grad_(False)
    return {path: torch.stack(grads).double() for path, grads in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_mean_of_each_examples_squared_gradient(name):
    model, task = built(name)
    found, anatomy = surveyed(model, task, FISHER)
    plain = one_by_one(model, task, [w.path for w in anatomy.linears])
    for weight in anatomy.linears:
        mine, wanted_oi = found.fisher(weight), plain[weight.path].square().mean(0)
        # Llama's norms round to float32 whatever the model's dtype.
        assert close(mine.inputs_i, wanted_oi.sum(0), 1e-5), weight.path
        assert close(mine.outputs_o, wanted_oi.sum(1), 1e-5), weight.path
        assert mine.count == len(plain[weight.path])


def test_a_linear_layer_under_squared_error_by_hand():
    """½‖W x − y‖² has the gradient (W x − y) xᵀ: E[(g_o x_i)²]."""
    layer = nn.Sequential(nn.Linear(12, 5, bias=False)).double()
    x, y = torch.randn(40, 12).double(), torch.randn(40, 5).double()
    found, anatomy = surveyed(layer, tiny.vectors(x, y, 7), FISHER)
    g = (x @ layer[0].weight.T - y).detach()
    wanted_oi = (g[:, :, None] * x[:, None, :]).square().mean(0)
    fisher = found.fisher(anatomy.linears[0])
    assert close(fisher.inputs_i, wanted_oi.sum(0), 1e-12)
    assert close(fisher.outputs_o, wanted_oi.sum(1), 1e-12)
    assert fisher.terms == 1.0


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_neither_batch_size_nor_order_nor_padding_matters(name):
    """Squares of examples, not of a batch's mean."""
    model, x = MODELS[name]().double(), tiny.ids()
    lengths = torch.tensor([10, 6, 9, 5, 10, 7])
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    one, anatomy = surveyed(model, tiny.Tokens(x, 6, lengths), FISHER)
    many, _ = surveyed(model, tiny.Tokens(x[order], 1, lengths[order]), FISHER)
    longer = torch.cat([x, tiny.ids(6, 4, seed=9)], 1)
    padded, _ = surveyed(model, tiny.Tokens(longer, 3, lengths), FISHER)
    for weight in anatomy.linears:
        for other in (many, padded):
            assert close(other.fisher(weight).inputs_i, one.fisher(weight).inputs_i, 1e-5)
            assert close(other.fisher(weight).outputs_o, one.fisher(weight).outputs_o, 1e-5)
        assert one.fisher(weight).terms == pytest.approx(float((lengths - 1).double().mean()))


def test_a_batchs_mean_gradient_is_something_else():
    """The bug of re-implementations: it would shrink with the batch size."""
    model, task = built("llama")
    found, anatomy = surveyed(model, task, FISHER)
    weight = anatomy.linears[0]
    grads = one_by_one(model, task, [weight.path])[weight.path]
    of_batches = grads.unflatten(0, (-1, 2)).mean(1).square().mean(0).sum(0)
    assert float(of_batches.sum()) < 0.8 * float(found.fisher(weight).inputs_i.sum())


@settings(max_examples=30, deadline=None)
@given(t=st.integers(1, 9), o=st.integers(1, 9), i=st.integers(1, 9), cut=st.integers(0, 5))
def test_both_ways_to_sum_agree(t, o, i, cut):
    """Short sequences go without the gradient's own matrix."""
    g = torch.Generator().manual_seed(t + 10 * o + 100 * i)
    x, grad = torch.randn(5, t, i, generator=g), torch.randn(5, t, o, generator=g)
    terms = torch.randint(1, 9, (5,), generator=g)
    total = FisherSum()
    for part in (slice(0, cut), slice(cut, 5)):
        total.add(x[part], grad[part], terms[part])
    whole_boi = (grad.double().mT @ x.double() / terms[:, None, None]).square()
    found = total.mean()
    assert close(found.inputs_i, whole_boi.sum(1).mean(0), 1e-10)
    assert close(found.outputs_o, whole_boi.sum(2).mean(0), 1e-10)
    assert found.count == 5
    assert found.terms == pytest.approx(float(terms.double().mean()))
    assert bool((found.inputs_i >= 0).all())


def test_it_comes_back_from_the_spool():
    model, task, spool = tiny.llama(), tiny.tokens(), Spool()
    whole, anatomy = surveyed(model, task, FISHER, OutputGradient(), INPUTS, spool=spool)
    spool.written = []
    again, _ = surveyed(model, task, FISHER, OutputGradient(), INPUTS, spool=spool)
    assert spool.written == []
    for weight in anatomy.linears:
        a, b = whole.fisher(weight), again.fisher(weight)
        assert torch.equal(a.inputs_i, b.inputs_i)
        assert (a.count, a.terms) == (b.count, b.terms) == (6, 9.0)
        assert close(
            again.gradient(weight, OutputGradient()).h_nn.diagonal().sum()[None],
            whole.gradient(weight, OutputGradient()).h_nn.diagonal().sum()[None],
        )
    back = Fisher.from_tensors(a.tensors())
    assert torch.equal(back.outputs_o, a.outputs_o)


def test_what_was_not_declared_is_not_there():
    found, anatomy = surveyed(tiny.llama(), tiny.tokens(), INPUTS)
    for ask in (found.fisher, found.magnitude):
        with pytest.raises(KeyError, match="not declared"):
            ask(anatomy.linears[0])


def test_no_examples_is_an_error_of_the_caller():
    with pytest.raises(ValueError, match="no examples"):
        FisherSum().mean()


class Routed(nn.Module):
    """Rows of all examples mixed, as a router hands them to an expert."""

    def __init__(self):
        super().__init__()
        self.first, self.expert = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        rows = self.first(x).repeat_interleave(2, 0)[1:]
        return self.expert(rows)[: len(x)]


def test_activations_without_examples_name_their_layer():
    with pytest.raises(UserError, match=r"16 examples .* found the shape \(31, 12\) at expert"):
        surveyed(Routed(), tiny.regression(), FISHER)


def test_gradients_that_are_not_finite_name_their_layer():
    model, task = tiny.mlp(), tiny.regression()
    loss = task._loss
    task._loss = lambda out, batch: loss(out, batch) * float("inf")
    with pytest.raises(UserError, match="gradients, found NaN or infinity at first"):
        surveyed(model, task, FISHER)


@pytest.mark.parametrize("name", MODELS)
def test_magnitudes_are_means_over_positions_that_count(name):
    model, task = built(name)
    found, anatomy = surveyed(model, task, MAGNITUDE, INPUTS)
    for weight in anatomy.linears:
        rows = []
        hook = model.get_submodule(weight.path).register_forward_pre_hook(
            lambda _m, args, rows=rows: rows.append(args[0].detach())
        )
        for batch in task.batches("calibration"):
            task.run(model, batch)
        hook.remove()
        masks = [task.mask(b) for b in task.batches("calibration")]
        flat = [r.reshape(-1, r.shape[-1]) for r in rows]
        kept = [f if m is None else f[m.reshape(-1)] for f, m in zip(flat, masks, strict=True)]
        assert close(found.magnitude(weight), torch.cat(kept).abs().mean(0), 1e-12)
        assert close(found.inputs(weight).mean_n, torch.cat(kept).mean(0), 1e-10)
