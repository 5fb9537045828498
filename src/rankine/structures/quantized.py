"""Round-to-nearest codes of 2, 3, 4 or 8 bits with a scale and a minimum per group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankine.errors import UserError
from rankine.metric import Metric
from rankine.structures.bank import Routing, copies, grouped
from rankine.structures.base import Parts, Structure, dtype_of, has_bias, weight_shape

WIDTHS = (2, 3, 4, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., n) uint8 codes below 2^bits → (..., ceil(n·bits/8)) bytes, little-endian bit stream."""
    if bits == 8:
        return codes.contiguous()
    if bits == 4:
        codes = F.pad(codes, (0, codes.shape[-1] % 2))
        return codes[..., ::2] | codes[..., 1::2] << 4
    planes = (codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
    stream = planes.flatten(-2)
    stream = F.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = (2 ** torch.arange(8, device=codes.device)).to(torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack`: (..., n) uint8 codes."""
    if bits == 8:
        return packed
    if bits == 4:
        both = torch.stack([packed & 15, packed >> 4], -1)
        return both.flatten(-2)[..., :n]
    # Shifts by plain numbers: ONNX has no shift of a tensor by a tensor.
    stream = torch.stack([(packed >> shift) & 1 for shift in range(8)], -1)
    planes = stream.flatten(-2)[..., : n * bits].unflatten(-1, (n, bits))
    weights = (2 ** torch.arange(bits, device=packed.device)).to(torch.uint8)
    return (planes * weights).sum(-1, dtype=torch.uint8)


@dataclass(frozen=True)
class Quantized(Structure):
    """Asymmetric min-max codes, `group` consecutive entries along `axis` share scale and minimum.

    The axis is −1 (along inputs; along channels of a cache) or −2 (along outputs; along tokens).
    A group that the axis does not divide ends short. Constant groups are exact.
    """

    kind: ClassVar[str] = "quantized"
    trainable: ClassVar[tuple[str, ...]] = ("scale", "minimum")

    code_bits: int
    group: int = 64
    axis: int = -1

    def __post_init__(self) -> None:
        if isinstance(self.code_bits, bool) or self.code_bits not in WIDTHS:
            raise UserError(f"expected code_bits among {WIDTHS}, found {self.code_bits!r}")
        whole = isinstance(self.group, int) and isinstance(self.axis, int)
        if not whole or self.group < 1 or self.axis not in (-1, -2):
            raise UserError(f"expected group >= 1 and axis -1 or -2, found {self}")

    def encode(self, w: Tensor, metric: Metric, start: Parts | None = None) -> Parts:
        """`codes` (packed uint8), `scale` and `minimum` (one per group, in the weight's dtype).

        Round to nearest ignores the metric; calibrated rounding is a method's business.
        """
        x = w.transpose(-1, self.axis)
        n = self._whole_bytes(x.shape[-1])
        groups = _grouped(x.float(), self.group)
        # Round the stored scale and minimum first: codes must fit what decoding will see.
        levels = 2**self.code_bits - 1
        low, high = groups.amin(-1), groups.amax(-1)
        minimum = low.to(w.dtype)
        scale = ((high - minimum.float()) / levels).to(w.dtype)
        step = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
        codes = ((groups - minimum.float().unsqueeze(-1)) / step.unsqueeze(-1)).round()
        codes = codes.clamp(0, levels).to(torch.uint8).flatten(-2)[..., :n]
        return {
            "codes": pack(codes, self.code_bits),
            "scale": scale.contiguous(),
            "minimum": minimum.contiguous(),
        }

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """minimum + scale · code, in the scale's dtype."""
        n = parts["codes"].shape[-1] * 8 // self.code_bits
        codes = unpack(parts["codes"], self.code_bits, n).to(parts["scale"].dtype)
        groups = _grouped(codes, self.group)
        x = groups * parts["scale"].unsqueeze(-1) + parts["minimum"].unsqueeze(-1)
        return x.flatten(-2)[..., :n].transpose(-1, self.axis)

    def bits(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Whole bytes of codes per vector, plus a scale and a minimum per group."""
        dims = list(shape)
        dims[-1], dims[self.axis] = dims[self.axis], dims[-1]
        n = self._whole_bytes(dims[-1])
        per_vector = n * self.code_bits
        per_vector += 2 * math.ceil(n / self.group) * dtype.itemsize * 8
        return math.prod(dims[:-1]) * per_vector

    def _whole_bytes(self, n: int) -> int:
        if n * self.code_bits % 8:
            raise UserError(
                f"expected a width whose {self.code_bits}-bit codes fill whole bytes, found {n}: "
                "leave this weight dense or use 8 bits"
            )
        return n

    def module(self, like: nn.Module) -> nn.Module:
        """`QuantizedLinear` or `QuantizedBank` on meta."""
        o, i = weight_shape(like)
        if (count := copies(like)) is not None:
            return QuantizedBank(self, i, o, False, dtype_of(like), (count,))
        return QuantizedLinear(self, i, o, has_bias(like), dtype_of(like))


def _grouped(x: Tensor, group: int) -> Tensor:
    """(..., n) → (..., ceil(n/group), group); a short last group repeats its last entry."""
    n = x.shape[-1]
    group = min(group, n)  # a checkpoint may state any: no room is taken for what is not there
    short = -n % group
    if short:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], -1)
    return x.unflatten(-1, (-1, group))


class QuantizedLinear(nn.Module):
    """Weight-only: the weight is decoded at each call, so it saves bytes, not time."""

    def __init__(
        self,
        structure: Quantized,
        i: int,
        o: int,
        bias: bool,
        dtype: torch.dtype,
        lead: tuple[int, ...] = (),
    ):
        super().__init__()
        self.structure = structure
        self.in_features, self.out_features = i, o
        vectors, n = (o, i) if structure.axis == -1 else (i, o)
        shape = (*lead, vectors)
        codes = structure._whole_bytes(n) * structure.code_bits // 8
        groups = math.ceil(n / structure.group)
        meta = torch.device("meta")
        self.register_buffer("codes", torch.empty(*shape, codes, dtype=torch.uint8, device=meta))
        self.scale = nn.Parameter(torch.empty(*shape, groups, dtype=dtype, device=meta))
        self.minimum = nn.Parameter(torch.empty(*shape, groups, dtype=dtype, device=meta))
        self.bias = nn.Parameter(torch.empty(o, dtype=dtype, device=meta)) if bias else None

    @property
    def weight(self) -> Tensor:
        """The decoded (o, i) weight, rebuilt at each access."""
        structure = self.structure
        codes = self.codes
        assert isinstance(codes, Tensor)
        parts = {"codes": codes, "scale": self.scale, "minimum": self.minimum}
        return structure.decode(parts)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) → (..., outputs)."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Sizes for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.structure}"


class QuantizedBank(QuantizedLinear):
    """The same for every matrix of a bank."""

    @property
    def copies(self) -> int:
        """How many matrices it stacks."""
        return self.scale.shape[0]

    def forward(self, x_si: Tensor, routing: Routing) -> Tensor:  # type: ignore[override]
        """(rows, inputs) → (rows, outputs)."""
        return grouped(x_si, self.weight.to(x_si.dtype), routing)
