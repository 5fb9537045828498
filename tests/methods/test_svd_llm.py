"""SVD-LLM: whitening by Cholesky, by eigh and the output-side form are one matrix."""

import pytest
import torch
from fitting import Layer, correlated, normal, truncated

from rankine.method import get

METHOD = get("svd_llm")
LAYER = Layer(normal(8, 6), correlated(300, 6))
RANKS = range(1, 7)


def by_cholesky(layer, rank):
    """The paper's own form: W S = U Σ Vᵀ, Ŵ = U_k Σ_k V_kᵀ S⁻¹."""
    s = torch.linalg.cholesky(layer.x_ni.T @ layer.x_ni / len(layer.x_ni))
    return torch.linalg.solve_triangular(s.T, truncated(layer.w_oi @ s, rank).T, upper=True).T


def by_eigh(layer, rank):
    """SVD-LLM v2: the symmetric root."""
    values, q = torch.linalg.eigh(layer.x_ni.T @ layer.x_ni / len(layer.x_ni))
    root = q * values.sqrt()
    return truncated(layer.w_oi @ root, rank) @ torch.linalg.inv(root)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("form", [by_cholesky, by_eigh])
def test_all_whitenings_are_one(form, rank):
    approx, _ = LAYER.fitted(METHOD, rank)
    wanted = form(LAYER, rank)
    y, y_wanted = LAYER.x_ni @ approx.T, LAYER.x_ni @ wanted.T
    assert float((y - y_wanted).norm() / y_wanted.norm()) < 1e-5
    assert torch.allclose(approx, wanted, atol=1e-5)


@pytest.mark.parametrize("rank", RANKS)
def test_the_error_on_the_data_is_the_tail(rank):
    approx, _ = LAYER.fitted(METHOD, rank)
    tail = torch.linalg.svdvals(LAYER.x_ni @ LAYER.w_oi.T)[rank:].square().sum() / 300
    assert LAYER.error(approx) == pytest.approx(float(tail), rel=1e-6, abs=1e-12)
    losses = LAYER.losses(METHOD)
    if rank in losses:
        assert losses[rank] == pytest.approx(float(tail), rel=1e-6)


def test_it_beats_plain_svd_on_the_data_and_loses_off_it():
    for rank in range(1, 6):
        ours, plain = (LAYER.fitted(get(name), rank)[0] for name in ("svd_llm", "svd"))
        assert LAYER.error(ours) < LAYER.error(plain)
        assert (ours - LAYER.w_oi).norm() > (plain - LAYER.w_oi).norm()


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_inputs(tokens):
    """Cholesky fails there. The data's own rank gives its outputs, full rank the weight."""
    layer = Layer(normal(8, 6), correlated(tokens, 6))
    approx, _ = layer.fitted(METHOD, tokens)
    assert layer.error(approx) < 1e-8 * layer.error(0 * approx)
    assert torch.allclose(layer.fitted(METHOD, 6)[0], layer.w_oi, atol=1e-5)
