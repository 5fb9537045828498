"""The compiled products against float64, and against their torch twin where they step aside."""

import ctypes

import pytest
import torch
from torch import nn

from rankine.kernels import fused

needs_compiler = pytest.mark.skipif(fused.missing() is not None, reason=str(fused.missing()))


def parts(dtype, o=37, r=11, i=53, rows=(1, 1)):
    generator = torch.Generator().manual_seed(o * i + r)
    shapes = ((*rows, i), (r, i), (o, r), (o, i), (o,))
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def close(y, expected):
    tolerance = 1e-2 if y.dtype == torch.bfloat16 else 1e-5
    assert (y.double() - expected).norm() <= tolerance * expected.norm()


@pytest.fixture
def no_twin(monkeypatch):
    """Fail when the torch product runs."""

    def refuse(*_):
        raise AssertionError("the torch twin ran")

    monkeypatch.setattr(fused.F, "linear", refuse)


@needs_compiler
@pytest.mark.parametrize("dtype", fused.DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 2, 5), (4, 4, 4), (37, 11, 53), (130, 97, 257), (8, 64, 96)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_exact_to_rounding(dtype, sizes, threads, no_twin, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, down, up, w, bias = parts(dtype, *sizes)
    close(fused.fused_linear(x, w, bias), x.double() @ w.double().T + bias.double())
    expected = x.double() @ down.double().T @ up.double().T
    close(fused.fused_lowrank(x, down, up), expected)
    assert fused.fused_lowrank(x, down, up).shape == (1, 1, sizes[0])


@needs_compiler
def test_large_enough_for_threads(no_twin, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, _, _, w, _ = parts(torch.float32, o=1025, i=700)
    close(fused.fused_linear(x, w), x.double() @ w.double().T)


@needs_compiler
def test_rounds_as_torch_does(no_twin):
    # One input of 1: the product is the weight itself, so rounding is all there is.
    w = torch.randn(4096, 1).bfloat16()
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    assert torch.equal(fused.fused_linear(one, w), w.T)
    # Halfway cases and the largest values, through a float32 sum of two inputs.
    w = torch.tensor([[1.0, 2**-8], [1.0, 3 * 2**-8], [3e38, 3e38], [float("nan"), 0]]).bfloat16()
    two = torch.ones(1, 2, dtype=torch.bfloat16)
    expected = w.float().sum(1).bfloat16()[None]
    assert torch.equal(fused.fused_linear(two, w).nan_to_num(7), expected.nan_to_num(7))


def test_steps_aside_for_all_else():
    x, down, up, w, bias = parts(torch.float32, rows=(2, 3))
    close(
        fused.fused_lowrank(x, down, up, bias), x.double() @ down.double().T @ up.double().T + bias
    )
    x, down, up, w, _ = parts(torch.float16)
    assert torch.equal(fused.fused_linear(x, w), nn.functional.linear(x, w))
    x, down, up, w, _ = parts(torch.float32)
    w.requires_grad_()
    fused.fused_linear(x, w).sum().backward()
    torch.testing.assert_close(w.grad, x[0].expand_as(w))
    strided = w.detach().T.contiguous().T
    torch.testing.assert_close(fused.fused_linear(x, strided), fused.fused_linear(x, w.detach()))


def test_without_a_compiler_one_sentence(monkeypatch):
    monkeypatch.setattr(fused, "compiler", lambda: None)
    fused.missing.cache_clear()
    assert "no C compiler" in fused.missing()
    x, _, _, w, _ = parts(torch.float32)
    assert torch.equal(fused.fused_linear(x, w), nn.functional.linear(x, w))
    monkeypatch.undo()
    fused.missing.cache_clear()


@needs_compiler
def test_a_refusing_compiler_is_one_sentence(monkeypatch, tmp_path):
    broken = tmp_path / "fused.c"
    broken.write_text("int broken(")
    monkeypatch.setattr(fused, "SOURCE", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused.missing.cache_clear()
    fused._library.cache_clear()
    assert "refused fused.c" in fused.missing()
    assert list((tmp_path / "rankine").iterdir()) == []
    monkeypatch.undo()
    fused.missing.cache_clear()
    fused._library.cache_clear()
    assert isinstance(fused._library(), ctypes.CDLL)
