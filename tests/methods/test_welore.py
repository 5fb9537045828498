"""WeLore: property tests (i) to (v) of its description."""

import pytest
import torch
from fitting import Layer, normal, truncated
from hypothesis import given, settings
from hypothesis import strategies as st

import rankine
import tiny_models as tiny
from rankine.anatomy import Target, Weight
from rankine.engine.run import cast
from rankine.errors import UserError
from rankine.method import get
from rankine.methods.welore import NORMS, normalised
from rankine.metric import Metric
from rankine.structures import Dense, LowRank
from rankine.training.heal import Healing

WELORE, RANKS = get("welore"), get("welore", {"budget_kind": "rank"})
SHAPES = [(12, 12), (12, 30), (30, 12), (8, 8), (4, 24)]


def orthogonal(n, seed):
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def with_spectrum(s_n, shape, seed=0):
    """A weight of these singular values."""
    o, i = shape
    u, v = orthogonal(o, seed), orthogonal(i, seed + 1)
    return (u[:, : len(s_n)] * s_n) @ v[:, : len(s_n)].T


def spectra(seed=0):
    """Singular values from flat to heavy-tailed."""
    decay = torch.linspace(0.1, 3.0, len(SHAPES)).double()
    return [
        torch.arange(1, min(shape) + 1).double() ** -d + 0.01 * normal(1, seed=seed).abs()
        for shape, d in zip(SHAPES, decay, strict=True)
    ]


def bids_of(method, weights):
    found = []
    for n, w_oi in enumerate(weights):
        shape = (w_oi.shape[0], w_oi.shape[1])
        target = Target((Weight(f"w{n}", "linear", 0, shape, "linear", f"w{n}"),))
        found.append(method.bid(target, w_oi, Metric(), torch.bfloat16))
    return found


def weights(seed=0):
    return [
        with_spectrum(s, shape, seed + 10 * n)
        for n, (s, shape) in enumerate(zip(spectra(seed), SHAPES, strict=True))
    ]


def kept_at(threshold, spectrum):
    """#{z_i >= t}, by the formula."""
    z = (spectrum - spectrum.min()) / (spectrum.max() - spectrum.min())
    return int((z >= threshold).sum())


def size(rank, shape):
    """Numbers stored: factors where they are fewer, else the weight."""
    o, i = shape
    return min(o * i, rank * (o + i))


def chosen_ranks(chosen, full):
    """Rank of each choice; the full one for dense."""
    picks = [chosen[f"w{n}"].structure for n in range(len(full))]
    return [
        most if isinstance(one, Dense) else one.rank for one, most in zip(picks, full, strict=True)
    ]


@pytest.mark.parametrize("keep", [0.16, 0.25, 0.4, 0.55, 0.7, 0.85, 0.97, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_lowest_threshold_whose_parameters_fit(keep, seed):
    """params(t) = Σ min(o·i, k(o + i)), searched over every t at which anything changes."""
    spectrums = [torch.linalg.svdvals(w) for w in weights(seed)]
    total = sum(o * i for o, i in SHAPES)
    levels = sorted({float(x) for s in spectrums for x in (s - s.min()) / (s.max() - s.min())})
    best = max(
        used
        for t in levels
        if (
            used := sum(
                size(kept_at(t * (1 - 1e-9), s), shape)
                for s, shape in zip(spectrums, SHAPES, strict=True)
            )
        )
        <= keep * total
    )
    chosen = WELORE.allocate(bids_of(WELORE, weights(seed)), int(keep * total * 16), None)
    assert sum(o.bits for o in chosen.values()) == 16 * best


def test_i_reduction_grows_with_the_threshold():
    """From nothing at t = 0 to one rank each (what equals s_max) at t = 1."""
    full = [min(shape) for shape in SHAPES]
    bids, dense = bids_of(RANKS, weights()), sum(o * i for o, i in SHAPES) * 16
    before = None
    for share in range(len(SHAPES), sum(full) + 1):
        chosen = RANKS.allocate(bids, -(-dense * share // sum(full)), None)
        kept = sum(chosen_ranks(chosen, full))
        assert before is None or kept >= before
        before = kept
    assert before == sum(full)
    s = torch.linalg.svdvals(weights()[2])
    z = normalised(s, "minmax")
    reductions = [1 - int((z >= t).sum()) / len(z) for t in torch.linspace(0, 1, 201)]
    assert reductions == sorted(reductions)
    assert reductions[0] == 0
    assert reductions[-1] == 1 - 1 / len(z)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_ii_neither_size_nor_rotation_matters(norm, scale, seed):
    w = normal(9, 14, seed=seed)
    turned = scale * orthogonal(9, seed + 1) @ w @ orthogonal(14, seed + 2)
    z, other = (normalised(torch.linalg.svdvals(m), norm) for m in (w, turned))
    assert torch.allclose(z, other, atol=1e-9)
    assert bool((z[:-1] >= z[1:]).all())


@pytest.mark.parametrize("norm", NORMS)
def test_ii_nor_do_they_for_the_ranks(norm):
    method = get("welore", {"norm": norm})
    turned = [
        (10.0**n) * orthogonal(w.shape[0], n) @ w @ orthogonal(w.shape[1], n + 5)
        for n, w in enumerate(weights())
    ]
    full = [min(shape) for shape in SHAPES]
    for bits in (4000, 9000, 14000):
        one, other = (
            method.allocate(bids_of(method, ws), bits, None) for ws in (weights(), turned)
        )
        assert chosen_ranks(one, full) == chosen_ranks(other, full)


def test_heavy_tails_go_first():
    chosen = WELORE.allocate(bids_of(WELORE, weights()), 11000, None)
    bits = [chosen[f"w{n}"].bits / (16 * o * i) for n, (o, i) in enumerate(SHAPES)]
    assert bits[0] == 1.0  # nearly flat: stays dense
    assert bits[2] < 0.5


def test_a_flat_spectrum_is_not_low_rank():
    flat = with_spectrum(torch.full((12,), 0.7).double(), (12, 12))
    assert torch.equal(normalised(torch.full((5,), 0.7).double(), "minmax"), torch.ones(5).double())
    steep = weights()[1]
    chosen = WELORE.allocate(bids_of(WELORE, [flat, steep]), (144 + 200) * 16, None)
    assert isinstance(chosen["w0"].structure, Dense)
    assert isinstance(chosen["w1"].structure, LowRank)


def test_one_outlier_makes_a_weight_look_low_rank_unless_a_quantile_is_asked_for():
    plain = torch.linspace(2.0, 1.0, 40).double()
    outlier = plain.clone()
    outlier[0] = 100.0
    assert float(normalised(outlier, "minmax")[1:].max()) < 0.02
    quantile = normalised(outlier, "quantile")
    assert torch.allclose(quantile[1:], normalised(plain, "quantile")[1:], atol=0.05)


@pytest.mark.parametrize("rank", range(1, 7))
def test_iii_the_factors_are_the_best_ones(rank):
    layer = Layer(normal(8, 6), normal(30, 6, seed=1))
    approx, _ = layer.fitted(WELORE, rank)
    assert torch.allclose(approx, truncated(layer.w_oi, rank), atol=1e-9)
    tail = torch.linalg.svdvals(layer.w_oi)[rank:].square().sum()
    assert float((approx - layer.w_oi).square().sum()) == pytest.approx(float(tail), abs=1e-12)


# -- the paper's own budget -----
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.62, 0.8])
def test_ranks_as_the_budget(keep):
    """ERR = 1 − Σk / Σd at the threshold; a weight is factorized where more than half goes."""
    spectrums = [torch.linalg.svdvals(w) for w in weights()]
    full = [len(s) for s in spectrums]
    levels = sorted({float(x) for s in spectrums for x in (s - s.min()) / (s.max() - s.min())})
    kept = next(
        ranks
        for t in levels
        if sum(ranks := [kept_at(t * (1 - 1e-9), s) for s in spectrums]) <= keep * sum(full)
    )
    dense = sum(o * i for o, i in SHAPES) * 16
    chosen = RANKS.allocate(bids_of(RANKS, weights()), int(keep * dense), None)
    wanted = [k if 1 - k / d > 0.5 else d for k, d in zip(kept, full, strict=True)]
    assert chosen_ranks(chosen, full) == wanted
    assert all(o.bits <= 16 * s[0] * s[1] for o, s in zip(chosen.values(), SHAPES, strict=True))


# -- training what was cut -----
def compressed(keep=0.97, **knobs):
    model = cast(tiny.llama(), torch.bfloat16)
    asked = {"method": "welore", "set": knobs, "keep": keep}
    return model, rankine.compress(model, task=tiny.tokens(), evaluate=False, **asked)


@pytest.mark.parametrize("norms", [False, True])
def test_iv_only_the_factors_of_what_was_cut_are_trained(norms):
    model, result = compressed()
    dense = [w.path for t in result.stages[0].targets for w in t.weights]
    dense = [path for path in dense if path not in result.patch.modules]
    assert dense  # some stayed dense
    assert result.patch.modules
    Healing(result.patch, norms=norms).prepare(model, tiny.tokens())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    factors = {f"{path}.{part}.weight" for path in result.patch.modules for part in ("down", "up")}
    scales = {n for n, _ in model.named_parameters() if "norm" in n} if norms else set()
    assert trained == factors | scales


@pytest.mark.parametrize(("kind", "keep"), [("parameters", 0.98), ("rank", 0.45)])
def test_iv_it_never_grows(kind, keep):
    model, result = compressed(keep, budget_kind=kind)
    assert sum(p.numel() for p in model.parameters()) < sum(
        p.numel() for p in tiny.llama().parameters()
    )
    assert result.patch.modules


def test_v_merged_factors_are_the_same_function():
    model, result = compressed()
    for path in result.patch.modules:
        module = model.get_submodule(path).float()
        x = normal(5, module.in_features, seed=3).float()
        assert torch.allclose(module(x), x @ module.weight.T, atol=1e-5)


@pytest.mark.parametrize("knobs", [{"norm": "max"}, {"budget_kind": "bytes"}])
def test_unknown_values(knobs):
    with pytest.raises(UserError, match="unknown value"):
        get("welore", knobs)
