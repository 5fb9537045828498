"""Symmetric matrices at half their bytes: the lower triangle folded into a rectangle (rectangular
full packed form, Gustavson et al. 2010)."""

from __future__ import annotations

from torch import Tensor


def pack(h_nn: Tensor) -> Tensor:
    """(..., n + 1, n / 2) for an even n, (..., n, (n + 1) / 2) for an odd one: the first half of
    the columns, and the triangle below the second half turned into the room above the diagonal."""
    n = h_nn.shape[-1]
    odd, half = n % 2, (n + 1) // 2
    packed = h_nn.new_zeros(*h_nn.shape[:-2], n + 1 - odd, half)
    packed[..., 1 - odd :, :] = h_nn[..., :half]
    head, corner = packed[..., : n - half, odd:], h_nn[..., half:, half:].mT
    head.tril_(-1).add_(corner.triu())
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The (..., n, n) matrix of `pack`."""
    rows, half = packed.shape[-2:]
    odd = int(rows < 2 * half)
    n = 2 * half - odd
    h_nn = packed.new_zeros(*packed.shape[:-2], n, n)
    h_nn[..., :half] = packed[..., 1 - odd :, :]
    h_nn[..., :half, :half].tril_()
    h_nn[..., half:, half:] = packed[..., : n - half, odd:].triu().mT
    upper = h_nn.tril(-1).mT
    return h_nn.add_(upper)
