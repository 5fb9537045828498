"""The compiled form as a runtime: the same function, nothing else changed, undone at will."""

import copy
import sys

import pytest
import torch
from torch import nn

import rankine
import tiny_models as tiny
from rankine.engine.run import cast
from rankine.errors import UserError
from rankine.kernels import fused as kernel
from rankine.method import Runtime, get
from rankine.structures import LowRank, decoding

needs_compiler = pytest.mark.skipif(kernel.missing() is not None, reason=str(kernel.missing()))


@pytest.fixture
def counted(monkeypatch):
    """Names of the compiled products as they are called."""
    calls = []

    def listening(name, product):
        return lambda *args: calls.append(name) or product(*args)

    for name in ("fused_linear", "fused_lowrank"):
        monkeypatch.setattr(decoding, name, listening(name, getattr(decoding, name)))
    return calls


def factored(act=None):
    """A linear layer and a factored one."""
    low = LowRank(5, act=act).module(nn.Linear(48, 32)).to_empty(device="cpu")
    for parameter in low.parameters():
        nn.init.normal_(parameter)
    return nn.Sequential(nn.Linear(16, 48), low).requires_grad_(False)


def swapped(model):
    return {name for name, m in model.named_modules() if "forward" in vars(m)}


@needs_compiler
def test_inside_the_context_and_after_it(counted):
    model, x = factored(), torch.randn(1, 16)
    expected, names = model(x), list(model.state_dict())
    with rankine.fused(model):
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        assert counted == ["fused_linear", "fused_lowrank"]
        assert list(model.state_dict()) == names
    assert not swapped(model)
    assert torch.equal(model(x), expected)
    assert len(counted) == 2


def test_nested_contexts_undo_what_they_did():
    model = factored()
    with rankine.fused(model[1]):
        inner = swapped(model)
        with rankine.fused(model):
            assert swapped(model) == {"0", "1", "1.down", "1.up"}
        assert swapped(model) == inner == {"1", "1.down", "1.up"}
    assert not swapped(model)


def test_left_alone():
    """A function between the factors; an adapter that took a factor's place later."""
    with rankine.fused(model := factored(act="relu")):
        assert "1" not in swapped(model)
    model, x = factored(), torch.randn(1, 16)
    with rankine.fused(model):
        model[1].down = nn.Sequential(model[1].down, nn.Tanh())
        inside = model(x)
    torch.testing.assert_close(inside, model(x), atol=1e-4, rtol=1e-4)


def test_a_copy_runs_its_own_weights():
    model, x = factored(), torch.randn(1, 16)
    rankine.fused(model)
    other = copy.deepcopy(model)
    other[0].weight.zero_()
    other[0].bias.zero_()
    assert torch.equal(other(x)[0], other[1].up.bias)
    assert not torch.equal(model(x), other(x))


def test_the_runtime_protocol():
    method, model = get("fused"), factored()
    assert isinstance(method, Runtime)
    undo = method.swap(model)
    assert swapped(model)
    undo.close()
    assert not swapped(model)
    with pytest.raises(UserError, match="runs a finished model"):
        rankine.plan(tiny.llama(), method="fused")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = cast(tiny.llama(), torch.bfloat16)
    result = rankine.compress(model, method="svd", keep=0.5, task=tiny.tokens(), evaluate=False)
    return rankine.save(model, tmp_path_factory.mktemp("fused") / "out", result.patch)


@needs_compiler
def test_a_loaded_model_generates_the_same(saved, counted):
    plain, model = rankine.load(saved), rankine.load(saved, fused=True)
    assert {n: t.shape for n, t in plain.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    ids = tiny.ids(1, 8)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)  # many rows: torch's products
        counted.clear()
        one = (m(ids[:, :1]).logits for m in (plain, model))
        torch.testing.assert_close(*one, atol=2e-2, rtol=2e-2)
    assert {"fused_linear", "fused_lowrank"} <= set(counted)


def test_without_a_compiler_a_load_warns(saved, monkeypatch):
    module = sys.modules["rankine.checkpoint.load"]  # the package's name for it is the function
    monkeypatch.setattr(module, "missing", lambda: "no C compiler was found")
    with pytest.warns(UserWarning, match="no C compiler"):
        rankine.load(saved, fused=True)
