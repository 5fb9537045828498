"""Round to nearest: at most half a step away, in the bytes it says."""

from itertools import pairwise

import pytest
import torch
from fitting import Layer, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from rankine.errors import UserError
from rankine.method import get
from rankine.metric import Metric
from rankine.structures import Dense, Quantized


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.integers(1, 40),
    rows=st.integers(1, 5),
    eighths=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_entry_is_within_half_a_step(bits, group, rows, eighths, seed):
    w = normal(rows, 8 * eighths, seed=seed)
    structure = Quantized(bits, group)
    back, _ = Layer(w, w).fitted(get("rtn"), structure)
    rounding = 1e-6 * float(w.abs().max())  # codes are found in float32
    for start in range(0, w.shape[1], group):
        part = w[:, start : start + group]
        step = (part.amax(1) - part.amin(1)) / (2**bits - 1)
        error = (back[:, start : start + group] - part).abs().amax(1)
        assert bool((error <= step / 2 * (1 + 1e-6) + rounding).all())
        # the smallest and the largest of a group are met exactly
        again = back[:, start : start + group]
        assert torch.allclose(again.amin(1), part.amin(1), atol=rounding)
        assert torch.allclose(again.amax(1), part.amax(1), atol=rounding)


def test_constant_groups_are_exact():
    w = torch.full((3, 16), 0.25).double()
    back, _ = Layer(w, w).fitted(get("rtn"), Quantized(2, 8))
    assert torch.equal(back, w)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_size_and_its_bytes(bits):
    w = normal(6, 64).to(torch.bfloat16)
    method = get("rtn", {"code_bits": bits, "group": 16})
    layer = Layer(w, w)
    bid = method.bid(layer.target, w, method.metric(layer.target, layer), torch.bfloat16)
    (option,) = [o for o in bid.options if not isinstance(o.structure, Dense)]
    assert option.bits == 6 * 64 * bits + 6 * 4 * 2 * 16
    patch = method.fit(layer.target, option.structure, w, Metric(), torch.bfloat16)
    assert patch.bits() == option.bits
    parts = {n.removeprefix("w."): t for n, t in patch.tensors.items()}
    error = w.double() - option.structure.decode(parts).double()
    assert option.loss == pytest.approx(float(error.square().sum()), rel=1e-9)


def test_more_bits_lose_less():
    w = normal(16, 64)
    losses = []
    for bits in (2, 3, 4, 8):
        back, _ = Layer(w, w).fitted(get("rtn"), Quantized(bits))
        losses.append(float((back - w).square().sum()))
    # a bit more halves the step, which quarters the squared error
    assert all(few > 3 * many for few, many in pairwise(losses))


def test_widths_that_fill_no_whole_bytes_are_grouped_along_the_outputs():
    method = get("rtn", {"code_bits": 4})
    for shape, axis in (((6, 8), -1), ((8, 9), -2)):
        layer = Layer(normal(*shape), normal(4, shape[1]))
        assert method.structure(layer.target) == Quantized(4, 64, axis)
        bid = method.bid(
            layer.target, layer.w_oi, method.metric(layer.target, layer), torch.float32
        )
        assert len(bid.options) == 2


def test_a_group_longer_than_its_axis_is_one_of_that_length():
    """Whatever a checkpoint says of it, nothing is filled up to its size."""
    w = normal(4, 16)
    long, fitting = Quantized(4, 2**31 - 1), Quantized(4, 16)
    parts = long.encode(w, Metric())
    assert parts.keys() == fitting.encode(w, Metric()).keys()
    assert torch.equal(long.decode(parts), fitting.decode(fitting.encode(w, Metric())))
    assert long.bits(w.shape, w.dtype) == fitting.bits(w.shape, w.dtype)


def test_a_weight_that_fits_neither_way_stays_dense():
    layer = Layer(normal(5, 9), normal(4, 9))
    method = get("rtn", {"code_bits": 4})
    bid = method.bid(layer.target, layer.w_oi, Metric(), torch.float32)
    assert [type(o.structure) for o in bid.options] == [Dense]


def test_widths_that_are_no_codes():
    with pytest.raises(UserError, match="code_bits"):
        Quantized(5)
