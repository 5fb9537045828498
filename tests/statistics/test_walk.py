"""Which blocks may be walked one by one, and what half the two-sided norm predicts."""

import pytest
import surveys
import torch
import torch.nn.functional as F
from surveys import GRADIENTS, INPUTS, close, surveyed
from torch import nn

import tiny_models as tiny
from rankine.anatomy import describe
from rankine.metric import Gram, Metric
from rankine.statistics import Walk, as_walked, survey


class Layer(nn.Module):
    """A block of a user's own."""

    def __init__(self, tuples):
        super().__init__()
        self.tuples = tuples
        self.inner = nn.Linear(12, 12)

    def forward(self, x):
        y = F.relu(self.inner(x))
        return (y, x) if self.tuples else y


class Stack(nn.Module):
    """Blocks in a chain, with a residual around each, side by side, or that return more."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.layers = nn.ModuleList(Layer(how == "tuples") for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        if self.how == "side by side":
            return self.head(sum(layer(x) for layer in self.layers))
        for layer in self.layers:
            y = layer(x)[0] if self.how == "tuples" else layer(x)
            x = y + (x if self.how == "residual" else 0)
        return self.head(x)


@pytest.mark.parametrize("how", ["chain", "residual", "side by side", "tuples"])
def test_blocks_are_walked_only_where_they_are_a_chain(how):
    model, task = Stack(how).double().eval(), tiny.regression(dtype=torch.float64)
    batches = list(task.batches("calibration"))
    anatomy = as_walked(describe(model), model, task, batches[0])
    # `+ 0` makes a new tensor of the same values: still a chain.
    assert [b.path for b in anatomy.blocks] == (
        ["layers.0", "layers.1", "layers.2"] if how == "chain" else [""]
    )
    model.requires_grad_(False)
    wanted = [*anatomy.linears, anatomy.weight("head")]
    spool = surveys.Spool()
    walk = Walk(model, anatomy, task, batches)
    needs = {w.path: frozenset({INPUTS, GRADIENTS}) for w in wanted}
    found = survey(walk, needs, spool.get, spool.keep)
    inputs = surveys.plain_inputs(model, task, list(needs))
    gradients = surveys.plain_gradients(model, task, list(needs))
    for weight in wanted:
        assert close(found.inputs(weight).h_nn, inputs[weight.path].h_nn)
        g = surveys.moment(gradients[weight.path]).h_nn
        assert close(found.gradient(weight, GRADIENTS).h_nn, g, 1e-9)


@pytest.mark.parametrize("name", [*tiny.LANGUAGE, *tiny.MORE_LANGUAGE, "bert"])
def test_the_families_are_chains(name):
    model = {**tiny.LANGUAGE, **tiny.MORE_LANGUAGE, "bert": tiny.bert}[name]()
    task = tiny.classified() if name == "bert" else tiny.tokens(padded=True)
    anatomy = describe(model)
    batch = next(iter(task.batches("calibration")))
    assert as_walked(anatomy, model, task, batch) is anatomy
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", sorted(tiny.TRANSLATION))
def test_an_encoder_and_its_decoder_are_walked_as_one(name):
    model, task = tiny.TRANSLATION[name](), tiny.translated()
    anatomy = describe(model)
    walked = as_walked(anatomy, model, task, next(iter(task.batches("calibration"))))
    assert [block.path for block in walked.blocks] == [""]
    assert [w.path for w in walked.linears] == [w.path for w in anatomy.linears]


# -- the unit of the two-sided metric -----
def predicted(found, weight, change):
    """Half the squared two-sided norm, without shrinkage."""
    gram_in = Gram(found.inputs(weight).h_nn)
    gram_out = Gram(found.gradient(weight, GRADIENTS).h_nn)
    return float(Metric(gram_in, gram_out, scale=0.5).loss(change, torch.zeros_like(change)))


def mean_loss(model, task):
    total, terms = 0.0, 0.0
    with torch.no_grad():
        for batch in task.batches("calibration"):
            loss = task.loss(task.run(model, batch), batch)
            count = task.terms(batch).to(loss).expand_as(loss)
            total, terms = total + float((loss * count).sum()), terms + float(count.sum())
    return total / terms


def test_exact_for_a_linear_model_with_unit_noise():
    """L = ½ E‖y − Wx‖² with residuals independent of x: ΔL = ½ tr(ΔW H ΔWᵀ), and G = I."""
    g = tiny.seeded(0)
    x = torch.randn(40_000, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 6).double()
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    noise = torch.randn(40_000, 4, generator=g, dtype=torch.float64)
    y = model(x).detach() + noise
    task = tiny.vectors(x, y, batch=8_000)
    found, anatomy = surveyed(model, task, INPUTS, GRADIENTS)
    change = 0.1 * torch.randn(4, 6, generator=g, dtype=torch.float64)
    before = mean_loss(model, task)
    with torch.no_grad():
        model[0].weight += change
    rise = mean_loss(model, task) - before
    assert predicted(found, anatomy.linears[0], change) == pytest.approx(rise, rel=0.05)


def test_exact_for_the_mean_over_positions():
    """One term per example, eight positions that feed it: the moment is scaled by eight."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3, bias=False)

        def forward(self, x_btn):
            return self.layer(x_btn).mean(1)

    g = tiny.seeded(0)
    x = torch.randn(20_000, 8, 5, generator=g, dtype=torch.float64)
    model = Pooled().double()
    y = model(x).detach() + torch.randn(20_000, 3, generator=g, dtype=torch.float64)
    task = tiny.vectors(x, y, batch=5_000)
    found, anatomy = surveyed(model, task, INPUTS, GRADIENTS)
    change = 0.3 * torch.randn(3, 5, generator=g, dtype=torch.float64)
    before = mean_loss(model, task)
    with torch.no_grad():
        model.layer.weight += change
    rise = mean_loss(model, task) - before
    assert predicted(found, anatomy.linears[0], change) == pytest.approx(rise, rel=0.05)


def markov(table, count, length, g):
    """Sequences of a chain with the given transition probabilities."""
    rows = [torch.randint(3, len(table), (count,), generator=g)]
    while len(rows) < length:
        rows.append(torch.multinomial(table[rows[-1]], 1, generator=g).squeeze(1))
    return torch.stack(rows, 1)


def test_nats_per_token_of_a_trained_language_model():
    """Text it has not seen: the predicted rise is the measured one. (On memorised text, or before
    training, gradients say nothing about curvature.)"""
    g = tiny.seeded(0)
    table = torch.softmax(2.0 * torch.randn(48, 48, generator=g), -1)
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        task = tiny.Tokens(markov(table, 64, 16, g), batch=64)
        (batch,) = task.batches("calibration")
        optimizer.zero_grad()
        task.loss(task.run(model, batch), batch).mean().backward()
        optimizer.step()
    task = tiny.Tokens(markov(table, 256, 16, g), batch=128)
    found, anatomy = surveyed(model, task, INPUTS, GRADIENTS)
    before = mean_loss(model, task)
    ratios = {}
    for weight in anatomy.linears:
        module = model.get_submodule(weight.path)
        change = 0.3 * module.weight.std() * torch.randn(module.weight.shape, generator=g)
        rises = []
        for sign in (1, -2, 1):  # there, to the other side, and back
            with torch.no_grad():
                module.weight += sign * change
            rises.append(mean_loss(model, task) - before)
        ratios[weight.path] = predicted(found, weight, change) / (sum(rises[:2]) / 2)
    typical = torch.tensor([r for path, r in ratios.items() if ".layers.0." in path])
    assert 0.7 < float(typical.log().mean().exp()) < 1.4
    assert all(0.3 < r < 3 for r in typical.tolist()), ratios
