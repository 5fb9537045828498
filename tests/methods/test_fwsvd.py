"""FWSVD: property tests (i) to (v) of its description."""

import dataclasses

import pytest
import torch
from fitting import Layer, correlated, normal, truncated

import rankine
import tiny_models as tiny
from rankine.budget import Knapsack, Uniform
from rankine.errors import UserError
from rankine.method import get
from rankine.metric import Gram, Metric
from rankine.statistics import Fisher, WeightFisher
from rankine.structures import LowRank

FWSVD, BOTH = get("fwsvd"), get("fwsvd", {"sides": "both"})
LAYER = Layer(normal(8, 6), correlated(300, 6), correlated(300, 8, seed=3))


@dataclasses.dataclass
class Known(Layer):
    """A layer whose Fisher information is given: I_oi = outputs_o · inputs_i / Σ."""

    inputs_i: torch.Tensor = dataclasses.field(default_factory=lambda: torch.ones(6).double())
    outputs_o: torch.Tensor = dataclasses.field(default_factory=lambda: torch.ones(8).double())
    terms: float = 1.0

    def fisher(self, weight):
        return Fisher(self.inputs_i, self.outputs_o, 10, self.terms)


def known(**fields):
    return Known(LAYER.w_oi, LAYER.x_ni, LAYER.g_no, **fields)


FEATURES = torch.tensor([3.0, 0.1, 1.0, 0.01, 7.0, 0.5]).double()


@pytest.mark.parametrize("rank", range(1, 7))
@pytest.mark.parametrize("method", [FWSVD, BOTH])
def test_i_a_constant_fisher_is_plain_svd(method, rank):
    layer = known(inputs_i=torch.full((6,), 0.3).double())
    assert torch.allclose(layer.fitted(method, rank)[0], truncated(LAYER.w_oi, rank), atol=1e-8)


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e6])
@pytest.mark.parametrize("method", [FWSVD, BOTH])
def test_ii_the_scale_of_the_fisher_changes_nothing(method, factor):
    outputs_o = normal(8, seed=7).square()
    layer = known(inputs_i=FEATURES, outputs_o=outputs_o)
    other = known(inputs_i=factor * FEATURES, outputs_o=factor * outputs_o)
    assert torch.allclose(layer.fitted(method, 2)[0], other.fitted(method, 2)[0], atol=1e-8)
    ratio = other.losses(method)[2] / layer.losses(method)[2]
    assert ratio == pytest.approx(factor, rel=1e-6)  # but how much is at stake it does say


@pytest.mark.parametrize("rank", range(1, 7))
def test_iii_the_weighted_residual_is_the_tail(rank):
    layer = known(inputs_i=FEATURES)
    approx, _ = layer.fitted(FWSVD, rank)
    residual = float((FEATURES * (layer.w_oi - approx).square()).sum())
    tail = float(torch.linalg.svdvals(layer.w_oi * FEATURES.sqrt())[rank:].square().sum())
    assert residual == pytest.approx(tail, rel=1e-6, abs=1e-12)
    wanted = truncated(layer.w_oi * FEATURES.sqrt(), rank) / FEATURES.sqrt()
    assert torch.allclose(approx, wanted, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_iv_the_inputs_second_moment_as_fisher_is_diagonal_whitening(rank):
    h_i = LAYER.inputs(LAYER.target.weights[0]).h_nn.diagonal()
    approx, _ = known(inputs_i=h_i).fitted(FWSVD, rank)
    parts = LowRank(rank).encode(LAYER.w_oi, Metric(inputs=Gram(diagonal_n=h_i)))
    assert torch.equal(approx, LowRank(rank).decode(parts))


def test_v_a_linear_layer_under_squared_error():
    """From the data to the factors: f_i = Σ_o E[(g_o x_i)²] with g = W x − y."""
    x, y = correlated(40, 12, offset=0.5), normal(40, 5, seed=1)
    model = torch.nn.Sequential(torch.nn.Linear(12, 5, bias=False)).double()
    w_oi = model[0].weight.detach().clone()
    g_no = x @ w_oi.T - y
    scale_i = (g_no.square().sum(1, keepdim=True) * x.square()).mean(0).sqrt()
    task = tiny.vectors(x, y, 7)
    result = rankine.compress(
        model, method="fwsvd", bits=20.0, include="*", task=task, evaluate=False
    )
    (structure,) = result.patch.modules.values()
    assert structure.rank == 1
    wanted = truncated(w_oi * scale_i, structure.rank) / scale_i
    assert torch.allclose(model[0].weight, wanted, atol=1e-6)


@pytest.mark.parametrize("rank", range(1, 6))
def test_it_trades_plain_error_for_weighted_error(rank):
    fisher_i = LAYER.fisher(None).inputs_i
    ours, plain = (LAYER.w_oi - LAYER.fitted(m, rank)[0] for m in (FWSVD, get("svd")))
    assert float(ours.norm()) > float(plain.norm())
    assert float((fisher_i * ours.square()).sum()) < float((fisher_i * plain.square()).sum())


@pytest.mark.parametrize("terms", [1.0, 128.0])
def test_losses_are_per_term_of_the_loss(terms):
    """½ · terms · Σ I Δ², with I as the method sees it."""
    outputs_o = normal(8, seed=7).square()
    outputs_o *= FEATURES.sum() / outputs_o.sum()  # two sums of one matrix
    layer = known(inputs_i=FEATURES, outputs_o=outputs_o, terms=terms)
    seen = {
        FWSVD: FEATURES.expand(8, 6) / 8,
        BOTH: torch.outer(outputs_o, FEATURES) / outputs_o.sum(),
    }
    for method, fisher_oi in seen.items():
        assert float(fisher_oi.sum()) == pytest.approx(float(FEATURES.sum()))
        squared = (layer.w_oi - layer.fitted(method, 2)[0]).square()
        wanted = 0.5 * terms * float((fisher_oi * squared).sum())
        assert layer.losses(method)[2] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_both_sides_no_perturbation_of_that_rank_is_better(seed):
    outputs_o = normal(8, seed=7).square() + 0.01
    layer = known(inputs_i=FEATURES, outputs_o=outputs_o)
    approx, patch = layer.fitted(BOTH, 2)
    b, a = patch.tensors["w.up.weight"], patch.tensors["w.down.weight"]

    def error(other):
        return float((outputs_o[:, None] * FEATURES * (layer.w_oi - other).square()).sum())

    for size in (1e-3, 1e-1):
        other = (b + size * normal(8, 2, seed=seed)) @ (a + size * normal(2, 6, seed=seed + 50))
        assert error(other) >= error(approx)


@pytest.mark.parametrize("method", [FWSVD, BOTH])
@pytest.mark.parametrize("dead", [(1, 3), (0, 1, 2, 3, 4, 5)])
def test_dead_features_and_layers(method, dead):
    """No gradient at all at some inputs, or anywhere."""
    fisher_i = FEATURES.clone()
    fisher_i[list(dead)] = 0.0
    outputs_o = torch.zeros(8).double() if len(dead) == 6 else torch.ones(8).double()
    layer = known(inputs_i=fisher_i, outputs_o=outputs_o)
    approx, _ = layer.fitted(method, 6)
    assert torch.allclose(approx, layer.w_oi, atol=1e-4)
    assert all(loss >= 0 for loss in layer.losses(method).values())


def test_what_it_asks_to_be_measured_and_how_it_shares():
    assert FWSVD.needs(LAYER.target) == {WeightFisher()}
    assert isinstance(FWSVD.allocator, Uniform)
    assert isinstance(get("fwsvd", {"allocation": "knapsack"}).allocator, Knapsack)


def test_the_result_does_not_depend_on_the_batch_size():
    made = []
    for batch in (1, 6):
        model = tiny.llama()
        task = tiny.tokens(batch=batch, padded=True)
        rankine.compress(model, method="fwsvd", keep=0.6, task=task, evaluate=False)
        made.append(model)
    x = tiny.ids(3, 12, seed=7)
    with torch.no_grad():
        one, other = (model(x, use_cache=False).logits for model in made)
    assert torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("knobs", [{"sides": "outputs"}, {"allocation": "lems"}])
def test_unknown_values(knobs):
    with pytest.raises(UserError, match="expected"):
        get("fwsvd", knobs)


def test_a_classifier_of_ones_own():
    """An example is what the task says: a padded sequence with one label."""
    model, dense = tiny.bert(), tiny.bert()
    result = rankine.compress(
        model, method="fwsvd", keep=0.8, task=tiny.classified(), evaluate=False
    )
    assert result.patch.modules
    task = tiny.classified()
    batch = next(iter(task.batches("calibration")))
    with torch.no_grad():
        one, other = (task.run(m, batch).logits for m in (model, dense))
    assert bool(torch.isfinite(one).all())
    assert not torch.equal(one, other)
