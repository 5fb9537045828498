"""The private CPU products torch ships, behind one door that checks what they do not.

`_weight_int8pack_mm` in bfloat16 returns garbage (or reads past its input) without a word when the
inner size is no multiple of 16; none of these kernels looks at strides. Shapes: m rows of x, o
outputs, i inputs, g groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankine import compat

#: The inner size that the int8 kernel reads in steps of.
INT8_STEP = 16
#: Output and group sizes that the int4 kernel is written for.
INT4_OUTPUTS = 16
INT4_GROUPS = (32, 64, 128, 256)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# -- int8, one scale per output --------------------------------------------------------------------
def quantize_int8(w_oi: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 (o, i), scales (o,) in w's dtype): symmetric round to nearest."""
    scale_o = w_oi.float().abs().amax(1).clamp_min(1e-12) / 127
    codes = (w_oi.float() / scale_o[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes.contiguous(), scale_o.to(w_oi.dtype)


def int8_linear(x: Tensor, codes_oi: Tensor, scale_o: Tensor) -> Tensor:
    """(..., i) → (..., o): x (codes · scale)ᵀ. Raises ValueError on what the kernel cannot do."""
    o, i = codes_oi.shape
    _check(x, i)
    if codes_oi.dtype != torch.int8 or not codes_oi.is_contiguous():
        raise ValueError(f"expected contiguous int8 codes, found {_describe(codes_oi)}")
    if scale_o.shape != (o,) or scale_o.dtype != x.dtype or not scale_o.is_contiguous():
        raise ValueError(f"expected {o} contiguous {x.dtype} scales, found {_describe(scale_o)}")
    if i % INT8_STEP:
        raise ValueError(f"expected a multiple of {INT8_STEP} inputs for int8, found {i}")
    x_mi = x.reshape(-1, i).contiguous()
    y_mo = compat.int8_product(x_mi, codes_oi, scale_o)
    return y_mo.view(*x.shape[:-1], o)


# -- int4, a scale and a zero per group of inputs --------------------------------------------------
def quantize_int4(w_oi: Tensor, group: int = 64) -> tuple[Tensor, Tensor]:
    """(packed uint8, scales and zeros (g, o, 2) in w's dtype): asymmetric round to nearest."""
    o, i = w_oi.shape
    _check_int4(o, i, group)
    w_ogj = w_oi.float().view(o, i // group, group)
    low, high = w_ogj.amin(-1), w_ogj.amax(-1)
    scale_og = ((high - low) / 15).clamp_min(1e-12)
    codes = ((w_ogj - low[..., None]) / scale_og[..., None]).round().clamp(0, 15)
    # The kernel computes (code − 8) · scale + zero.
    zero_og = low + 8 * scale_og
    scale_zero = torch.stack([scale_og.T, zero_og.T], -1).to(w_oi.dtype).contiguous()
    packed = compat.int4_packed(codes.view(o, i).int())
    return packed, scale_zero


def int4_linear(x: Tensor, packed: Tensor, scale_zero_go2: Tensor, group: int = 64) -> Tensor:
    """(..., i) → (..., o). Raises ValueError on what the kernel cannot do."""
    g, o, two = scale_zero_go2.shape
    i = g * group
    _check(x, i)
    _check_int4(o, i, group)
    if scale_zero_go2.dtype != x.dtype or two != 2 or not scale_zero_go2.is_contiguous():
        raise ValueError(
            f"expected contiguous {x.dtype} scales and zeros, found {_describe(scale_zero_go2)}"
        )
    if packed.dtype != torch.uint8 or packed.numel() * 2 != o * i or not packed.is_contiguous():
        raise ValueError(f"expected {o * i // 2} packed bytes, found {_describe(packed)}")
    x_mi = x.reshape(-1, i).contiguous()
    y_mo = compat.int4_product(x_mi, packed, group, scale_zero_go2)
    return y_mo.view(*x.shape[:-1], o)


# -- floating weights in oneDNN's blocked layout ---------------------------------------------------
def can_pack(dtype: torch.dtype) -> bool:
    """Does this torch have oneDNN's packed product for this dtype here?"""
    return bool(torch.backends.mkldnn.is_available()) and (
        dtype == torch.float32 or (dtype == torch.bfloat16 and compat.packs_bfloat16())
    )


def pack(w_oi: Tensor) -> Tensor:
    """The weight, reordered once for products with few rows: same numbers, opaque layout."""
    if w_oi.ndim != 2 or not can_pack(w_oi.dtype):
        raise ValueError(f"expected a float32 or bfloat16 matrix, found {_describe(w_oi)}")
    return compat.packed_weight(w_oi.contiguous())


def packed_linear(x: Tensor, packed_oi: Tensor, bias_o: Tensor | None = None) -> Tensor:
    """(..., i) → (..., o): x Wᵀ + bias for a weight from `pack`."""
    _check(x, packed_oi.shape[1])
    if packed_oi.dtype != x.dtype:
        raise ValueError(f"expected inputs in {packed_oi.dtype}, found {_describe(x)}")
    return compat.packed_product(x, packed_oi, bias_o)


# -- checks ----------------------------------------------------------------------------------------
def _check(x: Tensor, i: int) -> None:
    if x.device.type != "cpu" or x.dtype not in FLOATS:
        raise ValueError(f"expected floating inputs on the CPU, found {_describe(x)}")
    if x.shape[-1] != i:
        raise ValueError(f"expected {i} inputs, found {_describe(x)}")


def _check_int4(o: int, i: int, group: int) -> None:
    if group not in INT4_GROUPS or i % group:
        raise ValueError(f"expected inputs in groups of one of {INT4_GROUPS}, found {i} by {group}")
    if o % INT4_OUTPUTS:
        raise ValueError(f"expected a multiple of {INT4_OUTPUTS} outputs for int4, found {o}")


def _describe(t: Tensor) -> str:
    strided = "" if t.is_contiguous() else ", not contiguous"
    return f"{tuple(t.shape)} {t.dtype} on {t.device}{strided}"
