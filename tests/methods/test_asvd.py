"""ASVD: scaled by the inputs' mean size; ranks by probing each layer alone."""

import pytest
import torch
from fitting import Layer, correlated, normal, truncated

import rankine
import tiny_models as tiny
from rankine.budget import Bid, Option, total_bits
from rankine.engine.stage import WorkBench
from rankine.errors import UserError
from rankine.method import get
from rankine.patch import Patch
from rankine.statistics import InputMagnitude
from rankine.structures import Dense, LowRank

ASVD = get("asvd")
LAYER = Layer(normal(8, 6), correlated(300, 6, offset=1.0))


@pytest.mark.parametrize("rank", range(1, 7))
@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_it_is_the_papers_matrix(rank, alpha):
    """U_k Σ_k V_kᵀ S⁻¹ with W S = U Σ Vᵀ, S = diag(E|x|^α)."""
    scale_i = LAYER.x_ni.abs().mean(0) ** alpha
    approx, _ = LAYER.fitted(get("asvd", {"alpha": alpha}), rank)
    assert torch.allclose(approx, truncated(LAYER.w_oi * scale_i, rank) / scale_i, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 3])
def test_without_a_scale_it_is_plain_svd(rank):
    approx, _ = LAYER.fitted(get("asvd", {"alpha": 0.0}), rank)
    assert torch.allclose(approx, truncated(LAYER.w_oi, rank), atol=1e-9)


def test_an_inputs_size_counts_and_its_unit_does_not():
    """Inputs of one size each, at random signs: E|x| = √E[x²], so α = 1 is diagonal whitening."""
    size_i = torch.tensor([5.0, 1.0, 0.2, 3.0, 0.5, 1.0]).double()
    layer = Layer(normal(8, 6), normal(400, 6).sign() * size_i)
    louder = Layer(layer.w_oi, 7 * layer.x_ni)
    approx, _ = layer.fitted(ASVD, 2)
    assert torch.allclose(approx, louder.fitted(ASVD, 2)[0], atol=1e-9)
    errors = (layer.w_oi - approx).norm(dim=0)
    plain = (layer.w_oi - layer.fitted(get("svd"), 2)[0]).norm(dim=0)
    assert float(errors[0] / plain[0]) < float(errors[2] / plain[2])
    full = layer.w_oi - layer.fitted(get("asvd", {"alpha": 1.0}), 2)[0]
    predicted = layer.losses(get("asvd", {"alpha": 1.0}))[2]
    assert predicted == pytest.approx(float((full * size_i).square().sum()), rel=1e-9)


def test_a_feature_that_is_always_zero_is_lost_no_more_than_it_matters():
    layer = Layer(normal(8, 6), LAYER.x_ni * torch.tensor([1.0, 1, 0, 1, 1, 1]).double())
    approx, _ = layer.fitted(ASVD, 6)
    assert torch.allclose(approx, layer.w_oi, atol=1e-4)


def test_what_it_asks_to_be_measured():
    assert ASVD.needs(LAYER.target) == {InputMagnitude()}


# -- the search -----
class Bench:
    """Probes that look losses up: target → rank → loss."""

    def __init__(self, losses):
        self.losses, self.probed = losses, []

    def fit(self, target, option):
        return Patch({target: option.structure})

    def probe(self, patch):
        self.probed.append(tuple(patch.modules))
        ((target, structure),) = patch.modules.items()
        return self.losses[target][structure.rank]


def bids(names):
    options = (*(Option(LowRank(r), 10 * r, 99.0) for r in range(1, 10)), Option(Dense(), 100, 0))
    return [Bid(name, (name,), options, dense_bits=100) for name in names]


def random_losses(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        name: dict(enumerate(torch.rand(9, generator=g).sort(descending=True).values.tolist(), 1))
        for name in "abcd"
    }


def strs(losses, budget):
    """The search as the paper's code does it: one list of (layer, size, loss), worst first; the
    longest tail of it whose smallest size of each layer fits."""
    found = sorted(
        ((loss, name, rank) for name, of in losses.items() for rank, loss in of.items()),
        reverse=True,
    )
    for first in reversed(range(len(found) + 1)):
        sizes = dict.fromkeys(losses, 10)
        for _, name, rank in found[first:]:
            sizes[name] = min(sizes[name], rank)
        if 10 * sum(sizes.values()) <= budget:
            return sizes
    raise AssertionError("nothing fits")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [60, 130, 222, 380])
def test_one_threshold_on_the_probed_losses(seed, budget):
    losses = random_losses(seed)
    bench = Bench(losses)
    chosen = ASVD.allocate(bids("abcd"), budget, bench)
    wanted = strs(losses, budget)
    assert {n: o.bits // 10 for n, o in chosen.items()} == wanted
    for name, option in chosen.items():
        loss = 0.0 if wanted[name] == 10 else losses[name][wanted[name]]
        assert option.loss == pytest.approx(loss)
    assert sorted(bench.probed) == sorted([(n,) for n in "abcd"] * 9)  # each layer alone


def test_a_smaller_size_that_does_better_is_preferred():
    losses = {
        "a": {**dict.fromkeys(range(1, 10), 0.5), 3: 0.1},
        "b": dict.fromkeys(range(1, 10), 0.2),
    }
    chosen = ASVD.allocate(bids("ab"), 130, Bench(losses))
    assert (chosen["a"].bits, chosen["b"].bits) == (30, 100)


def test_probes_below_zero_are_noise():
    losses = {"a": dict.fromkeys(range(1, 10), -0.5), "b": dict.fromkeys(range(1, 10), 0.2)}
    chosen = ASVD.allocate(bids("ab"), 120, Bench(losses))
    assert (chosen["a"].bits, chosen["b"].bits) == (10, 100)
    assert chosen["a"].loss == 0.0


def test_only_the_given_shares_are_probed():
    bench = Bench(random_losses(0))
    method = get("asvd", {"ratios": (0.5, 0.25)})
    chosen = method.allocate(bids("abcd"), 200, bench)
    assert len(bench.probed) == 8
    assert {o.bits for o in chosen.values()} <= {20, 50, 100}


def test_below_the_smallest_share_all_layers_get_the_same():
    bench = Bench({})
    chosen = get("asvd", {"ratios": (0.5,)}).allocate(bids("abcd"), 190, bench)
    assert [o.bits for o in chosen.values()] == [40] * 4
    assert total_bits(chosen) <= 190
    assert not bench.probed


def test_uniform_probes_nothing():
    bench = Bench({})
    chosen = get("asvd", {"allocation": "uniform"}).allocate(bids("abcd"), 250, bench)
    assert {o.bits for o in chosen.values()} == {60}
    assert not bench.probed


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"allocation": "knapsack"}, "search"),
        ({"ratios": ()}, "ratios"),
        ({"ratios": (1.5,)}, "1.5"),
        ({"alpha": -0.5}, "alpha"),
    ],
)
def test_unknown_values(knobs, said):
    with pytest.raises(UserError, match=said):
        get("asvd", knobs)


def test_what_is_probed_is_the_loss_with_one_layer_cut():
    """On a real model: the search's figures, measured again from outside."""
    model, task = tiny.llama(), tiny.tokens()
    result = rankine.compress(
        model, method="asvd", keep=1.0, set={"ratios": (0.3,)}, task=task, evaluate=False
    )
    batches = list(task.batches("calibration"))

    def loss(one):
        with torch.no_grad():
            return float(torch.cat([task.loss(task.run(one, b), b) for b in batches]).mean())

    before, stage = loss(tiny.llama()), result.stages[0]
    rises = []
    for target in result.patch.modules:
        alone = tiny.llama()
        tensors = {n: t for n, t in result.patch.tensors.items() if n.startswith(target + ".")}
        Patch({target: result.patch.modules[target]}, tensors).apply(alone)
        rises.append(max(0.0, loss(alone) - before))
        assert stage.choices[target].loss == pytest.approx(rises[-1], abs=1e-6)
    assert len(rises) > 2
    assert max(rises) > 0


def test_a_search_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    """What was probed is not probed again, and the end is the same."""
    made, plain = [], WorkBench._loss

    def run(work, stop=None):
        def loss(bench):
            if stop is not None and len(made) == stop:
                raise KeyboardInterrupt
            made.append(1)
            return plain(bench)

        monkeypatch.setattr(WorkBench, "_loss", loss)
        model, asked = tiny.llama(), {"method": "asvd", "keep": 1.0, "set": {"ratios": (0.2, 0.3)}}
        rankine.compress(model, task=tiny.tokens(), work=str(work), evaluate=False, **asked)
        return model.state_dict()

    whole, probes = run(tmp_path / "whole"), len(made)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=10)
    made.clear()
    resumed = run(tmp_path / "cut")
    assert len(made) == probes - 9  # ten figures stood: the dense model's, which is taken again
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
