"""The private products against the dense result, for every inner size, in a process of its own:
what they do wrong may end the process."""

import os
import subprocess
import sys

import pytest
import torch

from rankine.kernels import aten

CHILD = """
import torch
from rankine.kernels import aten

torch.manual_seed(0)

def close(y, x, w):
    expected = x.double() @ w.double().T
    tolerance = 0.02 if x.dtype != torch.float32 else 1e-5
    assert (y.double() - expected).norm() <= tolerance * expected.norm(), (x.shape, w.shape)
    assert y.shape == expected.shape and y.dtype == x.dtype

def attempt(fits, run):
    try:
        result = run()
    except ValueError as error:
        assert not fits, error
        return
    assert fits
    return result

for dtype in (torch.bfloat16, torch.float32):
    for k in range(1, 130):
        for rows in ((1,), (), (2, 3)) if k % 32 == 0 else ((1,),):
            x = torch.randn(*rows, k, dtype=dtype)
            w = torch.randn(32, k, dtype=dtype)
            codes, scale = aten.quantize_int8(w)
            y = attempt(k % 16 == 0, lambda: aten.int8_linear(x, codes, scale))
            if y is not None:
                close(y, x, codes * scale.double()[:, None])
            packed = attempt(k % 32 == 0, lambda: aten.quantize_int4(w, 32))
            if packed is not None:
                y = aten.int4_linear(x, *packed, 32)
                eye = torch.eye(k, dtype=torch.float32)
                exact = aten.int4_linear(eye, packed[0], packed[1].float(), 32).T
                close(y, x, exact)
                grouped = w.float().view(32, -1, 32)
                step = (grouped.amax(-1) - grouped.amin(-1)) / 15
                error = (exact.view(32, -1, 32) - grouped).abs().amax(-1)
                assert (error <= 0.5 * step + 0.05).all()
            if k in (1, 7, 16, 33, 128, 129) and aten.can_pack(dtype):  # compiled per size: slow
                close(aten.packed_linear(x, aten.pack(w)), x, w)
print("sound")
"""


@pytest.mark.process
def test_every_inner_size_is_right_or_refused():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "sound"


def test_int8_codes_are_within_half_a_step():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    codes, scale = aten.quantize_int8(w)
    assert ((codes * scale[:, None] - w).abs() <= 0.5001 * scale[:, None]).all()


def test_refusals():
    codes, scale = aten.quantize_int8(torch.randn(8, 32))
    x = torch.randn(1, 32)
    with pytest.raises(ValueError, match="not contiguous"):
        aten.int8_linear(x, codes.T.contiguous().T, scale)
    with pytest.raises(ValueError, match="expected 32 inputs"):
        aten.int8_linear(x[:, :16], codes, scale)
    with pytest.raises(ValueError, match="scales"):
        aten.int8_linear(x.bfloat16(), codes, scale)
    with pytest.raises(ValueError, match="floating inputs"):
        aten.int8_linear(x.double(), codes, scale)
    with pytest.raises(ValueError, match="16 outputs"):
        aten.quantize_int4(torch.randn(8, 32), 32)
    with pytest.raises(ValueError, match="groups"):
        aten.quantize_int4(torch.randn(16, 32), 48)
    packed, scale_zero = aten.quantize_int4(torch.randn(16, 64), 32)
    with pytest.raises(ValueError, match="packed bytes"):
        aten.int4_linear(torch.randn(1, 64), packed[:8], scale_zero, 32)
    with pytest.raises(ValueError, match="matrix"):
        aten.pack(torch.randn(4, 4, dtype=torch.float64))
