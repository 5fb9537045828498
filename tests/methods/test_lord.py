"""LoRD: PCA of the outputs. Property tests (i) to (v) of its description, and the rank sweep."""

import pytest
import torch
from fitting import Layer, correlated, normal, truncated
from test_svd_llm import by_cholesky, by_eigh

import tiny_models as tiny
from rankine.budget import Bid, Option
from rankine.errors import UserError
from rankine.method import get
from rankine.patch import Patch
from rankine.structures import Dense, LowRank

CENTRED, PLAIN = get("lord"), get("lord", {"centred": False})
LAYER = Layer(normal(8, 6), correlated(300, 6, offset=2.0))
BIASED = Layer(normal(8, 6), correlated(300, 6, offset=2.0), bias_o=normal(8, seed=5))
RANKS = range(1, 7)


def implied(patch):
    """The bias change that the fit owes the layer."""
    return patch.tensors.get("w.up.bias")


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("form", [by_cholesky, by_eigh])
def test_i_without_centring_it_is_whitened_svd(form, rank):
    approx, patch = LAYER.fitted(PLAIN, rank)
    y, wanted = LAYER.x_ni @ approx.T, LAYER.x_ni @ form(LAYER, rank).T
    assert float((y - wanted).norm() / wanted.norm()) < 1e-5
    assert implied(patch) is None


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("layer", [LAYER, BIASED], ids=["plain", "biased"])
def test_ii_the_calibration_error_is_the_tail_of_the_outputs_covariance(layer, rank):
    approx, patch = layer.fitted(CENTRED, rank)
    y = layer.x_ni @ layer.w_oi.T
    eigenvalues = torch.linalg.eigvalsh(torch.cov(y.T, correction=0)).flip(0).clamp_min(0)
    tail = float(eigenvalues[rank:].sum())
    assert layer.error(approx, implied(patch)) == pytest.approx(tail, rel=1e-6, abs=1e-10)
    if rank in (losses := layer.losses(CENTRED)):
        assert losses[rank] == pytest.approx(tail, rel=1e-6)


@pytest.mark.parametrize("rank", RANKS)
def test_iii_centring_is_never_worse(rank):
    centred, patch = LAYER.fitted(CENTRED, rank)
    plain, _ = LAYER.fitted(PLAIN, rank)
    assert LAYER.error(centred, implied(patch)) <= LAYER.error(plain) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("tokens", [2, 4])
def test_iv_fewer_tokens_than_inputs(tokens):
    """At the rank of the covariance (one less than the tokens) the outputs are reproduced."""
    layer = Layer(normal(8, 6), correlated(tokens, 6, offset=2.0))
    approx, patch = layer.fitted(CENTRED, tokens - 1)
    assert layer.error(approx, implied(patch)) < 1e-8 * layer.error(0 * approx)


def test_v_full_rank_is_lossless_including_the_bias():
    approx, patch = BIASED.fitted(CENTRED, 6)
    assert torch.allclose(approx, BIASED.w_oi, atol=1e-5)
    assert torch.allclose(implied(patch), torch.zeros(8).double(), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_bias_formula(rank):
    """c = (I − U_kU_kᵀ) E[W x]: what the layer's own bias gains."""
    _, patch = LAYER.fitted(CENTRED, rank)
    y = LAYER.x_ni @ LAYER.w_oi.T
    _, vectors = torch.linalg.eigh(torch.cov(y.T, correction=0))
    u = vectors.flip(1)[:, :rank]
    wanted = y.mean(0) - u @ (u.T @ y.mean(0))
    assert torch.allclose(implied(patch), wanted, atol=1e-9)


def test_the_added_bias_is_counted_where_the_layer_had_none():
    assert CENTRED.structure(LAYER.target) == LowRank(1, bias=True)
    assert CENTRED.structure(BIASED.target) == LowRank(1)
    assert PLAIN.structure(LAYER.target) == LowRank(1)
    assert LowRank(2, bias=True).bits((8, 6), torch.bfloat16) == (2 * 14 + 8) * 16


def test_a_layers_own_bias_is_kept_on_top():
    """On a real GPT-2 layer: ŷ has the mean of y over the calibration data."""
    import rankine

    model, dense, task = tiny.gpt2(), tiny.gpt2(), tiny.tokens(padded=True)
    path = "transformer.h.0.attn.c_attn"
    knobs = {"allocation": "uniform"}
    rankine.compress(
        model, method="lord", set=knobs, keep=0.3, include=path, task=task, evaluate=False
    )
    outputs = {}
    for name, one in (("dense", dense), ("lord", model)):
        rows = []
        handle = one.get_submodule(path).register_forward_hook(
            lambda _m, _a, out, rows=rows: rows.append(out.detach())
        )
        for batch in task.batches("calibration"):
            task.run(one, batch)
        handle.remove()
        masks = [task.mask(b) for b in task.batches("calibration")]
        outputs[name] = torch.cat([y[m] for y, m in zip(rows, masks, strict=True)])
    assert not torch.allclose(outputs["lord"], outputs["dense"], atol=1e-2)
    assert torch.allclose(outputs["lord"].mean(0), outputs["dense"].mean(0), atol=1e-4)


# -- the rank rule -----
class Bench:
    """Probes that say: the type "up" is tolerant, "q" is not."""

    def __init__(self):
        self.probed = []

    def fit(self, target, option):
        if isinstance(option.structure, Dense):
            return Patch()
        return Patch({target: option.structure})

    def probe(self, patch):
        self.probed.append(frozenset(patch.modules))
        removed = sum(1 - s.rank / 10 for s in patch.modules.values())
        return removed * (1.0 if any("q" in p for p in patch.modules) else 0.01)


DENSE = Option(Dense(), 100, 0.0)


def bids():
    return [
        Bid(
            f"{n}.{role}",
            (f"{n}.{role}",),
            (
                *(Option(LowRank(r), 10 * r, 10.0 - r) for r in range(1, 10)),
                Option(Dense(), 100, 0),
            ),
            dense_bits=100,
            group=role,
        )
        for n in range(3)
        for role in ("q", "up")
    ]


def test_one_share_per_type_by_the_sweep():
    bench = Bench()
    chosen = CENTRED.allocate(bids(), 400, bench)
    by_type = {role: {chosen[f"{n}.{role}"].bits for n in range(3)} for role in ("q", "up")}
    assert all(len(sizes) == 1 for sizes in by_type.values())  # the same for all blocks
    assert by_type["q"] == {100}  # dense: nothing worth compressing there
    assert by_type["up"] == {30}
    assert sum(o.bits for o in chosen.values()) <= 400
    types = {frozenset(p.split(".")[1] for p in paths) for paths in bench.probed}
    assert types == {frozenset({"q"}), frozenset({"up"})}  # one type at a time


def test_uniform_probes_nothing():
    bench = Bench()
    chosen = get("lord", {"allocation": "uniform"}).allocate(bids(), 300, bench)
    assert {o.bits for o in chosen.values()} == {50}
    assert not bench.probed


def test_unknown_allocation():
    with pytest.raises(UserError, match="by_type"):
        get("lord", {"allocation": "greedy"})


def test_truncated_is_what_the_helpers_say():
    """The reference itself: Eckart-Young by hand on a diagonal matrix."""
    diagonal = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())
    assert torch.allclose(truncated(diagonal, 2), torch.diag(torch.tensor([3.0, 2, 0]).double()))
