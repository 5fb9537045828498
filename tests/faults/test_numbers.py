"""Data and weights that are not as they should be: what can be done is done, exactly where it can
be exact, and what cannot names the layer."""

from __future__ import annotations

import pytest
import torch

import rankine
import tiny_models as tiny
from rankine.tasks import FunctionTask

LOW_RANK = ["svd", "svd_llm", "anchored_svd", "lord", "kfac_svd"]


def fields(method):
    return {"method": "rtn"} if method == "rtn" else {"method": method, "keep": 0.8}


def compress(net, x, method="svd_llm", **more):
    y = torch.randn(len(x), net.last.out_features, generator=tiny.seeded(0))
    given = {**fields(method), **more}
    return rankine.compress(net, task=tiny.vectors(x, y, 16), evaluate=False, **given)


def inputs(kind: str) -> torch.Tensor:
    x = torch.randn(64, 12, generator=tiny.seeded(1))
    if kind == "constant":
        return torch.full_like(x, 0.5)
    if kind == "zero":
        return torch.zeros_like(x)
    if kind == "dead channels":
        return x * (torch.arange(12) < 4)
    if kind == "rank two":
        return x[:, :2] @ torch.randn(2, 12, generator=tiny.seeded(2))
    if kind == "one sample":
        return x[:1]
    scale = {"huge": 1e30, "tiny": 1e-30}[kind]
    return scale * x


KINDS = ["constant", "zero", "dead channels", "rank two", "one sample", "huge", "tiny"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", LOW_RANK)
def test_singular_moments_give_finite_weights(kind, method):
    result = compress(tiny.mlp(), inputs(kind), method)
    assert result.patch.modules
    assert all(bool(torch.isfinite(p).all()) for p in result.model.parameters())


@pytest.mark.parametrize("kind", ["constant", "zero", "dead channels", "rank two"])
@pytest.mark.parametrize("method", ["svd_llm", "anchored_svd", "kfac_svd"])
def test_full_rank_recovers_the_weight_whatever_the_data(kind, method):
    """Also where the moment says nothing: no component of the weight is lost off the data."""
    from rankine.anatomy import describe
    from rankine.engine.run import open_run
    from rankine.engine.stage import Stage, WorkSource, needed
    from rankine.method import get
    from rankine.recipe import Recipe
    from rankine.statistics import survey
    from rankine.structures import LowRank

    net = tiny.mlp().double()
    x = inputs(kind).double()
    task = tiny.vectors(x, torch.randn(len(x), 5, generator=tiny.seeded(3)).double(), 16)
    solver, recipe = get(method, {}), Recipe.of(**fields(method))
    with open_run(recipe, net, task) as run:
        stage = Stage(run, solver, 0, list(solver.targets(describe(run.work))))
        spool = {}
        found = survey(run.walk(), needed(stage, stage.targets), spool.get, spool.__setitem__)
        for target in stage.targets:
            metric = solver.metric(target, found)
            w = WorkSource(run).weight(target.weights[0]).double()
            structure = LowRank(min(w.shape))
            again = structure.decode(structure.encode(w, metric))
            assert float((again - w).norm() / w.norm()) < 1e-6, target.id


def spoiled(path: str, value: float):
    net = tiny.mlp()
    with torch.no_grad():
        net.get_submodule(path).weight[1, 1] = value
    return net


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [*LOW_RANK, "auto", "rtn"])
def test_weights_that_are_no_numbers_are_named(value, method):
    x = torch.randn(64, 12, generator=tiny.seeded(1))
    with pytest.raises(
        rankine.UserError, match=r"expected finite .* (first|last|second)"
    ) as caught:
        compress(spoiled("last", value), x, method)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["svd_llm", "anchored_svd", "kfac_svd"])
def test_activations_that_are_no_numbers_name_the_layer(method):
    x = torch.randn(64, 12, generator=tiny.seeded(1))
    x[3, 4] = float("nan")
    with pytest.raises(rankine.UserError, match="activations, found NaN or infinity at first"):
        compress(tiny.mlp(), x, method)
    with pytest.raises(rankine.UserError, match="found NaN or infinity at second"):
        compress(spoiled("first", float("nan")), x.nan_to_num(), method)


@pytest.mark.parametrize("method", [*LOW_RANK, "rtn", "auto"])
@pytest.mark.parametrize("sizes", [(12, 24, 1), (1, 24, 5), (3, 8, 1)])
def test_matrices_of_one_row_or_column(method, sizes):
    """They cannot be made smaller, and do not stop the others from being."""
    net = tiny.Mlp(*sizes).eval()
    x = torch.randn(32, sizes[0], generator=tiny.seeded(1))
    more = {} if method == "rtn" else {"keep": 1.0}
    result = compress(net, x, method, **more)
    assert result.model(x).shape == (32, sizes[2])
    assert bool(torch.isfinite(result.model(x)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["svd", "svd_llm", "anchored_svd", "kfac_svd", "rtn", "auto"])
def test_models_in_half_precision_stay_in_it(dtype, method):
    model = tiny.llama().to(dtype)
    result = rankine.compress(model, task=tiny.tokens(), evaluate=False, **fields(method))
    assert result.patch.modules
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert bool(torch.isfinite(model(tiny.ids()).logits).all())


def test_a_dead_model():
    """All weights zero: nothing to approximate, nothing to divide by."""
    net = tiny.mlp()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    result = compress(net, torch.randn(64, 12, generator=tiny.seeded(1)))
    assert not bool(result.model(torch.ones(1, 12)).any())


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 12)]])
def test_no_data_at_all(batches):
    with pytest.raises(rankine.UserError, match="expected calibration"):
        rankine.compress(
            tiny.mlp(), task=FunctionTask(batches), method="svd_llm", keep=0.8, evaluate=False
        )
