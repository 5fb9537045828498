"""AFM: PCA of the outputs. The property tests of its specification, on layers and on tables."""

import math

import pytest
import torch
from fitting import Layer, correlated, normal, truncated
from torch import nn

import rankine
import tiny_models as tiny
from rankine.anatomy import Target, Weight, describe
from rankine.budget import Bid, Option
from rankine.errors import UserError
from rankine.method import get
from rankine.patch import Patch
from rankine.statistics import Lookups, MomentSum, Walk, survey
from rankine.structures import Dense, LowRank
from rankine.tasks import FunctionTask

AFM = get("afm")
RELU = get("afm", {"act": "relu"})
PLAIN = Layer(normal(8, 6), correlated(300, 6, offset=2.0))
BIASED = Layer(normal(8, 6), correlated(300, 6, offset=2.0), bias_o=normal(8, seed=5))
RANKS = range(1, 7)


def outputs(layer, patch):
    """What the module that the patch builds makes of the layer's inputs."""
    o, i = layer.w_oi.shape
    model = nn.ModuleDict({"w": nn.Linear(i, o, bias=layer.bias_o is not None).double()})
    if layer.bias_o is not None:  # as the engine completes it
        whole = patch.tensors["w.up.bias"] + layer.bias_o
        patch = patch | Patch(tensors={"w.up.bias": whole})
    with torch.no_grad():
        return patch.apply(model)["w"](layer.x_ni)


def wanted(layer):
    y = layer.x_ni @ layer.w_oi.T
    return y if layer.bias_o is None else y + layer.bias_o


def mse(a, b):
    return float((a - b).square().sum(1).mean())


def tails(layer):
    """Σ_{i>k} λ_i of the outputs' covariance, by k."""
    values = torch.linalg.eigvalsh(torch.cov(wanted(layer).T, correction=0)).flip(0).clamp_min(0)
    return [float(values[k:].sum()) for k in range(len(values) + 1)]


@pytest.mark.parametrize("layer", [PLAIN, BIASED], ids=["plain", "biased"])
def test_i_and_ii_the_error_is_the_tail_of_the_outputs_covariance(layer):
    """And at full rank there is none, biases included."""
    for rank in RANKS:
        _, patch = layer.fitted(AFM, rank)
        error = mse(outputs(layer, patch), wanted(layer))
        assert error == pytest.approx(tails(layer)[rank], rel=1e-4, abs=1e-9)
        if rank in (losses := layer.losses(AFM)):
            assert losses[rank] == pytest.approx(tails(layer)[rank], rel=1e-4)
    y = wanted(layer)
    assert mse(outputs(layer, patch), y) < 1e-10 * mse(y, 0 * y)


@pytest.mark.parametrize("rank", RANKS)
def test_iv_centring_helps_and_so_does_the_data(rank):
    _, patch = PLAIN.fitted(AFM, rank)
    centred = mse(outputs(PLAIN, patch), wanted(PLAIN))
    uncentred = PLAIN.error(PLAIN.fitted(get("lord", {"centred": False}), rank)[0])
    plain = PLAIN.error(truncated(PLAIN.w_oi, rank))
    assert centred <= uncentred * (1 + 1e-9) + 1e-12
    assert uncentred <= plain * (1 + 1e-9) + 1e-12


class Streamed(Layer):
    """Its inputs, measured in float32 batches."""

    batches = 1

    def inputs(self, weight):
        total = MomentSum()
        for rows in self.x_ni.float().chunk(self.batches):
            total.add(rows)
        return total.mean()


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_v_one_batch_or_fifty_make_the_same_covariance(offset):
    """Also where the mean is large: E[yyᵀ] − μμᵀ would cancel in float32."""
    layer = Streamed(normal(8, 6), (correlated(300, 6) + offset).float().double())
    y, found = wanted(layer), []
    for layer.batches in (1, 50):
        metric = AFM.metric(layer.target, layer)
        found.append(metric.inputs.congruence(layer.w_oi))
    for c_oo in (found[1], torch.cov(y.T, correction=0)):
        assert float((found[0] - c_oo).norm()) <= 1e-6 * float(c_oo.norm())


# -- a function between the factors -----
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_function_stands_where_the_paper_puts_it(rank):
    """ŷ = U σ(Uᵀ(W x + b)) + (I − UUᵀ) E[y], with E[Uᵀy] ≥ 0."""
    choice = LowRank(rank, act="relu", shift=True)
    _, patch = fitted(BIASED, RELU, choice)
    y = wanted(BIASED)
    _, vectors = torch.linalg.eigh(torch.cov(y.T, correction=0))
    u = vectors.flip(1)[:, :rank]
    u = u * torch.where(u.T @ y.mean(0) < 0, -1.0, 1.0)
    want = torch.relu(y @ u) @ u.T + y.mean(0) - u @ (u.T @ y.mean(0))
    assert torch.allclose(outputs(BIASED, patch), want, atol=1e-8)
    assert AFM.structure(BIASED.target) == LowRank(1)
    assert RELU.structure(BIASED.target) == LowRank(1, act="relu", shift=True)
    assert RELU.structure(PLAIN.target) == LowRank(1, act="relu", bias=True)


def fitted(layer, method, choice):
    """As `Layer.fitted`, for choices that decode to no matrix."""
    goal = method.goal(layer.target, layer, layer)
    metric = method.metric(layer.target, layer)
    return goal, method.fit(layer.target, choice, goal, metric, torch.float64)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("layer", [PLAIN, BIASED], ids=["plain", "biased"])
def test_with_headroom_the_function_hardly_acts(layer, act):
    """Nothing below the zero of the function: linear AFM before any training."""
    high = get("afm", {"act": act, "headroom": 30.0})
    _, patch = fitted(layer, high, LowRank(3, act=act, bias=layer.bias_o is None, shift=True))
    assert mse(outputs(layer, patch), wanted(layer)) == pytest.approx(tails(layer)[3], rel=1e-4)
    low = get("afm", {"act": act})
    shift = layer.bias_o is not None
    _, patch = fitted(layer, low, LowRank(3, act=act, bias=not shift, shift=shift))
    assert mse(outputs(layer, patch), wanted(layer)) > 1.5 * tails(layer)[3]


def test_bits_of_the_shift_are_counted():
    goal = RELU.goal(BIASED.target, BIASED, BIASED)
    metric = RELU.metric(BIASED.target, BIASED)
    bid = RELU.bid(BIASED.target, goal, metric, torch.bfloat16)
    assert bid.dense_bits == 8 * 6 * 16
    for option in bid.options[:-1]:
        rank = option.structure.rank
        assert option.bits == rank * (8 + 6 + 1) * 16
        assert option.loss == pytest.approx(tails(BIASED)[rank], rel=1e-4)
    with pytest.raises(UserError, match="expected act among"):
        get("afm", {"act": "sine"})
    with pytest.raises(UserError, match="moves a function"):
        LowRank(2, shift=True)


# -- tables -----
class Table:
    """An embedding and how often its ids are looked up: source and evidence of its target."""

    def __init__(self, ids, width=5, kind="weight"):
        self.ids, self.size = ids, 12
        # Rows of a few directions and many sizes, around a mean.
        self.e_vd = correlated(self.size, width, seed=3, offset=1.0)
        self.kind = kind

    @property
    def target(self):
        shape = (self.e_vd.shape[1], self.size)
        embedding = Weight("t", "embedding", -1, shape, "embedding", "t")
        head = Weight("h", "head", -1, shape[::-1], "linear", "h", tied_with="t.weight")
        return Target((embedding, head) if self.kind == "table" else (embedding,), self.kind)

    def weight(self, weight):
        return self.e_vd.T

    def bias(self, weight):
        return None

    def lookups(self, weight):
        return torch.bincount(self.ids, minlength=self.size).double() / len(self.ids)

    def fitted(self, rank, method=AFM):
        goal = method.goal(self.target, self, self)
        choice = LowRank(rank, view="table", bias=self.kind == "weight" and method is AFM)
        metric = method.metric(self.target, self)
        return method.fit(self.target, choice, goal, metric, torch.float64)

    def decoded(self, patch, padding=None):
        model = nn.ModuleDict({"t": nn.Embedding(self.size, 5, padding_idx=padding).double()})
        with torch.no_grad():
            return patch.apply(model)["t"](torch.arange(self.size))


SKEWED = Table(torch.tensor([0] * 50 + [1] * 20 + [2] * 9 + [3] * 4 + [4, 4, 5, 6, 7]))


@pytest.mark.parametrize("rank", range(1, 6))
def test_ii_a_table_is_cut_by_how_its_rows_are_used(rank):
    """The error of a looked-up row, on average, is the tail of the weighted covariance."""
    found = SKEWED.decoded(SKEWED.fitted(rank))[SKEWED.ids]
    rows = SKEWED.e_vd[SKEWED.ids]
    values = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0)).flip(0).clamp_min(0)
    assert mse(found, rows) == pytest.approx(float(values[rank:].sum()), rel=1e-4, abs=1e-9)
    plain = get("svd").fit(
        SKEWED.target,
        LowRank(rank, view="table"),
        SKEWED.e_vd.T,
        get("svd").metric(None, None),
        torch.float64,
    )
    assert mse(found, rows) <= mse(SKEWED.decoded(plain)[SKEWED.ids], rows) * (1 + 1e-9) + 1e-12


def test_i_at_full_width_every_row_is_what_it_was():
    """Those that nobody looked up too."""
    assert torch.allclose(SKEWED.decoded(SKEWED.fitted(5)), SKEWED.e_vd, atol=1e-5)


def test_rows_that_nobody_looked_up_are_coded_by_the_others():
    """Projected on the same directions, around the same mean."""
    patch, mean = SKEWED.fitted(2), SKEWED.e_vd[SKEWED.ids].mean(0)
    u = torch.linalg.qr(patch.tensors["t.up.weight"])[0]
    want = mean + (SKEWED.e_vd - mean) @ u @ u.T
    assert torch.allclose(SKEWED.decoded(patch), want, atol=1e-8)


def test_a_padding_row_of_zeros_stays_zero():
    """Histories are summed over it."""
    table = Table(SKEWED.ids + 1)
    table.e_vd[0] = 0
    found = table.decoded(table.fitted(2), padding=0)
    assert torch.equal(found[0], torch.zeros(5).double())
    assert torch.allclose(found[1:], table.decoded(table.fitted(2))[1:])


def test_iii_the_decoder_may_be_fused_into_what_reads_it():
    """W¹_f U and b + Σ W¹_f c on the codes: what decoding and the first layer give."""
    tables = [Table(SKEWED.ids), Table(SKEWED.ids.flip(0) % 5)]
    patches = [table.fitted(2) for table in tables]
    first = normal(7, 10, seed=9).split(5, 1)
    x = torch.randint(0, 12, (20, 2), generator=tiny.seeded(0))
    decoded = torch.cat([t.decoded(p)[x[:, n]] for n, (t, p) in enumerate(zip(tables, patches))], 1)
    codes = [p.tensors["t.down.weight"][x[:, n]] for n, p in enumerate(patches)]
    fused = [w @ p.tensors["t.up.weight"] for w, p in zip(first, patches)]
    constant = sum(w @ p.tensors["t.up.bias"] for w, p in zip(first, patches))
    y = torch.cat(codes, 1) @ torch.cat(fused, 1).T + constant
    assert torch.allclose(y, decoded @ torch.cat(first, 1).T, atol=1e-8)


def test_a_table_that_an_output_layer_shares_goes_on_being_shared():
    shared = Table(SKEWED.ids, kind="table")
    patch = shared.fitted(2)
    assert patch.tied == {"h.up.weight": "t.down.weight"}
    e = patch.tensors["t.down.weight"] @ patch.tensors["t.up.weight"].T
    turned = patch.tensors["t.down.weight"] @ patch.tensors["h.down.weight"]
    assert torch.equal(e, turned)
    assert "t.up.bias" not in patch.tensors
    metric = AFM.metric(shared.target, shared)
    bid = AFM.bid(shared.target, shared.e_vd.T, metric, torch.float64)
    option = next(o for o in bid.options if getattr(o.structure, "rank", 0) == 2)
    assert option.bits == patch.bits()


# -- the statistic -----
class Clicks(nn.Module):
    """Two id fields, a summed history that shares the first field's table, and an MLP."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.item = nn.Embedding(30, 8, padding_idx=0)
        self.user = nn.Embedding(20, 8)
        self.first, self.last = nn.Linear(24, 16), nn.Linear(16, 1)

    def forward(self, item, user, history, click):
        x = torch.cat([self.item(item), self.user(user), self.item(history).sum(1)], 1)
        return self.last(torch.relu(self.first(x))).squeeze(1)


def clicks(size, rows=100):
    g = tiny.seeded(4)
    skewed = torch.rand(rows, 6, generator=g).square()
    data = {
        "item": 1 + (29 * skewed[:, 0]).long(),
        "user": (20 * skewed[:, 1]).long(),
        "history": (30 * skewed[:, 2:]).long(),
        "click": torch.randint(0, 2, (rows,), generator=g).float(),
    }
    batches = [{k: v[n : n + size] for k, v in data.items()} for n in range(0, rows, size)]

    def loss(out, batch):
        logits = nn.functional.binary_cross_entropy_with_logits
        return logits(out, batch["click"], reduction="none")

    return data, FunctionTask(batches, loss=loss, evaluation=batches)


def measured(size):
    model, (data, task) = Clicks().eval(), clicks(size)
    anatomy = describe(model)
    spool = {}
    walk = Walk(model, anatomy, task, list(task.batches("calibration")))
    needs = {name: frozenset({Lookups()}) for name in ("item", "user")}
    found = survey(walk, needs, spool.get, spool.__setitem__)
    return data, {name: found.lookups(anatomy.weight(name)) for name in needs}


def test_v_every_lookup_counts_whatever_the_batches():
    """Histories too; padding ids stand for nothing."""
    data, whole = measured(100)
    ids = torch.cat([data["item"], data["history"].flatten()])
    count = torch.bincount(ids, minlength=30).double()
    assert count[0] > 0
    count[0] = 0
    assert torch.allclose(whole["item"], count / count.sum())
    assert torch.allclose(
        whole["user"], torch.bincount(data["user"], minlength=20).double() / 100.0
    )
    _, pieces = measured(2)
    for name in whole:
        assert torch.allclose(whole[name], pieces[name], atol=1e-6)


def test_a_small_click_model(tmp_path):
    """Tables and layers in one budget; saved, and loaded into a fresh module."""
    model, dense = Clicks().eval(), Clicks().eval()
    data, task = clicks(25)
    with torch.no_grad():
        for m in (model, dense):
            m.item.weight[1:] += 0.7  # off zero, as trained tables are
    asked = {"include": ["item", "user", "first"], "bits": 22.0, "task": task}
    result = rankine.compress(model, method="afm", output=tmp_path / "out", **asked)
    assert {s.view for s in result.patch.modules.values()} == {"table", "channel"}
    assert torch.equal(model.item(torch.zeros(1).long()), torch.zeros(1, 8))
    fresh = rankine.load(tmp_path / "out", into=Clicks()).eval()
    plain = Clicks().eval()
    plain.load_state_dict(dense.state_dict())
    rankine.compress(plain, method="svd", **asked)
    with torch.no_grad():
        assert torch.equal(fresh(**data), model(**data))
        errors = [float((m(**data) - dense(**data)).square().mean()) for m in (model, plain)]
    assert errors[0] < errors[1]


def test_greedy_takes_the_sizes_that_cost_least():
    """Each alone, on the model's own loss: a target that does not matter gives its bits away."""

    class Bench:
        def fit(self, target, option):
            return Patch({target: option.structure})

        def probe(self, patch):
            ((target, structure),) = patch.modules.items()
            return (1.0 if target == "matters" else 1e-3) * (10 - structure.rank)

    def bid(name):
        sizes = tuple(Option(LowRank(r), 10 * r, float(10 - r)) for r in range(1, 10))
        return Bid(name, (name,), (*sizes, Option(Dense(), 100, 0.0)), dense_bits=100)

    greedy = get("afm", {"allocation": "greedy"})
    chosen = greedy.allocate([bid("matters"), bid("idle")], 120, Bench())
    assert chosen["matters"].structure == Dense()
    assert chosen["idle"].structure == LowRank(2)
    uniform = AFM.allocate([bid("matters"), bid("idle")], 120, Bench())
    assert {o.structure for o in uniform.values()} == {LowRank(6)}
    with pytest.raises(UserError, match="greedy"):
        get("afm", {"allocation": "knapsack"})
    assert math.isclose(sum(o.bits for o in chosen.values()), 120)
